"""A tokenizer of the transformers library with its chat template."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers

from lightning_align.data.prefixes import num_shared
from lightning_align.data.tokenizer.chat import check_messages, plain_template, render_plain
from lightning_align.data.tokenizer.file import FileTokenizer, hash_parts, hash_vocabulary
from lightning_align.data.tokenizer.protocol import Message, Segment, all_ends
from lightning_align.data.tokenizer.turns import TurnFinder
from lightning_align.runtime.checksums import check_sums
from lightning_align.runtime.gguf import split_gguf
from lightning_align.runtime.hub import out_of_reach

_FILES = ("*token*", "vocab*", "merges*", "*.model", "tekken*")
"""What the files of a tokenizer are called: at least one of them is in its folder."""


class TransformersTokenizer(FileTokenizer):
    """A tokenizer of the transformers library with its chat template, or with the built-in template if it has none.

    Sequences start with a beginning-of-sequence token only if the transformers tokenizer adds it itself. Some tokenizers
    define such a token but do not use it.

    Args:
        name: A folder that ``save_pretrained`` wrote, a GGUF file, or a name on the Hugging Face hub.
        bos: The text of another beginning-of-sequence token.
        eos: The text of another end-of-sequence token. Required if the tokenizer has none.
        pad: The text of another padding token.

    Raises:
        ValueError: If transformers is not installed, or the tokenizer cannot be loaded, is not a fast tokenizer, has no
            end-of-sequence token, or lacks a token that an argument names.
    """

    def __init__(self, name: str, *, bos: str | None = None, eos: str | None = None, pad: str | None = None) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError(
                f"tokenizer {name!r} is neither 'bytes' nor a .json file. A folder or a name on the hub needs transformers:"
                " pip install 'lightning-align[hf]'"
            ) from error
        place, gguf = split_gguf(name, what="tokenizer")
        if Path(place).is_file() and not gguf:
            raise ValueError(f"tokenizer {name!r} must be 'bytes', a .json file, a GGUF file or a folder, but is another file.")
        if Path(place).is_dir() and not gguf and not any(any(Path(place).glob(pattern)) for pattern in _FILES):
            raise ValueError(f"tokenizer {name!r} is a folder without a tokenizer. Expected one that save_pretrained wrote.")
        try:
            if not gguf:
                check_sums(name, wanted=lambda file: "/" not in file and not file.endswith(".safetensors"))
            away = not Path(place).is_dir() and out_of_reach(name)
            source: Any = AutoTokenizer.from_pretrained(place, local_files_only=away, trust_remote_code=False, **gguf)
        except Exception as error:  # files that are damaged raise many types here
            reason = str(error).partition("\n")[0]  # the lines after the first are advice about the network
            if gguf:
                raise ValueError(f"tokenizer {name!r} cannot be read ({reason}). Is the file complete?") from error
            raise ValueError(
                f"tokenizer {name!r} cannot be loaded by transformers ({reason}). Without a network, give the path of a"
                " folder that save_pretrained wrote, such as ./my-model"
            ) from error
        if not getattr(source, "is_fast", False):
            raise ValueError(f"tokenizer {name!r} has no fast version, which is needed for the character offsets of each token")
        given = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        given = {role: text for role, text in given.items() if text is not None}
        for role, text in given.items():
            if text not in source.get_vocab():
                raise ValueError(f"`{role}` must be a token of tokenizer {name!r}, but got {text!r}")
        if given:
            source.add_special_tokens(given)
        if source.eos_token_id is None:
            raise ValueError(
                f"tokenizer {name!r} has no end-of-sequence token. Give its text, such as {name}?eos_token=<|im_end|>, or set"
                " its eos_token and save it again."
            )
        self._set_model(tokenizers.Tokenizer.from_str(source.backend_tokenizer.to_str()))
        self._source = source
        self.name = self._name = f"{name}?{'&'.join(f'{role}={text}' for role, text in given.items())}".removesuffix("?")
        adds_bos = source.bos_token_id is not None and source("a")["input_ids"][:1] == [source.bos_token_id]
        self.bos_id = int(source.bos_token_id) if adds_bos else None
        self.eos_id = int(source.eos_token_id)
        self.pad_id = self.eos_id if source.pad_token_id is None else int(source.pad_token_id)
        template = self.template = str(source.chat_template or "")
        self.vocabulary_fingerprint = hash_vocabulary(self._model)
        self.has_template = bool(template)
        self._parts = False
        self.other_ends: tuple[str, ...] = ()
        self._parts = bool(template) and self._takes_parts()
        self.end_ids: tuple[int, ...] = self._find_turn_end() if template else ()
        """The special token with which the chat template ends a turn of the assistant, if it is another one."""
        roles = (self.bos_id, self.eos_id, self.pad_id, *self.end_ids)
        self.fingerprint = hash_parts(self._model.to_str(), str(roles), template)
        self.markers = self._find_markers()
        self.other_ends = self._find_other_ends()
        if faults := self._template_faults():
            warnings.warn(f"the chat template of {name} {'; it '.join(faults)}", stacklevel=2)

    def _template_faults(self) -> list[str]:
        """List where the template and this package treat special tokens differently. Other software follows the template."""
        if not self._source.chat_template:
            return []
        turns: list[Message] = [
            {"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, "abcd", strict=True)
        ]
        try:
            segments = self.render(turns, add_generation_prompt=False)
        except ValueError:
            return []  # reported for the row that the template cannot render
        bos, eos = str(self._source.bos_token), str(self._model.id_to_token(all_ends(self)[-1]))
        text = "".join(segment.text for segment in segments)
        faults = []
        if self._source.bos_token and text.startswith(bos * 2):
            faults.append(f"begins with {bos} twice: training keeps only one")
        if self.bos_id is not None and not text.startswith(bos):
            faults.append(f"does not begin with {bos}: training adds it, and serving the model must add it too")
        for segment, following in zip(segments, [*segments[1:], None], strict=True):
            # A template may write the token at the end of the conversation only.
            if segment.message == len(turns) - 1 and not segment.text.endswith(eos):
                faults.append(f"does not end the turns of the assistant with {eos}: training adds it after the last turn only")
                break
            if segment.trained and following is not None and following.text.lstrip().startswith(eos):
                faults.append(f"ends the turns of the assistant with {eos} twice: training uses the first only")
                break
        return faults

    def save(self, folder: str | Path, *, own_template: bool = False) -> None:
        """Save the tokenizer with its chat template. Without one, it is saved with the built-in template, as it is used.

        Args:
            folder: The folder to save it in.
            own_template: Whether to save a tokenizer without a template as it is. When it is loaded, it equals this one.
        """
        own = self._source.chat_template
        try:
            template = plain_template(has_bos=self.bos_id is not None)
            self._source.chat_template = own if own or own_template else template
            self._source.save_pretrained(folder)
        finally:
            self._source.chat_template = own

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        exact: Collection[int] | None = None,
    ) -> list[Segment]:
        """See `Tokenizer.render`. The turns of the assistant are located by `TurnFinder`."""
        if not self._source.chat_template:
            return render_plain(messages, add_generation_prompt=add_generation_prompt)
        check_messages(messages)
        finder = TurnFinder(
            partial(self._apply, tools=tools, template_kwargs=template_kwargs),
            ends=[str(self._model.id_to_token(number)) for number in all_ends(self)],
            boundary=self._boundary,
            other_ends=self.other_ends,
        )
        try:
            return finder.segments(messages, add_generation_prompt=add_generation_prompt, exact=exact)
        except _RejectedError:
            raise
        except ValueError as error:
            raise ValueError(
                f"the chat template of {self._name} {error}, so the turns of the assistant cannot be located. Use"
                " `mask_turns` 'last_turn', one turn per row, or a template that only appends"
            ) from error

    def _boundary(self, text: str, position: int) -> int:
        (encoding,) = self.encode_batch([text])
        return max((end for _, end in encoding.offsets if end <= position), default=0)

    def _find_turn_end(self) -> tuple[int, ...]:
        """Find the special token with which the template ends each turn of the assistant, if it is not `eos_id`.

        Templates of instruct models often have a token of their own for this, such as ``<end_of_turn>``. The template writes it
        first behind the answer, in the middle of a conversation as at its end, and does not write `eos_id` in the middle. At
        the end, only `eos_id` may follow.
        """
        question: Message = {"role": "user", "content": "Q7z"}
        found = []
        for behind in ([], [question]):
            try:
                first, second = (
                    self._apply([question, {"role": "assistant", "content": text}, *behind], False) for text in ("01", "2x")
                )
            except ValueError:
                return ()  # reported for the row that the template cannot render
            shared = num_shared(first[::-1], second[::-1])
            suffix, _, _ = first[len(first) - shared :].partition("Q7z")
            tokens = [
                (suffix.index(token.content), -len(token.content), number)
                for number, token in self._model.get_added_tokens_decoder().items()
                # A token that opens the conversation also opens the next turn.
                if token.special and token.content in suffix and not first.lstrip().startswith(token.content)
            ]
            found.append((suffix, [number for _, _, number in sorted(tokens)]))
        (suffix, last), (_, middle) = found
        if not last or last[:1] != middle[:1] or self.eos_id in middle:
            return ()
        _, _, rest = suffix.partition(str(self._model.id_to_token(last[0])))
        return (last[0],) if rest.strip() in ("", str(self._source.eos_token)) else ()

    def _find_markers(self) -> tuple[str, ...]:
        """Return the end, beginning and padding tokens, and the special tokens that the template writes itself."""
        names = [str(self._model.id_to_token(i)) for i in (self.eos_id, self.bos_id, self.pad_id) if i is not None]
        if self._source.chat_template:
            conversation: list[Message] = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "1"}]
            text = ""
            for messages, generate in ((conversation, False), ((conversation * 2)[:3], True)):
                with suppress(ValueError):
                    text += self._apply(messages, generate)
            specials = [token.content for token in self._model.get_added_tokens_decoder().values() if token.special]
            names += [special for special in specials if special in text]
        return tuple(dict.fromkeys(names))

    def _find_other_ends(self) -> tuple[str, ...]:
        """Return the special tokens that end a turn in place of the end token, such as ``<|call|>`` of gpt-oss.

        There are none if the template does not end its turns with the end token, because training then adds it.
        """
        eos = str(self._source.eos_token)
        with suppress(ValueError):
            messages: list[Message] = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "1"}]
            if self._source.chat_template and self._apply(messages, False).rstrip().endswith(eos):
                tokens = self._model.get_added_tokens_decoder().values()
                return tuple(token.content for token in tokens if token.special and token.content != eos)
        return ()

    def _takes_parts(self) -> bool:
        """Check whether the template writes content only if it is a list of parts."""
        for shape in (False, True):
            self._parts = shape
            with suppress(ValueError):
                if "Q7z" in self._apply([{"role": "user", "content": "Q7z"}], True):
                    return shape
        return False

    def _apply(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        *,
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        given = [dict(message) for message in messages]
        if self._parts:
            given = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                if isinstance(message["content"], str)
                else message
                for message in given
            ]
        try:
            rendered = self._source.apply_chat_template(
                given,
                tools=None if tools is None else list(tools),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(template_kwargs or {}),
            )
        except Exception as error:
            # Templates are programs: jinja2 passes on any exception that they raise.
            raise _RejectedError(f"the chat template of {self._name} rejects the messages ({error})") from error
        return str(rendered)


class _RejectedError(ValueError):
    """An error of the template itself."""
