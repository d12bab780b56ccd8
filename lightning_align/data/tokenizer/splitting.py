"""Where a text may be split such that its parts have the token ids of the whole."""

import json
import re
from typing import Any

import tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = (_GPT2, rf"{_CONTRACTIONS}\p{{N}}{_REST}", rf"{_CONTRACTIONS}\p{{N}}{{1,3}}{_REST}")
"""The patterns of words of GPT-2, Qwen 2 and Llama 3. No match of them has a space behind another character than a space."""


def splits_at_spaces(model: tokenizers.Tokenizer) -> bool:
    """Check whether a tokenizer encodes what is before and behind a space independently, whatever the texts are.

    It is certain for byte-level BPE that splits a text into words with one of the known patterns: each word is encoded alone,
    and a word has a space only as its first character or among other spaces.
    """
    content = json.loads(model.to_str())
    bpe = content["model"]
    if content["normalizer"] is not None or bpe.get("type") != "BPE" or bpe.get("dropout"):
        return False
    for token in content["added_tokens"]:
        flags = token["lstrip"] or token["rstrip"] or token["single_word"]
        if flags or re.search(r"\s", token["content"]):
            return False
    before = content["pre_tokenizer"] or {}
    *steps, last = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    # Digits are split from what is beside them, which is never a part of a word with a space inside.
    words = [step for step in steps if step.get("type") != "Digits"]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or len(words) > 1:
        return False
    return bool(last["use_regex"]) if not words else _is_known(words[0]) and not last["use_regex"]


def _is_known(step: dict[str, Any]) -> bool:
    isolated = step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]
    return isolated and step["pattern"].get("Regex") in _PATTERNS


def last_split(text: str) -> int:
    """Return the last place where a text may be split: a space behind a visible ASCII character. 0 if there is none.

    Whatever follows the text, what is before the place then has the same ids, if the tokenizer `splits_at_spaces`.
    """
    place = text.rfind(" ")
    while place > 0 and not "!" <= text[place - 1] <= "~":
        place = text.rfind(" ", 0, place)
    return max(place, 0)
