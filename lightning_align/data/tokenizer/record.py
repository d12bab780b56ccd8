"""What a checkpoint keeps of its tokenizer, and how another tokenizer differs from it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_align.data.tokenizer.chat import template_of

KEY = "tokenizer"
"""Where a checkpoint keeps the record."""
PARTS_KEY = "augment_tokenizers"
"""Where the checkpoint of a composition keeps the records of the augments' own tokenizers."""
_EARLIER_BYTES = "bytes-1"
"""The hash of the byte tokenizer's vocabulary in earlier records."""
_PROBE = (
    "The quick brown fox isn't lazy: 12345 + 67.89 = 12,412.89!\n\tdef f(x):  return x ** 2  # ok\r\n"
    "Zażółć gęślą jaźń, 你好世界, привет, مرحبا, नमस्ते, 🙂👩‍🚀 e\u0301 \u00a0<b>HTML</b> https://example.org/a?b=c_d   end "
)
"""A text with words, numbers, code, spaces and scripts. Tokenizers that encode it alike are taken to be alike."""


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Return a hash of which token each id is. Chat templates do not enter it, unlike ``Tokenizer.fingerprint``."""
    return str(getattr(tokenizer, "vocabulary_fingerprint", tokenizer.fingerprint))


def describe_tokenizer(tokenizer: Any, name: str | None = None) -> dict[str, str]:
    """Describe a tokenizer, for a checkpoint.

    Args:
        tokenizer: A tokenizer with at least a ``fingerprint``.
        name: The name that `load_tokenizer` knows it by. Default is its own name.

    Returns:
        ``name``, ``fingerprint`` and ``vocabulary``. If the tokenizer has them, also ``path`` (of a local file or folder),
        ``size``, ``specials``, ``template`` and ``encoding``.
    """
    name = str(name or getattr(tokenizer, "name", None) or type(tokenizer).__name__)
    record = {"name": name, "fingerprint": str(tokenizer.fingerprint), "vocabulary": vocabulary_fingerprint(tokenizer)}
    path, query, options = name.partition("?")
    if Path(path).exists():
        record["path"] = f"{Path(path).resolve()}{query}{options}"
    if all(hasattr(tokenizer, part) for part in ("vocab_size", "bos_id", "eos_id", "encode_batch", "has_template")):
        (encoding,) = tokenizer.encode_batch([_PROBE])
        record["size"] = str(tokenizer.vocab_size)
        record["specials"] = f"begins with {_id(tokenizer.bos_id)} and ends with {_id(tokenizer.eos_id)}"
        record["template"] = hashlib.sha256(template_of(tokenizer).encode()).hexdigest()[:16]
        record["encoding"] = hashlib.sha256(str(encoding.ids).encode()).hexdigest()[:16]
    return record


def has_other_tokens(record: Mapping[str, str], own: Mapping[str, str]) -> bool:
    """Check whether the ids of two tokenizers stand for different tokens."""
    if record["fingerprint"] == own["fingerprint"]:
        return False
    if _EARLIER_BYTES in (record["vocabulary"], own["vocabulary"]):
        both = (record, own)
        # An earlier record of bytes says nothing but that. An exported folder of bytes has the same vocabulary.
        sizes = {r.get("size", "259") for r in both}
        specials = {r.get("specials", "begins with id 1 and ends with id 2") for r in both}
        encodings = {r["encoding"] for r in both if "encoding" in r}
        return len(sizes) > 1 or len(specials) > 1 or encodings != {_bytes_encoding()}
    return record["vocabulary"] != own["vocabulary"]


def tokenizer_differences(record: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    """List in words how a tokenizer differs from a recorded one. Empty if the two are the same.

    Args:
        record: The recorded tokenizer.
        own: The other tokenizer, from `describe_tokenizer`.
    """
    if record["fingerprint"] == own["fingerprint"]:
        return []
    if has_other_tokens(record, own):
        sizes = [r.get("size") for r in (own, record)]
        counts = f" ({sizes[0]} tokens instead of {sizes[1]})" if None not in sizes and sizes[0] != sizes[1] else ""
        return [f"its ids stand for other tokens{counts}"]
    if _EARLIER_BYTES in (record["vocabulary"], own["vocabulary"]):
        return []
    if not all("encoding" in r for r in (record, own)):
        return ["it has another chat template, other special tokens or another preprocessing"]
    found = []
    if record["specials"] != own["specials"]:
        found.append(f"it has other special tokens: a sequence {own['specials']}, instead of: {record['specials']}")
    if record["encoding"] != own["encoding"]:
        found.append("it splits texts into other tokens")
    if record["template"] != own["template"]:
        found.append("it has another chat template")
    return found


def _id(number: int | None) -> str:
    return "no special id" if number is None else f"id {number}"


def _bytes_encoding() -> str:
    return hashlib.sha256(str([byte + 3 for byte in _PROBE.encode()]).encode()).hexdigest()[:16]
