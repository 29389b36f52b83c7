"""Merge adapter and base into one plain safetensors model, and compare it with the trained policy."""
