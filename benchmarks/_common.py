"""What the benchmarks share: meters of time, memory and load, pairs to train on, and how a result is printed.

Linux only: load and memory come from /proc.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from lightning.pytorch.callbacks import Callback

from lightning_align.types import LogProbs, PreferenceBatch, TokenBatch

MIB = 2**20
TICKS = os.sysconf("SC_CLK_TCK")
# With it glibc asks for huge pages: large fresh tensors then cost a 512th of the page faults.
THP = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Meter:
    """Wall-clock time of a block, and how many cores other processes (and the hypervisor) kept busy meanwhile."""

    seconds: float
    others: float

    def __enter__(self) -> Self:
        """Start."""
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        wall, busy, own = (stop - start for start, stop in zip(self._start, self._now(), strict=True))
        self.seconds = wall
        # Ticks are of 10 ms, so a short block may seem to have used more than there was.
        self.others = max(0.0, (busy - own) / wall)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        own = os.times()
        return (
            time.perf_counter(),
            (user + nice + system + irq + softirq + steal) / TICKS,
            own.user + own.system + own.children_user + own.children_system,
        )


def resident() -> int:
    """Bytes of this process in memory now."""
    return _status("VmRSS")


def peak() -> int:
    """The most bytes of this process in memory since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Forget the peak so far."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


class Memory:
    """The most memory that a block takes on top of what was resident before it, in bytes."""

    bytes: int

    def __enter__(self) -> Self:
        """Start."""
        reset_peak()
        self._before = resident()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.bytes = peak() - self._before


def in_subprocess(script: str, *arguments: str, thp: bool = False) -> dict[str, Any]:
    """Run a script in a process of its own, where no other side has left memory behind.

    Args:
        script: its path.
        *arguments: its arguments.
        thp: whether malloc asks for huge pages.

    Returns:
        The JSON object in its last line.
    """
    environment = {**os.environ, **(THP if thp else {})}
    output = subprocess.run(
        [sys.executable, script, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


class Timing(NamedTuple):
    """A run of one side."""

    seconds: float
    others: float


class Clock(Callback):
    """Times each step."""

    def __init__(self) -> None:
        self.timings: list[Timing] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        self.meter = Meter().__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop."""
        self.meter.__exit__()
        self.timings.append(Timing(self.meter.seconds, self.meter.others))


def alternate(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Timing]]:
    """Run the sides in turns, so that whatever else the machine does meets all of them.

    Args:
        sides: what to run, by name.
        rounds: how often each is run; where a side warms up, that is the caller's to do before.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(rounds):
        for name in order:
            with Meter() as meter:
                sides[name]()
            timings[name].append(Timing(meter.seconds, meter.others))
        order = order[1:] + order[:1]
    return timings


def median(values: Iterable[float]) -> float:
    """The median."""
    return statistics.median(list(values))


def ratio(ours: Sequence[Timing], peer: Sequence[Timing]) -> float:
    """Median, over the rounds, of our time over the peer's in the same round."""
    return median(a.seconds / b.seconds for a, b in zip(ours, peer, strict=True))


def load(timings: Sequence[Timing]) -> str:
    """Cores that others kept busy: the median over the rounds and the worst of them."""
    return f"{median(t.others for t in timings):.2f} (max {max(t.others for t in timings):.2f})"


def heading(title: str, text: str) -> None:
    """Print a section's title and what stands below it.

    Args:
        title: of the section.
        text: a paragraph, wrapped here.
    """
    print(f"## {title}\n\n{textwrap.fill(text, 120)}\n")


def table(rows: Sequence[dict[str, str]]) -> str:
    """A markdown table.

    Args:
        rows: cells by column; all with the same columns.
    """
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def claim(what: str, required: str, measured: str, met: bool) -> dict[str, str]:
    """A row of the table of what is required."""
    return {"what": what, "required": required, "measured": measured, "": "met" if met else "**missed**"}


def unshifted_means(model: torch.nn.Module, batch: TokenBatch) -> LogProbs:
    """What some published code trains on: the logits at each token score that token itself, and means replace sums."""
    logps = model(batch["tokens"]).log_softmax(-1).gather(2, batch["tokens"][..., None])[..., 0]
    counts = batch["targets"].sum(dim=1)
    return LogProbs((logps * batch["targets"]).sum(dim=1) / counts, counts)


class Pair(NamedTuple):
    """Token ids of a preference pair; both responses end with the end-of-sequence token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


EOS = 1


def synthetic_pairs(count: int, vocabulary: int, seed: int = 0) -> list[Pair]:
    """Random pairs with the lengths of short worked answers.

    Prompts have 20 to 120 tokens, responses 30 to 200, both log-normal between. Of a padded batch of 8 pairs, about 39 %
    of the positions are padding and 39 % are response.

    Args:
        count: number of pairs.
        vocabulary: ids are uniform in it.
        seed: of the generator.
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
    """Pairs of a JSONL file with the fields prompt, chosen and rejected.

    A tokenizer is trained on the file, and its ids are spread over the vocabulary.

    Args:
        path: of the file.
        count: number of pairs to take, from the first on.
        vocabulary: number of ids.
        seed: of the permutation of ids.
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
    """Batches of pairs in order, both sides padded to one width."""
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
    """Share of padding, and of responses, in all positions."""
    sides = [side for batch in all_batches for side in (batch["chosen"], batch["rejected"])]
    positions = sum(side["mask"].numel() for side in sides)
    real, responses = (sum(int(side[name].sum()) for side in sides) for name in ("mask", "targets"))
    return 1 - real / positions, responses / positions
