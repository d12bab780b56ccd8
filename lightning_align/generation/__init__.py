"""Decoding: filters on the next token's distribution, and the loop that samples from it."""
