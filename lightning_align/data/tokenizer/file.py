"""A tokenizer that is read from a ``tokenizer.json`` file of the tokenizers library."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import tokenizers

from lightning_align.data.tokenizer.chat import plain_template, render_plain
from lightning_align.data.tokenizer.protocol import Encoding, Message, Segment
from lightning_align.data.tokenizer.splitting import last_split, splits_at_spaces
from lightning_align.runtime.checksums import check_sums
from lightning_align.runtime.files import publish_text

BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "[BOS]")
EOS_NAMES = ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eos|>", "[EOS]")
PAD_NAMES = ("<pad>", "<|pad|>", "<|padding|>", "[PAD]")


class FileTokenizer:
    """A tokenizer of the tokenizers library, read from its JSON file.

    Args:
        path: The path of the file.
        bos: The text of the beginning-of-sequence token. None looks for a common name. An empty string means that
            there is no such token.
        eos: The text of the end-of-sequence token. None looks for a common name.
        pad: The text of the padding token. None looks for a common name and falls back to the end-of-sequence token.

    Raises:
        ValueError: If the file cannot be read, has no end-of-sequence token, or lacks a token that an argument names.
    """

    has_template: bool = False

    def __init__(self, path: str, *, bos: str | None = None, eos: str | None = None, pad: str | None = None) -> None:
        check_sums(Path(path).parent, wanted=lambda name: name == Path(path).name)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            close = get_close_matches(Path(path).name, sorted(file.name for file in Path(path).parent.glob("*.json")), n=3)
            near = f"; similar files: {', '.join(str(Path(path).parent / name) for name in close)}" if close else ""
            raise ValueError(f"tokenizer {path}: there is no such file (searched in {Path.cwd()}{near})") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"tokenizer {path} cannot be read ({error})") from error
        try:
            model = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            # The library raises bare Exceptions.
            raise ValueError(f"tokenizer {path} is not a file of the tokenizers library ({error})") from error
        self._set_model(model)
        options = {"bos": bos, "eos": eos, "pad": pad}
        self.name = f"{path}?{'&'.join(f'{k}={v}' for k, v in options.items() if v is not None)}".removesuffix("?")
        vocabulary = model.get_vocab(with_added_tokens=True)
        bos_id = None if bos == "" else _find_special(vocabulary, name=bos, common=BOS_NAMES, argument="bos", path=path)
        eos_id = _find_special(vocabulary, name=eos, common=EOS_NAMES, argument="eos", path=path)
        if eos_id is None:
            raise ValueError(
                f"tokenizer {path} has no end-of-sequence token. Searched for {', '.join(EOS_NAMES)}. Give its text with"
                f" FileTokenizer({path!r}, eos=...), or with tokenizer: {path}?eos=... on the command line."
            )
        pad_id = _find_special(vocabulary, name=pad, common=PAD_NAMES, argument="pad", path=path)
        self.bos_id: int | None = bos_id
        self.eos_id: int = eos_id
        self.pad_id: int = eos_id if pad_id is None else pad_id
        ids = dict.fromkeys(i for i in (eos_id, bos_id, self.pad_id) if i is not None)
        self.markers: tuple[str, ...] = tuple(str(self._model.id_to_token(i)) for i in ids)
        self.fingerprint: str = hash_parts(self._model.to_str(), str((bos_id, eos_id, self.pad_id)))
        self.text = text
        """The content of the file."""
        self.vocabulary_fingerprint = hash_vocabulary(self._model)

    def save(self, folder: str | Path) -> None:
        """Save the tokenizer in the format that `AutoTokenizer.from_pretrained` loads. It adds the same tokens as here."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        specials = {name: str(self._model.id_to_token(i)) for name, i in ids.items() if i is not None}
        write_tokenizer(tokenizers.Tokenizer.from_str(self.text), folder, specials=specials, has_bos=self.bos_id is not None)

    def _set_model(self, model: tokenizers.Tokenizer) -> None:
        model.no_padding()
        model.no_truncation()
        # Byte-level post-processors of many files cut leading spaces from the offsets. A token that begins with the last
        # space of a prompt would then seem to begin after it. We add special tokens ourselves, so the post-processor of
        # the file is not needed.
        model.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        self._model = model
        self._splits = splits_at_spaces(model)
        ids = set(model.get_vocab(with_added_tokens=True).values())
        self.vocab_size: int = 1 + max(ids, default=-1)
        self.holes: frozenset[int] = frozenset(range(self.vocab_size)) - ids
        added = model.get_added_tokens_decoder().items()
        self.special_ids: frozenset[int] = frozenset(number for number, token in added if token.special)

    def token_id(self, text: str) -> int | None:
        """Return the id of the token with this text, or None if there is none."""
        return self._model.token_to_id(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """See `Tokenizer.encode_batch`."""
        return [Encoding(encoding.ids, _Offsets(encoding)) for encoding in self.raw_batch(texts)]

    def split_point(self, text: str) -> int:
        """Return a place in a text such that what is before it has the same ids, whatever follows the text. 0 if unknown."""
        return last_split(text) if self._splits else 0

    def raw_batch(self, texts: Sequence[str], *, offsets: bool = True) -> list[tokenizers.Encoding]:
        """Encode each text and return the library's own objects.

        For long texts, the conversion of all offsets to Python integers takes longer than the encoding.

        Args:
            texts: The texts to encode.
            offsets: Whether to compute offsets. Encoding is faster without them.
        """
        encode = self._model.encode_batch if offsets else self._model.encode_batch_fast
        return encode(list(texts), add_special_tokens=False)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """See `Tokenizer.decode`."""
        return self._model.decode(list(ids), skip_special_tokens=skip_special)

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


def write_tokenizer(model: tokenizers.Tokenizer, folder: str | Path, *, specials: Mapping[str, str], has_bos: bool) -> None:
    """Write a tokenizer without a chat template of its own in the format of transformers, with the built-in template.

    Args:
        model: The tokenizer. Its post-processor is replaced, because training adds special tokens itself.
        folder: The folder to write to.
        specials: The special tokens by their names in transformers, such as ``eos_token``.
        has_bos: Whether sequences begin with the beginning-of-sequence token.
    """
    model.no_padding()
    model.no_truncation()
    model.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    if has_bos:
        bos = specials["bos_token"]
        numbers = [(bos, model.token_to_id(bos))]
        model.post_processor = tokenizers.processors.TemplateProcessing(single=[bos, "$A"], special_tokens=numbers)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": plain_template(has_bos=has_bos),
        **specials,
    }
    publish_text(Path(folder) / "tokenizer.json", model.to_str(pretty=True) + "\n")
    publish_text(Path(folder) / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


class _Offsets(Sequence[tuple[int, int]]):
    """The offsets of an encoding, each converted when it is read. Most of them never are, and to convert all takes long."""

    def __init__(self, encoding: tokenizers.Encoding) -> None:
        self._encoding = encoding

    def __len__(self) -> int:
        return len(self._encoding)

    def __getitem__(self, index: Any) -> Any:
        # The library's indices have no sign.
        return self._encoding.token_to_chars(range(len(self))[index]) if isinstance(index, int) else list(self)[index]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._encoding.offsets)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as a list


def _find_special(
    vocabulary: Mapping[str, int], *, name: str | None, common: Sequence[str], argument: str, path: str
) -> int | None:
    if name is not None and name not in vocabulary:
        raise ValueError(f"`{argument}` must be a token of tokenizer {path}, but got {name!r}")
    found = name if name is not None else next((common_name for common_name in common if common_name in vocabulary), None)
    return None if found is None else vocabulary[found]


def hash_parts(*parts: str) -> str:
    """Hash several strings to 16 hexadecimal digits. Each string is prefixed with its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode() + part.encode())
    return digest.hexdigest()[:16]


def hash_vocabulary(model: tokenizers.Tokenizer) -> str:
    """Hash which token each id is, without merges, templates and special roles."""
    vocabulary = sorted(model.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    return hash_parts(*(f"{number} {token}" for token, number in vocabulary))
