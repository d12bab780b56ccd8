"""The LightningModule of CALM: it trains only the connections, on the next-token loss of the composition."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_align.calm.alignment import use_alignment
from lightning_align.calm.attention_maps import CHARTS, first_row, show_attention
from lightning_align.calm.connections import ConnectionConfig
from lightning_align.calm.context import within_context
from lightning_align.calm.datamodule import CALMBatch
from lightning_align.calm.layers import LayerChoice, Position
from lightning_align.calm.model import CALM
from lightning_align.calm.parts import build_part
from lightning_align.calm.scores import composed_logprobs as composed_logprobs
from lightning_align.calm.spec import Augment, AugmentInput, check_realigned, described_augment, described_model, storable
from lightning_align.calm.start import augments_of, composition_of
from lightning_align.calm.states import StateStore, attach_states
from lightning_align.generation.ends import Ends
from lightning_align.generation.sampler import Generation, GenerationConfig
from lightning_align.models.activations import Checkpointing
from lightning_align.models.building import Backbone
from lightning_align.models.causality import check_causal
from lightning_align.models.composed import FROZEN
from lightning_align.runtime.kinds import check_kinds, hints_of
from lightning_align.runtime.lightning_internals import built_from_config, datamodule_of, trainer_of
from lightning_align.training.evaluation import log_metric, metrics_of
from lightning_align.training.metrics import TokenNLL
from lightning_align.training.module import AlignModule


class CALMModule(AlignModule):
    """A LightningModule that trains the connections of a `CALM`.

    A checkpoint contains the connections and the weight hashes of the frozen models, not the weights of the frozen models.
    """

    policy: CALM
    charts = CHARTS
    replaced_by_init_from = (
        *("anchor", "augments", "connection", "combine", "anchor_layers", "anchor_position", "connections_from"),
    )
    """Arguments that a composition has in its own folder."""
    object_arguments = (*AlignModule.object_arguments, "anchor", "augments", "connection", "anchor_layers")

    def __init__(
        self,
        anchor: str | Backbone | None = None,
        augments: list[Augment] | None = None,
        *,
        init_from: str | None = None,
        connection: ConnectionConfig | None = None,
        combine: Literal["sequence", "sum"] = "sequence",
        anchor_layers: LayerChoice | None = None,
        anchor_position: Position = "output",
        activation_checkpointing: Checkpointing = False,
        loss_on: Literal["response", "all"] = "response",
        connections_from: str | None = None,
        store_states: str | None = None,
        attention_maps: bool = False,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        generation: GenerationConfig | None = None,
    ) -> None:
        """Store the arguments. The models are built in ``configure_model``.

        Args:
            anchor: The model to augment: a module or a factory in code, `class_path` and `init_args` or the path of a
                checkpoint in YAML.
            augments: The models that augment the anchor, and how each is connected.
            init_from: The folder of a composition, or a checkpoint of one, to start from, instead of `anchor` and `augments`.
            connection: The architecture of the connections.
            combine: How to combine several connections that end at the same layer. With `sequence`, each sees the output of the
                one before it. With `sum`, all see the layer's own hidden state.
            anchor_layers: The anchor's layers, given as `layers` of an `Augment`. By default they are found automatically.
            anchor_position: Whether to add connections to a layer's input or to its output.
            activation_checkpointing: See `AlignModule`. It is also on if the anchor was built with gradient checkpointing.
            loss_on: Whether to train on the `response` or on `all` tokens. `all` is not allowed if an augment reads the prompt
                as a prefix, because every position of the prompt would see the tokens that it predicts.
            connections_from: A safetensors file of connections to start from, written by `CALM.save_connections`.
            store_states: A folder for the augments' hidden states of training rows. They are then computed once and not in
                every epoch. By default they are not stored.
            attention_maps: Whether to log pictures of the attention weights of the first row at each validation.
            optimizer: A factory that gets the parameter groups. Default is AdamW with learning rate 1e-3.
            lr_scheduler: A factory that gets the optimizer. The scheduler is stepped after every optimizer step.
            generation: How `predict` and the sample logger decode.

        Raises:
            ValueError: If an option has an unknown value, or two options cannot be combined.
        """
        for name, value, choices in (("loss_on", loss_on, ("response", "all")), ("combine", combine, ("sequence", "sum"))):
            if value not in choices:
                raise ValueError(f"CALMModule: `{name}` must be one of {', '.join(choices)}, but got {value!r}.")
        if init_from is not None and (anchor is not None or augments):
            raise ValueError(
                f"CALMModule: `anchor` and `augments` must be left out with `init_from`, but got both. {init_from} has its own."
            )
        if anchor is None and init_from is None:
            raise ValueError(_missing_module("anchor"))
        check_kinds(type(self).__name__, hints_of(CALMModule), {"anchor": anchor})
        given = built_from_config()
        super().__init__(
            cast(Backbone, anchor),
            init_from=init_from,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            generation=generation,
            activation_checkpointing=activation_checkpointing,
        )
        if init_from is not None:
            augments = augments_of(init_from)
        sources = [augments] if isinstance(augments, (Augment, nn.Module)) else list(augments or ())
        self._augments = [
            Augment(**a) if isinstance(a, Mapping) and "model" in a else a if isinstance(a, Augment) else Augment(a)
            for a in sources
        ]
        prefix = next((index for index, augment in enumerate(self._augments) if augment.alignment == "prefix"), None)
        if loss_on == "all" and prefix is not None:
            raise ValueError(
                f"CALMModule: `loss_on` must be 'response', but got 'all', because augment {prefix} reads the prompt as a "
                "prefix. Every position sees all of a prefix, so the loss would include tokens that are visible before they "
                "are predicted. Set `loss_on` to 'response', or the augment's `alignment` to 'aligned'."
            )
        self.connection = ConnectionConfig(**connection) if isinstance(connection, Mapping) else connection
        if not given:
            self.hparams.pop("backbone", None)
            self.hparams["anchor"] = described_model(anchor)
            self.hparams["anchor_layers"] = storable(anchor_layers, anchor)
            described = [{**described_augment(a), "model": described_model(a.model)} for a in self._augments]
            self.hparams["augments"] = [] if init_from else described
            self.hparams["connection"] = None if self.connection is None else dataclasses.asdict(self.connection)
        self.combine, self.anchor_layers, self.anchor_position = combine, anchor_layers, anchor_position
        self.loss_on, self.connections_from = loss_on, connections_from
        self.store_states, self.attention_maps = store_states, attention_maps
        self._stores: dict[int, StateStore] = {}
        self.val_nll, self.test_nll = TokenNLL(), TokenNLL()

    default_lr = 1e-3

    def initial_weights(self) -> list[str]:
        """Return the path of the anchor, if it is given as one, or `init_from`. Its token ids are the ids of the data."""
        anchor: Any = self.init_from or self.source.backbone
        return [anchor] if isinstance(anchor, str) else []

    def build_for_sharding(self, build: Callable[[], nn.Module]) -> nn.Module:
        """Build the composition whole: it reads the weights of its models, and a second attempt would add hooks again."""
        return build()

    def build_policy(self) -> CALM:
        """Build the composition of the anchor and its augments."""
        if self.init_from is not None:
            policy = cast(CALM, composition_of(self.init_from))
        else:
            anchor = _build(self.source.backbone, "anchor")
            check_causal(anchor)
            models = [_build(augment.model, f"augments[{i}].model") for i, augment in enumerate(self._augments)]
            policy = CALM(
                anchor,
                [augment.with_changes(model=model) for augment, model in zip(self._augments, models, strict=True)],
                connection=self.connection,
                combine=self.combine,
                anchor_layers=self.anchor_layers,
                anchor_position=self.anchor_position,
            )
        if self.connections_from is not None:
            policy.load_connections(self.connections_from)
        rank_zero_info(policy.describe())
        return policy

    def setup(self, stage: str) -> None:
        """Check that the data module's tokenizers fit the augments, before the first batch.

        Args:
            stage: The stage that Lightning sets up.

        Raises:
            ValueError: If a tokenizer does not fit its augment.
        """
        super().setup(stage)
        # Lightning warns where a module and not its data module has this hook.
        warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer` in `LightningModule`")
        tokenizers = getattr(datamodule_of(self.trainer), "augment_tokenizers", ())
        if tokenizers and len(tokenizers) != len(self._augments):
            raise ValueError(
                f"`augment_tokenizers` must have one entry per augment, {len(self._augments)} in all, "
                f"but got {len(tokenizers)}. Use null for an augment that reads the anchor's token ids."
            )
        for index, (tokenizer, augment) in enumerate(zip(tokenizers, self._augments, strict=False)):
            if tokenizer is not None:
                check_realigned(index, prefix=augment.alignment == "prefix", own=augment.tokens == "own")

    # -- training

    def begin_trial(self) -> None:
        """Prepare a copy that is only timed, which stores nothing."""
        super().begin_trial()
        self.store_states = None

    def check_by_hand(self) -> None:
        """Raise if hidden states are to be stored, which the hooks of a Trainer do."""
        super().check_by_hand()
        if self.store_states is not None:
            raise ValueError("CALMModule: `store_states` needs a Trainer. Train with a Trainer, or set it to None.")

    def on_fit_start(self) -> None:
        """Ignore Lightning's warning about modules in eval mode. The frozen models are always in eval mode."""
        warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")

    def _inputs(self, batch: CALMBatch, *, stored: bool = False) -> list[AugmentInput | None]:
        """Determine the input of each augment: the batch's own entry, the prompt as a prefix, or stored hidden states."""
        readers, alignment = self.policy.readers, use_alignment(self.policy, datamodule_of(trainer_of(self)))
        inputs: list[AugmentInput | None] = list(batch.get("augments", [None] * len(readers)))
        if alignment is not None:
            inputs = alignment.completed(inputs, readers, batch)
        for index, reader in enumerate(readers):
            given = inputs[index]
            if given is not None and given.ends is not None:
                check_realigned(index, prefix=reader.prefix, own=reader.own)  # before its states are stored
                inputs[index] = given = within_context(index, reader, given)
            if given is None and reader.prefix:
                prompt = batch["mask"] & (batch["targets"].cumsum(dim=1) == 0)
                inputs[index] = given = AugmentInput(batch["tokens"], prompt)
            if stored and self.store_states is not None and not reader.prefix and (given is None or given.states is None):
                tokens, mask = (batch["tokens"], batch["mask"]) if given is None else (given.tokens, given.mask)
                states = self._store_of(index).fetch(reader, tokens, torch.ones_like(tokens) > 0 if mask is None else mask)
                inputs[index] = (given or AugmentInput(tokens))._replace(states=states)
        return inputs

    def _store_of(self, index: int) -> StateStore:
        """Return the store of an augment's hidden states, opened on first use."""
        if index not in self._stores:
            reader = self.policy.readers[index]
            dtypes = sorted({str(parameter.dtype) for parameter in reader.model.parameters()})
            key = f"{self.policy.identity[f'augments.{index}']} {reader.site} {dtypes} {self.trainer.precision}"
            self._stores[index] = StateStore(cast(str, self.store_states), key)
        return self._stores[index]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Add the stored hidden states of a training batch while it is on the CPU."""
        stored = self.store_states is not None and self.trainer.training
        return attach_states(batch, self.policy.readers, self._store_of) if stored else batch

    def _targeted(self, batch: CALMBatch) -> CALMBatch:
        """Return the batch with the targets that `loss_on` selects."""
        if self.loss_on == "response":
            return batch
        targets = batch["mask"].clone()
        targets[:, 0] = False
        changed: CALMBatch = {**batch, "targets": targets}
        if "num_tokens" in batch:
            changed["num_targets"] = batch["num_tokens"]
        return changed

    def training_step(self, batch: CALMBatch, batch_idx: int) -> Tensor:
        """Compute the sum of -log p(response) over the micro-batch, in nats.

        The gradient is divided by the number of target tokens in the optimizer batch before the optimizer step.
        """
        self.begin_by_hand()
        inputs = self._inputs(batch, stored=True)
        if self.logs_this_step:
            with self.policy.tracing() as traces:
                logprobs = composed_logprobs(self.policy, self._targeted(batch), inputs)
            self.log_dict({f"train/contribution/{trace.name}": trace.ratio for trace in traces})
        else:
            logprobs = composed_logprobs(self.policy, self._targeted(batch), inputs)
        loss, count = -logprobs.sums.sum(), logprobs.counts.sum()
        self.count_tokens(batch)
        self.log_training({"loss": loss.detach() / count.clamp(min=1)}, progress_bar="loss", batch_size=len(logprobs.counts))
        return self.weighted(loss, count)

    def on_train_epoch_end(self) -> None:
        """Write the index of the stored states, so that a later run finds the states of this epoch."""
        super().on_train_epoch_end()
        for store in self._stores.values():
            store.flush()

    def on_fit_end(self) -> None:
        """Close the files of stored states."""
        for store in self._stores.values():
            store.close()
        self._stores = {}

    # -- evaluation

    def _evaluate(self, metric: TokenNLL, batch: CALMBatch, loader: int) -> None:
        # `num_bytes` counts only the bytes of the responses.
        num_bytes = batch.get("num_bytes") if self.loss_on == "response" else None
        logprobs = composed_logprobs(self.policy, self._targeted(batch), self._inputs(batch))
        for each in metrics_of(metric, self.trainer, loader):
            each.update(*logprobs, num_bytes)

    def validation_step(self, batch: CALMBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update ``val/loss``, ``val/perplexity`` and ``val/bits_per_byte`` with a batch."""
        if self.attention_maps and batch_idx == dataloader_idx == 0 and not self.trainer.sanity_checking:
            self._show_attention(batch)
        self._evaluate(self.val_nll, batch, dataloader_idx)

    def test_step(self, batch: CALMBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update ``test/loss``, ``test/perplexity`` and ``test/bits_per_byte`` with a batch."""
        self._evaluate(self.test_nll, batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log what the epoch's sums and counts give."""
        log_metric(self, "val", self.val_nll)

    def on_test_epoch_end(self) -> None:
        """Log what the epoch's sums and counts give."""
        log_metric(self, "test", self.test_nll)

    def _show_attention(self, batch: CALMBatch) -> None:
        batch = first_row(batch)
        inputs, data = self._inputs(batch), datamodule_of(self.trainer)
        with self.policy.tracing(maps=True) as traces:
            composed_logprobs(self.policy, batch, inputs)
        if self.trainer.is_global_zero:
            given = getattr(data, "augment_tokenizers", None) or [None] * len(inputs)
            tokenizers = [getattr(data, "tokenizer", None)]
            tokenizers += [other or tokenizers[0] for other in given]
            step = self.trainer.global_step
            show_attention(self.loggers, traces, self.policy.spots, batch, inputs, tokenizers=tokenizers, step=step)

    # -- prediction

    def continue_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        ends: Ends | None = None,
        ids: Sequence[int] | None = None,
    ) -> list[list[Generation]]:
        """Continue prompts. See `AlignModule.continue_prompts` for the arguments.

        Without a cache, prompts are continued separately if an augment reads a prefix or has its own tokenizer, because it
        needs to know the prompt at every step.
        """
        readers, alignment = self.policy.readers, use_alignment(self.policy, datamodule_of(trainer_of(self)))
        if self.policy.make_cache is not None or not any(reader.own or reader.prefix for reader in readers):
            return super().continue_prompts(prompts, config, ends=ends, ids=ids)
        results = []
        for number, prompt in zip(range(len(prompts)) if ids is None else ids, prompts, strict=True):
            start = torch.tensor([prompt], device=self.device)

            def inputs(tokens: Tensor, start: Tensor = start) -> list[AugmentInput | None]:
                lengths = [start.shape[1]] * len(tokens)
                given = [None] * len(readers) if alignment is None else alignment.inputs(tokens, num_prompts=lengths)
                return [AugmentInput(start) if reader.prefix else own for reader, own in zip(readers, given, strict=True)]

            with self.policy.given(inputs):
                results += super().continue_prompts([prompt], config, ends=ends, ids=[number])
        return results

    # -- checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the hashes of the frozen models, and add their weights to the checkpoint so that loading stays strict.

        Raises:
            ValueError: If a frozen model has other weights than in training.
        """
        if self.policy is None:
            self.configure_model()
        checkpoint.setdefault(FROZEN, {})  # a checkpoint of another model has no hashes
        super().on_load_checkpoint(checkpoint)


def _build(source: Any, name: str) -> nn.Module:
    """Build a model from a checkpoint path, a factory or a description. A module is returned as it is."""
    if source is None:
        raise ValueError(_missing_module(name))
    return build_part(source)


def _missing_module(name: str) -> str:
    return (
        f"`{name}` must be a model, but got None. The run was started with a module, which a checkpoint does not contain. "
        f"Pass `{name}` again."
    )
