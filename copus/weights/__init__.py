"""Weights on their way in and out: Hugging Face folders, Megatron-LM checkpoints, and those of other runs."""
