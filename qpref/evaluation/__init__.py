"""Held-out reports: what a trained model prefers, and what it writes."""
