"""Log-probs of responses, and losses on pairs of responses."""
