"""RETRO: a language model that attends to retrieved neighbors of its context (Borgeaud et al. 2021, arXiv 2112.04426)."""
