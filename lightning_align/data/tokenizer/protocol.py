"""The interface of a tokenizer and the types that it takes and returns."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

Message = Mapping[str, Any]
"""One turn of a conversation: ``{"role": ..., "content": ...}``."""


class Encoding(NamedTuple):
    """The token ids of a text and the characters of each token."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """Start and end of each token's characters in the text. Tokens that are bytes of the same character share its offsets."""


class Segment(NamedTuple):
    """A part of a rendered conversation."""

    text: str
    role: str
    trained: bool
    """Whether the text is what an assistant says. If not, it is a prompt or part of the template."""
    eos: bool = False
    """Whether to append an end-of-sequence id, because the text does not contain one."""


class Tokenizer(Protocol):
    """A converter between text and token ids."""

    @property
    def vocab_size(self) -> int:
        """The largest id plus 1."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The id at the start of each sequence. None if sequences start with their first token."""
        ...

    @property
    def eos_id(self) -> int:
        """The id at the end of each response."""
        ...

    @property
    def pad_id(self) -> int:
        """The padding id. It may equal another id, so never infer a mask from it."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of everything that the ids depend on."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Encode each text without adding special tokens. The text of a special token becomes that token."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Convert ids to text. Special tokens are left out if ``skip_special`` is true."""
        ...

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[Segment]:
        """Render a conversation as text.

        Args:
            messages: The turns of the conversation.
            add_generation_prompt: Whether to end with the text that starts the next turn of the assistant.

        Raises:
            ValueError: If a message is malformed or the template rejects it.
        """
        ...
