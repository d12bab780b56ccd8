"""Benchmarks and studies; README.md in this folder lists them."""
