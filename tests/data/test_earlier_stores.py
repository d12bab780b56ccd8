"""Stores of format 3 are used exactly where the rows have the same ids today."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lightning_align.data.mapping import RowMapping
from lightning_align.data.rows import source_fingerprint
from lightning_align.data.store import Recipe, store_path
from lightning_align.data.tokenizer import ByteTokenizer
from tests.data.helpers import write_jsonl

RECIPE: dict[str, Any] = {
    "kind": "sft",
    "accepted": ("response", "messages", "text"),
    "max_length": 32,
    "truncation": "keep_start",
    "mask_turns": "last_turn",
    "on_bad_row": "fail",
}


def path_of(source: str, folder: Path, **options: Any) -> Path:
    recipe = Recipe(**{**RECIPE, **options})
    return store_path(source, split="train", recipe=recipe, tokenizer=ByteTokenizer(), cache_dir=str(folder))


def keep_earlier(source: str, folder: Path) -> Path:
    """Put a file where format 3 had the rows of a source."""
    settings = {
        name: value for name, value in asdict(Recipe(**RECIPE)).items() if name not in ("mapping", "chat_template_kwargs")
    }
    content = {
        "format": 3,
        "source": source_fingerprint(source),
        "tokenizer": ByteTokenizer().fingerprint,
        "recipe": settings,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path = folder / f"sft-{digest[:16]}.arrow"
    path.touch()
    return path


@pytest.mark.parametrize(
    ("row", "same"),
    [
        ({"prompt": "a", "response": "b"}, True),
        ({"text": "a"}, True),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "weight": 2}, True),
        ({"chosen": "a b", "rejected": "a c"}, False),
        ({"prompt": "a", "response": "b", "tools": []}, False),
        ({"prompt": "a", "response": "b", "system": "c"}, False),
        ({"prompt": "a", "response": " "}, False),
        ({"prompt": [{"role": "user", "content": "a"}], "response": "b"}, False),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, False),
        ({"question": "a", "prompt": "b", "response": "c"}, False),
    ],
)
def test_a_store_of_format_3_is_used_only_for_plain_rows(row: dict[str, Any], same: bool, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "r"}, row])
    earlier = keep_earlier(source, tmp_path)
    assert (path_of(source, tmp_path) == earlier) is same


def test_other_settings_and_sources_have_stores_of_their_own(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "r"}])
    earlier = keep_earlier(source, tmp_path)
    assert path_of(source, tmp_path) == earlier
    for options in ({"max_length": 33}, {"mapping": RowMapping(shape="plain")}, {"chat_template_kwargs": {"a": 1}}):
        assert path_of(source, tmp_path, **options) != earlier
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "p", "response": "s"}])
    assert path_of(other, tmp_path) != earlier
    assert path_of([source], tmp_path) != earlier  # type: ignore[arg-type]
