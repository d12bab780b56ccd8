"""Messages in one form, whatever file they come from, before a chat template sees them.

Files store the same message in different ways. JSON omits a field, while Arrow adds it as null, because all rows of a
column have the same fields, in the same order. Content is a string or a list of parts. `normalize_messages` removes these
differences, so the same rows give the same ids from any file. An object that is given as a string of JSON keeps its order
and its nulls.
"""

import json
import unicodedata
from collections.abc import Mapping
from typing import Any

_FLAGS = ("weight", "train", "training")
"""The fields of a message that say whether to train on it. OpenAI calls it ``weight``, axolotl ``training`` or ``train``."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_TOOL_ROLES = ("tool", "function", "ipython")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_ORDER = (
    *("role", "content", "id", "type", "function", "name", "description", "parameters", "arguments"),
    *("properties", "required"),
)
"""The usual order of the fields of messages, calls and tools. Other fields follow by their names."""


class _Normal(dict[str, Any]):
    """A message in the form that `normalize_messages` returns."""


def normalize_messages(messages: list[Any]) -> list[dict[str, Any]]:
    """Convert messages to one form.

    Nulls are removed at every depth. Content becomes a string: the texts of a list of parts are joined. The arguments of a
    tool call become an object if they are the JSON of one. A field ``train`` with the value False is left of the flags that
    exclude a message from training.

    Raises:
        ValueError: If a message is malformed, or has content that is not text.
    """
    return [_normalize(message, number) for number, message in enumerate(messages, start=1)]


def canonical(value: Any) -> Any:
    """Remove what depends on the kind of file: nulls in objects, the order of their fields, and integers stored as floats."""
    if isinstance(value, Mapping):
        names = [name for name, item in value.items() if item is not None]
        return {name: canonical(value[name]) for name in sorted(names, key=_place)}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _place(name: Any) -> tuple[int, str]:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER), str(name)


def is_blank(text: str) -> bool:
    """Check whether a text has no visible character."""
    return all(character.isspace() or unicodedata.category(character) == "Cf" for character in text)


def says_something(message: Mapping[str, Any]) -> bool:
    """Check whether a normalized message has content, a tool call or reasoning."""
    return bool(message.get("tool_calls")) or not all(is_blank(str(message.get(name, ""))) for name in ("content", *_REASONING))


def shown(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a template may see of a normalized message."""
    return {name: value for name, value in message.items() if name != "train"}


def tool_names(message: Mapping[str, Any]) -> list[str]:
    """Return the names of the tools that a normalized message calls."""
    calls = [call.get("function", call) for call in message.get("tool_calls", ()) if isinstance(call, Mapping)]
    return [str(call["name"]) for call in calls if isinstance(call, Mapping) and "name" in call]


def read_tools(value: Any) -> list[Any] | None:
    """Read the column ``tools``: a list of tools, one tool, or the JSON of either. The items of a list may be JSON too.

    Returns:
        The tools, or None if there is none.

    Raises:
        ValueError: If the value is something else.
    """
    # Schemas in JSON stay as they are: a null in them is meant.
    tools = _parsed(value) if isinstance(value, str) else canonical(value)
    tools = [tools] if isinstance(tools, dict) and tools else tools
    if not tools:
        return None
    if not isinstance(tools, list):
        raise ValueError("expected a list of tools, or its JSON")
    tools = [_parsed(tool) if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, dict) and tool for tool in tools):
        raise ValueError("expected each tool as an object with its JSON schema, or its JSON")
    return tools


def read_template_kwargs(value: Any) -> dict[str, Any]:
    """Read the column ``chat_template_kwargs``: an object, or its JSON.

    Raises:
        ValueError: If the value is something else, or it has a name that is no variable of a template.
    """
    value = _parsed(value) if isinstance(value, str) else canonical(value)
    if not isinstance(value, dict):
        if not value:
            return {}
        raise ValueError("expected an object with variables of the chat template, or its JSON")
    check_template_kwargs(value)
    return value


def check_template_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Check that arguments for a chat template set variables of the template and nothing else.

    Raises:
        ValueError: If a name is not a string, or an argument of the rendering itself.
    """
    reserved = {
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        "tokenizer_kwargs",
    }
    for name in kwargs:
        if not isinstance(name, str) or name in reserved:
            raise ValueError(
                f"expected variables of the chat template, such as `enable_thinking`, but got {name!r}, which is set by us"
            )


def _parsed(text: str) -> Any:
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"expected JSON ({error})") from error


def _normalize(message: Any, number: int) -> dict[str, Any]:
    if isinstance(message, _Normal):
        return message
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {number} must be an object with `role` and `content`, but got {str(message)[:60]!r}")
    role = message["role"]
    fields: dict[str, Any] = {"role": role, "content": message.get("content")}
    for name in sorted(message, key=_place):
        value = message[name]
        if name not in fields and value is not None:
            value = canonical(value)
            # An object of nulls only is how some writers of Arrow files store an object that is missing.
            if not (isinstance(value, dict | list) and not value):
                fields[name] = value
    trained = True
    for name in _FLAGS:
        flag = fields.pop(name, 1)
        if not isinstance(flag, int) or flag not in (0, 1):
            raise ValueError(
                f"message {number} has {flag!r} as `{name}`, expected 0 or 1 (false or true): whether to train on it"
            )
        trained = trained and bool(flag)
    for name in ("train_detail", "training_detail"):
        if name in fields:
            raise ValueError(f"message {number} has `{name}`, but parts of a message cannot be excluded: expected `train`")
    if not trained:
        fields["train"] = False
    if isinstance(fields.get("tool_calls"), list):
        fields["tool_calls"] = [_with_arguments(call) for call in fields["tool_calls"]]
    fields["content"] = _content(fields, number)
    return _Normal(fields)


def _content(fields: dict[str, Any], number: int) -> str:
    content, role = fields["content"], fields["role"]
    if isinstance(content, str):
        return content
    if content is None:
        if role == "assistant" and says_something({**fields, "content": ""}):
            return ""
        raise ValueError(f"message {number} must be an object with `role` and `content`, but it has no content")
    if isinstance(content, list | tuple):
        return _text(content, number)
    if role in _TOOL_ROLES and isinstance(content, Mapping):
        return json.dumps(canonical(content), ensure_ascii=False)
    raise ValueError(
        f"`content` of message {number}, of the role {role}, must be a string or a list of text parts, but got a"
        f" {type(content).__name__}"
    )


def _text(part: Any, number: int) -> str:
    """Return the text of a part of content, or of a list of parts."""
    if isinstance(part, str):
        return part
    if isinstance(part, list | tuple):
        return "".join(_text(item, number) for item in part if item is not None)
    kind = None
    if isinstance(part, Mapping):
        part = canonical(part)
        kind = part.get("type", "text")
        text = part.get("text")
        if kind in _TEXT_PARTS and isinstance(text, str):
            return text
        if kind in _TEXT_PARTS and isinstance(text, Mapping) and isinstance(text.get("value"), str):
            return str(text["value"])
    raise ValueError(
        f"message {number} has a part of the type {kind or type(part).__name__!r} in its content, which is not text: only"
        ' parts {"type": "text", "text": ...} can be trained on'
    )


def _with_arguments(call: Any) -> Any:
    """Give a tool call its arguments as an object, as templates and servers of models expect them."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            return call
        if isinstance(parsed, dict):
            return {**call, "arguments": parsed}
    return call
