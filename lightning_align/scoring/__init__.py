"""Log-probabilities of responses, and losses on pairs of them."""
