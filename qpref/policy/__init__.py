"""The model: a 4-bit base with LoRA adapters, which with its adapters off is its own reference."""
