"""The built-in chat template, for tokenizers that have no template of their own."""

from collections.abc import Mapping, Sequence

from lightning_align.data.tokenizer.protocol import Message, Segment


def render_plain(messages: Sequence[Message], *, add_generation_prompt: bool) -> list[Segment]:
    r"""Render a conversation with the built-in template, which uses plain text only.

    A turn is ``<|role|>``, a line break, the content and a line break. A turn of the assistant ends with the
    end-of-sequence id instead of the line break, so that the trained text is exactly what the model generates.

    Raises:
        ValueError: If a message is malformed.
    """
    check_messages(messages)
    segments: list[Segment] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise ValueError(
                f"`content` of a message with the role {role} must be a string, but got a {type(content).__name__}"
            )
        if role == "assistant":
            segments.append(Segment("<|assistant|>\n", role, False))
            segments.append(Segment(content, role, True, eos=True))
        else:
            segments.append(Segment(f"<|{role}|>\n{content}\n", role, False))
    if add_generation_prompt:
        segments.append(Segment("<|assistant|>\n", "assistant", False))
    return segments


def check_messages(messages: Sequence[Message]) -> None:
    """Check that each message is a mapping with a role and a content.

    Raises:
        ValueError: If a message is not.
    """
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"message {number} must be an object with `role` and `content`, but got {str(message)[:60]!r}")
