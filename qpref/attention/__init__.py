"""Attention over packed streams with each prompt computed once. Loads nothing and knows no recipe."""
