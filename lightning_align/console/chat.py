"""``lightning-align chat``: talk to a checkpoint or an exported folder, or to two of them side by side."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_align.data.encode import encode_rows
from lightning_align.data.forms import Form
from lightning_align.data.ledger import Ledger
from lightning_align.data.rows import Row
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.data.tokenizer.chat import plain_template, template_of
from lightning_align.data.tokenizer.record import KEY
from lightning_align.export.tokenizer import folder_tokenizer, tokenizer_of
from lightning_align.generation.sampler import GenerationConfig
from lightning_align.generation.stream import stream
from lightning_align.models.checkpoint import build_policy, read_checkpoint
from lightning_align.models.formats import read_model
from lightning_align.models.language_model import context_length

HELP = "Type a message. /new begins a new conversation, /exit ends. An empty line is ignored."


def chat(
    model: str,
    *,
    compare: str | None = None,
    tokenizer: str | None = None,
    template: Literal["auto", "on", "off"] = "auto",
    system: str | None = None,
    prompt: str | None = None,
    device: str = "auto",
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Talk to a model: each message is answered as it is written. Messages come from the terminal or from a pipe, one per line.

    Args:
        model: A checkpoint of a run, or an exported folder.
        compare: A second model, which answers the same messages after the first. `chat A B` is the same.
        tokenizer: The tokenizer, as in the data module. Default is that of each checkpoint or folder.
        template: Whether messages are turns of a conversation, written with the chat template (`on`), or prompts that the
            model continues (`off`). `auto` is `on` if the tokenizer has a chat template of its own. Use `on` for a model that
            was trained on rows of messages with another tokenizer.
        system: The message of the system at the start of each conversation.
        prompt: A single message to answer. Default is to ask for messages.
        device: The device: cpu, cuda, mps, or auto for the first one there is.
        max_new_tokens: The maximum length of an answer in tokens.
        temperature: The sampling temperature. 0 takes the most likely token.
        top_p: Keep the smallest set of most likely tokens that has this total probability.
        seed: The seed of the random numbers.

    Raises:
        ValueError: If the model or its tokenizer cannot be read, or a message fills the context of the model.
    """
    config = GenerationConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    names = [model] if compare is None else [model, compare]
    speakers = [Speaker(name, tokenizer, config, template=template, system=system, device=device_of(device)) for name in names]
    if prompt is None and sys.stdin.isatty():
        for speaker in speakers:
            print(
                f"{speaker.name}: {'a conversation' if speaker.turns else 'each message is a prompt that the model continues'}"
            )
        print(HELP)
    for number, text in enumerate([prompt] if prompt is not None else _lines()):
        if text == "/exit":
            break
        for speaker in speakers:
            if text == "/new":
                speaker.begin()
                continue
            if len(speakers) > 1:
                print(f"[{speaker.name}]")
            for piece in speaker.answer(text, number):
                print(piece, end="", flush=True)
            print(flush=True)


class Speaker:
    """A model in a conversation.

    Args:
        name: A checkpoint or an exported folder.
        tokenizer: The tokenizer. None for that of the model.
        config: The sampling settings.
        template: See `chat`.
        system: The message of the system.
        device: Where the model computes.

    Raises:
        ValueError: If the model or its tokenizer cannot be read, or `system` is given for plain prompts.
    """

    def __init__(
        self,
        name: str,
        tokenizer: str | None,
        config: GenerationConfig,
        *,
        template: str,
        system: str | None,
        device: torch.device,
    ) -> None:
        policy, reader = load(name, tokenizer)
        self.name, self.config, self.reader = name, config, reader
        self.policy = policy.to(device).eval()
        # An export of a tokenizer without a template has the built-in one.
        own = reader.has_template and template_of(reader) != plain_template(has_bos=reader.bos_id is not None)
        self.turns = template == "on" or (template == "auto" and own)
        if system is not None and not self.turns:
            raise ValueError(f"`system` needs conversations, but messages are plain prompts for {name}. Add --template on.")
        self.start: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        context, length = context_length(policy), config.max_new_tokens
        self.room = 1 << 30 if context is None else max(2, context - min(length, context // 2))
        self.begin()

    def begin(self) -> None:
        """Begin a new conversation."""
        self.messages = list(self.start)

    def answer(self, text: str, number: int) -> Iterator[str]:
        """Yield the answer to a message in pieces, and remember both.

        Args:
            text: The message.
            number: The number of the message, which selects its random numbers.
        """
        self.messages.append({"role": "user", "content": text})
        ids = _encoded({"messages": self.messages} if self.turns else {"prompt": text}, self.reader, room=self.room)
        written = ""
        for piece in stream(self.policy, ids, self.config, tokenizer=self.reader, number=number):
            yield piece
            written += piece
        self.messages.append({"role": "assistant", "content": written})


def _lines() -> Iterator[str]:
    """Yield the messages that are typed or piped."""
    while True:
        try:
            text = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return
        if not text and not sys.stdin.isatty():
            return
        if text.strip():
            yield text.rstrip("\n")


def _encoded(fields: dict[str, Any], tokenizer: Any, *, room: int) -> list[int]:
    """Encode a prompt as `predict` does. Of a long conversation the beginning is left out."""
    accepted: tuple[Form, ...] = ("prompt", "messages")
    ledger = Ledger("chat")
    rows = encode_rows(
        [Row(fields, "the message")],
        tokenizer=tokenizer,
        ledger=ledger,
        accepted=accepted,
        max_length=room,
        truncation="keep_end",
        mask_turns="last_turn",
        prompts_only=True,
    )
    (row,) = rows
    return [int(token) for token in row.sides[0].tokens[: row.num_prompt]]


def load(path: str, tokenizer: str | None) -> tuple[torch.nn.Module, Any]:
    """Read a model and its tokenizer.

    Args:
        path: A checkpoint or an exported folder.
        tokenizer: The tokenizer. None for that of the model.

    Raises:
        ValueError: If one of them cannot be read.
    """
    if (Path(path) / "config.json").is_file():
        name = tokenizer or folder_tokenizer(path)
        if name is None:
            raise ValueError(f"{path} has no tokenizer. Give one with --tokenizer.")
        return read_model(path), load_tokenizer(name)
    saved = read_checkpoint(path)
    reader = tokenizer_of(path, saved.get(KEY), given=tokenizer)
    if reader is None:
        raise ValueError(f"{path} does not name its tokenizer. Give it with --tokenizer.")
    return build_policy(saved, path), reader


def device_of(name: str) -> torch.device:
    """Return the device of a name, or for ``auto`` the first one there is."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
