"""Tokenizers: bytes, a ``tokenizer.json`` file, or a transformers tokenizer with its chat template.

What the rest of the data room needs of one is small: ids with the characters they stand for, and never a special token
that was not asked for. Who builds rows adds the beginning and the end of a sequence, once and at one place.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import tokenizers
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # its stubs are a package of their own

from lightning_align.data.rows import SUFFIXES, read_rows
from lightning_align.runtime.files import publish_text
from lightning_align.runtime.hub import out_of_reach

Message = Mapping[str, Any]
"""One turn of a conversation: ``{"role": ..., "content": ...}``."""

BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "[BOS]")
EOS_NAMES = ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eos|>", "[EOS]")
PAD_NAMES = ("<pad>", "<|pad|>", "<|padding|>", "[PAD]")


class Encoding(NamedTuple):
    """The ids of a text and the characters that each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """Start and end of each id's characters in the text; ids that are bytes of one character share its offsets."""


class Segment(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    role: str
    trained: bool
    """Whether an assistant says this, as opposed to what surrounds it."""
    eos: bool = False
    """Whether an end-of-sequence id that is not in the text follows."""


class Tokenizer(Protocol):
    """What turns text into ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The id that starts each sequence, or None where sequences start with their first token."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends each response."""
        ...

    @property
    def pad_id(self) -> int:
        """The id that fills rows up; may equal another one, so never infer a mask from it."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of everything that the ids depend on."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Encodes each text, adding no special token; the text of a special token becomes that token."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids, without that of special tokens unless asked for."""
        ...

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[Segment]:
        """Writes a conversation as text.

        Args:
            messages: Its turns.
            add_generation_prompt: Whether to end with what makes the assistant speak next.

        Raises:
            ValueError: If a message is malformed or the template does not allow it.
        """
        ...


class ByteTokenizer:
    """UTF-8 bytes: 0 pads, 1 begins, 2 ends, and 3 to 258 are the bytes. Any text and nothing to train."""

    vocab_size: int = 259
    bos_id: int | None = 1
    eos_id: int = 2
    pad_id: int = 0
    fingerprint: str = "bytes-1"
    _specials = ("<pad>", "<bos>", "<eos>")

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """See `Tokenizer.encode_batch`. No text stands for a special token."""
        return [Encoding([byte + 3 for byte in text.encode()], _byte_offsets(text)) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """See `Tokenizer.decode`. Bytes that are no UTF-8 become replacement characters; ids past 258 raise a ValueError."""
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"ids reach from {min(ids)} to {max(ids)}, the byte tokenizer knows 0 to {self.vocab_size - 1}")
        parts = (bytes([i - 3]) if i >= 3 else b"" if skip_special else self._specials[i].encode() for i in ids)
        return b"".join(parts).decode("utf-8", errors="replace")

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[Segment]:
        """See `Tokenizer.render` and `render_plain`."""
        return render_plain(messages, add_generation_prompt=add_generation_prompt)


class FileTokenizer:
    """A tokenizer of the ``tokenizers`` library, read from its JSON file.

    Args:
        path: The file.
        bos: Text of the token that begins a sequence; None looks for a usual name, "" means none.
        eos: Text of the token that ends a response; None looks for a usual name.
        pad: Text of the token that pads; None looks for a usual name and falls back to ``eos``.

    Raises:
        ValueError: If the file cannot be read or has no such token.
    """

    def __init__(self, path: str, *, bos: str | None = None, eos: str | None = None, pad: str | None = None) -> None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"tokenizer {path} cannot be read ({error})") from error
        try:
            model = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            # The library raises bare Exceptions.
            raise ValueError(f"tokenizer {path} is not a file of the tokenizers library ({error})") from error
        self._set_model(model)
        vocabulary = model.get_vocab(with_added_tokens=True)
        bos_id = None if bos == "" else _find(vocabulary, name=bos, usual=BOS_NAMES, what="bos", path=path)
        eos_id = _find(vocabulary, name=eos, usual=EOS_NAMES, what="eos", path=path)
        if eos_id is None:
            raise ValueError(
                f"tokenizer {path} has no end-of-sequence token: looked for {', '.join(EOS_NAMES)}. Name it:"
                f" FileTokenizer({path!r}, eos=...), or tokenizer: {path}?eos=... on the command line"
            )
        pad_id = _find(vocabulary, name=pad, usual=PAD_NAMES, what="pad", path=path)
        self.bos_id: int | None = bos_id
        self.eos_id: int = eos_id
        self.pad_id: int = eos_id if pad_id is None else pad_id
        self.fingerprint: str = _hash(self._model.to_str(), str((bos_id, eos_id, self.pad_id)))
        self._text = text

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer as `AutoTokenizer.from_pretrained` reads it."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        specials = {name: self._model.id_to_token(i) for name, i in ids.items() if i is not None}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **specials}
        publish_text(Path(folder) / "tokenizer.json", self._text)
        publish_text(Path(folder) / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    def _set_model(self, model: tokenizers.Tokenizer) -> None:
        model.no_padding()
        model.no_truncation()
        # The byte-level post-processors of many files cut leading spaces from the offsets, and then a token that begins with
        # the last space of a prompt looks as if it did not. We add special tokens ourselves, so theirs is not needed.
        model.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        self._model = model
        self.vocab_size: int = 1 + max(model.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """See `Tokenizer.encode_batch`."""
        return [Encoding(encoding.ids, encoding.offsets) for encoding in self.raw_batch(texts)]

    def raw_batch(self, texts: Sequence[str], *, offsets: bool = True) -> list[tokenizers.Encoding]:
        """As the library gives them: of long texts the offsets take longer to turn into Python's numbers than to find.

        Args:
            texts: what to encode.
            offsets: whether they are wanted; without them it is quicker.
        """
        encode = self._model.encode_batch if offsets else self._model.encode_batch_fast
        return encode(list(texts), add_special_tokens=False)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """See `Tokenizer.decode`."""
        return self._model.decode(list(ids), skip_special_tokens=skip_special)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[Segment]:
        """See `Tokenizer.render` and `render_plain`."""
        return render_plain(messages, add_generation_prompt=add_generation_prompt)


class TransformersTokenizer(FileTokenizer):
    """A tokenizer of the transformers library, with its chat template; the plain one where it has none.

    It begins a sequence with its beginning-of-sequence token where the tokenizer itself would: not every tokenizer that has
    such a token uses it.

    Args:
        name: A folder that ``save_pretrained`` wrote, or a name of the hub.

    Raises:
        ValueError: If transformers is not installed, the tokenizer cannot be loaded, is not a fast one, or has no
            end-of-sequence token.
    """

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError(
                f"tokenizer {name!r} is neither 'bytes' nor a .json file, and a folder or name of the hub needs transformers:"
                " pip install 'lightning-align[hf]'"
            ) from error
        try:
            away = not Path(name).is_dir() and out_of_reach(name)
            source: Any = AutoTokenizer.from_pretrained(name, local_files_only=away)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).partition("\n")[0]  # what follows is advice about a network
            raise ValueError(
                f"tokenizer {name!r} cannot be loaded by transformers ({reason}). Without a network give the path of a folder"
                " that save_pretrained wrote, as ./my-model"
            ) from error
        if not getattr(source, "is_fast", False):
            raise ValueError(f"tokenizer {name!r} has no fast version, which is what tells the characters of each token")
        if source.eos_token_id is None:
            raise ValueError(f"tokenizer {name!r} has no end-of-sequence token: set its eos_token and save it again")
        self._set_model(tokenizers.Tokenizer.from_str(source.backend_tokenizer.to_str()))
        self._source = source
        self._name = name
        adds_bos = source.bos_token_id is not None and source("a")["input_ids"][:1] == [source.bos_token_id]
        self.bos_id = int(source.bos_token_id) if adds_bos else None
        self.eos_id = int(source.eos_token_id)
        self.pad_id = self.eos_id if source.pad_token_id is None else int(source.pad_token_id)
        template = str(source.chat_template or "")
        self.fingerprint = _hash(self._model.to_str(), str((self.bos_id, self.eos_id, self.pad_id)), template)
        if faults := self._template_faults():
            warnings.warn(f"the chat template of {name} {'; it '.join(faults)}", stacklevel=2)

    def _template_faults(self) -> list[str]:
        """What the chat template does with the ends of a sequence that other software may do otherwise."""
        if not self._source.chat_template:
            return []
        turns: list[Message] = [
            {"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, "abcd", strict=True)
        ]
        try:
            segments = self.render(turns, add_generation_prompt=False)
        except ValueError:
            return []  # said of the row that it cannot write
        bos, eos = str(self._source.bos_token), str(self._source.eos_token)
        text = "".join(segment.text for segment in segments)
        faults = []
        if self._source.bos_token and text.startswith(bos * 2):
            faults.append(f"begins with {bos} twice, where once is meant")
        if self.bos_id is not None and not text.startswith(bos):
            faults.append(f"does not begin with {bos}: it is added here, and must be added where the model is served")
        for segment, following in zip(segments, [*segments[1:], None], strict=True):
            if segment.trained and not segment.text.endswith(eos):
                faults.append(f"ends what the assistant says without {eos}: it is added here behind the last turn alone")
                break
            if segment.trained and following is not None and following.text.lstrip().startswith(eos):
                faults.append(f"ends what the assistant says with {eos} twice: the first is learned")
                break
        return faults

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer, its chat template included."""
        self._source.save_pretrained(folder)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[Segment]:
        """See `Tokenizer.render`. What the assistant says is found by rendering the conversation up to there and so far."""
        if not self._source.chat_template:
            return render_plain(messages, add_generation_prompt=add_generation_prompt)
        check_messages(messages)
        whole = self._apply(messages, add_generation_prompt)
        segments: list[Segment] = []
        position = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._apply(messages[:index], True)
            after = self._apply(messages[: index + 1], False)
            if not (whole.startswith(before) and whole.startswith(after) and position <= len(before) <= len(after)):
                raise ValueError(
                    f"the chat template of {self._name} writes message {index + 1} differently when more follows, so what the"
                    " assistant says cannot be told from the rest; use a template that only appends, or one turn a row"
                )
            response = after[len(before) :]
            # What a template writes behind the end of a turn (a line break, usually) is nothing the assistant says.
            head, eos, _ = response.partition(str(self._source.eos_token))
            segments.append(Segment(whole[position : len(before)], "user", False))
            segments.append(Segment(head + eos, "assistant", True, eos=not eos and index == len(messages) - 1))
            position = len(before) + len(head) + len(eos)
        segments.append(Segment(whole[position:], "user", False))
        return [segment for segment in segments if segment.text or segment.trained]

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            rendered = self._source.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:
            # Templates are programs of their authors: jinja2 passes through whatever they raise.
            raise ValueError(f"the chat template of {self._name} refuses the messages ({error})") from error
        return str(rendered)


def load_tokenizer(spec: str) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        spec: ``bytes``, the path of a ``tokenizer.json`` (special tokens of unusual names are given behind it:
            ``tokenizer.json?eos=<|done|>&pad=<|fill|>``), or a folder or hub name of a transformers tokenizer.

    Raises:
        ValueError: If there is none such or it has no end-of-sequence token.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path, _, query = spec.partition("?")
    if not path.endswith(".json"):
        return TransformersTokenizer(spec)
    names = dict(part.split("=", 1) for part in query.split("&") if "=" in part)
    if unknown := names.keys() - {"bos", "eos", "pad"}:
        raise ValueError(f"tokenizer {spec!r} gives {', '.join(sorted(unknown))}, expected bos, eos or pad behind the '?'")
    return FileTokenizer(path, **names)


def check_vocabulary(tokenizer: Tokenizer, *, num_tokens: int) -> None:
    """Raises a ValueError if a model with ``num_tokens`` embeddings cannot take every id of ``tokenizer``."""
    if tokenizer.vocab_size > num_tokens:
        raise ValueError(
            f"the model knows {num_tokens} tokens, the tokenizer has {tokenizer.vocab_size}: give the model at least"
            f" {tokenizer.vocab_size}, or use the tokenizer that it was trained with"
        )


def render_plain(messages: Sequence[Message], *, add_generation_prompt: bool) -> list[Segment]:
    r"""Writes a conversation in the built-in template, of plain text only.

    A turn is ``<|role|>``, a line break, the content and a line break; an assistant's turn ends with the end-of-sequence id
    in place of the line break, so that what it says is exactly what it generates.

    Raises:
        ValueError: If a message is malformed.
    """
    check_messages(messages)
    segments: list[Segment] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise ValueError(f"content of a {role} message is a {type(content).__name__}, expected a string")
        if role == "assistant":
            segments.append(Segment("<|assistant|>\n", role, False))
            segments.append(Segment(content, role, True, eos=True))
        else:
            segments.append(Segment(f"<|{role}|>\n{content}\n", role, False))
    if add_generation_prompt:
        segments.append(Segment("<|assistant|>\n", "assistant", False))
    return segments


def check_messages(messages: Sequence[Message]) -> None:
    """Raises a ValueError unless each message is an object with a role and a content."""
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"message {number} is {str(message)[:60]!r}, expected an object with role and content")


def train_tokenizer(rows: str | list[str], *, output: str, vocab_size: int = 8192, min_frequency: int = 2) -> None:
    """Trains a byte-level BPE tokenizer on the text of rows and writes it as a ``tokenizer.json``.

    It is lossless, has the special tokens ``<pad>``, ``<bos>`` and ``<eos>``, and splits numbers into digits, so that they
    are read and written one digit at a time.

    Args:
        rows: File to learn from, or a list of them; every text field of their rows counts.
        output: The file to write, such as tokenizer.json.
        vocab_size: Number of tokens, at least 259: the bytes and the special tokens.
        min_frequency: How often a pair of tokens must occur to become one.

    Raises:
        ValueError: If a file cannot be read, has no text, or a number is out of range.
    """
    rows = [rows] if isinstance(rows, str) else rows
    if not output.endswith(".json"):
        raise ValueError(f"output is {output!r}, expected a name that ends in .json")
    if vocab_size < 259:
        raise ValueError(f"vocab_size is {vocab_size}, expected at least 259: 256 bytes and 3 special tokens")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = tqdm(_texts_of_files(rows), desc="reading rows", unit=" texts", leave=False)
    model.train_from_iterator(texts, trainer)
    if texts.n == 0:
        raise ValueError(
            f"rows {', '.join(rows)} have no text field: expected prompt, response, chosen, rejected, messages or text"
        )
    content = model.to_str(pretty=True)

    publish_text(Path(output), content)  # its own `save` raises a bare Exception where the disk is full
    print(f"{model.get_vocab_size()} tokens in {output}")


def _texts_of_files(paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        for row in read_rows(path):
            if row.problem:
                raise ValueError(f"{row.origin} {row.problem}; files end in {', '.join(SUFFIXES)}")
            for field in ("prompt", "response", "chosen", "rejected", "messages", "text"):
                value = row.fields.get(field)
                parts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
                for part in parts:
                    text = part.get("content") if isinstance(part, dict) else part
                    if isinstance(text, str):
                        yield text


def _byte_offsets(text: str) -> list[tuple[int, int]]:
    # The pairs are shared between texts: making them anew takes longer than all else that is done to a text.
    spans = _spans(1 << len(text).bit_length())
    if text.isascii():
        return spans[: len(text)]
    return [span for span, character in zip(spans, text, strict=False) for _ in character.encode()]


@cache
def _spans(num_characters: int) -> list[tuple[int, int]]:
    return [(i, i + 1) for i in range(num_characters)]


def _find(vocabulary: Mapping[str, int], *, name: str | None, usual: Sequence[str], what: str, path: str) -> int | None:
    if name is not None and name not in vocabulary:
        raise ValueError(f"{what} is {name!r}, which tokenizer {path} does not have")
    found = name if name is not None else next((usual_name for usual_name in usual if usual_name in vocabulary), None)
    return None if found is None else vocabulary[found]


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode() + part.encode())
    return digest.hexdigest()[:16]
