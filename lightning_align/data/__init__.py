"""The data room: where rows come from, and what becomes of them on the way to a batch of token ids."""
