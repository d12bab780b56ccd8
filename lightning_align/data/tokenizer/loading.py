"""Loading a tokenizer by name, and comparing its vocabulary with a model."""

from lightning_align.data.tokenizer.byte import ByteTokenizer
from lightning_align.data.tokenizer.file import FileTokenizer
from lightning_align.data.tokenizer.protocol import Tokenizer
from lightning_align.data.tokenizer.transformers import TransformersTokenizer
from lightning_align.runtime.shipped import shipped_file


def load_tokenizer(spec: str) -> Tokenizer:
    """Load a tokenizer.

    Args:
        spec: ``bytes``, the path of a ``tokenizer.json``, a GGUF file, or a folder or hub name of a transformers tokenizer.
            Special tokens with uncommon names follow it: ``tokenizer.json?eos_token=<|done|>&pad_token=<|fill|>``, or
            ``my-base-model?eos_token=<|im_end|>``. They replace those of the tokenizer.

    Raises:
        ValueError: If there is no such tokenizer, or it has no end-of-sequence token.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path, _, query = spec.partition("?")
    given = (part.split("=", 1) for part in query.split("&") if "=" in part)
    names = {name.removesuffix("_token"): text for name, text in given}
    if unknown := names.keys() - {"bos", "eos", "pad"}:
        raise ValueError(
            f"tokenizer {spec!r}: the options after '?' must be bos_token, eos_token or pad_token, but got "
            f"{', '.join(sorted(unknown))}"
        )
    if path == "bytes":
        raise ValueError(f"tokenizer {spec!r} has the special tokens <bos>, <eos> and <pad>. Remove the options after 'bytes'.")
    path = shipped_file(path)
    return FileTokenizer(path, **names) if path.endswith(".json") else TransformersTokenizer(path, **names)


def check_vocabulary(tokenizer: Tokenizer, *, num_tokens: int) -> None:
    """Check that a model has an embedding for every id of a tokenizer.

    Args:
        tokenizer: The tokenizer.
        num_tokens: The number of embeddings of the model.

    Raises:
        ValueError: If the tokenizer has more ids than the model has embeddings.
    """
    if tokenizer.vocab_size > num_tokens:
        raise ValueError(
            f"the model has {num_tokens} tokens, but the tokenizer has {tokenizer.vocab_size}. Give the model at least"
            f" {tokenizer.vocab_size} tokens (`resize_embeddings: {tokenizer.vocab_size}` of a PretrainedLM), or use the"
            " tokenizer that the model was trained with."
        )
