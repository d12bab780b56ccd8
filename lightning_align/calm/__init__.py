"""CALM: composition of two or more frozen language models by trained cross-attention."""
