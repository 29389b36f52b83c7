"""From files to packed batches: checked rows, token ids, one stream without padding."""
