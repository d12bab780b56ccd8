"""Text to the terms of BM25: one Unicode form, words of any script, and the words of identifiers.

A language is a setting. By default there are no stop words and no stemming, so that no text is analyzed by the rules of a
language that it is not written in.
"""

import hashlib
import importlib
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

_NO_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # radicals of Han
    (0x3005, 0x3007),
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
_UNSPACED = re.compile(f"[{''.join(f'{chr(low)}-{chr(high)}' for low, high in _NO_SPACES)}]+")
"""Runs of scripts without spaces between words."""
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
"""Where a word begins within an identifier such as ``parseHTTPHeader``."""
_PROBE = "The parseHTTPHeader of snake_case, naïve cafés running 12 times; 東京都の天気 กรุงเทพ हिन्दी"


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """How BM25 finds the terms of a text.

    Args:
        language: The language of the stop words and the stemmer, such as ``english``. Default is none, for any language.
        stop_words: Whether frequent words of the language, such as "the", are left out. The list is that of bm25s.
        stemming: Whether words are reduced to their stems by the Snowball stemmer of the language (package PyStemmer).
        identifiers: Whether identifiers such as ``getUserName`` and ``get_user_name`` are terms and their words too.
        segmenter: A function that divides text of scripts without spaces (Chinese, Japanese, Thai, ...) into words, as
            ``module:function``, such as ``jieba:lcut``. Default is that each two consecutive characters are a term.

    Raises:
        ValueError: If stop words or stemming are on without a language.
    """

    language: str | None = None
    stop_words: bool = False
    stemming: bool = False
    identifiers: bool = True
    segmenter: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if (self.stop_words or self.stemming) and self.language is None:
            raise ValueError("`stop_words` and `stemming` need a `language`, such as english, but got None.")
        if self.segmenter is not None and ":" not in self.segmenter:
            raise ValueError(f"`segmenter` must be module:function, such as jieba:lcut, but got {self.segmenter!r}.")


def terms(text: str, config: WordsConfig) -> list[str]:
    """Return the terms of a text, in order, with repetitions.

    Args:
        text: The text. It is brought to one Unicode form (NFKC), and case makes no difference.
        config: The settings.
    """
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    pattern = _ASCII_WORD if text.isascii() else _word()
    found = [term for match in pattern.finditer(text) for term in _of_run(match[0], config)]
    if config.stop_words:
        found = [term for term in found if term not in _stop_words(str(config.language))]
    if config.stemming:
        found = _stemmer(str(config.language))(found)
    return found


def words_key(config: WordsConfig | None) -> dict[str, Any]:
    """Return what the terms depend on: the settings, and the terms of a text, which depend on libraries and Unicode tables."""
    if config is None:
        return {}
    return {**asdict(config), "probe": hashlib.sha256(" ".join(terms(_PROBE, config)).encode()).hexdigest()[:16]}


def config_of(settings: Mapping[str, Any] | None) -> WordsConfig | None:
    """Return the settings that an index was built with, given its ``words_key``. None for indices of release 0.1.0."""
    return None if settings is None else WordsConfig(**{k: v for k, v in settings.items() if k != "probe"})


def earlier_terms(text: str) -> list[str]:
    """Return the terms of a text for indices of release 0.1.0."""
    return re.findall(r"\w+", text.lower())


_ASCII_WORD = re.compile(r"\w+")


@cache
def _word() -> re.Pattern[str]:
    """Return the pattern of a word with its combining marks, such as the vowel signs of Hindi, which are no letters."""
    marks = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M"]
    known = set(marks)
    starts, ends = ([code for code in marks if code + step not in known] for step in (-1, 1))
    spans = "".join(f"{chr(first)}-{chr(last)}" for first, last in zip(starts, ends, strict=True))
    return re.compile(rf"\w[\w{spans}\u200c\u200d]*")


def _of_run(run: str, config: WordsConfig) -> Iterator[str]:
    """Yield the terms of a run of letters, digits, marks and underscores."""
    if run.isascii():
        yield from _of_word(run, config)
        return
    run = run.replace("\u200c", "").replace("\u200d", "")
    end = 0
    for match in _UNSPACED.finditer(run):
        yield from _of_word(run[end : match.start()], config)
        yield from _segmenter(config.segmenter)(match[0])
        end = match.end()
    yield from _of_word(run[end:], config)


def _of_word(word: str, config: WordsConfig) -> Iterator[str]:
    whole = word.casefold().strip("_")
    if not whole:
        return
    yield whole
    if config.identifiers and (not word.islower() or "_" in word):
        parts = [part for piece in word.split("_") for part in _CAMEL.split(piece) if part]
        if len(parts) > 1:
            yield from (part.casefold() for part in parts)


def _pairs(run: str) -> list[str]:
    """Return each two consecutive characters. A single character is a term itself."""
    return [run[i : i + 2] for i in range(len(run) - 1)] or [run]


@cache
def _segmenter(name: str | None) -> Callable[[str], list[str]]:
    if name is None:
        return _pairs
    module, _, function = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"`segmenter` must be a function that can be imported, but got {name!r} ({error}). Install the package, or leave it"
            " out to use pairs of characters."
        ) from error
    return lambda run: [word for word in found(run) if word.strip()]


@cache
def _stop_words(language: str) -> frozenset[str]:
    try:
        from bm25s import stopwords
    except ImportError as error:
        raise ValueError("`stop_words` needs bm25s. Run pip install bm25s, or set `stop_words` to false.") from error
    known = {name.removeprefix("STOPWORDS_"): value for name, value in vars(stopwords).items() if name.startswith("STOPWORDS_")}
    short = "EN" if language.lower() == "english" else language.upper()
    if short not in known:
        raise ValueError(
            f"`language` must have stop words in bm25s ({', '.join(sorted(name.lower() for name in known))}), but got"
            f" {language!r}. Set `stop_words` to false."
        )
    return frozenset(known[short])


@cache
def _stemmer(language: str) -> Callable[[list[str]], list[str]]:
    try:
        import Stemmer
    except ImportError as error:
        raise ValueError("`stemming` needs PyStemmer. Run pip install PyStemmer, or set `stemming` to false.") from error
    try:
        stem: Callable[[list[str]], list[str]] = Stemmer.Stemmer(language).stemWords
    except KeyError as error:
        raise ValueError(
            f"`language` must be one of PyStemmer's ({', '.join(Stemmer.algorithms())}), but got {language!r}."
        ) from error
    return stem
