"""The training loop and what is seen of it."""
