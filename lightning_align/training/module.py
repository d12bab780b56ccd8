"""What every module of the suite shares: how its policy is built and saved, how its loss is weighted, what it logs."""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.tensorboard.summary import hparams

from lightning_align.generation.sampler import Generation, GenerationConfig, generate
from lightning_align.models.building import Backbone, backbone_spec, build_backbone, has_own_weights
from lightning_align.models.checkpoint import load_policy, read_checkpoint
from lightning_align.models.language_model import logits_of
from lightning_align.models.lora import LoRAConfig, add_lora, train_only
from lightning_align.models.parallelize import shard
from lightning_align.models.weights import POLICY_PREFIX, check_weights, policy_state
from lightning_align.runtime.memory import keep_freed_memory
from lightning_align.types import TokenBatch


class AlignModule(L.LightningModule):
    """A LightningModule around one policy.

    The policy is built in ``configure_model``, where Lightning wants it for sharded strategies, as ``self.policy``.

    A training step returns a **sum** over what it is a mean of (tokens, pairs) and declares how many there were,
    through `weighted`; the gradients are divided once, before the optimizer step, by the number in the whole optimizer
    batch. So one optimizer batch gives one gradient, however it is cut into micro-batches and spread over ranks.
    """

    default_lr = 1e-4
    objects: ClassVar[tuple[str, ...]] = ()
    """Further arguments that are objects in code, of which a subclass puts into ``hparams`` what a checkpoint can hold."""

    def __init__(
        self,
        backbone: Backbone | None = None,
        *,
        init_from: str | None = None,
        lora: LoRAConfig | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        generation: GenerationConfig | None = None,
    ) -> None:
        """See the subclasses for the arguments."""
        super().__init__()
        if backbone is None and init_from is None:
            raise ValueError(f"{type(self).__name__}: give `backbone` (what to build), `init_from` (a checkpoint), or both")
        if isinstance(lora, Mapping):
            lora = LoRAConfig(**lora)
        if isinstance(generation, Mapping):
            generation = GenerationConfig(**generation)
        # On the command line Lightning hands over the parsed configuration, which is primitives only. In code the arguments are
        # objects; what a checkpoint can hold of them, and rebuild them from, is their own arguments.
        given = _given_hyperparameters.get() is not None
        objects = ("backbone", "lora", "optimizer", "lr_scheduler", "generation", *self.objects)
        self.save_hyperparameters(ignore=() if given else objects)
        if not given:
            described = backbone_spec(backbone) if isinstance(backbone, nn.Module) else backbone
            self.hparams["backbone"] = described if isinstance(described, dict) else None
            self.hparams["lora"] = None if lora is None else dataclasses.asdict(lora)
            self.hparams["generation"] = None if generation is None else dataclasses.asdict(generation)
        # In a tuple: a module as attribute would be registered, a second time beside the policy.
        self._backbone = (backbone,)
        self.init_from, self.lora, self.generation = init_from, lora, generation or GenerationConfig()
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self.policy: nn.Module = cast(nn.Module, None)
        self._awaits_weights = False
        self._weight: Tensor | float = 0.0
        self._tokens = self._cells = torch.zeros((), dtype=torch.long)
        self._clock, self._timed_step = math.nan, 0

    def setup(self, stage: str) -> None:
        """Settle how memory is allocated before the first of it is."""
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()

    # -- the policy

    def configure_model(self) -> None:
        """Build the policy, once."""
        if self.policy is not None:
            return
        policy = self._build_policy()
        if self.lora is not None:
            given = self.init_from is not None or isinstance(self._backbone[0], nn.Module)
            if not given and not has_own_weights(policy):
                raise ValueError(
                    f"{type(self).__name__}: `lora` trains adapters on a frozen base, which the checkpoint does not hold: give "
                    "the base as `init_from`, or a backbone that comes with its weights"
                )
            add_lora(policy, self.lora)
            train_only(policy, self.lora.scope)
        self.configure_reference(policy)
        if self._sharded:
            shard(policy, self._data_mesh)
            # A file of adapters lacks their base, which stands here: see `on_load_checkpoint`, which comes too late to add it.
            self.strict_loading = self.lora is None
        self.policy = policy

    def configure_reference(self, policy: nn.Module) -> None:
        """Make what the policy is compared with, before it is sharded and before a checkpoint is restored into it."""

    def _build_policy(self) -> nn.Module:
        (backbone,) = self._backbone
        if self.init_from is None:
            assert backbone is not None
            return build_backbone(backbone)
        if backbone is not None and self.lora is None and not Path(self.init_from).is_file():
            # A checkpoint of this run has all weights, and outlives the file that the run began from. Whether one is about to
            # be loaded is not known yet: see `_check_weights`.
            self._awaits_weights = True
            return build_backbone(backbone)
        return load_policy(self.init_from, backbone)

    def _check_weights(self) -> None:
        """Refuse to go on with the weights of no file at all."""
        if self._awaits_weights:
            assert self.init_from is not None
            read_checkpoint(self.init_from)

    def on_validation_start(self) -> None:
        """See `_check_weights`."""
        self._check_weights()

    def on_test_start(self) -> None:
        """See `_check_weights`."""
        self._check_weights()

    def on_predict_start(self) -> None:
        """See `_check_weights`."""
        self._check_weights()

    @property
    def _sharded(self) -> bool:
        return self._trainer is not None and isinstance(self._trainer.strategy, ModelParallelStrategy)

    @property
    def _data_mesh(self) -> Any:
        assert self.device_mesh is not None
        return self.device_mesh["data_parallel"]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the policy, (B, N) -> (B, N, V)."""
        return logits_of(self.policy, tokens)

    # -- what a run that is resumed needs

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed what a batch draws (dropout) by its place in the run, so that a resumed run draws the same on every rank."""
        # Resumed from the last batch of an epoch, Lightning does not count the next epoch as begun; a run that is resumed from
        # the last batch of that one too would train it a second time.
        progress: Any = self.trainer.fit_loop.epoch_progress
        for epochs in (progress.total, progress.current):
            epochs.ready = epochs.started = epochs.processed + 1
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        place = (seed, self.global_rank, self.current_epoch, self.trainer.global_step, batch_idx)
        torch.manual_seed(hash(place) % 2**63)

    # -- one gradient for one optimizer batch

    def weighted(self, loss_sum: Tensor, weight: Tensor | int) -> Tensor:
        """Return a summed loss from a training step, and say over how many it is a sum.

        Args:
            loss_sum: scalar, the sum over the micro-batch of what the loss is a mean of.
            weight: how many there were; their total over the optimizer batch is what the gradient is divided by.
        """
        self._weight = self._weight + weight
        return loss_sum

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn the gradient of the sum into that of the mean; before clipping, after unscaling."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        total = torch.as_tensor(self._weight, dtype=torch.float32, device=self.device)
        self._weight = 0.0
        world = self.trainer.world_size
        if world > 1:
            total = self.trainer.strategy.reduce(total, reduce_op="sum")
        # Lightning has divided by the accumulation, DDP and FSDP2 by the number of ranks.
        factor = self.trainer.accumulate_grad_batches * world / total.clamp(min=1)
        if gradients:
            torch._foreach_mul_(gradients, factor)
        if self._logs_this_step:
            norm = torch.nn.utils.get_total_norm(gradients)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            self.log_dict({"train/grad_norm": norm, "train/lr": optimizer.param_groups[0]["lr"]})

    @property
    def _logs_this_step(self) -> bool:
        return self._log_every > 0 and (self.trainer.global_step + 1) % self._log_every == 0

    @property
    def _log_every(self) -> int:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by the Trainer's logger connector
        return every

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip; also for a fused optimizer in bfloat16, where Lightning refuses though nothing is left to unscale.

        Raises:
            ValueError: if a fused optimizer is to unscale float16 gradients after the clipping.
        """
        precision = self.trainer.precision_plugin
        if not isinstance(precision, MixedPrecision) or not getattr(optimizer, "_step_supports_amp_scaling", False):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif precision.scaler is not None and gradient_clip_val:
            raise ValueError(
                "gradient_clip_val with precision 16-mixed needs an optimizer that is not fused: set `fused: false` in its "
                "init_args, or precision bf16-mixed"
            )
        else:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(precision, optimizer, gradient_clip_val or 0.0, algorithm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over what trains, norms' gains and biases without weight decay, and the schedule a step at a time."""
        parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p.ndim >= 2]}]
        if vectors := [p for p in parameters if p.ndim < 2]:
            groups.append({"params": vectors, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=self.default_lr) if self._optimizer is None else self._optimizer(groups)
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        schedule: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if (monitor := getattr(scheduler, "monitor", None)) is not None:
            # One that waits for a metric, such as `ReduceLROnPlateau`: there is a new value after a validation, not every step.
            schedule = {"scheduler": scheduler, "monitor": monitor}
        return cast(OptimizerLRScheduler, {"optimizer": optimizer, "lr_scheduler": schedule})

    # -- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint whole without the file it began from, and hold no frozen base."""
        described = checkpoint.get("hyper_parameters", {}).get("backbone", self)
        if described is None or (described is not self and has_own_weights(self.policy)):
            checkpoint["hyper_parameters"]["backbone"] = backbone_spec(self.policy)
        # A sharded strategy restores the weights itself, all of them, before `on_load_checkpoint` could complete them.
        if self.lora is not None and not self._sharded:
            for name in self._frozen_names():
                checkpoint["state_dict"].pop(name, None)
        if not self._sharded:
            states = checkpoint.get("optimizer_states", [])
            for state, optimizer in zip(states, self.trainer.optimizers if states else [], strict=True):
                self._number_parameters(state, optimizer)

    def _number_parameters(self, state: dict[str, Any], optimizer: Optimizer) -> None:
        """Number an optimizer's parameters by their places in the module.

        To an optimizer the numbers are names, but a sharded strategy that opens the checkpoint takes them for places.
        """
        place_of = {id(parameter): place for place, parameter in enumerate(self.parameters())}
        places = [place_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
        state["state"] = {places[number]: value for number, value in state["state"].items()}
        state["param_groups"] = [{**g, "params": [places[number] for number in g["params"]]} for g in state["param_groups"]]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Complete a checkpoint of adapters with the base that stands here, so that loading stays strict.

        Raises:
            ValueError: if the checkpoint is of another model.
        """
        self._awaits_weights = False
        if self._sharded:
            if self.lora is not None and not checkpoint.get("hyper_parameters", {}).get("lora"):
                raise ValueError("the checkpoint is of a run without `lora`, and the module has it: give one of adapters")
            return
        if self.lora is not None:
            own = self.state_dict()
            for name in self._frozen_names():
                checkpoint["state_dict"].setdefault(name, own[name])
        path = None if self._trainer is None else self._trainer.ckpt_path
        check_weights(self.policy, policy_state(checkpoint["state_dict"]), path or "that was given")

    def _frozen_names(self) -> list[str]:
        return [POLICY_PREFIX + name for name, parameter in self.policy.named_parameters() if not parameter.requires_grad]

    # -- what every method logs

    def log_training(self, values: dict[str, Tensor], *, progress_bar: str, batch_size: int) -> None:
        """Log a training step's values as ``train/name``.

        Args:
            values: scalars by name.
            progress_bar: name of the one that is shown there.
            batch_size: rows of the micro-batch.
        """
        for name, value in values.items():
            self.log(f"train/{name}", value, prog_bar=name == progress_bar, batch_size=batch_size)

    def count_tokens(self, batch: TokenBatch) -> None:
        """Count a batch for the throughput and the padding share."""
        self._tokens = self._tokens + batch["mask"].sum()
        self._cells = self._cells + batch["mask"].numel()

    def on_train_start(self) -> None:
        """Register the run in TensorBoard's HPARAMS tab, under its validation loss."""
        self._check_weights()
        self._weight = 0.0  # a fit that was stopped inside an accumulation left what it had counted
        self._clock = math.nan
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger) and self.trainer.is_global_zero:
                # Lightning's own log_hyperparams(..., metrics) would draw their initial values as points of their curves.
                # What decodes has no part in the loss, and hides what has.
                shown = {
                    name: value for name, value in self.hparams_initial.items() if name not in ("_instantiator", "generation")
                }
                flat = {name: value for name, value in _flatten(shown) if value is not None}
                for summary in hparams(flat, {"val/loss": 0.0}):  # type: ignore[no-untyped-call]
                    logger.experiment._get_file_writer().add_summary(summary)

    def on_validation_end(self) -> None:
        """Leave the validation out of the throughput."""
        self._tokens = self._cells = torch.zeros((), dtype=torch.long, device=self.device)
        self._clock = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log tokens a second (real ones, over all ranks) and the share of padding since the last time."""
        step = self.trainer.global_step
        if step == self._timed_step or not self._log_every or step % self._log_every:
            return
        self._timed_step = step
        now = time.perf_counter()
        if not math.isnan(self._clock):
            rate = self._tokens * self.trainer.world_size / (now - self._clock)
            padding = 1 - self._tokens / self._cells
            self.log_dict({"train/tokens_per_second": rate.float(), "train/padding_share": padding.float()})
        self._tokens = self._cells = torch.zeros((), dtype=torch.long, device=self.device)
        self._clock = now

    # -- prediction

    def continue_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        eos_id: int | None = None,
        ids: Sequence[int] | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> list[list[Generation]]:
        """Continue prompts with the policy, as `predict_step` and the callbacks do; see `generate` for the arguments.

        A module whose policy needs more than the prompts' tokens gives it here.
        """
        return generate(self.policy, prompts, config, eos_id=eos_id, ids=ids, decode=decode)

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Continue prompts.

        Args:
            batch: a `PromptBatch`, prompts of any lengths.
            batch_idx: not used: a response depends on the number of its row, whatever batch it is in.

        Returns:
            For each prompt ``row``, ``prompt`` and ``responses`` (as text where the data module has a tokenizer, else as ids)
            and ``finished``.
        """
        tokenizer = self._tokenizer
        results = self.continue_prompts(
            batch["prompts"],
            self.generation,
            eos_id=None if tokenizer is None else tokenizer.eos_id,
            ids=batch["rows"].tolist(),
            decode=None if tokenizer is None else tokenizer.decode,
        )

        def spell(ids: list[int]) -> str | list[int]:
            return ids if tokenizer is None else tokenizer.decode(ids)

        return [
            {
                "row": int(row),
                "prompt": spell(prompt),
                "responses": [spell(r.tokens) for r in responses],
                "finished": [r.finished for r in responses],
            }
            for row, prompt, responses in zip(batch["rows"], batch["prompts"], results, strict=True)
        ]

    @property
    def _tokenizer(self) -> Any:
        data = getattr(self.trainer, "datamodule", None)
        return getattr(data, "tokenizer", None)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested hyperparameters as ``a/b`` with values that TensorBoard can show."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
