"""Backbones and what is done to them: PaLM, LoRA, sharding."""
