"""Supervised fine-tuning, the stage that the other methods start from."""
