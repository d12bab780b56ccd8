"""The built-in chat template, for tokenizers that have no template of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

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
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise ValueError(
                f"`content` of a message with the role {role} must be a string, but got a {type(content).__name__}"
            )
        if role == "assistant":
            segments.append(Segment("<|assistant|>\n", role, False))
            segments.append(Segment(content, role, True, eos=True, message=index))
        else:
            segments.append(Segment(f"<|{role}|>\n{content}\n", role, False))
    if add_generation_prompt:
        segments.append(Segment("<|assistant|>\n", "assistant", False))
    return segments


_TURNS = (
    "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>\\n' + message['content'] + eos_token -}}"
    "{%- else -%}{{- '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)


def plain_template(*, has_bos: bool) -> str:
    """Return the built-in template as a chat template of transformers, which writes the beginning-of-sequence token itself."""
    return f"{'{{- bos_token -}}' if has_bos else ''}{_TURNS}"


def template_of(tokenizer: Any) -> str:
    """Return the chat template of a tokenizer. Without one of its own it has the built-in template."""
    return str(getattr(tokenizer, "template", "")) or plain_template(has_bos=tokenizer.bos_id is not None)


def check_messages(messages: Sequence[Message]) -> None:
    """Check that each message is a mapping with a role and a content.

    Raises:
        ValueError: If a message is not.
    """
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"message {number} must be an object with `role` and `content`, but got {str(message)[:60]!r}")
