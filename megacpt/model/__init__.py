"""The decoder on the parallel layers, and its Hugging Face form."""
