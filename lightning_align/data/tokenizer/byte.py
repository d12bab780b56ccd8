"""The byte tokenizer, which needs no file and no training."""

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers

from lightning_align.data.tokenizer.chat import render_plain
from lightning_align.data.tokenizer.file import hash_vocabulary, write_tokenizer
from lightning_align.data.tokenizer.protocol import Encoding, Message, Segment


class ByteTokenizer:
    """A tokenizer of UTF-8 bytes. It encodes any text and is not trained.

    Id 0 is padding, 1 is beginning-of-sequence, 2 is end-of-sequence, and 3 to 258 are the bytes 0 to 255.
    """

    name: str = "bytes"
    vocab_size: int = 259
    bos_id: int | None = 1
    eos_id: int = 2
    pad_id: int = 0
    markers: tuple[str, ...] = ()
    has_template: bool = False
    fingerprint: str = "bytes-1"
    special_ids: frozenset[int] = frozenset((0, 1, 2))
    _specials = ("<pad>", "<bos>", "<eos>")

    @property
    def vocabulary_fingerprint(self) -> str:
        """A hash of which token each id is."""
        return hash_vocabulary(_as_bpe())

    def save(self, folder: str | Path) -> None:
        """Save the tokenizer in the format that `AutoTokenizer.from_pretrained` loads.

        There, the texts of the three special tokens become these tokens, which they do not here.
        """
        specials = dict(zip(("pad_token", "bos_token", "eos_token"), self._specials, strict=True))
        write_tokenizer(_as_bpe(), folder, specials=specials, has_bos=True)

    def token_id(self, text: str) -> int | None:
        """Return the id of a special token or of a text of one byte. None for other texts."""
        if text in self._specials:
            return self._specials.index(text)
        content = text.encode()
        return content[0] + 3 if len(content) == 1 else None

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """See `Tokenizer.encode_batch`. No text encodes to a special token."""
        return [Encoding([byte + 3 for byte in text.encode()], _byte_offsets(text)) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """See `Tokenizer.decode`. Bytes that are not valid UTF-8 become replacement characters.

        Raises:
            ValueError: If an id is outside 0 to 258.
        """
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise ValueError(
                f"`ids` of the byte tokenizer must be in 0 to {self.vocab_size - 1}, but got ids from {min(ids)} to {max(ids)}"
            )
        parts = (bytes([i - 3]) if i >= 3 else b"" if skip_special else self._specials[i].encode() for i in ids)
        return b"".join(parts).decode("utf-8", errors="replace")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        exact: Collection[int] | None = None,
    ) -> list[Segment]:
        """See `Tokenizer.render` and `render_plain`. The built-in template has no tools and no variables."""
        return render_plain(messages, add_generation_prompt=add_generation_prompt)


def _byte_offsets(text: str) -> list[tuple[int, int]]:
    # Texts share the tuples: creating them for each text would take longer than the rest of the encoding.
    spans = _spans(1 << len(text).bit_length())
    if text.isascii():
        return spans[: len(text)]
    return [span for span, character in zip(spans, text, strict=False) for _ in character.encode()]


@cache
def byte_characters() -> dict[str, int]:
    """Return the byte of each character in the tokens of byte-level BPE."""
    # A byte that is a visible character of Latin-1 is written as it is, and the others from code point 256 on.
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    return dict(sorted(characters.items(), key=lambda item: item[1]))


@cache
def _as_bpe() -> tokenizers.Tokenizer:
    """Return the same tokenizer as one of the tokenizers library: byte-level BPE without merges."""
    specials = ByteTokenizer._specials
    vocabulary = {name: i for i, name in enumerate(specials)}
    vocabulary |= {character: byte + 3 for character, byte in byte_characters().items()}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in specials])
    return model


@cache
def _spans(num_characters: int) -> list[tuple[int, int]]:
    return [(i, i + 1) for i in range(num_characters)]
