"""Generated sets on disk: the responses of an opponent and its log-probs of both responses, as readable JSON.

A set is a folder:

- ``identity.json`` holds the settings that its rows depend on.
- ``part-00000.jsonl``, ``part-00001.jsonl`` and so on hold the rows. Each file is a batch of prompts of similar length. A file
  is written completely or not at all.
- ``manifest.json`` holds the hashes of the parts. It completes the set.

Parts do not depend on each other or on the number of ranks. A set that was interrupted resumes with the missing parts.

A row has the keys ``{"row", "prompt", "real", "real_logprob", "generated": [...]}``. Each entry of the list has the keys
``{"iteration", "sample", "text", "tokens", "reason", "end", "logprob", "sampled_logprob", "base_logprob"}``. The newest
iteration comes first. ``end`` is the id that ended the response. ``unsupported`` counts the ids of an engine that the tokenizer
does not have. ``checksum`` is the hash of the other entries of a row.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_align.data.store import StoredRow
from lightning_align.runtime.checksums import sealed
from lightning_align.runtime.files import publish_text
from lightning_align.spin.set_files import Row, checked_row, read_identity, read_json, short
from lightning_align.types import SelfPlayBatch, TokenBatch

Array = np.ndarray[Any, Any]


class GeneratedSet:
    """The generated set of one iteration, complete or incomplete.

    Args:
        folder: The folder of the set.
        identity: The settings that the rows depend on. They must be serializable as JSON.
        parts: For each part, the indices of the source rows that it answers.
    """

    def __init__(self, folder: Path, identity: Row, parts: list[list[int]]) -> None:
        self.folder, self.identity, self.parts = folder, identity, parts

    def open(self, *, write: bool) -> None:
        """Begin the set, or check that an existing set has the same identity.

        Args:
            write: Whether this rank writes.

        Raises:
            ValueError: If the existing set was generated with other settings.
        """
        path = self.folder / "identity.json"
        if not path.exists():
            if write:
                if any(self.folder.glob("part-*.jsonl")):
                    raise ValueError(
                        f"{path} is missing, so the settings of the responses in its folder are not known. Remove "
                        f"{self.folder} to generate the set again."
                    )
                publish_text(path, json.dumps(sealed(self.identity), indent=2))
            return
        found = read_identity(self.folder)
        differences = [name for name in self.identity if found.get(name) != self.identity[name]]
        if differences:
            changes = ", ".join(
                f"`{name}` was {short(found.get(name))} and is now {short(self.identity[name])}" for name in differences
            )
            raise ValueError(
                f"{self.folder} was generated with other settings: {changes}. Give SelfPlayGeneration another `folder`, remove "
                "this one, or resume from a checkpoint of the run that wrote it."
            )

    def path(self, part: int) -> Path:
        """Return the path of a part."""
        return self.folder / f"part-{part:05d}.jsonl"

    def missing(self) -> list[int]:
        """Return the parts that do not exist yet."""
        return [part for part in range(len(self.parts)) if not self.path(part).exists()]

    def write(self, part: int, rows: Sequence[Row]) -> None:
        """Write a part, completely or not at all."""
        publish_text(self.path(part), "".join(json.dumps(sealed(row), ensure_ascii=False) + "\n" for row in rows))

    def close(self) -> None:
        """Write the hashes of all parts, unless the manifest exists already."""
        path = self.folder / "manifest.json"
        if not path.exists():
            hashes = {self.path(part).name: _digest(self.path(part)) for part in range(len(self.parts))}
            publish_text(path, json.dumps(sealed({**self.identity, "sha256": hashes}), indent=2))

    def read(self, part: int) -> list[Row]:
        """Read the rows of a part.

        Raises:
            ValueError: If the file is missing, or if a row is missing or was changed.
        """
        path, manifest = self.path(part), self.folder / "manifest.json"
        remedy = f"Remove the file and resume from {self._start()}. This generates it again."
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing. {remedy}") from error
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror or error}). {remedy}") from error
        if manifest.exists() and self._hashes().get(path.name) != hashlib.sha256(data).hexdigest():
            raise ValueError(f"{path} was changed after it was written: its SHA-256 differs from {manifest.name}. {remedy}")
        rows: list[Row] = []
        # Not `splitlines`, which also splits at U+2028 and similar.
        for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else [], start=1):
            try:
                rows.append(checked_row(json.loads(line.decode())))
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not a row of a generated set ({error}). {remedy}") from error
        found, expected = [row["row"] for row in rows], self.parts[part]
        if found != expected:
            missing = [row for row in expected if row not in found][:3]
            which = f" Row {missing[0]} is missing." if missing else ""
            raise ValueError(f"{path} has {len(rows)} rows, but {len(expected)} were expected.{which} {remedy}")
        return rows

    def check_manifest(self) -> None:
        """Check the parts that are left of a complete set that lacks some. Its manifest is no longer needed then."""
        if (self.folder / "manifest.json").exists():
            for part in set(range(len(self.parts))) - set(self.missing()):
                self.read(part)

    def drop_manifest(self) -> None:
        """Remove the manifest, so that missing parts can be written."""
        (self.folder / "manifest.json").unlink(missing_ok=True)

    def _hashes(self) -> dict[str, str]:
        path = self.folder / "manifest.json"
        hashes = read_json(path).get("sha256")
        if not isinstance(hashes, dict):
            raise ValueError(f"{path} has no hashes. Remove the file, if you trust the responses beside it.")
        return hashes

    def _start(self) -> str:
        """Return which checkpoint to resume from to generate parts of this set again."""
        start = self.folder.parent / "start.ckpt"
        return str(start) if start.exists() else "the checkpoint at the end of the previous iteration"

    def rows(self) -> Iterator[Row]:
        """Yield all rows, part by part."""
        for part in range(len(self.parts)):
            yield from self.read(part)


def plan(store: Any, *, num_prompts: int | None, size: int) -> list[list[int]]:
    """Split the first `num_prompts` rows of a store into parts of prompts of similar length.

    Args:
        store: The rows.
        num_prompts: The number of rows to use. None uses all rows.
        size: The number of rows per part.

    Returns:
        For each part, the indices of its rows.
    """
    count = len(store) if num_prompts is None else min(num_prompts, len(store))
    lengths = [int(n) for n in store.table["num_prompt"].to_numpy()[:count]]
    order = sorted(range(count), key=lambda index: lengths[index])
    return [order[start : start + size] for start in range(0, count, size)]


def statistics(rows: Sequence[Row], *, iteration: int, eos_id: int | None, real: dict[int, list[int]]) -> dict[str, float]:
    """Compute statistics of the responses that an iteration generated, as means over these responses.

    Args:
        rows: The rows of a set.
        iteration: The iteration. Replayed responses of earlier iterations are not counted.
        eos_id: The end-of-sequence id of responses of earlier versions, which do not store theirs.
        real: The ids of the real response to each row.

    Returns:
        The count of responses (`generated`), the rates of ends, truncations and ties, and the means per response: `length` and
        `length_gap` (generated minus real) in tokens, `real_logprob` and `kl_to_base` in nats, `engine_gap`, the absolute
        difference in nats between the log-prob of the engine and ours, and `unsupported`, the number of ids of an engine that
        the tokenizer does not have, if there are any.
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
            counts["unsupported"] += answer.get("unsupported", 0)
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
    if counts["unsupported"]:
        values["unsupported"] = float(counts["unsupported"])
    if counts["based"]:
        values["kl_to_base"] = sums["kl"] / counts["based"]
    return values


def answer_ids(answer: Row, eos_id: int | None = None) -> list[int]:
    """Return the ids of a response to train on. They include an end-of-sequence id only if the model wrote it.

    Args:
        answer: The response.
        eos_id: The end-of-sequence id of responses of earlier versions, which do not store theirs.
    """
    end = answer.get("end", eos_id) if answer["reason"] == "eos" else None
    return [*answer["tokens"], *([] if end is None else [end])]


class Pair(NamedTuple):
    """A real and a generated response to the same prompt."""

    stored: StoredRow
    generated: Array
    """(N,) int64, the ids of the prompt and the generated response."""
    opponent: tuple[float, float]
    """Log-probs of the real and the generated response under the opponent, in nats."""


class Pairs:
    """The pairs of a set, accessible by index like the rows of a `TokenStore`.

    Args:
        store: The store of the real rows.
        rows: The rows of a set.
        eos_id: The end-of-sequence id of responses of earlier versions, which do not store theirs.
    """

    def __init__(self, store: Any, rows: Sequence[Row], *, eos_id: int | None = None) -> None:
        self._store = store
        self._pairs = [
            (row["row"], np.array(answer_ids(answer, eos_id), np.int32), (row["real_logprob"], answer["logprob"]))
            for row in rows
            for answer in row["generated"]
        ]
        self._real = store.lengths()

    def __len__(self) -> int:
        return len(self._pairs)

    def rows(self) -> list[int]:
        """Return the number of the row of each pair."""
        return [row for row, *_ in self._pairs]

    def __getitem__(self, index: int) -> Pair:
        row, response, opponent = self._pairs[index]
        stored = self._store[row]
        prompt = stored.sides[0].tokens[: stored.num_prompt]
        return Pair(stored, np.concatenate([prompt, response]).astype(np.int64), opponent)

    def store_rows(self) -> Array:
        """Return the number of the real row of each pair in the store, (pairs,) int64."""
        return np.array([row for row, _, _ in self._pairs], np.int64)

    def lengths(self) -> Array:
        """Return the number of tokens of each pair, both sides together, (pairs,) int64."""
        return np.array([self._real[row] + len(response) for row, response, _ in self._pairs], np.int64)


def collate_self_play(pairs: Sequence[Pair], *, pad_id: int) -> SelfPlayBatch:
    """Collate pairs into a batch: real rows, then generated rows, padded on the right, (2B, N)."""
    sides = [pair.stored.sides[0] for pair in pairs]
    tokens = [torch.from_numpy(side.tokens.astype(np.int64)) for side in sides]
    targets = [torch.from_numpy(side.targets.copy()) for side in sides]
    generated = [torch.from_numpy(pair.generated) for pair in pairs]
    prompt_lengths = [pair.stored.num_prompt for pair in pairs]
    return {
        "pairs": join_pairs(tokens, targets, generated, prompt_lengths, pad_id=pad_id),
        "opponent": torch.tensor([p.opponent[0] for p in pairs] + [p.opponent[1] for p in pairs]),
    }


def join_pairs(
    real: Sequence[Tensor], targets: Sequence[Tensor], generated: Sequence[Tensor], prompts: Sequence[int], *, pad_id: int
) -> TokenBatch:
    """Join real rows and then generated rows into one batch, padded on the right, (2B, N).

    Args:
        real: The ids of prompt and real response, (N_i,) int64 each.
        targets: The target mask of each real row, (N_i,) bool.
        generated: The ids of prompt and generated response, (M_i,) int64 each.
        prompts: The number of prompt ids of each row.
        pad_id: The id of the padding.
    """
    generated_targets = [torch.arange(len(row), device=row.device) >= n for row, n in zip(generated, prompts, strict=True)]
    return join_rows([*real, *generated], [*targets, *generated_targets], pad_id=pad_id)


def join_rows(rows: Sequence[Tensor], targets: Sequence[Tensor], *, pad_id: int) -> TokenBatch:
    """Join rows into one batch, padded on the right, (B, N).

    Args:
        rows: The ids of each row, (N_i,) int64.
        targets: The target mask of each row, (N_i,) bool.
        pad_id: The id of the padding.
    """
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    return {
        "tokens": torch.stack([F.pad(row, (0, width - len(row)), value=pad_id) for row in rows]),
        # The mask comes from the lengths, because the padding id may also be the id of a real token.
        "mask": torch.arange(width, device=lengths.device) < lengths[:, None],
        "targets": torch.stack([F.pad(target, (0, width - len(target))) for target in targets]),
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
