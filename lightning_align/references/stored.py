"""Log-probs under a reference that does not move, computed once and kept on disk.

Each row stands there under the hash of its token ids and targets, in a folder named by the hash of the reference's weights
and the precision. So whatever changes a number makes another name, and nothing else does: beta, the loss, the learning
rate, the order of the rows, their number and the number of processes all find what is there.

A shard is a safetensors file, named by the hash of its content and published whole. A pass that was cut off goes on after
the last shard that it wrote; one that is damaged is noticed by its name and made again.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_align.runtime.files import publish
from lightning_align.runtime.ranks import everyone, world
from lightning_align.types import LogProbs, TokenBatch

Source = Callable[[nn.Module, TokenBatch], LogProbs]
"""Scores a batch, given the policy, as a frozen reference does."""
_FORMAT = 1
"""Raise it when the same key comes to mean another number."""
KEY_BYTES = 16


class StoredLogProbs:
    """A reference that looks its numbers up. Where one is missing it asks the model, as long as it has it."""

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
        """Open the folder of a reference, and read what is there.

        Args:
            source: scores a batch; let go by `finish`.
            again: makes the source once more, where rows come later; None from it, or none of it, if nothing can.
            weights: hash of the reference's weights.
            precision: of its forward pass, as the Trainer names it.
            cache_dir: where the folder stands, or is made; all nodes must see it.
            shard_rows: rows of a file: what a rank may have to do again after a crash.
        """
        self.source: Source | None = source
        self.stage = "fit"
        """What asks for rows, for messages."""
        self._again, self._is_again = again, False
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
        """Rows that are known."""
        return len(self._known)

    # -- looking up

    def logprobs(self, policy: nn.Module, batch: TokenBatch) -> LogProbs:
        """See `lightning_align.references.protocol.Reference`.

        Raises:
            ValueError: if a row is not there, and the model is not either and cannot be made again.
        """
        found = self.find(batch)
        if found is not None:
            return LogProbs(*(part.to(batch["tokens"].device) for part in found))
        return self._model()(policy, batch)

    def _model(self) -> Source:
        if self.source is None and self._again is not None:
            self.source = self._again()
            self._is_again = True
        if self.source is None:
            raise ValueError(
                f"{self.folder} has no log-probs of a row that `{self.stage}` asks for: it was not there when the training "
                "began, and then the reference was let go. Rows must stay as they are from epoch to epoch; for others make the "
                "module from a file (`init_from`), of which the reference can be made again, or give it `reference: frozen`"
            )
        return self.source

    def find(self, batch: TokenBatch) -> LogProbs | None:
        """The log-probs of a batch on the CPU, or None if any of its rows is not known."""
        found = [self._known.get(key) for key in row_keys(batch)]
        known = [row for row in found if row is not None]
        if len(known) < len(found):
            return None
        return LogProbs(torch.tensor([total for total, _ in known]), torch.tensor([count for _, count in known]))

    # -- filling

    def fill(self, batches: Iterable[TokenBatch], policy: nn.Module, device: torch.device, *, in_step: bool = False) -> int:
        """Score and store all rows that are not known yet.

        Args:
            batches: this rank's share of the rows, on the CPU. What ranks have beyond their shares is done twice.
            policy: which the reference may be a part of.
            device: where the source scores.
            in_step: whether every rank must run every forward pass that any of them runs, as of a sharded model.

        Returns:
            How many rows this rank scored.

        Raises:
            ValueError: as `logprobs`.
        """
        done = 0
        for batch in tqdm(batches, desc="reference log-probs", unit=" batches", leave=False, disable=None):
            keys = row_keys(batch)
            missing = [row for row, key in enumerate(keys) if key not in self._known]
            if in_step and not everyone(not missing, device):
                missing = list(range(len(keys)))
            if not missing:
                continue
            rows = torch.tensor(missing)
            part: TokenBatch = {name: value[rows].to(device) for name, value in batch.items()}  # type: ignore[assignment]
            sums, counts = self._model()(policy, part)
            numbers = zip(sums.float().tolist(), counts.tolist(), strict=True)
            scored = dict(zip((keys[row] for row in missing), numbers, strict=True))
            self._new.update(scored)
            self._known.update(scored)
            done += len(missing)
            if len(self._new) >= self.shard_rows:
                self._write()
        self._write()
        return done

    def finish(self) -> None:
        """Wait for all ranks, read what they wrote, and let the model go."""
        if world()[1] > 1:
            torch.distributed.barrier()
        self._read()
        self.source = None

    def rest(self) -> None:
        """Let the model go if it was made again, for a stage that is over."""
        if self._is_again:
            self.source, self._is_again = None, False

    # -- files

    def _write(self) -> None:
        if not self._new:
            return
        keys = torch.frombuffer(bytearray(b"".join(self._new)), dtype=torch.uint8).view(-1, KEY_BYTES)
        sums, counts = zip(*self._new.values(), strict=True)
        content = save({"keys": keys, "sums": torch.tensor(sums), "counts": torch.tensor(counts)})
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
                    raise ValueError("its content is not what it was written with")
                shard = load(content)
                keys, sums, counts = shard["keys"], shard["sums"].tolist(), shard["counts"].tolist()
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                warnings.warn(f"{path} is damaged, and its rows will be scored again ({error})", stacklevel=2)
                continue
            joined = keys.numpy().tobytes()
            names = (joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES))
            self._known.update(zip(names, zip(sums, counts, strict=True), strict=True))
            self._files.add(path.name)
        rank_zero_info(f"{len(self)} rows of reference log-probs in {self.folder}")


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def row_keys(batch: TokenBatch) -> list[bytes]:
    """The key of each row: the hash of its token ids and targets, and of the targets' weights if it has any; no padding."""
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
