"""Log-probs under a frozen reference, computed once and stored on disk.

A row is found by the hash of its token ids and targets, in a folder named by the hash of the reference's weights and the
precision. So a stored number is used exactly where it is valid: for any beta, loss, learning rate, order and number of rows,
and number of processes.

A shard is a safetensors file that is named by the hash of its content and written atomically. A pass that is stopped resumes
after its last shard. A damaged shard does not match its name, and its rows are scored again.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_align.models.shared_rows import plan_prefixes
from lightning_align.runtime.files import publish
from lightning_align.runtime.ranks import everyone
from lightning_align.runtime.team import Team
from lightning_align.scoring.targets import host_counts
from lightning_align.types import LogProbs, TokenBatch

Source = Callable[[nn.Module, TokenBatch], LogProbs]
"""Scores a batch under the reference. It gets the policy, because the reference may share its weights."""
_FORMAT = 1
"""Increase it when the same key stands for another number."""
KEY_BYTES = 16


class StoredLogProbs:
    """A reference that reads stored log-probs. For a missing row it uses the model, while the model is in memory."""

    def __init__(
        self,
        source: Source,
        *,
        again: Callable[[], Source | None] | None = None,
        weights: str,
        precision: str,
        cache_dir: str | Path,
        shard_rows: int = 4096,
    ) -> None:
        """Open the folder of a reference, and read its shards.

        Args:
            source: Scores a batch. `finish` frees it.
            again: Makes the source again for rows that come later. It returns None if that is not possible.
            weights: The hash of the reference's weights.
            precision: The precision of its forward pass, as the Trainer names it.
            cache_dir: The parent of the folder. All nodes must share it.
            shard_rows: Rows per shard. A rank loses at most this many rows in a crash.
        """
        self.source: Source | None = source
        self.stage = "fit"
        """The running command, for messages."""
        self._again, self._is_again = again, False
        self._is_partial, self._in_step = False, False
        self.shard_rows = shard_rows
        content = {"format": _FORMAT, "weights": weights, "precision": precision}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.folder = Path(cache_dir) / f"reference-{digest[:16]}"
        self._content = content
        self._known: dict[bytes, tuple[float, int]] = {}
        self._files: set[str] = set()
        self._new: dict[bytes, tuple[float, int]] = {}
        self._read()

    def __len__(self) -> int:
        """Return the number of stored rows."""
        return len(self._known)

    # -- reading

    def logprobs(self, policy: nn.Module, batch: TokenBatch) -> LogProbs:
        """See `lightning_align.references.protocol.Reference`.

        Raises:
            ValueError: If a row is missing and the model was freed and cannot be made again.
        """
        found, device = self.find(batch), batch["tokens"].device
        if self.is_joint and not everyone(found is not None, device):
            found = None
        if found is not None:
            return LogProbs(*(part.to(device) for part in found))
        scores = self._model()(policy, batch)
        if self._is_partial:
            self._keep(row_keys(batch), scores)
        return scores

    @property
    def is_joint(self) -> bool:
        """Whether all ranks must score a batch if one of them has to, because the model is sharded and rows are missing."""
        return self._is_partial and self._in_step

    def _model(self) -> Source:
        if self.source is None and self._again is not None:
            self.source = self._again()
            self._is_again = True
        if self.source is None:
            raise ValueError(
                f"{self.folder} has no log-probs for a row of `{self.stage}`. The row was not among the rows at the start of "
                "training, and the reference was freed after that. Rows must not change between epochs. For other rows, give "
                "the module a file (`init_from`), from which the reference can be made again, or set `reference: frozen`."
            )
        return self.source

    def find(self, batch: TokenBatch) -> LogProbs | None:
        """Return the log-probs of a batch on the CPU, or None if a row is missing."""
        found = [self._known.get(key) for key in row_keys(batch)]
        known = [row for row in found if row is not None]
        if len(known) < len(found):
            return None
        # With bf16-true the default dtype is bfloat16 in here.
        sums = torch.tensor([total for total, _ in known], dtype=torch.float32)
        return LogProbs(sums, torch.tensor([count for _, count in known]))

    # -- scoring

    def fill(self, batches: Iterable[TokenBatch], policy: nn.Module, device: torch.device, *, in_step: bool = False) -> int:
        """Score and store all rows that are not stored yet.

        Args:
            batches: This rank's share of the rows, on the CPU. Rows that several ranks have are scored by each.
            policy: The policy. The reference may share its weights.
            device: The device of the source.
            in_step: Whether all ranks must run the same forward passes, as with a sharded model.

        Returns:
            The number of rows that this rank scored.

        Raises:
            ValueError: See `logprobs`.
        """
        try:
            done = self._score(batches, policy, device, in_step=in_step)
        finally:
            self._write()  # also what was scored before a signal or an error
        self._in_step = in_step
        return done

    def _score(self, batches: Iterable[TokenBatch], policy: nn.Module, device: torch.device, *, in_step: bool) -> int:
        done = 0
        for batch in tqdm(batches, desc="reference log-probs", unit=" batches", leave=False, disable=None):
            keys = row_keys(batch)
            missing = [row for row, key in enumerate(keys) if key not in self._known]
            if in_step and not everyone(not missing, device):
                missing = list(range(len(keys)))
            if not missing:
                continue
            rows = torch.tensor(missing)
            part: Any = {name: value[rows] for name, value in batch.items() if isinstance(value, Tensor)}
            plan = {} if batch.get("prefixes") is None else {"prefixes": plan_prefixes(part, worth=batch["prefixes"].worth)}
            counts = host_counts(part) | plan
            part = {name: value.to(device, non_blocking=True) for name, value in part.items()} | counts
            self._keep([keys[row] for row in missing], self._model()(policy, part))
            done += len(missing)
        return done

    def _keep(self, keys: list[bytes], scores: LogProbs) -> None:
        scored = dict(zip(keys, zip(scores.sums.float().tolist(), scores.counts.tolist(), strict=True), strict=True))
        self._new.update(scored)
        self._known.update(scored)
        if len(self._new) >= self.shard_rows:
            self._write()

    def exchange(self, team: Team) -> None:
        """Copy the shards of ranks that have a folder on another node into the folder of this rank. Call it on all ranks.

        Args:
            team: The ranks, each of which has scored its share.
        """
        seen = team.gather(sorted(path.name for path in self.folder.glob("*.safetensors")))
        common = set(seen[0]).intersection(*seen)
        if all(set(names) == common for names in seen):
            return  # they share one folder
        mine = {path.name: path.read_bytes() for path in self.folder.glob("*.safetensors") if path.name not in common}
        for shards in team.gather(mine):
            for name, content in shards.items():
                if not (self.folder / name).exists():
                    publish(self.folder / name, partial(_write_bytes, content=content))

    def finish(self, *, is_complete: bool = True) -> None:
        """Read the shards of all ranks, which must have written them, and free the model.

        Args:
            is_complete: Whether all rows of the run are stored. If not, the model stays, and rows are stored when they come.
        """
        self._read()
        self._is_partial = not is_complete
        if is_complete:
            self.source = None

    def rest(self) -> None:
        """Store the rows of a command that has ended, and free the model if it was made again for that command."""
        self._write()
        if self._is_again:
            self.source, self._is_again = None, False

    # -- files

    def _write(self) -> None:
        if not self._new:
            return
        keys = torch.frombuffer(bytearray(b"".join(self._new)), dtype=torch.uint8).view(-1, KEY_BYTES)
        sums, counts = zip(*self._new.values(), strict=True)
        content = save({"keys": keys, "sums": torch.tensor(sums, dtype=torch.float32), "counts": torch.tensor(counts)})
        name = hashlib.sha256(content).hexdigest() + ".safetensors"
        publish(self.folder / name, lambda path: _write_bytes(path, content))
        manifest = json.dumps(self._content, indent=2)
        publish(self.folder / "manifest.json", lambda path: _write_bytes(path, manifest.encode()))
        self._files.add(name)
        self._new.clear()

    def _read(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._files:
                continue
            try:
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() != path.stem:
                    raise ValueError("its content does not match its name")
                shard = load(content)
                keys, sums, counts = shard["keys"], shard["sums"].tolist(), shard["counts"].tolist()
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                warnings.warn(f"{path} is damaged ({error}). Its rows will be scored again.", stacklevel=2)
                continue
            joined = keys.numpy().tobytes()
            names = (joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES))
            self._known.update(zip(names, zip(sums, counts, strict=True), strict=True))
            self._files.add(path.name)
        rank_zero_info(f"{self.folder} has reference log-probs of {len(self)} rows")


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def row_keys(batch: TokenBatch) -> list[bytes]:
    """Return the key of each row: the hash of its token ids, its targets, and the weights of its targets, without padding."""
    tokens, targets = batch["tokens"].cpu(), batch["targets"].cpu()
    lengths = batch["mask"].sum(dim=1).tolist()
    weights: Tensor | None = batch["target_weights"].float().cpu() if "target_weights" in batch else None
    ids, marks = tokens.to(torch.int64).numpy(), targets.numpy()
    keys = []
    for row, length in enumerate(lengths):
        digest = hashlib.blake2b(ids[row, :length].tobytes(), digest_size=KEY_BYTES)
        digest.update(marks[row, :length].tobytes())
        if weights is not None:
            digest.update(weights[row][targets[row]].numpy().tobytes())
        keys.append(digest.digest())
    return keys
