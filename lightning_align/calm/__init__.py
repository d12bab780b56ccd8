"""CALM: two or more frozen language models composed by trained cross-attention."""
