"""The base module: Lightning's hooks, each handed to the part that does the work."""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_align.generation.sampler import GenerationConfig
from lightning_align.models.activations import Checkpointing
from lightning_align.models.building import Backbone, backbone_spec, has_own_weights
from lightning_align.models.composed import is_composed, prepare_frozen
from lightning_align.models.deferred import is_deferred
from lightning_align.models.dropout import DropoutSwitch
from lightning_align.models.language_model import logits_of
from lightning_align.models.lora import LoRAConfig
from lightning_align.models.weights import check_weights, policy_state
from lightning_align.runtime.kinds import check_kinds, from_fields, hints_of
from lightning_align.runtime.lightning_internals import (
    built_from_config,
    callbacks_of,
    count_epoch_as_begun,
    datamodule_of,
    log_interval,
    trainer_of,
)
from lightning_align.runtime.memory import keep_freed_memory
from lightning_align.runtime.plain import plain
from lightning_align.runtime.ranks import data_world
from lightning_align.training.checked_loads import check_loads, check_module_file
from lightning_align.training.checkpoints import (
    check_trained_count,
    drop_composed,
    drop_frozen,
    make_storable,
    number_parameters,
    restore_composed,
    restore_frozen,
    storable_hyperparameters,
)
from lightning_align.training.gradient import BatchMean, clip_gradients, gradients_of, total_norm
from lightning_align.training.optimizers import build_optimizer
from lightning_align.training.parts import refuse_callbacks, warn_of_foreign_parts
from lightning_align.training.place import Clock
from lightning_align.training.policy import PolicySource
from lightning_align.training.responding import Responding
from lightning_align.training.routers import RouterLoss
from lightning_align.training.schedules import run_length
from lightning_align.training.settings import run_settings
from lightning_align.training.tensorboard import Charts, all_charts, log_charts, log_hyperparameters
from lightning_align.training.throughput import Throughput
from lightning_align.training.tokenizer import KEY as TOKENIZER
from lightning_align.training.tokenizer import add_record, check_tokenizer, record_of
from lightning_align.training.watch import RankWatch
from lightning_align.types import TokenBatch


class AlignModule(Responding):
    """A LightningModule that trains one policy.

    The policy is built in ``configure_model``, where Lightning expects it for sharded strategies, as ``self.policy``.

    A training step returns a **sum** over tokens or pairs and says through `weighted` how many there were. The gradients are
    divided once, before the optimizer step, by the number in the whole optimizer batch. So an optimizer batch has one gradient,
    however it is split into micro-batches and over ranks.
    """

    default_lr: ClassVar[float] = 1e-4
    """The learning rate of the default optimizer."""
    default_dropout: ClassVar[bool] = True
    """Whether training has dropout by default. False where a loss compares the policy with another model."""
    charts: ClassVar[Charts] = {}
    """The charts of the method in TensorBoard, beside those of every method."""
    object_arguments: ClassVar[tuple[str, ...]] = ("backbone", "lora", "optimizer", "lr_scheduler", "generation")
    """Arguments that are objects in code. Instead of the objects, ``hparams`` gets what a checkpoint can hold."""

    def __init__(
        self,
        backbone: Backbone | None = None,
        *,
        init_from: str | None = None,
        lora: LoRAConfig | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        generation: GenerationConfig | None = None,
        dropout: bool | None = None,
        router_aux_loss_coef: float | None = None,
        activation_checkpointing: Checkpointing = False,
    ) -> None:
        """Describe the run. The policy is built in ``configure_model``.

        Args:
            backbone: The language model: a module or a factory in code, `class_path` and `init_args` in YAML. Not needed with
                `init_from`, because a checkpoint says which backbone it is of.
            init_from: A checkpoint to take the initial weights from: a .ckpt of this package, a state dict (.pt or
                .safetensors), or an exported folder.
            lora: Train LoRA adapters only, on a frozen base model.
            optimizer: A factory that gets the parameter groups. Default is AdamW with the learning rate of the method: 3e-4
                for SFT and RETRO, 1e-3 for CALM, 5e-6 for DPO and SPIN.
            lr_scheduler: A factory that gets the optimizer. The scheduler is stepped after every optimizer step.
            generation: How `predict` and the sample logger decode.
            dropout: Whether to train with dropout. Default is false for DPO and SPIN, so that policy and reference score alike.
            router_aux_loss_coef: The weight of the load-balancing loss of expert routers, per micro-batch. Default is the one
                of the configuration if that sets `output_router_logits`.
            activation_checkpointing: Whether the backward pass computes the layers again, which saves memory and takes a third
                more time. With `offload`, the inputs of the layers also wait in the memory of the host.

        Raises:
            ValueError: If there is neither a backbone nor a checkpoint, or the coefficient is negative.
        """
        super().__init__(activation_checkpointing)
        lora, generation = from_fields(LoRAConfig, lora, "lora"), from_fields(GenerationConfig, generation, "generation")
        # A plain object, not a module: as a submodule the backbone would be registered twice.
        self.source = PolicySource(type(self).__name__, backbone, init_from=init_from, lora=lora)
        # On the command line, Lightning hands over the parsed configuration, which holds primitives only. In code the arguments
        # are objects: a checkpoint can hold the arguments that they were made with.
        given = built_from_config()
        self.save_hyperparameters(ignore=() if given else self.object_arguments)
        if not given:
            objects = {"lora": lora, "generation": generation, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
            check_kinds(type(self).__name__, hints_of(type(self)), {**self.hparams, "backbone": backbone, **objects})
            self.hparams["backbone"] = self.source.described()
            self.hparams["lora"] = None if lora is None else dataclasses.asdict(lora)
            self.hparams["generation"] = None if generation is None else dataclasses.asdict(generation)
        storable_hyperparameters(self)
        self.init_from, self.lora, self.generation = init_from, lora, generation or GenerationConfig()
        self.make_optimizer, self.make_schedule = optimizer, lr_scheduler
        self.learning_rate: float | None = None
        """Replaces the learning rate of the optimizer if it is set. `Tuner.lr_find` sets it."""
        self.policy: nn.Module = cast(nn.Module, None)
        self.dropout = DropoutSwitch(dropout, default=self.default_dropout)
        self.router_loss = RouterLoss(router_aux_loss_coef)
        self.batch_mean = BatchMean()
        self.throughput = Throughput()
        self.clock = Clock()

    # -- the policy

    def setup(self, stage: str) -> None:
        """Check the checkpoint, choose how memory is allocated, and compare the tokenizer with that of the initial weights."""
        super().setup(stage)
        check_loads(self.trainer, sharded=self.is_sharded)
        self.clock.attach(self.trainer, stage)
        warn_of_foreign_parts(self.trainer)
        self.dropout.end()  # an earlier run may have ended with an error in the middle of a step
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        for path in self.initial_weights():
            check_tokenizer(record_of(path), datamodule_of(self.trainer), source=path)

    def configure_callbacks(self) -> Sequence[Callback]:
        """Watch the other ranks, from before the data are prepared. It adds no other callback.

        Raises:
            ValueError: If a callback of the Trainer cannot work with the module.
        """
        refuse_callbacks(self.trainer, type(self).__name__)
        RankWatch.attach(self.trainer)
        return super().configure_callbacks()

    @property
    def _backbone(self) -> tuple[Any]:
        """The backbone under its earlier name."""
        return (self.source.backbone,)

    def configure_model(self) -> None:
        """Build the policy, once."""
        if self.policy is not None:
            return
        policy = self.build_for_sharding(self.build_policy)
        deferred = is_deferred(policy)
        if prepare_frozen(policy, sharded=self.is_sharded):
            warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")  # they always are
        self.source.add_adapters(policy)
        self.router_loss.prepare(policy)
        self.configure_reference(policy)
        if self.is_sharded:
            self.shard_policy(policy)
            if deferred:
                self.check_sharded(policy)
            # A checkpoint of adapters lacks the base model, and one of a composition its frozen models. `on_load_checkpoint`
            # comes too late to add them under a sharded strategy.
            self.strict_loading = self.lora is None and not is_composed(policy)
        self.policy = policy

    def build_policy(self) -> nn.Module:
        """Build the policy with its initial weights, without adapters. Subclasses override it to build something else."""
        return self.source.build()

    def initial_weights(self) -> list[str]:
        """Return the files and folders that the initial weights come from and that may name their tokenizer."""
        return [] if self.init_from is None else [self.init_from]

    def configure_reference(self, policy: nn.Module) -> None:
        """Make what the policy is compared with, before it is sharded and before a checkpoint is loaded into it."""

    def check_weights_loaded(self) -> None:
        """Raise if the policy's weights were to come from a file that is missing and no checkpoint has brought them."""
        self.source.check_weights()

    def check_by_hand(self) -> None:
        """Check that the weights are loaded."""
        self.check_weights_loaded()

    def on_validation_start(self) -> None:
        """Check that the weights are loaded."""
        self.check_weights_loaded()

    def on_test_start(self) -> None:
        """Check that the weights are loaded."""
        self.check_weights_loaded()

    def on_predict_start(self) -> None:
        """Check that the weights are loaded."""
        self.check_weights_loaded()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the policy, (B, N) -> (B, N, V)."""
        return logits_of(self.policy, tokens)

    # -- one gradient per optimizer batch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Switch dropout off, or seed it by the batch's position in the run, so that a resumed run draws the same numbers."""
        super().on_train_batch_start(batch, batch_idx)
        count_epoch_as_begun(self.trainer)
        self.clock.begin_batch(self.trainer, batch_idx)
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        position = (seed, data_world()[0], self.current_epoch, self.trainer.global_step, batch_idx)
        torch.manual_seed(hash(position) % 2**63)
        self.dropout.start(self.policy)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Average the gradient, after unscaling and before clipping."""
        self.masters.prepare_step()
        gradients = gradients_of(optimizer)
        self.batch_mean.average(
            gradients,
            accumulated=self.trainer.accumulate_grad_batches,
            world_size=self.trainer.world_size,
            total=lambda count: self.trainer.strategy.reduce(count, reduce_op="sum"),
            device=self.device,
        )
        if self.logs_this_step:
            self.log_dict({"train/grad_norm": total_norm(gradients), "train/lr": optimizer.param_groups[0]["lr"]})
        self.clock.begin_update()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients; see `clip_gradients`."""
        clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer of the parameters that train, or of their float32 copies, and the schedule."""
        # Under FSDP2, torch saves the state of an optimizer by the names that its parameters have in the module.
        self.masters.create([] if self.is_sharded else self.named_parameters())
        with run_length(self.schedule_steps):
            return build_optimizer(
                self.masters.substitute(self.policy.parameters()),
                self.make_optimizer,
                self.make_schedule,
                lr=self.default_lr,
                found_lr=self.learning_rate,
                scaled=self.mixed_dtype is torch.float16,
                ready=self.masters.attach,
            )

    def schedule_steps(self) -> float:
        """Return the optimizer steps that a schedule with `total_steps: auto` is for: those of the run."""
        if trainer_of(self) is None:
            raise ValueError("`total_steps` of the schedule is 'auto', but the module has no Trainer. Give a number of steps.")
        return float(self.trainer.estimated_stepping_batches)

    # -- checkpoints

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Build the module of a checkpoint. See `LightningModule.load_from_checkpoint`.

        Raises:
            ValueError: If the checkpoint is damaged, or of another method.
        """
        if isinstance(checkpoint_path, (str, Path)):
            check_module_file(checkpoint_path, cls, kwargs)
        found: Self = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the run's place, make the checkpoint independent of ``init_from``, and leave out frozen base models."""
        self.clock.save(checkpoint, trainer_of(self))
        make_storable(checkpoint, type(self).__name__)
        described = checkpoint.get("hyper_parameters", {}).get("backbone", self)
        if described is None or (described is not self and has_own_weights(self.policy)):
            checkpoint["hyper_parameters"]["backbone"] = plain(backbone_spec(self.policy))
        add_record(checkpoint, datamodule_of(trainer_of(self)))
        drop_composed(checkpoint, self.policy, sharded=self.is_sharded)
        if self.is_sharded:
            # A sharded strategy loads the weights itself, all of them, before `on_load_checkpoint` could complete them.
            return
        if self.lora is not None:
            drop_frozen(checkpoint, self.policy)
        if states := checkpoint.get("optimizer_states"):
            for state, optimizer in zip(states, self.trainer.optimizers, strict=True):
                number_parameters(state, optimizer, self.masters.substitute(self.parameters()))
        self.masters.save(checkpoint["state_dict"], self.named_parameters(remove_duplicate=False))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Complete a checkpoint of adapters with the base model, so that it is loaded strictly.

        Raises:
            ValueError: If the checkpoint is of another model.
        """
        self.source.awaits_weights = False
        trainer = trainer_of(self)
        if trainer is not None and trainer.training:
            self.masters.load(checkpoint.get("state_dict", {}))  # a sharded checkpoint has none
        path = (None if trainer is None else trainer.ckpt_path) or "that was given"
        self.clock.load(checkpoint, trainer)
        check_tokenizer(checkpoint.get(TOKENIZER), datamodule_of(trainer), source=f"checkpoint {path}")
        restore_composed(checkpoint, self.policy, path, sharded=self.is_sharded)
        if self.is_sharded:
            if self.lora is not None and not checkpoint.get("hyper_parameters", {}).get("lora"):
                raise ValueError(
                    "The module has `lora`, but the checkpoint is of a run without `lora`. Give a checkpoint of adapters."
                )
            if not self.strict_loading:
                check_trained_count(checkpoint, self.trainer.optimizers, path)
            return
        if self.lora is not None:
            restore_frozen(checkpoint, self.policy, self.state_dict())
        check_weights(self.policy, policy_state(checkpoint["state_dict"]), path)

    # -- logging

    @property
    def logs_this_step(self) -> bool:
        """Whether the Trainer logs the optimizer step that is under way."""
        every = log_interval(self.trainer)
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    def log_training(self, values: Mapping[str, Tensor], *, progress_bar: str, batch_size: int) -> None:
        """Log a training step's values as ``train/<name>``.

        Args:
            values: Scalars by name.
            progress_bar: The name of the value that the progress bar shows. On a GPU it changes where the step is logged.
            batch_size: Rows of the micro-batch.
        """
        # In every step, Lightning reads the values of the progress bar, for which the host waits for a GPU.
        each_step = self.device.type == "cpu"
        for name, value in values.items():
            self.log(f"train/{name}", value, prog_bar=each_step and name == progress_bar, batch_size=batch_size)
        if not each_step and not self.by_hand and (self.logs_this_step or self.trainer.global_step == 0):
            self.trainer.progress_bar_metrics[f"train/{progress_bar}"] = float(values[progress_bar])

    def count_tokens(self, batch: TokenBatch) -> None:
        """Count a batch for the throughput and the padding share."""
        self.throughput.count(batch["mask"])

    def on_train_start(self) -> None:
        """Check the weights, start counting, and register the run and its charts in TensorBoard."""
        self.check_weights_loaded()
        super().on_train_start()
        self.clock.begin_run(self.trainer)
        self.batch_mean.reset()  # an earlier fit may have been stopped in the middle of an optimizer batch
        self.throughput.stop()
        self.router_loss.announce(self.policy)
        self.dropout.announce(self.policy)
        if self.trainer.is_global_zero:
            log_hyperparameters(self.loggers, run_settings(self), metric="val/loss")
            others = [found for callback in callbacks_of(self.trainer) if (found := getattr(callback, "charts", None))]
            log_charts(self.loggers, type(self).__name__, all_charts(self.charts, others))

    def on_validation_end(self) -> None:
        """Leave the validation out of the throughput."""
        super().on_validation_end()
        self.throughput.restart(self.device)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Restore the mode of the policy, log the throughput, and save the checkpoint that a requeue signal has asked for."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.dropout.end()
        self.clock.end_batch(self.trainer)
        step, every = self.trainer.global_step, log_interval(self.trainer)
        if every and step % every == 0:
            if values := self.throughput.report(step, world_size=data_world()[1], device=self.device):
                self.log_dict(values)
