"""Responses sampled from a model: several to each prompt, for preferences that a reward decides."""
