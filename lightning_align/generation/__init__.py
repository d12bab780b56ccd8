"""Generation: filters of the next-token distribution, the sampler, and backends for other engines."""
