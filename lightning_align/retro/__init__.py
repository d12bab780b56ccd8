"""RETRO: a language model that reads the neighbours of what it has written so far (Borgeaud et al. 2021)."""
