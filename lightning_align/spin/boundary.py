"""The boundary between two iterations: which weights the next one begins with, and the checkpoints that are saved there."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_align.models.building import has_own_weights
from lightning_align.models.composed import is_composed
from lightning_align.models.formats import whole_weights
from lightning_align.models.weights import check_weights, state_hash
from lightning_align.runtime.lightning_internals import is_fast_dev_run, last_saved_step, link_last
from lightning_align.runtime.ranks import is_sharded
from lightning_align.runtime.team import of_first_rank
from lightning_align.spin.stored import (
    AVERAGE,
    POLICY,
    base_names,
    content_hash,
    differ_by_rounding,
    put_weights,
    read_origin,
    read_weights,
    relative_distance,
    save_weights,
)

START = "start.ckpt"
"""The checkpoint at the boundary, in the folder of the iteration that begins there."""
FAR = 0.1
"""Two runs of an iteration that are this far apart, relative to what the iteration changed, differ by more than rounding."""


class Boundary:
    """The start of an iteration.

    Args:
        trainer: The trainer.
        module: The module, which begins the iteration.
        root: The folder of the iteration.
        run: The id of the run.
    """

    def __init__(self, trainer: L.Trainer, module: Any, root: Path, *, run: str) -> None:
        self.trainer, self.module, self.root, self.run = trainer, module, root, run
        # Only rank 0 needs the weights: it stores and compares them. To gather sharded ones, all ranks must take part.
        moving = module.opponent.moving
        # A LoRA run reads its base model again from where it came from. Iterations do not write billions of equal weights.
        is_read = module.init_from is not None or has_own_weights(module.policy)
        self.base = base_names(module.policy) if module.lora is not None and is_read else set[str]()
        self.weights, self.average = self._whole(module.policy), {} if moving is None else self._whole(moving.average)
        own = ""
        if trainer.is_global_zero:
            # The hash also covers the other weights of the opponent: an average and a base.
            own = state_hash({**self.weights, **{f"average.{name}": value for name, value in self.average.items()}})
            if is_composed(module.policy):
                own = hashlib.sha256(f"{own} {sorted(module.policy.identity.items())}".encode()).hexdigest()
            own = own if module.base_hash is None else f"{own[:32]}{module.base_hash[:32]}"
        self.digest: str = of_first_rank(own)
        """The hash of the weights that the iteration begins with."""

    def _whole(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the whole weights of a model on rank 0, and nothing on the others."""
        first = self.trainer.is_global_zero
        return whole_weights(model, keep=first) if first or is_sharded(model) else {}

    def settle(self) -> None:
        """Store the weights, or use the stored ones if the iteration has begun before. Every rank must call this.

        Raises:
            ValueError: If the stored weights are of another run, or cannot be read.
        """
        decision = "keep", ""
        if self.trainer.is_global_zero:
            try:
                decision = self._decide()
            except ValueError as error:  # every rank must raise, or the others would wait
                decision = "raise", str(error)
        action, text = of_first_rank(decision)
        if action == "raise":
            raise ValueError(text)
        if action == "use":
            self._use_stored()
            rank_zero_info(text)
        elif action == "warn":
            self._use_stored()
            rank_zero_warn(text)

    def _decide(self) -> tuple[str, str]:
        path, average = self.root / POLICY, self.root / AVERAGE
        if not path.exists():
            if self.module.opponent_kind == "ema":
                save_weights(average, self.average, digest=self.digest, run=self.run)
            save_weights(path, self.weights, digest=self.digest, run=self.run, base=self.base)
            return "keep", ""
        origin = read_origin(path)
        if origin.weights == self.digest:
            return "keep", ""
        own_base = {name: value for name, value in self.weights.items() if name in self.base} if origin.frozen else {}
        if origin.frozen and origin.frozen != content_hash(own_base):
            raise ValueError(
                f"{self.root} began with adapters of another base model than this run has. Give the `init_from` and the "
                "`backbone` that the run started with, or give SelfPlayGeneration another `folder`."
            )
        stored = {**own_base, **read_weights(path)}
        number = self.root.name.removeprefix("iteration_")
        # Weights from a file have the same bits everywhere, and random ones do not.
        may_differ = origin.run == self.run or self.module.init_from is None
        if may_differ and differ_by_rounding(self.weights, stored):
            return "use", f"Iteration {number} uses the weights in {path}. They differ from those of this run by rounding."
        if origin.run != self.run:
            raise ValueError(
                f"{self.root} holds an iteration that began with other weights ({origin.weights[:12]}) than this run "
                f"({self.digest[:12]}). Give SelfPlayGeneration another `folder`, remove this one, or resume from a checkpoint "
                "of the run that wrote it."
            )
        check_weights(self.module.policy, stored, path)
        text = f"Iteration {number} goes on with the weights in {path}, which this run stored when it began the iteration."
        before = self.root.with_name(f"iteration_{int(number) - 1}") / POLICY
        if not before.exists():
            return "use", text
        apart = relative_distance(self.weights, stored, {**own_base, **read_weights(before)})
        text = f"{text} The weights that were trained again are {apart:.2g} of the last iteration's change away from them."
        if apart < FAR:
            return "use", text
        return "warn", f"{text} That is more than rounding. If you changed settings, give SelfPlayGeneration another `folder`."

    def _use_stored(self) -> None:
        module, path = self.module, self.root / POLICY
        put_weights(module.policy, read_weights(path), path)
        if module.opponent_kind == "ema" and (self.root / AVERAGE).exists():
            put_weights(module.opponent.moving.average, read_weights(self.root / AVERAGE), self.root / AVERAGE)
            module.restore_opponent()
        else:
            module.begin_iteration(module.iteration)
        self.digest = read_origin(path).weights
        if module.base_hash is not None and self.digest[32:] != module.base_hash[:32]:
            self._use_stored_base(module.opponent.base(module.policy), self.root.with_name("iteration_0") / POLICY)

    def _use_stored_base(self, base: Any, path: Path) -> None:
        """Use the first weights of the run as the base, from which the rebuilt base may differ by rounding."""
        own = whole_weights(base)
        if not path.exists() or not differ_by_rounding(own, read_weights(path)):
            raise ValueError(
                f"{self.root} was generated with another base than this run has. Give the `init_from` and the `backbone` that "
                "the run started with, or give SelfPlayGeneration another `folder`."
            )
        put_weights(base, read_weights(path), path)
        self.module.base_hash = self.digest[32:]


def save_boundary(trainer: L.Trainer, root: Path, *, force_last: bool) -> None:
    """Save a checkpoint at the end of an iteration: in the folder of the next one, and as `last.ckpt`. Call it on every rank.

    Args:
        trainer: The trainer.
        root: The folder of the next iteration. If that iteration began before, its checkpoint is kept.
        force_last: Whether to save `last.ckpt` again if it was saved after the last step.
    """
    if is_fast_dev_run(trainer):
        return
    kept = (root / START).exists() and (root / POLICY).exists()
    if not of_first_rank(kept):
        save_checkpoint(trainer, root / START)
        rank_zero_info(f"{root.name.replace('_', ' ').capitalize()} begins. A run that is stopped resumes with {root / START}.")
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or not callback.save_last or callback.dirpath is None:
            continue
        if force_last or last_saved_step(callback) != trainer.global_step:
            name = f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
            # Set before saving, because the checkpoint contains it.
            callback.last_model_path = callback.last_model_path or str(Path(callback.dirpath) / name)
            if callback.save_last == "link":
                link_last(trainer, callback, str(root / START))
            else:
                save_checkpoint(trainer, callback.last_model_path, weights_only=callback.save_weights_only)


def save_checkpoint(trainer: L.Trainer, path: str | Path, *, weights_only: bool = False) -> None:
    """Save a checkpoint, completely or not at all. A link is replaced by the checkpoint. Every rank must call this.

    Args:
        trainer: The trainer.
        path: The file, or the folder of a sharded checkpoint.
        weights_only: Whether to save only the weights.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
    trainer.strategy.barrier("self-play checkpoint begins")
    trainer.save_checkpoint(temporary, weights_only)
    trainer.strategy.barrier("self-play checkpoint written")
    if trainer.is_global_zero:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        os.replace(temporary, path)
    trainer.strategy.barrier("self-play checkpoint renamed")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
