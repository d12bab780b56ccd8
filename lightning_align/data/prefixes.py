"""The common beginning of two texts, where an answer may begin."""

import re
import unicodedata

_TURN = re.compile(
    r"(?:^|\n)[ \t]*(?:\#+[ \t]*|\[|<\|?|\*\*)?"
    r"(?:assistant|ai|bot|chatbot|gpt|model|answer|response|output|a|tl;dr)"
    r"(?:\*\*)?(?::(?:\*\*)?|\]|\|?>)[ \t]*\n*"
    r"|<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n*|<start_of_turn>model\n|\[/INST\]"
    r"|<.Assistant.>",
    re.IGNORECASE,
)
"""What transcripts write in front of an answer."""


def common_turns(first: str, second: str) -> tuple[str, bool]:
    """Find the prompt that two transcripts have in common.

    Returns:
        The prompt. It ends behind the last name of an assistant that both have and that leaves text of both, such as
        ``Assistant:``. If there is none, it is the `common_prefix`. And whether there is text in front of such a name.
    """
    common = first[: num_shared(first, second)]
    for found in reversed(list(_TURN.finditer(common))):
        end = found.end()
        if end and common[end - 1] == " ":
            end -= 1  # the tokens of many tokenizers include the space before a word
        if first[end:].strip() and second[end:].strip():
            return common[:end], bool(common[: found.start()].strip())
    return common_prefix(first, second), False


def num_shared(first: str, second: str) -> int:
    """Count the characters that two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def common_prefix(first: str, second: str) -> str:
    """Find the common beginning of two texts.

    It is shortened so that the rest of each text begins with a whole word and the space before it.
    """
    length = num_shared(first, second)
    following = (first[length : length + 1], second[length : length + 1])
    # Shorten it if it ends inside a word of either text, or before a combining mark of its last character.
    if length and any(character and _continues(first[length - 1], character) for character in following):
        length -= 1
        while length and _continues(first[length - 1], first[length]):
            length -= 1
    # The tokens of many tokenizers include the space before a word.
    if length and first[length - 1] == " ":
        length -= 1
    return first[:length]


def _continues(before: str, character: str) -> bool:
    if unicodedata.combining(character) or character in "\u200d\ufe0f" or before == "\u200d":
        return True
    return _is_word(before) and _is_word(character)


def _is_word(character: str) -> bool:
    # Chinese and Japanese have no spaces between words, so each character counts as a word.
    return (character.isalnum() or character == "_") and not 0x2E80 <= ord(character) <= 0x9FFF
