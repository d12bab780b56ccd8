"""Encoding of a text piece by piece, where what was encoded never changes because of what follows.

A tokenizer that begins each text with a space (sentencepiece) must not do so for the second piece of a text.
"""

import json
from collections.abc import Sequence
from typing import Any

import tokenizers

from lightning_align.data.tokenizer.protocol import Tokenizer

_MOST_KNOWN = 1 << 17


class PieceEncoder:
    """An encoder of pieces of text. Pieces that were encoded before, such as frequent words, are looked up.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._model = continuing_model(tokenizer)
        self._known: dict[tuple[bool, str], tuple[list[int], list[int]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}

    def encode(self, pieces: Sequence[tuple[bool, str]]) -> list[tuple[list[int], list[int]]]:
        """Encode pieces.

        Args:
            pieces: For each piece whether it begins its text, and the piece.

        Returns:
            For each piece its ids, and for each id the number of characters of the piece up to and including it.
        """
        if len(self._known) > _MOST_KNOWN:
            self._known = {}
        new = list(dict.fromkeys(piece for piece in pieces if piece not in self._known))
        for is_first in (True, False):
            texts = [text for first, text in new if first is is_first]
            for text, content in zip(texts, self._encode(texts, is_first=is_first), strict=True):
                self._known[is_first, text] = content
        return [self._known[piece] for piece in pieces]

    def _encode(self, texts: list[str], *, is_first: bool) -> list[tuple[list[int], list[int]]]:
        if not texts:
            return []
        if is_first or self._model is None:
            return [(list(ids), [end for _, end in offsets]) for ids, offsets in self._tokenizer.encode_batch(texts)]
        encodings = self._model.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, [end for _, end in encoding.offsets]) for encoding in encodings]


def continuing_model(tokenizer: Any) -> tokenizers.Tokenizer | None:
    """Return a model that puts no space in front of a text. None if the tokenizer puts none there."""
    model = getattr(tokenizer, "_model", None)
    if not isinstance(model, tokenizers.Tokenizer):
        return None
    parts = [None if part is None else json.loads(part.__getstate__()) for part in (model.normalizer, model.pre_tokenizer)]
    changed = [_without_space(part) for part in parts]
    if changed == parts:
        return None
    content = json.loads(model.to_str())
    content["normalizer"], content["pre_tokenizer"] = changed
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _without_space(part: Any) -> Any:
    """Remove the space in front of a text from the settings of a normalizer or a pre-tokenizer."""
    if part is None or part["type"] == "Prepend":
        return None
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            kept = [step for step in map(_without_space, part[name]) if step is not None]
            return {**part, name: kept}
    if part.get("prepend_scheme", "never") != "never":
        return {**part, "prepend_scheme": "never"}
    return {**part, "add_prefix_space": False} if part.get("add_prefix_space") else part
