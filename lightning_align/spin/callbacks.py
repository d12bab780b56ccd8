"""The loop of self-play: when an iteration begins, what is generated for it, and when to stop."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_align.data.store import TokenStore
from lightning_align.generation.backend import GenerationBackend, NativeBackend
from lightning_align.models.formats import whole_weights
from lightning_align.models.weights import state_hash
from lightning_align.runtime.files import publish
from lightning_align.runtime.lightning_internals import limit_epochs, replace_schedule, set_reload_interval, skip_no_batches
from lightning_align.spin.generations import GeneratedSet, Pairs, Row, plan, statistics
from lightning_align.spin.opponent import served_weights
from lightning_align.spin.play import Play, real_ids

SHOWN = 4
"""Prompts of an iteration that TensorBoard shows."""


class SelfPlayGeneration(Callback):
    """Runs self-play as iterations of one fit: generate from the opponent, score, train, and again.

    An iteration is a number of epochs over its pairs. The trainer is told to end after the last one. All that an iteration
    trains on stands in ``<folder>/iteration_<t>/`` (see `lightning_align.spin.generations`), with the policy that it began
    with; the state of a checkpoint names the folder, so a run that is resumed finds it, unless it is told of another.
    """

    def __init__(
        self,
        *,
        iterations: int = 3,
        epochs: int | Sequence[int] = 1,
        replay: int = 1,
        num_prompts: int | None = None,
        lr_factors: Sequence[float] | None = None,
        reset_optimizer: bool = True,
        folder: str | None = None,
        backend: GenerationBackend | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        patience: int = 0,
    ) -> None:
        """Choose the schedule.

        Args:
            iterations: T.
            epochs: over the pairs of an iteration; a list has one number an iteration.
            replay: so many iterations before take part with their responses, scored anew by the new opponent.
            num_prompts: how many of the training prompts are answered, the first; all by default.
            lr_factors: factor on the optimizer's learning rate, one an iteration.
            reset_optimizer: whether optimizer and schedule begin anew with each iteration.
            folder: where generated sets are kept; by default `generations` in the run's folder. With several nodes, one that
                all of them see.
            backend: who generates; by default the sampler of this package.
            monitor: a logged metric. After an iteration that did not improve it, the run ends with the weights of the best one,
                which are then in `best.ckpt` in the folder and in the trainer's `last.ckpt`.
            mode: whether that metric is to grow (`max`) or to fall (`min`).
            patience: iterations without improvement that are borne; after the last one the weights are those of the best.

        Raises:
            ValueError: if a number is out of range.
        """
        numbers = [epochs] * iterations if isinstance(epochs, int) else list(epochs)
        for name, value, least in (("iterations", iterations, 1), ("replay", replay, 0), ("patience", patience, 0)):
            if value < least:
                raise ValueError(f"SelfPlayGeneration: {name} is {value}; it must be at least {least}")
        if len(numbers) != iterations or min(numbers) < 1:
            raise ValueError(f"SelfPlayGeneration: epochs is {epochs}; give a number of at least 1, or {iterations} of them")
        if lr_factors is not None and (len(lr_factors) != iterations or min(lr_factors) <= 0):
            raise ValueError(
                f"SelfPlayGeneration: lr_factors is {list(lr_factors)}; expected {iterations} numbers above 0, one an iteration"
            )
        if num_prompts is not None and num_prompts < 1:
            raise ValueError(f"SelfPlayGeneration: num_prompts is {num_prompts}; it must be at least 1, or null for all")
        if mode not in ("min", "max"):
            raise ValueError(f"SelfPlayGeneration: mode is {mode!r}; it must be min or max")
        self.iterations, self.replay, self.num_prompts = iterations, replay, num_prompts
        self._starts = [sum(numbers[:t]) for t in range(iterations + 1)]
        self.lr_factors, self.reset_optimizer = lr_factors, reset_optimizer
        self.folder = None if folder is None else Path(folder)
        self.backend = backend or NativeBackend()
        self.monitor, self.mode, self.patience = monitor, mode, patience
        # What a checkpoint keeps.
        self.iteration = -1
        """The one that has begun last."""
        self._step, self._hash, self._announced = 0, "", -1
        self._history: dict[int, float] = {}
        self._folder: str | None = None
        # What it does not.
        self._cache: dict[str, tuple[int, Pairs, dict[str, float]]] = {}
        self._speed: float | None = None
        self._restored = False

    # -- the trainer's hooks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let the trainer ask for rows anew before each epoch, and end after the last iteration.

        Raises:
            ValueError: if the module does not play against itself, or as the loop was not told to.
        """
        if stage != "fit":
            return
        if not hasattr(pl_module, "begin_iteration"):
            raise ValueError(f"SelfPlayGeneration: {type(pl_module).__name__} has no opponent; it is a callback of SPINModule")
        self._check(pl_module)
        set_reload_interval(trainer, 1)
        limit_epochs(trainer, self._starts[-1])

    def _check(self, module: Any) -> None:
        """Refuse what could not be done before anything is generated."""
        name = type(self.backend).__name__
        if not isinstance(self.backend, NativeBackend):
            if module.generate_mode == "per_step":
                raise ValueError(
                    f"SelfPlayGeneration: backend is {name}, which would never be asked, since generate is 'per_step': "
                    "expected the native one; leave `backend` out, or give SPINModule `generate: per_iteration`"
                )
            if module.opponent_kind == "mixture":
                raise ValueError(
                    f"SelfPlayGeneration: backend is {name}, and opponent 'mixture', two models that no other engine can serve "
                    "as one: leave `backend` out for the native one, or give SPINModule the opponent iterate, ema or base"
                )
        if self.lr_factors is not None and not self.reset_optimizer and module.make_schedule is not None:
            raise ValueError(
                f"SelfPlayGeneration: lr_factors is {list(self.lr_factors)}, with `lr_scheduler` and reset_optimizer false, "
                "where one schedule runs through all iterations and alone says the rate: expected reset_optimizer true, or no "
                "`lr_scheduler`, or no `lr_factors`"
            )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin an iteration, where one begins: its optimizer, its learning rate, its numbers and texts in the log.

        Not at the start of the epoch: Lightning leaves that hook out after resuming from an epoch's last batch.
        """
        self.begin(trainer)
        if self._announced < self.iteration:
            self._announced = self.iteration
            self._prepare_optimizer(trainer)
            self._report(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the last epoch of an iteration, look whether it was of use.

        Raises:
            ValueError: if nothing logs the metric to look at.
        """
        if self.monitor is None or trainer.current_epoch + 1 != self._starts[self.iteration + 1]:
            return
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"SelfPlayGeneration: monitor is {self.monitor!r}, which nothing has logged; there are "
                f"{', '.join(sorted(trainer.callback_metrics))}: validate at the end of each epoch, or monitor one of these"
            )
        self._history[self.iteration] = float(trainer.callback_metrics[self.monitor])
        best = (max if self.mode == "max" else min)(self._history, key=lambda t: self._history[t])
        last = self.iteration == self.iterations - 1
        if best == self.iteration or (not last and self.iteration - best <= self.patience):
            return
        rank_zero_info(
            f"iteration {self.iteration}: {self.monitor} is {self._history[self.iteration]:.4g}, after "
            f"{self._history[best]:.4g} in iteration {best}; the run ends with the weights of that one"
        )
        self._roll_back(trainer, best + 1)
        trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Which iteration it is, what it began with, and where its sets are."""
        names = ("iteration", "_step", "_hash", "_announced", "_history", "_folder")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where that was, but in the folder that this run names, if it does: the other may have been moved there."""
        for name, value in state_dict.items():
            setattr(self, name, value)
        if self.folder is not None:
            self._folder = None

    # -- an iteration

    def begin(self, trainer: L.Trainer) -> None:
        """Begin the iteration of the trainer's epoch, once. Every rank must call it."""
        module: Any = trainer.lightning_module
        if not self._restored:
            self._restored = True
            module.restore_opponent()
            module.iteration = max(self.iteration, 0)
        iteration = next(t for t in reversed(range(self.iterations)) if trainer.current_epoch >= self._starts[t])
        if self._folder is None:
            default = Path(trainer.log_dir or trainer.default_root_dir) / "generations"
            self._folder = str((self.folder or default).resolve())
        if iteration <= self.iteration:
            return
        self.iteration, self._step = iteration, trainer.global_step
        skip_no_batches(trainer, enough=sys.maxsize // 2)
        module.begin_iteration(iteration)
        weights = whole_weights(module.policy)
        # What the opponent is made of besides: an average, a base.
        average = {} if module.opponent.moving is None else whole_weights(module.opponent.moving.average)
        told = state_hash({**weights, **{f"average.{name}": value for name, value in average.items()}})
        self._hash = trainer.strategy.broadcast(told if module.base_hash is None else f"{told[:32]}{module.base_hash[:32]}")
        if trainer.is_global_zero and (module.generate_mode == "per_iteration" or self.monitor is not None):
            self._keep(weights)
        if not isinstance(self.backend, NativeBackend):
            # The native one generates from the player itself, so no copy of its weights is made.
            self.backend.sync_weights(served_weights(module.opponent.player(module.policy)), iteration=iteration)

    def _keep(self, weights: dict[str, Tensor]) -> None:
        """Save the policy that the iteration begins with, or find that it is there."""
        path = self._root / "policy.safetensors"
        if not path.exists():
            publish(path, lambda temporary: save_file(weights, temporary, metadata={"sha256": self._hash}))
            return
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("sha256", "")
        if found != self._hash:
            raise ValueError(
                f"{self._root}: is of an iteration that began with other weights ({found[:12]}, here {self._hash[:12]}). Give "
                "SelfPlayGeneration another `folder`, remove this one, or go on from a checkpoint of the run that made it"
            )

    @property
    def _root(self) -> Path:
        assert self._folder is not None
        return Path(self._folder) / f"iteration_{self.iteration}"

    def pairs(self, trainer: L.Trainer, data: Any, stage: str, store: TokenStore) -> Pairs | None:
        """The pairs of the iteration, generated now if they are not there.

        Args:
            trainer: in its fit, with the weights restored. Every rank must ask.
            data: the data module.
            stage: train or validation.
            store: its rows.

        Returns:
            None where the module generates a step at a time.

        Raises:
            ValueError: if what is there is not of this run, or was altered, or is gone and cannot be generated again.
        """
        self.begin(trainer)
        module: Any = trainer.lightning_module
        if module.generate_mode == "per_step":
            return None
        if stage in self._cache and self._cache[stage][0] == self.iteration:
            return self._cache[stage][1]
        num_prompts = self.num_prompts if stage == "train" else None
        parts = plan(store, num_prompts=num_prompts, size=module.generation.batch_size)
        identity = {
            "iteration": self.iteration,
            "weights": self._hash,
            "rows": Path(store.path).stem,
            "num_prompts": sum(map(len, parts)),
            "max_length": data.max_length,
            "opponent": module.opponent_kind,
            "base_weight": module.base_weight if module.opponent_kind == "mixture" else None,
            "replay": self.replay,
            "generation": dataclasses.asdict(module.generation),
        }
        found = GeneratedSet(self._root / stage, identity, parts)
        found.open(write=trainer.is_global_zero)
        missing: list[int] = trainer.strategy.broadcast(found.missing())
        if missing:
            if trainer.global_step != self._step:
                raise ValueError(
                    f"{found.path(missing[0])}: is missing, and the opponent of iteration {self.iteration} is gone, "
                    "for the policy has trained since: go on from the checkpoint at the end of the iteration before"
                )
            before = GeneratedSet(self._root.parent / f"iteration_{self.iteration - 1}" / stage, {}, parts)
            Play(trainer, data, store, found, before, self).run(missing)
        trainer.strategy.barrier("self-play")
        if trainer.is_global_zero:
            found.close()
        trainer.strategy.barrier("self-play closed")
        rows = list(found.rows())
        eos_id = data.tokenizer.eos_id
        real = {row["row"]: real_ids(store, row["row"]) for row in rows}
        told = statistics(rows, iteration=self.iteration, eos_id=eos_id, real=real)
        pairs = Pairs(store, rows, eos_id=eos_id)
        self._cache[stage] = self.iteration, pairs, told
        if trainer.is_global_zero and missing:
            summary = ", ".join(f"{name} {value:.3g}" for name, value in told.items())
            rank_zero_info(f"iteration {self.iteration}, {stage}: {summary}")
        return pairs

    def told_speed(self, tokens: int, seconds: float) -> None:
        """Take note of how fast this rank generated."""
        self._speed = tokens / max(seconds, 1e-9)

    def _prepare_optimizer(self, trainer: L.Trainer) -> None:
        module: Any = trainer.lightning_module
        for number, optimizer in enumerate(trainer.optimizers):
            if self.iteration and self.reset_optimizer:
                optimizer.state.clear()
            for group in optimizer.param_groups:
                factor = 1.0 if self.lr_factors is None else self.lr_factors[self.iteration]
                if self.reset_optimizer or module.make_schedule is None:
                    group["lr"] = group["initial_lr"] = group["base_lr"] * factor
            if self.reset_optimizer and module.make_schedule is not None:
                replace_schedule(trainer, number, partial(module.make_schedule, optimizer))

    def _report(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        played = {stage: told for stage, (iteration, _, told) in self._cache.items() if iteration == self.iteration}
        numbers = {f"{stage}/{name}": value for stage, told in played.items() for name, value in told.items()}
        numbers["iteration"] = float(self.iteration)
        if self._speed is not None:
            numbers["generation_tokens_per_second"] = self._speed * trainer.world_size
        for name, value in numbers.items():
            module.log(f"spin/{name}", value, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        if not trainer.is_global_zero or not played:
            return
        stage = "validation" if "validation" in played else "train"
        with (self._root / stage / "part-00000.jsonl").open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in islice(lines, SHOWN)]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("spin/generations", _table(rows), self.iteration)

    def _roll_back(self, trainer: L.Trainer, iteration: int) -> None:
        """Give the policy the weights that an iteration began with, and save it beside them and as the last checkpoint."""
        module: Any = trainer.lightning_module
        weights = load_file(self._root.parent / f"iteration_{iteration}" / "policy.safetensors")
        with torch.no_grad():
            for name, own in module.policy.state_dict().items():
                value = weights[name].to(own.device)
                own.copy_(distribute_tensor(value, own.device_mesh, own.placements) if isinstance(own, DTensor) else value)
        trainer.save_checkpoint(self._root.parent / "best.ckpt")
        # One that was written after the last step has the weights of before; one after the epoch is still to come.
        for written in sorted({getattr(callback, "last_model_path", "") for callback in trainer.checkpoint_callbacks} - {""}):
            if trainer.is_global_zero and Path(written).is_symlink():
                Path(written).unlink()  # else the checkpoint that it names would be written over
            trainer.strategy.barrier("self-play rolled back")
            trainer.save_checkpoint(written)


def _table(rows: list[Row]) -> str:
    """Prompt, real and generated response side by side, as Markdown."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", "<br>") or "(nothing)"

    lines = ["| prompt | real | generated |", "| --- | --- | --- |"]
    lines += [f"| {cell(row['prompt'])} | {cell(row['real'])} | {cell(row['generated'][0]['text'])} |" for row in rows]
    return "\n".join(lines)
