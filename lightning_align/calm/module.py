"""CALM training: the next-token loss of a frozen anchor that reads frozen augments, with respect to the connections alone."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_align.calm.connections import ConnectionConfig
from lightning_align.calm.datamodule import CALMBatch
from lightning_align.calm.layers import Position
from lightning_align.calm.model import CALM
from lightning_align.calm.probe import check_frozen
from lightning_align.calm.spec import Augment, AugmentInput, check_realigned
from lightning_align.calm.states import StateStore
from lightning_align.generation.sampler import Generation, GenerationConfig
from lightning_align.models.building import Backbone, build_backbone
from lightning_align.models.checkpoint import load_policy
from lightning_align.models.language_model import has_hidden
from lightning_align.runtime.lightning_internals import built_from_config, datamodule_of, trainer_of
from lightning_align.scoring.head import target_logprobs
from lightning_align.scoring.logits import logits_logprobs
from lightning_align.scoring.sums import sum_logprobs
from lightning_align.scoring.targets import select_targets
from lightning_align.training.arguments import RunArguments, Unpack
from lightning_align.training.metrics import TokenNLL
from lightning_align.training.module import AlignModule
from lightning_align.types import LogProbs

FROZEN = ("policy.anchor.", "policy.augments.")
"""What a checkpoint leaves out."""


def composed_logprobs(model: CALM, batch: CALMBatch, inputs: Sequence[AugmentInput | None]) -> LogProbs:
    """Sums and counts of the log-probs of the responses under a composition.

    Args:
        model: the composition.
        batch: (B, N), padded on the right.
        inputs: of each augment.
    """
    rows, before, targets = select_targets(batch)
    if has_hidden(model):
        hidden = model.hidden(batch["tokens"], inputs=inputs)[rows, before]
        logps = target_logprobs(hidden, model.head, targets)
    else:
        logps = logits_logprobs(model(batch["tokens"], inputs=inputs), rows, before, targets)
    return sum_logprobs(logps, rows, batch["targets"])


class CALMModule(AlignModule):
    """Trains the connections of a `CALM`; a checkpoint holds them and the hashes of the frozen models, and no more."""

    policy: CALM
    objects = ("anchor", "augments", "connection")

    def __init__(
        self,
        anchor: str | Backbone,
        augments: list[Augment],
        *,
        connection: ConnectionConfig | None = None,
        combine: Literal["sequence", "sum"] = "sequence",
        anchor_layers: str | None = None,
        anchor_position: Position = "output",
        loss_on: Literal["response", "all"] = "response",
        connections_from: str | None = None,
        store_states: str | None = None,
        attention_maps: bool = False,
        **shared: Unpack[RunArguments],
    ) -> None:
        """Describe the run; the models are built in ``configure_model``.

        Args:
            anchor: the model that is augmented: a module or a factory in code, `class_path` and `init_args` or the path of a
                checkpoint in YAML.
            augments: the models that augment it, and how each is connected.
            connection: what the connections are made of.
            combine: where several connections end at one layer, whether each sees what the one before it added (`sequence`) or
                all see the layer's own state (`sum`).
            anchor_layers: names of the anchor's layers, such as `model.layers.*`; by default they are found.
            anchor_position: whether connections are added to a layer's input or to its output.
            loss_on: whether to train on the responses, or on `all` tokens; not on all where an augment reads the prompt as a
                prefix, which every position of the prompt would see the end of.
            connections_from: safetensors file of connections to begin with, as `CALM.save_connections` writes it.
            store_states: folder in which the augments' hidden states of training rows are kept, to be computed once and not in
                every epoch.
            attention_maps: whether to show in TensorBoard, at each validation, what the first row's positions attend to.
            **shared: `optimizer`, `lr_scheduler` and `generation` of `AlignModule`.

        Raises:
            ValueError: if an option is none of its choices, or two do not go together.
        """
        for name, value, choices in (("loss_on", loss_on, ("response", "all")), ("combine", combine, ("sequence", "sum"))):
            if value not in choices:
                raise ValueError(f"CALMModule: {name} is {value!r}, expected one of {', '.join(choices)}")
        if anchor is None:
            raise ValueError("anchor was a module when the run was made, which a checkpoint cannot hold: give it again")
        given = built_from_config()
        super().__init__(cast(Backbone, anchor), init_from=None, lora=None, **shared)
        sources = [augments] if isinstance(augments, (Augment, nn.Module)) else list(augments)
        self._augments = [
            Augment(**a) if isinstance(a, Mapping) and "model" in a else a if isinstance(a, Augment) else Augment(a)
            for a in sources
        ]
        prefix = next((index for index, augment in enumerate(self._augments) if augment.alignment == "prefix"), None)
        if loss_on == "all" and prefix is not None:
            raise ValueError(
                f"CALMModule: loss_on is 'all', and augment {prefix} reads the prompt as a prefix, which every position sees "
                "all of: the loss would be on tokens that are seen before they are predicted. Set loss_on to 'response', or "
                "the augment's alignment to 'aligned'"
            )
        self.connection = ConnectionConfig(**connection) if isinstance(connection, Mapping) else connection
        if not given:
            self.hparams.pop("backbone", None)
            self.hparams["anchor"] = _described(anchor)
            self.hparams["augments"] = [
                {**{f.name: getattr(a, f.name) for f in dataclasses.fields(a)}, "model": _described(a.model)}
                for a in self._augments
            ]
            self.hparams["connection"] = None if self.connection is None else dataclasses.asdict(self.connection)
        self.combine, self.anchor_layers, self.anchor_position = combine, anchor_layers, anchor_position
        self.loss_on, self.connections_from = loss_on, connections_from
        self.store_states, self.attention_maps = store_states, attention_maps
        self._stores: dict[int, StateStore] = {}
        self.val_nll, self.test_nll = TokenNLL(), TokenNLL()

    default_lr = 1e-3

    def build_policy(self) -> CALM:
        """Build the composition of the anchor and its augments."""
        anchor = self.source.backbone
        augments = [dataclasses.replace(a, model=_build(a.model, f"augments[{i}].model")) for i, a in enumerate(self._augments)]
        policy = CALM(
            _build(anchor, "anchor"),
            augments,
            connection=self.connection,
            combine=self.combine,
            anchor_layers=self.anchor_layers,
            anchor_position=self.anchor_position,
        )
        if self.connections_from is not None:
            policy.load_connections(self.connections_from)
        _ = policy.identity  # now, before any sharding
        rank_zero_info(policy.describe())
        return policy

    def setup(self, stage: str) -> None:
        """Find out now, not at the first batch, whether the data module's tokenizers are of use to the augments.

        Raises:
            ValueError: if one is not.
        """
        super().setup(stage)
        tokenizers = getattr(datamodule_of(self.trainer), "augment_tokenizers", ())
        if tokenizers and len(tokenizers) != len(self._augments):
            raise ValueError(
                f"augment_tokenizers are {len(tokenizers)}, expected {len(self._augments)}, one for each augment in order: "
                "null for one that reads the anchor's ids"
            )
        for index, (tokenizer, augment) in enumerate(zip(tokenizers, self._augments, strict=False)):
            if tokenizer is not None:
                check_realigned(index, prefix=augment.alignment == "prefix", own=augment.tokens == "own")

    # -- training

    def on_fit_start(self) -> None:
        """Keep Lightning from wondering, at every start, at models that are in evaluation mode for good."""
        warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")

    def _inputs(self, batch: CALMBatch, *, stored: bool = False) -> list[AugmentInput | None]:
        """What each augment reads: what the batch says, the prompt as a prefix, or states from the disk."""
        readers = self.policy.readers
        inputs: list[AugmentInput | None] = list(batch.get("augments", [None] * len(readers)))
        for index, reader in enumerate(readers):
            given = inputs[index]
            if given is not None and given.ends is not None:
                check_realigned(index, prefix=reader.prefix, own=reader.own)  # before it is read, perhaps from the disk
            if given is None and reader.prefix:
                prompt = batch["mask"] & (batch["targets"].cumsum(dim=1) == 0)
                inputs[index] = given = AugmentInput(batch["tokens"], prompt)
            if stored and self.store_states is not None and not reader.prefix:
                tokens, mask = (batch["tokens"], batch["mask"]) if given is None else (given.tokens, given.mask)
                if index not in self._stores:
                    dtypes = sorted({str(parameter.dtype) for parameter in reader.model.parameters()})
                    place = f"{reader.depths} {self._augments[index].position}"
                    key = f"{self.policy.identity[f'augments.{index}']} {place} {dtypes} {self.trainer.precision}"
                    self._stores[index] = StateStore(self.store_states, key)
                states = self._stores[index].fetch(reader, tokens, torch.ones_like(tokens) > 0 if mask is None else mask)
                inputs[index] = (given or AugmentInput(tokens))._replace(states=states)
        return inputs

    def _targeted(self, batch: CALMBatch) -> CALMBatch:
        """The batch with the targets that the loss is to be on."""
        if self.loss_on == "response":
            return batch
        targets = batch["mask"].clone()
        targets[:, 0] = False
        return {**batch, "targets": targets}

    def training_step(self, batch: CALMBatch, batch_idx: int) -> Tensor:
        """Sum of -log p(response) over the micro-batch, to be divided by the tokens of the optimizer batch."""
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
        """Make what was stored last."""
        for store in self._stores.values():
            store.flush()

    def on_fit_end(self) -> None:
        """Close the stored states."""
        for store in self._stores.values():
            store.close()
        self._stores = {}

    # -- evaluation

    def _evaluate(self, metric: TokenNLL, batch: CALMBatch) -> None:
        # The bytes of a batch are those of its responses.
        num_bytes = batch.get("num_bytes") if self.loss_on == "response" else None
        metric.update(*composed_logprobs(self.policy, self._targeted(batch), self._inputs(batch)), num_bytes)

    def validation_step(self, batch: CALMBatch, batch_idx: int) -> None:
        """Add a batch to ``val/loss``, ``val/perplexity`` and ``val/bits_per_byte``."""
        if self.attention_maps and batch_idx == 0 and not self.trainer.sanity_checking:
            self._show_attention(batch)
        self._evaluate(self.val_nll, batch)

    def test_step(self, batch: CALMBatch, batch_idx: int) -> None:
        """The same under ``test/``."""
        self._evaluate(self.test_nll, batch)

    def on_validation_epoch_end(self) -> None:
        """Log what the epoch's sums and counts give."""
        self.log_evaluation("val", self.val_nll.compute_and_reset())

    def on_test_epoch_end(self) -> None:
        """Log what the epoch's sums and counts give."""
        self.log_evaluation("test", self.test_nll.compute_and_reset())

    def _show_attention(self, batch: CALMBatch) -> None:
        with self.policy.tracing(maps=True) as traces:
            composed_logprobs(self.policy, batch, self._inputs(batch))
        loggers = [logger for logger in self.loggers if isinstance(logger, TensorBoardLogger)]
        for logger in loggers if self.trainer.is_global_zero else ():
            for trace in traces:
                assert trace.weights is not None
                image = trace.weights[0].amax(dim=0)  # of the heads the one that looks hardest
                logger.experiment.add_image(f"val/attention/{trace.name}", image[None], self.trainer.global_step)

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
        """Continue prompts; see `AlignModule.continue_prompts`.

        An augment with its own tokenizer reads the text so far at every step, and one that reads a prefix without a cache
        has to be given it: then prompts are continued one by one.
        """
        readers = self.policy.readers
        if not any(r.own or (r.prefix and self.policy.make_cache is None) for r in readers):
            return super().continue_prompts(prompts, config, eos_id=eos_id, ids=ids, decode=decode)
        realign = getattr(datamodule_of(trainer_of(self)), "augment_inputs", None)
        results = []
        for number, prompt in zip(range(len(prompts)) if ids is None else ids, prompts, strict=True):
            start = torch.tensor([prompt], device=self.device)

            def inputs(tokens: Tensor, start: Tensor = start) -> list[AugmentInput | None]:
                given = realign(tokens, torch.ones_like(tokens, dtype=torch.bool)) if realign else []
                given = given or [None] * len(readers)
                return [AugmentInput(start) if reader.prefix else own for reader, own in zip(readers, given, strict=True)]

            with self.policy.given(inputs):
                results += super().continue_prompts([prompt], config, eos_id=eos_id, ids=[number], decode=decode)
        return results

    # -- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Hold the connections and what they belong to; a sharded strategy restores all weights, and so saves them."""
        checkpoint["frozen"] = dict(self.policy.identity)
        if not self.is_sharded:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith(FROZEN)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Complete the connections with the frozen models that stand here, if they are those that the run was made with.

        Raises:
            ValueError: if they are not.
        """
        if self.policy is None:
            self.configure_model()
        trainer = trainer_of(self)
        path = None if trainer is None else trainer.ckpt_path
        check_frozen(self.policy.identity, checkpoint.get("frozen", {}), path or "the checkpoint")
        if not self.is_sharded:
            own = self.state_dict()
            checkpoint["state_dict"] |= {name: value for name, value in own.items() if name.startswith(FROZEN)}
            super().on_load_checkpoint(checkpoint)


def _build(source: Any, name: str) -> nn.Module:
    """A model out of a path, a factory, a description or itself."""
    if source is None:
        raise ValueError(f"{name} was a module when the run was made, which a checkpoint cannot hold: give it again")
    return load_policy(source) if isinstance(source, str) else build_backbone(source)


def _described(source: Any) -> Any:
    """What a checkpoint can hold of where a model came from."""
    if isinstance(source, nn.Module):
        return None
    return source if isinstance(source, (str, dict)) else None
