"""Sources of rows and documents, tokenizers, and the steps from a row to a batch of token ids."""
