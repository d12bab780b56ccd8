"""Self-play fine-tuning: a policy against the policy that it was, on demonstrations alone."""
