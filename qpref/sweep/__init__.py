"""Sweeps: one recipe trained at several points of its settings, over one base in memory and one reference cache."""
