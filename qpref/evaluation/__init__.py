"""Held-out evaluation: compare models on preference pairs, and generate answers."""
