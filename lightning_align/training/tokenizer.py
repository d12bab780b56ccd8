"""The tokenizer as a part of the run: recorded in checkpoints, and compared with the tokenizer of the data.

Token ids mean nothing without their tokenizer. A run that starts from a checkpoint with another tokenizer trains without an
error, on ids that the model knows as other tokens.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.data.tokenizer.record import (
    KEY,
    PARTS_KEY,
    describe_tokenizer,
    has_other_tokens,
    tokenizer_differences,
    vocabulary_fingerprint,
)
from lightning_align.models.checkpoint import read_checkpoint

__all__ = ["KEY", "add_record", "check_tokenizer", "record_of", "tokenizer_record", "vocabulary_fingerprint"]


def tokenizer_record(data: Any) -> dict[str, str] | None:
    """Describe the tokenizer of a data module, for a checkpoint.

    Args:
        data: Any data module. One without a `tokenizer` has no record.

    Returns:
        See `describe_tokenizer`. None without a tokenizer.
    """
    tokenizer: Any = getattr(data, "tokenizer", None)
    if not hasattr(tokenizer, "fingerprint"):
        return None
    return describe_tokenizer(tokenizer, getattr(data, "tokenizer_name", None))


def add_record(checkpoint: dict[str, Any], data: Any) -> None:
    """Add the record of a data module's tokenizer to a checkpoint, if there is one. See `tokenizer_record`."""
    if (record := tokenizer_record(data)) is not None:
        checkpoint[KEY] = record
    if any(others := getattr(data, PARTS_KEY, ())):
        checkpoint[PARTS_KEY] = [None if other is None else describe_tokenizer(other) for other in others]


def record_of(path: str | Path) -> dict[str, str] | None:
    """Return the record of a checkpoint, or of the tokenizer in an exported folder; None where there is none.

    Args:
        path: A checkpoint, a state dict, or a folder with a tokenizer of transformers.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "tokenizer.json").is_file() and not (path / "tokenizer_config.json").is_file():
            return None
        # Without transformers, the file in an exported folder can still be read.
        name = path if find_spec("transformers") else path / "tokenizer.json"
        return describe_tokenizer(load_tokenizer(str(name)), str(name))
    if not path.is_file() or path.suffix == ".safetensors":
        return None  # a state dict has no record, and to look for one would read all of it
    record = read_checkpoint(path).get(KEY)
    return dict(record) if isinstance(record, Mapping) else None


def check_tokenizer(record: Mapping[str, str] | None, data: Any, *, source: str) -> None:
    """Compare the tokenizer of the data with the one that a model was trained with.

    Args:
        record: From a checkpoint. Without one nothing is compared.
        data: The data module.
        source: Where the record comes from, for messages.

    Raises:
        ValueError: If the two have different tokens.
    """
    own = tokenizer_record(data)
    if record is None or own is None:
        return
    if has_other_tokens(record, own):
        raise ValueError(
            f"The tokenizer of the data, {own['name']}, is not the tokenizer that {source} was trained with, {record['name']}. "
            f"The same ids are other tokens. Set `tokenizer` of the data module (on the command line --data.tokenizer) to "
            f"{record['name']}."
        )
    if differences := tokenizer_differences(record, own):
        rank_zero_warn(
            f"The tokenizer of the data, {own['name']}, has the tokens of the tokenizer that {source} was trained with, "
            f"{record['name']}, but is not the same: {'; '.join(differences)}."
        )
