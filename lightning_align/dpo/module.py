"""Direct preference optimisation: Rafailov et al. 2023, arXiv 2305.18290."""

from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics.aggregation import CatMetric

from lightning_align.dpo.identity import batch_faults, differs, identity_fault
from lightning_align.generation.sampler import GenerationConfig
from lightning_align.models.building import Backbone
from lightning_align.models.lora import LoRAConfig
from lightning_align.models.parallelize import shard
from lightning_align.models.weights import weights_hash
from lightning_align.references.frozen import AdaptersOff, FrozenCopy, frozen_copy
from lightning_align.references.moving import moving_reference
from lightning_align.references.protocol import MovingReference, Reference
from lightning_align.references.stored import Source, StoredLogProbs
from lightning_align.references.update import ReferenceUpdate
from lightning_align.runtime.ranks import everyone
from lightning_align.scoring.collisions import response_collisions
from lightning_align.scoring.logprobs import token_logprobs
from lightning_align.scoring.losses import SORTED, LossName
from lightning_align.scoring.objective import Divergence, Objective
from lightning_align.scoring.ratios import Ratios, confidence_weights, log_ratios, pair_metrics, tail_weights
from lightning_align.scoring.sums import sum_logprobs
from lightning_align.training.metrics import PairMeans
from lightning_align.training.module import AlignModule
from lightning_align.types import LogProbs, PreferenceBatch, PromptBatch, TokenBatch

ReferenceKind = Literal["frozen", "stored", "moving"]
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


class DPOModule(AlignModule):
    """Aligns a language model with preferences, against the model that it began as."""

    default_lr = 5e-6

    def __init__(
        self,
        backbone: Backbone | None = None,
        *,
        init_from: str | None = None,
        loss: LossName | dict[LossName, float] = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        loss_args: dict[str, float] | None = None,
        sft_weight: float | None = None,
        divergence: Divergence = "reverse_kl",
        divergence_alpha: float = 0.5,
        confidence_weighting: bool = False,
        ld_alpha: float = 1.0,
        reference: ReferenceKind = "frozen",
        reference_cache: str = ".cache/lightning_align",
        lora: LoRAConfig | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        generation: GenerationConfig | None = None,
    ) -> None:
        """Describe the run; policy and reference are built in ``configure_model``.

        Args:
            backbone: the language model: a module or a factory in code, `class_path` and `init_args` in YAML. May be
                left out with `init_from`, whose checkpoint says what it is of.
            init_from: checkpoint of the fine-tuned model, which policy and reference begin as.
            loss: one of those in `lightning_align.scoring.losses`, or several with their weights. `simpo`, `cpo` and `orpo`
                need no reference, and none is made.
            beta: strength of the pull towards the reference; about 0.1 on sums, 2 to 10 for `sigmoid_norm` and `simpo`.
            label_smoothing: assumed share of flipped labels, for the losses that have it.
            loss_args: further arguments of the losses: `gamma` of `simpo`, `penalty` of `dpop`, `temperature` of `discopop`.
            sft_weight: weight of an added -log p(chosen) / |chosen|; by default 1 with `cpo` and `orpo`, as in their papers,
                else 0. With `sigmoid` it makes iterative RPO (Pang et al. 2024, arXiv 2404.19733).
            divergence: what holds the policy to the reference: `reverse_kl` (DPO), `forward_kl`, `js` or `alpha`.
            divergence_alpha: of the `alpha` divergence.
            confidence_weighting: weigh each pair by how likely the policy finds its responses (WPO); one more forward pass.
            ld_alpha: share that tokens beyond the length of the shorter response count (LD-DPO); 1 counts all alike.
            reference: `frozen`; `stored`, which is frozen, scores every row once before the training and then takes neither
                memory nor time; or `moving` by the rule of the callback `ReferenceUpdate`.
            reference_cache: folder of the stored log-probs, on a disk that all nodes see. Found again by the hashes of the
                rows and of the reference's weights, they may be deleted at any time.
            lora: train only adapters. A frozen reference is then the policy with its adapters off, and costs no memory; a
                moving one costs a second set of adapters.
            optimizer: factory over parameters; by default AdamW at 5e-6.
            lr_scheduler: factory over the optimizer; stepped every optimizer step.
            generation: how `predict` and the sample logger decode.

        Raises:
            ValueError: if the loss cannot use these numbers.
        """
        super().__init__(
            backbone,
            init_from=init_from,
            lora=lora,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            generation=generation,
        )
        self.objective = Objective(
            loss,
            beta=beta,
            label_smoothing=label_smoothing,
            loss_args=loss_args,
            divergence=divergence,
            divergence_alpha=divergence_alpha,
        )
        if sft_weight is None:
            sft_weight = 1.0 if self.objective.weights.keys() & {"cpo", "orpo"} else 0.0
        if sft_weight < 0:
            raise ValueError(f"sft_weight is {sft_weight}; it must be 0 or above")
        if not 0 <= ld_alpha <= 1:
            raise ValueError(
                f"ld_alpha is {ld_alpha}; it is the share that tokens beyond the shorter response count, from 0 to 1"
            )
        if confidence_weighting and self.objective.weights.keys() & set(SORTED):
            raise ValueError(f"confidence_weighting weighs pairs, and {loss} tells no pairs apart: use one without the other")
        if reference == "moving" and not self.objective.needs_reference:
            raise ValueError(f"reference is 'moving', but {loss} has no reference: leave `reference` out")
        self.beta, self.sft_weight = beta, sft_weight
        self.confidence_weighting, self.ld_alpha = confidence_weighting, ld_alpha
        if reference not in get_args(ReferenceKind):
            raise ValueError(f"reference is {reference!r}; it must be one of {', '.join(get_args(ReferenceKind))}")
        self.reference_kind, self.reference_cache = reference, reference_cache
        self._reference: tuple[Reference, str | None] | None = None
        self.val_means, self.test_means = PairMeans(METRICS), PairMeans(METRICS)
        self.val_margins = CatMetric()

    @property
    def reference(self) -> Reference:
        """What the policy is compared with; there once ``configure_model`` has run.

        Raises:
            ValueError: if the module came from a checkpoint that was trained against another one than can be made here.
        """
        if not self.objective.needs_reference:
            raise ValueError(f"the loss {', '.join(self.objective.weights)} has no reference")
        if self._reference is None:
            assert self.policy is not None, "configure_model has not run"
            raise ValueError(
                "the reference of this checkpoint is not here: its weights are not, or no longer, those of "
                f"{self.init_from or 'the backbone'}. Give load_from_checkpoint the `init_from` (or the module as `backbone`) "
                "that the run began with; prediction from prompts needs none"
            )
        return self._reference[0]

    def configure_reference(self, policy: nn.Module) -> None:
        """Adapters off where only adapters train, else a frozen copy of the policy as it begins; or one of those that move."""
        if not self.objective.needs_reference:
            return
        if self.reference_kind == "moving":
            moving = moving_reference(policy, lora=self.lora, convert=self._convert, shard=self._shard)
            self._reference = moving, None
            # Registered, so that it is saved, sharded or whole, and restored.
            self.reference_average = moving.average
            return
        if self.lora is not None:
            self._reference = AdaptersOff(), None
        elif self.init_from is None and (disabled := getattr(policy, "adapters_off", None)) is not None:
            self._reference = AdaptersOff(disabled), None  # new adapters of another library
        elif self._awaits_weights:
            return  # `reference` says so to whoever asks for it
        else:
            frozen = frozen_copy(policy)
            self._reference = frozen, weights_hash(frozen.model)
            frozen.model = self._shard(self._convert(frozen.model))
        if self.reference_kind == "stored":
            source, weights = self._reference
            stored = StoredLogProbs(
                source.logprobs,
                again=lambda: self._source_again(source, weights),
                weights=weights or weights_hash(policy),
                precision=str(self._trainer.precision if self._trainer is not None else next(policy.parameters()).dtype),
                cache_dir=self.reference_cache,
            )
            self._reference = stored, weights

    def _source_again(self, source: Reference, weights: str | None) -> Source | None:
        """The source of stored log-probs for rows that come after it was let go, if what it began from is still there."""
        if self._sharded:
            return None  # the ranks would have to notice together
        if weights is None:
            return source.logprobs  # the policy with its adapters off
        (backbone,) = self._backbone
        missing = self.init_from is not None and not Path(self.init_from).exists()
        if isinstance(backbone, nn.Module) or missing or self._trainer is None:
            return None
        context = self._trainer.precision_plugin.module_init_context()
        with isolate_rng(), self._trainer.strategy.tensor_init_context(), context:
            frozen = FrozenCopy(self._build_policy())
        if weights_hash(frozen.model) != weights:
            return None  # drawn at random, or written over
        frozen.model = self._convert(frozen.model)
        return frozen.logprobs

    def setup(self, stage: str) -> None:
        """As `AlignModule.setup`; tell a stored reference what will ask for rows."""
        super().setup(stage)
        if self._reference is not None and isinstance(self._reference[0], StoredLogProbs):
            self._reference[0].stage = getattr(stage, "value", stage)  # Lightning passes a member of an enum

    def teardown(self, stage: str) -> None:
        """Free what a stage alone needed."""
        if self._reference is not None and isinstance(self._reference[0], StoredLogProbs):
            self._reference[0].rest()

    def _convert(self, model: nn.Module) -> nn.Module:
        """As Lightning converts the policy, which registered modules alone get."""
        return model if self._trainer is None else self._trainer.precision_plugin.convert_module(model)

    def _shard(self, model: nn.Module) -> nn.Module:
        """A root of its own where the policy is sharded, else every rank would hold all of it."""
        return shard(model.to(self.device), self._data_mesh) if self._sharded else model

    def _check_weights(self) -> None:
        super()._check_weights()
        if self._reference is not None and isinstance(self.reference, MovingReference):
            self.reference.restore(self.policy)

    def on_fit_start(self) -> None:
        """Score all rows under a stored reference; refuse a moving one that nothing moves.

        Raises:
            ValueError: if there is no callback for it.
        """
        if self.reference_kind == "stored" and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a helper
            self._fill_stored()
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]  # set by the Trainer's callback connector
        if self.reference_kind == "moving" and not any(isinstance(callback, ReferenceUpdate) for callback in callbacks):
            raise ValueError(
                "reference is 'moving', but nothing moves it: add the callback ReferenceUpdate to the trainer, or leave "
                "`reference` at 'frozen'"
            )

    def _fill_stored(self) -> None:
        stored = self.reference
        assert isinstance(stored, StoredLogProbs)
        loops = self.trainer.fit_loop
        sources = [loops._data_source]
        if self.trainer.enable_validation:
            sources.append(loops.epoch_loop.val_loop._data_source)
        with isolate_rng(), self.trainer.precision_plugin.forward_context():
            # Loaders of their own: a data module's is cut in shares of the ranks, and each row comes in one of them.
            loaders = CombinedLoader([source.dataloader() for source in sources], "sequential")
            batches = (self._join(batch) for batch, _, _ in iter(loaders))
            stored.fill(batches, self.policy, self.device, in_step=self._sharded)
        stored.finish()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep which reference it was, not the reference."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference_sha256"] = None if self._reference is None else self._reference[1]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another reference than the checkpoint was trained against.

        Raises:
            ValueError: if the weights that the reference was made from have changed.
        """
        super().on_load_checkpoint(checkpoint)
        kind = checkpoint.get("hyper_parameters", {}).get("reference", "frozen")
        if (kind == "moving") != (self.reference_kind == "moving"):
            raise ValueError(
                f"this checkpoint is of a run with reference: {kind}, and the module has reference: {self.reference_kind}: go "
                "on with the same, or begin a new run with its weights as `init_from`"
            )
        then, now = checkpoint.get("reference_sha256"), None if self._reference is None else self._reference[1]
        if then == now:
            return
        if self._trainer is None or not self._trainer.training:
            self._reference = None  # the policy alone may be all that is wanted; scoring without a reference raises
            return
        raise ValueError(
            f"this checkpoint was trained against a reference with weights {str(then)[:12]}, and the one made from "
            f"{self.init_from or 'the backbone'} has {str(now)[:12]}: give the `init_from` (or the module) that it began with"
        )

    def score(self, batch: PreferenceBatch) -> tuple[LogProbs, Ratios]:
        """Log-probs under the policy, chosen rows first (2B,), and log-ratios to the reference (B,); one forward pass each."""
        both = self._join(batch)
        logps, rows = token_logprobs(self.policy, both)
        policy = counted = sum_logprobs(logps, rows, both["targets"])
        if "target_weights" in both:
            counted = sum_logprobs(logps, rows, both["targets"], both["target_weights"])
        if not self.objective.needs_reference:
            return policy, log_ratios(counted, None)
        reference = batch["reference"] if "reference" in batch else self.reference.logprobs(self.policy, both)
        return policy, log_ratios(counted, reference)

    def _join(self, batch: PreferenceBatch) -> TokenBatch:
        """Both sides, (2B, N), with what each target counts."""
        both = concatenate(batch)
        if self.ld_alpha != 1:
            both["target_weights"] = tail_weights(both["targets"], self.ld_alpha)
        return both

    def _check_start(self, batch: PreferenceBatch, ratios: Ratios) -> None:
        """Warn of what is wrong with the first batch; see `lightning_align.dpo.identity`."""
        bos_id = None if self._tokenizer is None else self._tokenizer.bos_id
        faults = batch_faults(batch, bos_id=bos_id)
        dtype, precision = next(self.policy.parameters()).dtype, str(self.trainer.precision)
        coarse = dtype.itemsize < 4 or "16" in precision
        chosen = differs(ratios.chosen, ratios.chosen_lengths, coarse=coarse, dtype=dtype)
        rejected = differs(ratios.rejected, ratios.rejected_lengths, coarse=coarse, dtype=dtype)
        if self.objective.needs_reference and not everyone(not bool(chosen | rejected), self.device):
            both = self._join(batch)
            expected = batch["reference"] if "reference" in batch else self.reference.logprobs(self.policy, both)
            model = getattr(self.reference, "model", None)
            faults.append(identity_fault(self.policy, model, both, expected, coarse=coarse))
        for fault in faults:
            rank_zero_warn(f"the first batch, where the policy should still be its reference: {fault}")

    def pair_losses(self, batch: PreferenceBatch, policy: LogProbs, ratios: Ratios) -> Tensor:
        """The loss of each pair, (B,), with the added SFT term; normalised a pair, so that it does not depend on its batch."""
        weights = batch.get("weights")
        if self.confidence_weighting:
            confidence = confidence_weights(policy, response_collisions(self.policy, concatenate(batch)))
            weights = confidence if weights is None else weights * confidence
        losses = self.objective(ratios, weights=weights, margins=batch.get("margins"))
        if self.sft_weight:
            likelihoods = policy.means[: len(losses)]
            losses = losses - self.sft_weight * (likelihoods * batch["weights"] if "weights" in batch else likelihoods)
        return losses

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        """Sum of the pairs' losses, to be divided by the pairs of the optimizer batch; and for callbacks what `score` found."""
        policy, ratios = self.score(batch)
        if batch_idx == 0 and self.trainer.global_step == 0:
            self._check_start(batch, ratios)
        losses = self.pair_losses(batch, policy, ratios)
        for side in (batch["chosen"], batch["rejected"]):
            self.count_tokens(side)
        values = {"loss": losses.detach(), **pair_metrics(policy, ratios, beta=self.beta)}
        means = torch.stack(list(values.values())).mean(dim=1).unbind()
        self.log_training(dict(zip(values, means, strict=True)), progress_bar="loss", batch_size=len(losses))
        return {"loss": self.weighted(losses.sum(), len(losses)), **_detached(policy, ratios)}

    def _evaluate(self, means: PairMeans, batch: PreferenceBatch) -> dict[str, Any]:
        policy, ratios = self.score(batch)
        values = {"loss": self.pair_losses(batch, policy, ratios), **pair_metrics(policy, ratios, beta=self.beta)}
        means.update(values)
        return {"margins": values["rewards/margins"], **_detached(policy, ratios)}

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        """Add a batch to ``val/loss``, ``val/rewards/...`` and ``val/logps/...``; returns what `score` found, for callbacks."""
        outputs = self._evaluate(self.val_means, batch)
        self.val_margins.update(outputs["margins"])
        return outputs

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """The same under ``test/``."""
        self._evaluate(self.test_means, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all pairs, and the margins as a histogram."""
        self._log_means("val", self.val_means)
        # A single margin comes back without a dimension.
        margins = self.val_margins.compute().reshape(-1)
        self.val_margins.reset()
        if self.trainer.sanity_checking:
            return  # a few rows, which would stand beside the histograms of all of them
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger) and self.trainer.is_global_zero and len(margins):
                logger.experiment.add_histogram("val/rewards/margins_histogram", margins, self.global_step)

    def on_test_epoch_end(self) -> None:
        """Log the means over all pairs."""
        self._log_means("test", self.test_means)

    def _log_means(self, stage: str, means: PairMeans) -> None:
        values = means.compute()
        means.reset()
        for name, value in values.items():
            # The metric is the same on every rank already; sync_dist only tells Lightning so.
            self.log(f"{stage}/{name}", value, prog_bar=name in ("loss", "rewards/accuracies"), sync_dist=True)

    def predict_step(self, batch: PromptBatch | PreferenceBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Continue prompts, or score pairs.

        Returns:
            For prompts as `AlignModule.predict_step`; for pairs ``row``, the policy's log-probs and lengths of both responses,
            their rewards and the margin.
        """
        if "prompts" in batch:
            return super().predict_step(batch, batch_idx)
        policy, ratios = self.score(batch)
        values = pair_metrics(policy, ratios, beta=self.beta)
        rows = batch["chosen"].get("rows", torch.arange(len(ratios.chosen)))
        names = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins")
        columns = {name.replace("/", "_"): values[name].tolist() for name in names}
        columns["tokens_chosen"], columns["tokens_rejected"] = (
            ratios.chosen_lengths.tolist(),
            ratios.rejected_lengths.tolist(),
        )
        return [
            {"row": int(row), **dict(zip(columns, numbers, strict=True))}
            for row, *numbers in zip(rows, *columns.values(), strict=True)
        ]


def _detached(policy: LogProbs, ratios: Ratios) -> dict[str, Any]:
    return {
        "policy": LogProbs(*(part.detach() for part in policy)),
        "ratios": Ratios(*(None if part is None else part.detach() for part in ratios)),  # type: ignore[arg-type]
    }


def concatenate(batch: PreferenceBatch) -> TokenBatch:
    """Chosen rows, then rejected rows, padded on the right to one width: (2B, N)."""
    chosen, rejected = batch["chosen"], batch["rejected"]
    width = max(chosen["tokens"].shape[1], rejected["tokens"].shape[1])

    def join(name: str) -> Tensor:
        sides = cast(tuple[dict[str, Tensor], ...], (chosen, rejected))
        return torch.cat([F.pad(side[name], (0, width - side[name].shape[1])) for side in sides])

    return {"tokens": join("tokens"), "mask": join("mask"), "targets": join("targets")}
