"""Supervised fine-tuning: the stage that every method starts from."""
