"""Generated sets on disk: what an opponent answered, and what it thinks of both answers, in files that a person can read.

A set is a folder. ``identity.json`` says what its rows depend on. ``part-00000.jsonl`` and so on hold the rows, each file a
batch of prompts of like length, each written whole or not at all; ``manifest.json`` closes the set with their hashes. Parts
depend neither on each other nor on the number of ranks, so a set that was cut off goes on with the parts that are missing.

A row: ``{"row", "prompt", "real", "real_logprob", "generated": [...]}`` with a list of ``{"iteration", "sample", "text",
"tokens", "reason", "logprob", "sampled_logprob", "base_logprob"}``, the newest iteration first.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_align.data.store import StoredRow, TokenStore
from lightning_align.runtime.files import publish_text
from lightning_align.types import SelfPlayBatch, TokenBatch

Row = dict[str, Any]
Array = np.ndarray[Any, Any]


class GeneratedSet:
    """A set of one iteration, complete or not.

    Args:
        folder: of the set.
        identity: what the rows depend on, as JSON can hold it.
        parts: for each part the rows of the source that it answers.
    """

    def __init__(self, folder: Path, identity: Row, parts: list[list[int]]) -> None:
        self.folder, self.identity, self.parts = folder, identity, parts

    def open(self, *, write: bool) -> None:
        """Begin the set, or go on with it.

        Args:
            write: whether this is the rank that writes.

        Raises:
            ValueError: if what is there was generated otherwise.
        """
        path = self.folder / "identity.json"
        if not path.exists():
            if write:
                publish_text(path, json.dumps(self.identity, indent=2))
            return
        found = _read_json(path)
        differences = [name for name in self.identity if found.get(name) != self.identity[name]]
        if differences:
            told = "; ".join(
                f"{name} is {_short(found.get(name))} there and {_short(self.identity[name])} here" for name in differences
            )
            raise ValueError(
                f"{self.folder}: was generated otherwise ({told}). Give SelfPlayGeneration another `folder`, remove this one, "
                "or go on with the checkpoint of the run that made it"
            )

    def path(self, part: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{part:05d}.jsonl"

    def missing(self) -> list[int]:
        """The parts that are not there yet."""
        return [part for part in range(len(self.parts)) if not self.path(part).exists()]

    def write(self, part: int, rows: Sequence[Row]) -> None:
        """Write a part, whole or not at all."""
        publish_text(self.path(part), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def close(self) -> None:
        """Write the hashes of all parts, if they are not there."""
        path = self.folder / "manifest.json"
        if not path.exists():
            hashes = {self.path(part).name: _digest(self.path(part)) for part in range(len(self.parts))}
            publish_text(path, json.dumps({**self.identity, "sha256": hashes}, indent=2))

    def read(self, part: int) -> list[Row]:
        """The rows of a part.

        Raises:
            ValueError: if a row is missing or was altered.
        """
        path, manifest = self.path(part), self.folder / "manifest.json"
        remedy = "Remove the file and go on from the checkpoint at the end of the iteration before, which generates it again"
        if not path.exists():
            raise ValueError(f"{path}: is missing. {remedy}")
        if manifest.exists() and _read_json(manifest)["sha256"].get(path.name) != _digest(path):
            raise ValueError(f"{path}: is not what was generated (another SHA-256 than in {manifest.name}). {remedy}")
        rows: list[Row] = []
        with path.open(encoding="utf-8") as lines:  # not `splitlines`, which also parts at U+2028 and the like
            for number, line in enumerate(lines, start=1):
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: is not JSON ({error}). {remedy}") from error
        found, expected = [row.get("row") for row in rows], self.parts[part]
        if found != expected:
            lost = [row for row in expected if row not in found][:3]
            which = f"; row {lost[0]} is missing" if lost else ""
            raise ValueError(f"{path}: has {len(rows)} rows, expected {len(expected)}{which}. {remedy}")
        return rows

    def rows(self) -> Iterator[Row]:
        """All rows, part by part."""
        for part in range(len(self.parts)):
            yield from self.read(part)


def plan(store: TokenStore, *, num_prompts: int | None, size: int) -> list[list[int]]:
    """Parts of prompts of like length: indices of the store's rows, the first so many of them."""
    count = len(store) if num_prompts is None else min(num_prompts, len(store))
    lengths = [int(n) for n in store.table["num_prompt"].to_numpy()[:count]]
    order = sorted(range(count), key=lambda index: lengths[index])
    return [order[start : start + size] for start in range(0, count, size)]


def statistics(rows: Sequence[Row], *, iteration: int, eos_id: int, real: dict[int, list[int]]) -> dict[str, float]:
    """What an iteration's responses are like, as means over those that it generated itself.

    Args:
        rows: of a set.
        iteration: which responses count; replayed ones do not.
        eos_id: the end-of-sequence id.
        real: for each row the ids of the real response.
    """
    counts: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    for row in rows:
        for answer in row["generated"]:
            if answer["iteration"] != iteration:
                continue
            ids = answer_ids(answer, eos_id)
            counts["generated"] += 1
            counts[answer["reason"]] += 1
            counts["ties"] += ids == real[row["row"]]
            sums["length"] += len(ids)
            sums["gap"] += len(ids) - len(real[row["row"]])
            sums["real_logprob"] += row["real_logprob"]
            if answer.get("sampled_logprob") is not None:
                counts["engine"] += 1
                sums["engine"] += abs(answer["sampled_logprob"] - answer["logprob"])
            if answer.get("base_logprob") is not None:
                counts["based"] += 1
                sums["kl"] += answer["logprob"] - answer["base_logprob"]
    total = max(1, counts["generated"])
    values = {
        "generated": float(counts["generated"]),
        "eos_rate": (counts["eos"] + counts["stop"]) / total,
        "truncation_rate": counts["length"] / total,
        "tie_rate": counts["ties"] / total,
        "length": sums["length"] / total,
        "length_gap": sums["gap"] / total,
        "real_logprob": sums["real_logprob"] / total,
    }
    if counts["engine"]:
        values["engine_gap"] = sums["engine"] / counts["engine"]
    if counts["based"]:
        values["kl_to_base"] = sums["kl"] / counts["based"]
    return values


def answer_ids(answer: Row, eos_id: int) -> list[int]:
    """The ids to learn from: with an end-of-sequence id where the model wrote one, and never where a limit cut it."""
    return [*answer["tokens"], *([eos_id] if answer["reason"] == "eos" else [])]


class Pair(NamedTuple):
    """A real and a generated response to one prompt."""

    stored: StoredRow
    generated: Array
    """(N,) int64, prompt and response."""
    opponent: tuple[float, float]
    """Log-probs of the real and of the generated response under the opponent."""


class Pairs:
    """The pairs of a set, by their index, as a `TokenStore` gives rows.

    Args:
        store: of the real rows.
        rows: of a set.
        eos_id: the end-of-sequence id.
    """

    def __init__(self, store: TokenStore, rows: Sequence[Row], *, eos_id: int) -> None:
        self._store = store
        self._pairs = [
            (row["row"], np.array(answer_ids(answer, eos_id), np.int32), (row["real_logprob"], answer["logprob"]))
            for row in rows
            for answer in row["generated"]
        ]
        self._real = store.lengths()

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Pair:
        row, response, opponent = self._pairs[index]
        stored = self._store[row]
        prompt = stored.sides[0].tokens[: stored.num_prompt]
        return Pair(stored, np.concatenate([prompt, response]).astype(np.int64), opponent)

    def lengths(self) -> Array:
        """(pairs,) tokens of both sides together."""
        return np.array([self._real[row] + len(response) for row, response, _ in self._pairs], np.int64)


def collate_self_play(pairs: Sequence[Pair], *, pad_id: int) -> SelfPlayBatch:
    """Pads pairs on the right: real rows, then generated rows, (2B, N)."""
    sides = [pair.stored.sides[0] for pair in pairs]
    tokens = [torch.from_numpy(side.tokens.astype(np.int64)) for side in sides]
    targets = [torch.from_numpy(side.targets.copy()) for side in sides]
    generated = [torch.from_numpy(pair.generated) for pair in pairs]
    beginnings = [pair.stored.num_prompt for pair in pairs]
    return {
        "pairs": join_pairs(tokens, targets, generated, beginnings, pad_id=pad_id),
        "opponent": torch.tensor([p.opponent[0] for p in pairs] + [p.opponent[1] for p in pairs]),
    }


def join_pairs(
    real: Sequence[Tensor], targets: Sequence[Tensor], generated: Sequence[Tensor], prompts: Sequence[int], *, pad_id: int
) -> TokenBatch:
    """Real rows, then generated rows, padded on the right to one width: (2B, N).

    Args:
        real: (N_i,) int64 ids of prompt and real response.
        targets: (N_i,) bool, its targets.
        generated: (M_i,) int64 ids of prompt and generated response.
        prompts: how many ids of each are the prompt.
        pad_id: the id that fills up.
    """
    wanted = [torch.arange(len(row), device=row.device) >= n for row, n in zip(generated, prompts, strict=True)]
    return join_rows([*real, *generated], [*targets, *wanted], pad_id=pad_id)


def join_rows(rows: Sequence[Tensor], targets: Sequence[Tensor], *, pad_id: int) -> TokenBatch:
    """Rows padded on the right to one width, (B, N).

    Args:
        rows: (N_i,) int64 ids.
        targets: (N_i,) bool.
        pad_id: the id that fills up.
    """
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    return {
        "tokens": torch.stack([F.pad(row, (0, width - len(row)), value=pad_id) for row in rows]),
        # From the lengths: a pad may have the id of a real token.
        "mask": torch.arange(width, device=lengths.device) < lengths[:, None],
        "targets": torch.stack([F.pad(target, (0, width - len(target))) for target in targets]),
    }


def _read_json(path: Path) -> Row:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}): remove the folder, and it is generated again") from error
    return cast(Row, content)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:24]}…"
