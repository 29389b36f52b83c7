"""Reward against KL: preference losses on one task whose reward a program computes."""
