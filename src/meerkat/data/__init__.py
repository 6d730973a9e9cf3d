"""Rows to examples, examples to tokens, tokens to packed batches, and who holds which."""
