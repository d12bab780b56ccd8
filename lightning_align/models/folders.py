"""Folders of exports that are replaced whole: a reader finds the old export, no export, or the new one, but never a mix."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lightning_align.runtime.checksums import SUMS, write_sums

CARD = "README.md"
"""The model card."""
CONNECTIONS = "connections.safetensors"
"""The connections of a composition."""
PARTIAL = ".export-partial"
"""The folder inside of an export's folder where the next export is written and checked."""
OWNED = (
    *("config.json", "generation_config.json", "adapter_config.json", CARD),
    *(
        "model*.safetensors",
        "model.safetensors.index.json",
        "adapter_model.*",
        "pytorch_model*.bin",
        "pytorch_model.bin.index.json",
    ),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
    CONNECTIONS,
    SUMS,
)
"""The files of an export. A new export removes those of the one before. Other files in the folder stay."""
OWNED_FOLDERS = ("anchor", "augment_*")
"""The folders of the models of a composition, which are removed if they contain a model or a tokenizer."""


def check_folder(folder: str | Path, mark: str) -> None:
    """Check that a folder can take an export.

    Args:
        folder: The folder.
        mark: The configuration file that an earlier export of the same kind has.

    Raises:
        ValueError: If the path is a file, or the folder contains other files and no export.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"`folder` must be a folder, but {folder} is a file. Pass another path.")
    known = (folder / mark).is_file() or (folder / PARTIAL).is_dir()
    if folder.is_dir() and any(folder.iterdir()) and not known:
        raise ValueError(
            f"`folder` must be empty or contain an earlier export, but {folder} contains other files and no {mark}. "
            "Pass another path."
        )


def check_writable(folder: str | Path, needed: int) -> None:
    """Check that a folder can be created and written, and that its disk has room. Nothing stays behind.

    Args:
        folder: The folder.
        needed: The number of bytes that will be written.

    Raises:
        ValueError: If it cannot be written, or the disk is too full.
    """
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(
            f"`folder` must be a folder that can be written, but {folder} is not ({error.strerror or error}). Pass another."
        ) from error
    finally:
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    if free < needed:
        raise ValueError(
            f"`folder` must have room for the export, which takes {needed / 2**30:.3g} GiB, but the disk of {folder} has "
            f"{free / 2**30:.3g} GiB. Free space, or pass another path."
        )


@contextmanager
def replaced_folder(folder: str | Path, mark: str) -> Iterator[Path]:
    """Write an export beside the old one within a ``with`` block, and put it in its place at the end.

    The configuration of the old export is removed first and that of the new one is written last, and nothing opens a folder
    without a configuration. If the block raises, the old export stays.

    Args:
        folder: The folder of the export. It is created with its parents.
        mark: The configuration file, without which nothing can open the folder.

    Yields:
        The folder to write to.

    Raises:
        ValueError: If the folder contains other files and no export, or cannot be written.
    """
    folder = Path(folder)
    check_folder(folder, mark)
    partial = folder / PARTIAL
    created = not folder.exists()
    try:
        if partial.exists():
            shutil.rmtree(partial)  # of an export that was interrupted
        partial.mkdir(parents=True)
        yield partial
        _share_permissions(partial, mark)
        write_sums(partial, without=(CARD,))
        (folder / mark).unlink(missing_ok=True)
        for pattern in OWNED:
            for file in folder.glob(pattern):
                file.unlink()
        for inner in (path for pattern in OWNED_FOLDERS for path in folder.glob(pattern)):
            if any((inner / name).is_file() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")):
                shutil.rmtree(inner)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == mark):
            os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{folder}: the export cannot be written ({reason}). Choose another path, or free space.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if created and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer of this package or of transformers into a folder, or nothing if it is None or has no such method."""
    save = getattr(tokenizer, "save", None) or getattr(tokenizer, "save_pretrained", None)
    if save is not None:
        save(folder)


def _share_permissions(folder: Path, mark: str) -> None:
    """Give the weights the permissions of the configuration, because safetensors makes them readable only by their owner."""
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / mark, file)
