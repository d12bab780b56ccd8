"""A tokenizer of the transformers library with its chat template."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from lightning_align.data.tokenizer.chat import check_messages, render_plain
from lightning_align.data.tokenizer.file import FileTokenizer, hash_parts
from lightning_align.data.tokenizer.protocol import Message, Segment
from lightning_align.runtime.hub import out_of_reach


class TransformersTokenizer(FileTokenizer):
    """A tokenizer of the transformers library with its chat template, or with the built-in template if it has none.

    Sequences start with a beginning-of-sequence token only if the transformers tokenizer adds it itself. Some tokenizers
    define such a token but do not use it.

    Args:
        name: A folder that ``save_pretrained`` wrote, or a name on the Hugging Face hub.

    Raises:
        ValueError: If transformers is not installed, or the tokenizer cannot be loaded, is not a fast tokenizer, or has
            no end-of-sequence token.
    """

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError(
                f"tokenizer {name!r} is neither 'bytes' nor a .json file. A folder or a name on the hub needs transformers:"
                " pip install 'lightning-align[hf]'"
            ) from error
        try:
            away = not Path(name).is_dir() and out_of_reach(name)
            source: Any = AutoTokenizer.from_pretrained(name, local_files_only=away)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).partition("\n")[0]  # the lines after the first are advice about the network
            raise ValueError(
                f"tokenizer {name!r} cannot be loaded by transformers ({reason}). Without a network, give the path of a"
                " folder that save_pretrained wrote, such as ./my-model"
            ) from error
        if not getattr(source, "is_fast", False):
            raise ValueError(f"tokenizer {name!r} has no fast version, which is needed for the character offsets of each token")
        if source.eos_token_id is None:
            raise ValueError(f"tokenizer {name!r} has no end-of-sequence token. Set its eos_token and save it again.")
        self._set_model(tokenizers.Tokenizer.from_str(source.backend_tokenizer.to_str()))
        self._source = source
        self._name = name
        adds_bos = source.bos_token_id is not None and source("a")["input_ids"][:1] == [source.bos_token_id]
        self.bos_id = int(source.bos_token_id) if adds_bos else None
        self.eos_id = int(source.eos_token_id)
        self.pad_id = self.eos_id if source.pad_token_id is None else int(source.pad_token_id)
        template = str(source.chat_template or "")
        self.fingerprint = hash_parts(self._model.to_str(), str((self.bos_id, self.eos_id, self.pad_id)), template)
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
        bos, eos = str(self._source.bos_token), str(self._source.eos_token)
        text = "".join(segment.text for segment in segments)
        faults = []
        if self._source.bos_token and text.startswith(bos * 2):
            faults.append(f"begins with {bos} twice: training keeps only one")
        if self.bos_id is not None and not text.startswith(bos):
            faults.append(f"does not begin with {bos}: training adds it, and serving the model must add it too")
        for segment, following in zip(segments, [*segments[1:], None], strict=True):
            if segment.trained and not segment.text.endswith(eos):
                faults.append(f"does not end the turns of the assistant with {eos}: training adds it after the last turn only")
                break
            if segment.trained and following is not None and following.text.lstrip().startswith(eos):
                faults.append(f"ends the turns of the assistant with {eos} twice: training uses the first only")
                break
        return faults

    def save(self, folder: str | Path) -> None:
        """Save the tokenizer with its chat template."""
        self._source.save_pretrained(folder)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[Segment]:
        """See `Tokenizer.render`.

        The text of an assistant turn is the difference between two renderings: the conversation before the turn with a
        generation prompt, and the conversation up to and including the turn.
        """
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
                    f"the chat template of {self._name} renders message {index + 1} differently when more messages follow,"
                    " so the turns of the assistant cannot be located. Use a template that only appends, or one turn per row"
                )
            response = after[len(before) :]
            # Text that the template writes after the end of a turn (usually a line break) is not part of the response.
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
            # Templates are programs: jinja2 passes on any exception that they raise.
            raise ValueError(f"the chat template of {self._name} rejects the messages ({error})") from error
        return str(rendered)
