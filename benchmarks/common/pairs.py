"""Preference pairs to train on: random ones, or those of a file."""

import json
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lightning_align.types import PreferenceBatch, TokenBatch


class Pair(NamedTuple):
    """Token ids of a preference pair. Both responses end with the end-of-sequence token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


EOS = 1


def synthetic_pairs(count: int, vocabulary: int, seed: int = 0) -> list[Pair]:
    """Random pairs with the lengths of short worked answers.

    Prompts have 20 to 120 tokens and responses 30 to 200, both log-normal. In a padded batch of 8 pairs about 39 % of
    positions are padding and 39 % are response tokens.

    Args:
        count: number of pairs.
        vocabulary: its size; ids are uniform.
        seed: seed of the generator.
    """
    generator = random.Random(seed)

    def length(mean: float, deviation: float, low: int, high: int) -> int:
        while not low <= (drawn := round(generator.lognormvariate(mean, deviation))) <= high:
            pass
        return drawn

    def ids(number: int) -> list[int]:
        return [generator.randrange(2, vocabulary) for _ in range(number)]

    def response() -> list[int]:
        return [*ids(length(4.42, 0.58, 30, 200) - 1), EOS]

    return [Pair(ids(length(3.93, 0.40, 20, 120)), response(), response()) for _ in range(count)]


def file_pairs(path: str, count: int, vocabulary: int, seed: int = 0) -> list[Pair]:
    """Pairs from a JSONL file with the fields prompt, chosen and rejected.

    A BPE tokenizer is trained on the file. Its ids are spread over the vocabulary.

    Args:
        path: path of the file.
        count: number of pairs to take from the start of the file.
        vocabulary: size of the vocabulary.
        seed: seed of the choice of ids.
    """
    from tokenizers import ByteLevelBPETokenizer

    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    tokenizer = ByteLevelBPETokenizer()
    texts = (row[name] for row in rows for name in Pair._fields)
    tokenizer.train_from_iterator(texts, vocab_size=min(4000, vocabulary - 2), show_progress=False)
    spread = random.Random(seed).sample(range(2, vocabulary), tokenizer.get_vocab_size())

    def ids(text: str) -> list[int]:
        return [spread[token] for token in tokenizer.encode(text).ids]

    return [Pair(ids(row["prompt"]), [*ids(row["chosen"]), EOS], [*ids(row["rejected"]), EOS]) for row in rows[:count]]


def batches(pairs: Sequence[Pair], size: int) -> list[PreferenceBatch]:
    """Batches of pairs in order. Both sides of a batch are padded to the same width."""
    return [_batch(pairs[start : start + size]) for start in range(0, len(pairs) - size + 1, size)]


def _batch(pairs: Sequence[Pair]) -> PreferenceBatch:
    width = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)

    def side(responses: Sequence[list[int]]) -> TokenBatch:
        tokens = torch.zeros(len(pairs), width, dtype=torch.long)
        mask = torch.zeros(len(pairs), width, dtype=torch.bool)
        targets = mask.clone()
        for row, (pair, response) in enumerate(zip(pairs, responses, strict=True)):
            start, stop = len(pair.prompt), len(pair.prompt) + len(response)
            tokens[row, :stop] = torch.tensor(pair.prompt + response)
            mask[row, :stop] = True
            targets[row, start:stop] = True
        return {"tokens": tokens, "mask": mask, "targets": targets}

    return {"chosen": side([p.chosen for p in pairs]), "rejected": side([p.rejected for p in pairs])}


def shares(all_batches: Sequence[PreferenceBatch]) -> tuple[float, float]:
    """Shares of padding and of response tokens among all positions."""
    sides = [side for batch in all_batches for side in (batch["chosen"], batch["rejected"])]
    positions = sum(side["mask"].numel() for side in sides)
    real, responses = (sum(int(side[name].sum()) for side in sides) for name in ("mask", "targets"))
    return 1 - real / positions, responses / positions
