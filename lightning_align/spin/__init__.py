"""Self-play fine-tuning (SPIN): learn from demonstrations by playing against an earlier policy."""
