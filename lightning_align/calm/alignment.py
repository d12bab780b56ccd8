"""Alignment of rows of the anchor with the tokens of augments that have their own tokenizers.

The anchor's tokens are converted to text, and the text to tokens of the augment (`lightning_align.calm.text`). Positions are
counted in characters, so that rotary embeddings know the distance between tokens of both models.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lightning_align.calm.spec import AugmentInput, Inputs
from lightning_align.calm.templates import PromptTable
from lightning_align.calm.text import OwnTokenizer, Reading, Turn
from lightning_align.data.tokenizer import Tokenizer, all_ends
from lightning_align.data.tokenizer.reader import text_reader
from lightning_align.types import TokenBatch


def char_ends(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[int]]:
    """Decode a row and count the characters that are complete after each token.

    Args:
        tokenizer: The tokenizer that produced the ids.
        ids: The token ids of one row, without padding.

    Returns:
        The text, and for each token the number of characters up to and including it.
    """
    reader = text_reader(tokenizer)
    text, ends = "", []
    for token in ids:
        text += reader.feed(token)
        ends.append(reader.num_characters)
    text += reader.finish()
    if ids and ids[-1] in all_ends(tokenizer):
        ends[-1] = len(text) + 1
    return text, ends


class Alignment:
    """The conversion of batches of the anchor to the inputs of its augments.

    Args:
        tokenizer: The tokenizer of the anchor.
        others: The tokenizer of each augment. None for an augment that has no tokenizer of its own.
    """

    def __init__(self, tokenizer: Tokenizer, others: Sequence[Tokenizer | None]) -> None:
        self.tokenizer = tokenizer
        self.own = [None if other is None else OwnTokenizer(tokenizer, other) for other in others]
        self.prompts = PromptTable()

    def __deepcopy__(self, memo: Any) -> Self:
        """Return itself: copies of a composition, such as an opponent, share the tokenizers."""
        return self

    def inputs(
        self, tokens: Tensor, mask: Tensor | None = None, *, num_prompts: Sequence[int] | None = None
    ) -> list[AugmentInput | None]:
        """Convert a batch.

        Args:
            tokens: (B, N) token ids of the anchor.
            mask: (B, N) bool, true at real tokens, which are one behind the other. None if all are real.
            num_prompts: The number of tokens of each row's prompt. None if it is not known.

        Returns:
            The input of each augment. None for an augment that has no tokenizer of its own.
        """
        real = torch.ones_like(tokens) if mask is None else mask.to(tokens.dtype)
        # One copy to the host. Nothing else waits for a device.
        rows, reals = torch.stack((tokens, real)).tolist()
        pads = [is_real.index(1) if 1 in is_real else 0 for is_real in reals]
        rows = [row[pad : pad + sum(is_real)] for row, pad, is_real in zip(rows, pads, reals, strict=True)]
        starts = [0] * len(rows) if num_prompts is None else num_prompts
        return [
            None
            if own is None
            else pad_readings(
                [
                    self.read(index, row, num_prompt).behind(pad)
                    for row, num_prompt, pad in zip(rows, starts, pads, strict=True)
                ],
                width=tokens.shape[1],
                pad_id=own.other.pad_id,
                device=tokens.device,
            )
            for index, own in enumerate(self.own)
        ]

    def fill(
        self, inputs: Inputs | None, readers: Sequence[Any], tokens: Tensor, mask: Tensor | None, **prompts: Any
    ) -> Inputs | None:
        """Return the inputs with those of the augments with their own tokenizers that have none.

        Args:
            inputs: The given inputs.
            readers: The reader of each augment.
            tokens: See `inputs`, as for the others.
            mask: See `inputs`.
            **prompts: See `inputs`.
        """
        given = [None] * len(readers) if inputs is None else inputs
        missing = [reader.own and has is None for reader, has in zip(readers, given, strict=False)]
        if not any(missing):
            return inputs
        made = self.inputs(tokens, mask, **prompts)
        return [new if lacks else has for lacks, has, new in zip(missing, given, made, strict=True)]

    def completed(self, inputs: Sequence[AugmentInput | None], readers: Sequence[Any], batch: TokenBatch) -> Any:
        """Return the inputs of a batch with those that a data module has not made. See `fill`."""
        if not any(reader.own and has is None for reader, has in zip(readers, inputs, strict=False)):
            return list(inputs)  # without waiting for a GPU
        lengths = prompt_lengths(batch["targets"])
        return list(self.fill(inputs, readers, batch["tokens"], batch["mask"], num_prompts=lengths) or ())

    def read(self, index: int, row: Sequence[int], num_prompt: int) -> Reading:
        """Convert a row for one augment."""
        own = self.own[index]
        assert own is not None
        prompt = self.prompt(index, row[:num_prompt])
        return own.read(row, num_prompt=num_prompt, turns=None if prompt is None else [Turn(num_prompt, len(row), prompt)])

    def prompt(self, index: int, prompt: Sequence[int]) -> Sequence[int] | None:
        """Return the ids that an augment reads instead of the text of a prompt. None if it reads the text."""
        return self.prompts.get(prompt, index)


def pad_readings(readings: Sequence[Reading], *, width: int, pad_id: int, device: torch.device | None = None) -> AugmentInput:
    """Pad the rows of a batch on the right.

    Args:
        readings: The rows.
        width: N, the number of columns of the anchor.
        pad_id: The padding id of the augment.
        device: The device of the tensors.
    """
    length = max([1, *(len(reading.ids) for reading in readings)])

    def pad(rows: Sequence[Any], width: int, value: int) -> Tensor:
        out = np.full((len(rows), width), value, dtype=np.int64)
        for padded, row in zip(out, rows, strict=True):
            padded[: len(row)] = row
        return torch.from_numpy(out).to(device, non_blocking=True)

    lengths = torch.tensor([len(reading.ids) for reading in readings]).to(device, non_blocking=True)
    return AugmentInput(
        pad([reading.ids for reading in readings], length, pad_id),
        torch.arange(length, device=device) < lengths[:, None],
        pad([reading.ends for reading in readings], length, 0),
        pad([reading.anchor_ends for reading in readings], width, 0),
        columns=pad([reading.columns for reading in readings], length, 0),
    )


def prompt_lengths(targets: Tensor) -> list[int]:
    """Count the columns before the first target of each row of (B, N). 0 for a row without targets."""
    return targets.int().argmax(dim=1).tolist()


def use_alignment(model: Any, data: Any) -> Alignment | None:
    """Give a composition the tokenizers of a data module, if it has any, and return what the composition now has.

    Args:
        model: The composition.
        data: The data module of the run, or None.
    """
    found = getattr(data, "alignment", None)
    if isinstance(found, Alignment) and len(found.own) == len(model.readers):
        model.alignment = found
    known: Alignment | None = model.alignment
    return known
