"""The callback that runs self-play: it begins iterations, generates their pairs, and stops the run."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_align.data.store import TokenStore
from lightning_align.generation.backend import GenerationBackend, NativeBackend
from lightning_align.generation.handoff import Served
from lightning_align.runtime.lightning_internals import limit_epochs, replace_schedule, set_reload_interval, skip_no_batches
from lightning_align.runtime.ranks import is_sharded
from lightning_align.runtime.run_folder import run_folder
from lightning_align.runtime.team import Team, of_first_rank
from lightning_align.spin.boundary import START, Boundary, save_boundary, save_checkpoint
from lightning_align.spin.generations import GeneratedSet, Pairs, plan, statistics
from lightning_align.spin.opponent import served_model, served_weights
from lightning_align.spin.own_rows import LoaderRows, OwnLoaders
from lightning_align.spin.play import Play, real_ids
from lightning_align.spin.report import log_iteration
from lightning_align.spin.set_files import read_identity
from lightning_align.spin.stored import POLICY, put_weights, read_weights


class SelfPlayGeneration(Callback):
    """A callback that runs the iterations of self-play within one `fit` call.

    Each iteration generates responses from the opponent, scores them, and trains on the pairs for a number of epochs. The run
    ends after the last iteration. The folder ``<folder>/iteration_<t>/`` holds the pairs of an iteration (see
    `lightning_align.spin.generations`) and the policy that it began with. A checkpoint stores the path of the folder. A resumed
    run uses this path, unless it sets `folder` to another one.
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
        """Set the schedule of the iterations.

        Args:
            iterations: The number of iterations. Default is 3.
            epochs: The number of epochs over the pairs of an iteration. A list has one number per iteration. Default is 1.
            replay: The number of earlier iterations with responses that are trained on again. The current opponent scores these
                responses anew. Default is 1.
            num_prompts: The number of training prompts to answer, from the first row on. Default is all.
            lr_factors: The factors on the learning rate of the optimizer, one per iteration. Default is no change.
            reset_optimizer: Whether the optimizer state and the learning rate schedule restart with each iteration. Default is
                true.
            folder: The folder of the generated sets. All nodes must share it. Default is `generations` in the
                folder of the run.
            backend: The engine that generates responses. Default is the sampler of this package.
            monitor: The name of a logged metric. If it stops improving, the run ends with the weights of the best iteration.
                These weights are then in `best.ckpt` in `folder` and in the `last.ckpt` of the trainer. Default is no metric.
            mode: Whether the metric should increase (`max`) or decrease (`min`). Default is `max`.
            patience: The number of iterations in a row without improvement that do not end the run. After the last
                iteration, the best weights are restored in any case. Default is 0.

        Raises:
            ValueError: If an argument is out of range.
        """
        numbers = [epochs] * iterations if isinstance(epochs, int) else list(epochs)
        for name, value, least in (("iterations", iterations, 1), ("replay", replay, 0), ("patience", patience, 0)):
            if value < least:
                raise ValueError(f"`{name}` of SelfPlayGeneration must be at least {least}, but got {value}.")
        if len(numbers) != iterations or min(numbers) < 1:
            raise ValueError(
                f"`epochs` of SelfPlayGeneration must be a number of at least 1 or a list of {iterations} such numbers (one "
                f"per iteration), but got {epochs}."
            )
        if lr_factors is not None and (len(lr_factors) != iterations or min(lr_factors) <= 0):
            raise ValueError(
                f"`lr_factors` of SelfPlayGeneration must be a list of {iterations} positive numbers (one per iteration), but "
                f"got {list(lr_factors)}."
            )
        if num_prompts is not None and num_prompts < 1:
            raise ValueError(f"`num_prompts` of SelfPlayGeneration must be at least 1, or null for all, but got {num_prompts}.")
        if mode not in ("min", "max"):
            raise ValueError(f"`mode` of SelfPlayGeneration must be 'min' or 'max', but got {mode!r}.")
        self.iterations, self.replay, self.num_prompts = iterations, replay, num_prompts
        self._starts = [sum(numbers[:t]) for t in range(iterations + 1)]
        self.lr_factors, self.reset_optimizer = lr_factors, reset_optimizer
        self.folder = None if folder is None else Path(folder)
        self.backend = backend or NativeBackend()
        self.monitor, self.mode, self.patience = monitor, mode, patience
        # State that is saved in a checkpoint.
        self.iteration = -1
        """The iteration that began last, counted from 0. It is -1 before the first iteration."""
        self._step, self._hash, self._announced = 0, "", -1
        self._run = ""
        self._history: dict[int, float] = {}
        self._folder: str | None = None
        # State that is not saved.
        self._cache: dict[str, tuple[int, Pairs, dict[str, float]]] = {}
        self.own = OwnLoaders(self)
        """The pairs of loaders of the user."""
        self._speed: float | None = None
        self._restored, self._synced = False, -1
        self._team: Team | None = None

    # -- the trainer's hooks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the trainer reload its data before each epoch, and stop after the last iteration.

        Raises:
            ValueError: If the module has no opponent, or if its settings conflict with those of this callback.
        """
        if stage != "fit":
            return
        if not hasattr(pl_module, "begin_iteration"):
            raise ValueError(f"SelfPlayGeneration needs a SPINModule. {type(pl_module).__name__} has no opponent.")
        self._check(pl_module)
        set_reload_interval(trainer, 1)
        limit_epochs(trainer, self._starts[-1])

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the group in which the ranks wait for each other."""
        if self._team is not None:
            self._team.close()
            self._team = None

    def _check(self, module: Any) -> None:
        """Raise if the settings conflict, before anything is generated."""
        name = type(self.backend).__name__
        if not isinstance(self.backend, NativeBackend):
            if module.generate_mode == "per_step":
                raise ValueError(
                    f"`backend` of SelfPlayGeneration is {name}, but `generate` of SPINModule is 'per_step', which never uses "
                    "it. Remove `backend`, or set `generate: per_iteration`."
                )
            if module.generation.filter_fn is not None:
                raise ValueError(
                    f"`backend` of SelfPlayGeneration is {name}, which cannot call the `filter_fn` of `generation`, "
                    f"{module.generation.filter_fn}. Remove one of them."
                )
            if module.opponent_kind == "mixture":
                raise ValueError(
                    f"`backend` of SelfPlayGeneration is {name}, but `opponent` of SPINModule is 'mixture'. Other engines "
                    "cannot serve its two models as one. Remove `backend` to use the native sampler, or set `opponent` to "
                    "iterate, ema or base."
                )
        if self.lr_factors is not None and not self.reset_optimizer and module.make_schedule is not None:
            raise ValueError(
                f"`lr_factors` of SelfPlayGeneration is {list(self.lr_factors)}, but `reset_optimizer` is false and there is "
                "an `lr_scheduler`. One schedule then runs through all iterations and overrides the factors. Set "
                "`reset_optimizer: true`, or remove `lr_scheduler` or `lr_factors`."
            )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin an iteration if it is due: prepare the optimizer and log statistics and texts.

        This is not done in the hook at the start of an epoch. Lightning skips that hook when it resumes from the last batch of
        an epoch.
        """
        self.begin(trainer)
        self.own.prepare(trainer, batch)
        if self._announced < self.iteration:
            self._announced = self.iteration
            self._prepare_optimizer(trainer)
            played = {stage: values for stage, (number, _, values) in self._cache.items() if number == self.iteration}
            log_iteration(trainer, pl_module, played, iteration=self.iteration, folder=self._root, speed=self._speed)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Generate the pairs of a loader of the user before the first batch is validated within `fit`."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.begin(trainer)
            self.own.prepare(trainer, batch)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End an iteration: check the monitored metric, and save a checkpoint before the next iteration begins.

        Raises:
            ValueError: If the metric was not logged.
        """
        if trainer.current_epoch + 1 != self._starts[self.iteration + 1] or not trainer.is_last_batch:
            return  # also at a stop in the middle of an epoch, after which the iteration goes on in a resumed run
        last = self.iteration == self.iterations - 1
        if self.monitor is not None and self._declined(trainer, last=last):
            trainer.should_stop = True
        elif not last:
            if self.reset_optimizer and not is_sharded(pl_module):
                # The next iteration does this anyway, and the checkpoint is smaller.
                for optimizer in trainer.optimizers:
                    optimizer.state.clear()
            save_boundary(trainer, self._root_of(self.iteration + 1), force_last=self.monitor is not None)

    def _declined(self, trainer: L.Trainer, *, last: bool) -> bool:
        """Return whether the run ends because the metric did not improve. The best weights are then restored."""
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"`monitor` of SelfPlayGeneration is {self.monitor!r}, but no such metric was logged. The logged metrics are "
                f"{', '.join(sorted(trainer.callback_metrics))}. Validate at the end of each epoch, or monitor one of these."
            )
        self._history[self.iteration] = float(trainer.callback_metrics[self.monitor])
        best = (max if self.mode == "max" else min)(self._history, key=lambda t: self._history[t])
        if best == self.iteration or (not last and self.iteration - best <= self.patience):
            return False
        rank_zero_info(
            f"Iteration {self.iteration} ends with {self.monitor} at {self._history[self.iteration]:.4g}, but iteration {best} "
            f"had {self._history[best]:.4g}. The run ends with the weights of iteration {best}."
        )
        self._roll_back(trainer, best + 1)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the current iteration, what it began with, and the folder of its sets."""
        names = ("iteration", "_step", "_hash", "_announced", "_history", "_folder", "_run")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state. A `folder` of this run replaces the saved one, because the sets may have been moved there."""
        for name, value in state_dict.items():
            setattr(self, name, value)
        if self.folder is not None:
            self._folder = None

    # -- an iteration

    def begin(self, trainer: L.Trainer) -> None:
        """Begin the iteration of the current epoch, unless it began already. Every rank must call this."""
        module: Any = trainer.lightning_module
        if not self._restored:
            self._restored = True
            module.restore_opponent()
            module.iteration = max(self.iteration, 0)
        iteration = next(t for t in reversed(range(self.iterations)) if trainer.current_epoch >= self._starts[t])
        if self._folder is None:
            default = run_folder(trainer) / "generations"
            self._folder = str((self.folder or default).resolve())
        if iteration <= self.iteration:
            return
        run = of_first_rank(uuid4().hex) if self.iteration < 0 else self._run
        skip_no_batches(trainer, enough=sys.maxsize // 2)
        module.begin_iteration(iteration)
        boundary = Boundary(trainer, module, self._root_of(iteration), run=run)
        if module.generate_mode == "per_iteration" or self.monitor is not None:
            boundary.settle()
        self._sync(module, iteration)
        # Set together and last, because a signal may save a checkpoint at any moment.
        self._run, self._hash, self._step, self.iteration = run, boundary.digest, trainer.global_step, iteration

    def _sync(self, module: Any, iteration: int) -> None:
        """Give another engine the weights of the opponent, unless this process did. The native one uses the player itself."""
        if not isinstance(self.backend, NativeBackend) and self._synced != iteration:
            player = module.opponent.player(module.policy)
            if sync := getattr(self.backend, "sync_model", None):
                served = Served(*served_model(player), module.data_tokenizer, module.ends(), module.generation)
                sync(served, iteration=iteration)
            else:
                self.backend.sync_weights(served_weights(player), iteration=iteration)
            self._synced = iteration

    @property
    def _root(self) -> Path:
        return self._root_of(self.iteration)

    def _root_of(self, iteration: int) -> Path:
        assert self._folder is not None
        return Path(self._folder) / f"iteration_{iteration}"

    def made_pairs(self, stage: str) -> Pairs | None:
        """Return the pairs of the current iteration if this process has them. Within `fit`, use `pairs`."""
        made = self._cache.get(stage)
        return made[1] if made is not None and made[0] == self.iteration else None

    def pairs(self, trainer: L.Trainer, data: Any, stage: str, store: TokenStore | LoaderRows) -> Pairs | None:
        """Return the pairs of the current iteration, and generate those that are missing. Every rank must call this.

        Args:
            trainer: The trainer, during `fit` and after the weights are restored.
            data: The data module.
            stage: The stage, `train` or `validation`.
            store: The rows of the stage.

        Returns:
            The pairs, or None if the module generates per step.

        Raises:
            ValueError: If the existing set is of another run or was changed, or if a missing part cannot be generated again.
        """
        self.begin(trainer)
        module: Any = trainer.lightning_module
        if module.generate_mode == "per_step":
            return None
        if (made := self.made_pairs(stage)) is not None:
            return made
        num_prompts = self.num_prompts if stage == "train" else None
        settings = module.generation.recorded()
        # The parts of an existing set keep their size. Another machine may generate the missing ones with other batches.
        found = read_identity(self._root / stage).get("generation") or {}
        settings["batch_size"] = found.get("batch_size", settings["batch_size"])
        parts = plan(store, num_prompts=num_prompts, size=settings["batch_size"])
        identity = {
            "iteration": self.iteration,
            "weights": self._hash,
            "rows": Path(store.path).stem,
            "num_prompts": sum(map(len, parts)),
            "max_length": data.max_length,
            "opponent": module.opponent_kind,
            "base_weight": module.base_weight if module.opponent_kind == "mixture" else None,
            "replay": self.replay,
            "generation": settings,
        }
        generated = GeneratedSet(self._root / stage, identity, parts)
        # If one rank finds a fault, all raise. The ranks generate for different times, so they wait in a group of their own.
        team = self._team = self._team or Team()
        with team.together():
            generated.open(write=trainer.is_global_zero)
        missing = team.share(generated.missing())
        if missing:
            if trainer.global_step != self._step:
                start = self._root / START
                raise ValueError(
                    f"{generated.path(missing[0])} is missing. It cannot be generated again, because the policy has trained "
                    f"since iteration {self.iteration} began. Resume from "
                    f"{start if start.exists() else 'the checkpoint at the end of the previous iteration'}."
                )
            with team.together():
                generated.check_manifest()
            with team.together():
                if trainer.is_global_zero:
                    generated.drop_manifest()
            with team.together():
                self._sync(module, self.iteration)
            before = self._root_of(self.iteration - 1) / stage
            size = (read_identity(before).get("generation") or {}).get("batch_size", settings["batch_size"])
            previous = GeneratedSet(before, {}, plan(store, num_prompts=num_prompts, size=size))
            try:
                with team.together():
                    Play(trainer, data, store, generated, previous, self).run(missing)
            except (KeyboardInterrupt, SystemExit):
                done = len(parts) - len(generated.missing())
                rank_zero_info(
                    f"Stopped with {done} of {len(parts)} parts in {generated.folder}. Start the same run again to go on."
                )
                raise
        with team.together():
            rows = list(generated.rows())
        with team.together():
            if trainer.is_global_zero:
                generated.close()
        eos_id = data.tokenizer.eos_id
        real = {row["row"]: real_ids(store, row["row"]) for row in rows}
        values = statistics(rows, iteration=self.iteration, eos_id=eos_id, real=real)
        pairs = Pairs(store, rows, eos_id=eos_id)
        self._cache[stage] = self.iteration, pairs, values
        if trainer.is_global_zero and missing:
            summary = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
            rank_zero_info(f"Iteration {self.iteration}, {stage}: {summary}")
        return pairs

    def record_speed(self, tokens: int, seconds: float) -> None:
        """Record how fast this rank generated."""
        self._speed = tokens / max(seconds, 1e-9)

    def _prepare_optimizer(self, trainer: L.Trainer) -> None:
        module: Any = trainer.lightning_module
        if self.iteration == 0 and self.lr_factors is None:
            return  # everything is new, unless a search for a learning rate has replaced the schedule
        for number, optimizer in enumerate(trainer.optimizers):
            if self.iteration and self.reset_optimizer:
                optimizer.state.clear()
            for group in optimizer.param_groups:
                base = group.setdefault("base_lr", group.get("initial_lr", group["lr"]))  # callbacks may add groups
                factor = 1.0 if self.lr_factors is None else self.lr_factors[self.iteration]
                if self.reset_optimizer or module.make_schedule is None:
                    group["lr"] = group["initial_lr"] = base * factor
            if self.reset_optimizer and module.make_schedule is not None:
                replace_schedule(trainer, number, partial(module.make_schedule, optimizer))

    def _roll_back(self, trainer: L.Trainer, iteration: int) -> None:
        """Load the weights that an iteration began with. Save them as `best.ckpt` and as the last checkpoint."""
        module: Any = trainer.lightning_module
        path = self._root_of(iteration) / POLICY
        put_weights(module.policy, read_weights(path), path)
        save_checkpoint(trainer, self._root.parent / "best.ckpt")
        # Last checkpoints that exist already hold the old weights. A checkpoint after the epoch gets the new ones anyway.
        for written in sorted({getattr(callback, "last_model_path", "") for callback in trainer.checkpoint_callbacks} - {""}):
            save_checkpoint(trainer, written)
