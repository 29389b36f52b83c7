"""From files to packed batches: rows, records, token ids, one stream without padding."""
