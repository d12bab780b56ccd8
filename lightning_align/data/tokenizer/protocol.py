"""The interface of a tokenizer and the types that it takes and returns."""

from collections.abc import Collection, Mapping, Sequence
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
    message: int = -1
    """The index of the message that a trained segment renders. -1 for other segments."""


def all_ends(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end a response for a tokenizer: its ``eos_id`` first, then its ``end_ids``."""
    return tuple(dict.fromkeys([tokenizer.eos_id, *getattr(tokenizer, "end_ids", ())]))


class Tokenizer(Protocol):
    """A converter between text and token ids.

    Optional attributes, which are found by name:

    - ``end_ids``: further ids that end a response, such as the token with which the chat template ends a turn.
    - ``holes``: the ids below ``vocab_size`` that stand for no token.
    - ``special_ids``: the ids of the special tokens.
    - ``token_id(text)``: the id of the token with this text, or None.
    """

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
    def markers(self) -> tuple[str, ...]:
        """The texts of the special tokens that begin and end turns or sequences, the end-of-sequence token first.

        A message that contains such a text means the text, not the token. Empty if no text becomes a special token.
        """
        ...

    @property
    def has_template(self) -> bool:
        """Whether it has a chat template of its own. The built-in template has no tools and no variables."""
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

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        exact: Collection[int] | None = None,
    ) -> list[Segment]:
        """Render a conversation as text.

        Args:
            messages: The turns of the conversation.
            add_generation_prompt: Whether to end with the text that starts the next turn of the assistant.
            tools: The JSON schemas of the tools that the model may call.
            template_kwargs: Further variables of the chat template.
            exact: The indices of the messages that need a segment of their own. Other messages of the assistant may be
                part of the text between them. None: all messages of the assistant.

        Raises:
            ValueError: If a message is malformed, the template rejects it, or a message in ``exact`` cannot be located.
        """
        ...
