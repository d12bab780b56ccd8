"""Tokenized rows of earlier releases, which are used where today's reading of the rows cannot differ.

Format 3 was written before columns were mapped and before chats were normalized. Rows of strings without special tokens and
without other columns have the same ids in both formats. For all other rows the store is built again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_align.data.mapping import RowMapping
from lightning_align.data.rows import Row, RowTask, Source, read_rows
from lightning_align.data.tokenizer import Tokenizer
from lightning_align.runtime.files import publish_text

PLAIN = ({"prompt", "response"}, {"prompt", "chosen", "rejected"}, {"text"}, {"prompt"})
NUMBERS = {"weight", "margin"}
_LEAST_BYTES = 1 << 23
"""The size of a store whose check takes long, so that its result is kept."""
_CHECK = 1
"""The version of the check. Increase it when other rows are plain."""


def earlier_store(
    source: Source, *, split: str, fingerprint: str, recipe: Mapping[str, Any], tokenizer: Tokenizer, cache_dir: str
) -> Path | None:
    """Return the path of a store of format 3 that has the ids of today, or None.

    Args:
        source: The source of the rows. Only one file or a task can have such a store.
        split: The split of a hub dataset.
        fingerprint: The hash of the source, which is costly for large files.
        recipe: How to encode the rows: the fields of `Recipe`.
        tokenizer: The tokenizer.
        cache_dir: The folder of the stores.
    """
    settings = dict(recipe)
    is_default = settings.pop("mapping") == asdict(RowMapping()) and not settings.pop("chat_template_kwargs")
    if not is_default or not isinstance(source, (str, RowTask)):
        return None
    content = {
        "format": 3,
        "source": fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "recipe": settings,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path = Path(cache_dir) / f"{settings['kind']}-{digest[:16]}.arrow"
    if not path.exists():
        return None
    checked = path.with_suffix(f".checked-{_CHECK}")
    if checked.exists():
        return path if checked.read_text(encoding="utf-8") == "plain" else None
    is_same = _are_plain(read_rows(source, split=split), tokenizer)
    if path.stat().st_size >= _LEAST_BYTES:
        # A store of the same name always has the same rows.
        publish_text(checked, "plain" if is_same else "other")
    return path if is_same else None


def _are_plain(rows: Iterable[Row], tokenizer: Tokenizer) -> bool:
    return all(not row.problem and _is_plain(row.fields, tokenizer.markers) for row in rows)


def _is_plain(fields: Mapping[str, Any], markers: tuple[str, ...]) -> bool:
    texts = {name: value for name, value in fields.items() if name not in NUMBERS}
    if set(texts) not in PLAIN:
        return False
    return all(isinstance(text, str) and text.strip() and not any(m in text for m in markers) for text in texts.values())
