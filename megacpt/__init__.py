"""megacpt: 4D-parallel continual pre-training of Llama-family models."""

__version__ = "0.1.0"
