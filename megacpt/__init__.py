"""megacpt: 4D-parallel continual pre-training of Llama, Qwen2, Qwen3 and Mistral models."""

__version__ = "0.1.0"
