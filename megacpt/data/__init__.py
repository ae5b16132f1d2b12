"""Text to tokens to packed batches. Knows nothing of torch or ranks."""
