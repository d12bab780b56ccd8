"""Direct preference optimization: Rafailov et al. 2023, arXiv 2305.18290."""

import warnings
from typing import Any, ClassVar, get_args

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics.aggregation import CatMetric

from lightning_align.dpo.batch import concatenate, detached, scored_rows
from lightning_align.dpo.identity import batch_faults, differs, identity_fault
from lightning_align.dpo.reference import InitialPolicy, ReferenceKind
from lightning_align.models.building import Backbone
from lightning_align.references.protocol import MovingReference, Reference
from lightning_align.references.update import ReferenceUpdate
from lightning_align.runtime.lightning_internals import callbacks_of, is_fast_dev_run
from lightning_align.runtime.ranks import everyone
from lightning_align.scoring.collisions import response_collisions
from lightning_align.scoring.logprobs import token_logprobs
from lightning_align.scoring.losses import SORTED, LossName
from lightning_align.scoring.objective import Divergence, Objective
from lightning_align.scoring.ratios import Ratios, confidence_weights, log_ratios, pair_metrics, tail_weights
from lightning_align.scoring.sums import sum_logprobs
from lightning_align.training.arguments import PolicyArguments, Unpack
from lightning_align.training.evaluation import log_metric, metrics_of
from lightning_align.training.metrics import PairMeans
from lightning_align.training.module import AlignModule
from lightning_align.training.shared_prefix import PrefixSharing, SharedPrefix
from lightning_align.training.tensorboard import Charts
from lightning_align.types import LogProbs, PreferenceBatch, PromptBatch, TokenBatch

METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
PROGRESS_BAR = ("loss", "rewards/accuracies")
NEEDS_TRAINER = {"stored": "scored before the first step", "moving": "moved by the callback ReferenceUpdate"}


class DPOModule(AlignModule):
    """Aligns a language model with preferences, relative to the model that it starts from."""

    default_lr = 5e-6
    charts: ClassVar[Charts] = {
        "rewards: chosen above rejected": ("val/rewards/chosen", "val/rewards/rejected"),
        "margins: training and validation": ("train/rewards/margins", "val/rewards/margins"),
        "accuracies: training and validation": ("train/rewards/accuracies", "val/rewards/accuracies"),
        "log-probs: chosen must not fall far": ("val/logps/chosen", "val/logps/rejected"),
    }
    tensor_parallel = True
    default_dropout = False

    def __init__(
        self,
        backbone: Backbone | None = None,
        *,
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
        shared_prefix: SharedPrefix = "auto",
        **shared: Unpack[PolicyArguments],
    ) -> None:
        """Describe the run. Policy and reference are built in ``configure_model``.

        Args:
            backbone: The language model; see `AlignModule`. Not needed with `init_from`.
            loss: A loss of `lightning_align.scoring.losses`, or several with their weights. `simpo`, `cpo` and `orpo` need no
                reference, and none is made for them.
            beta: The strength of the penalty for moving away from the reference: about 0.1 for losses on sums of log-probs, 2
                to 10 for `sigmoid_norm` and `simpo`.
            label_smoothing: The assumed share of flipped labels, for the losses that have it.
            loss_args: Further arguments of the losses: `gamma` of `simpo`, `penalty` of `dpop`, `temperature` of `discopop`.
            sft_weight: The weight of an added -log p(chosen) / |chosen|. Default is 1 with `cpo` and `orpo`, as in their
                papers, otherwise 0. With `sigmoid` it gives iterative RPO (Pang et al. 2024, arXiv 2404.19733).
            divergence: The divergence between policy and reference: `reverse_kl` (DPO), `forward_kl`, `js` or `alpha`.
            divergence_alpha: The parameter of the `alpha` divergence.
            confidence_weighting: Weight each pair by how likely its responses are under the policy (WPO). Costs one more
                forward pass.
            ld_alpha: The weight of tokens beyond the length of the shorter response (LD-DPO). 1 weights all tokens alike.
            reference: `frozen`; `stored`, a frozen reference that scores every row once before training and then costs neither
                memory nor time; or `moving`, updated by the callback `ReferenceUpdate`.
            reference_cache: The folder of stored log-probs, on a disk that all nodes share. Its files may be deleted at any
                time.
            shared_prefix: Whether to compute what both rows of a pair begin with once. Log-probs and gradients are the same.
                `auto` does so where it is exact and saves a tenth of the tokens. True refuses a model where it is not exact.
            **shared: `init_from`, `lora`, `optimizer`, `lr_scheduler`, `generation`, `dropout`, `router_aux_loss_coef` and
                `activation_checkpointing` of `AlignModule`. With `lora`, a frozen reference is the policy with its adapters off
                and costs no memory. A moving one is a second set of adapters.

        Raises:
            ValueError: If the loss does not support the given values.
        """
        super().__init__(backbone, **shared)
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
            raise ValueError(f"`sft_weight` must be 0 or more, but got {sft_weight}.")
        if not 0 <= ld_alpha <= 1:
            raise ValueError(
                f"`ld_alpha` must be from 0 to 1, but got {ld_alpha}. It is the weight of tokens beyond the shorter response."
            )
        if confidence_weighting and self.objective.weights.keys() & set(SORTED):
            raise ValueError(
                f"`confidence_weighting` weights the losses of pairs, but {loss} has no loss per pair. Use only one of them."
            )
        if reference == "moving" and not self.objective.needs_reference:
            raise ValueError(f"`reference` is 'moving', but {loss} uses no reference. Remove `reference`.")
        if reference not in get_args(ReferenceKind):
            raise ValueError(f"`reference` must be one of {', '.join(get_args(ReferenceKind))}, but got {reference!r}.")
        self.beta, self.sft_weight = beta, sft_weight
        self.confidence_weighting, self.ld_alpha = confidence_weighting, ld_alpha
        self.initial_policy = InitialPolicy(reference, cache_dir=reference_cache)
        self.prefix_sharing = PrefixSharing(shared_prefix, dropout=not self.dropout.off)
        self.val_means, self.test_means = PairMeans(METRICS), PairMeans(METRICS)
        # Margins that are not numbers are kept, to say how many there are.
        self.val_margins = CatMetric(nan_strategy="disable")

    # -- the reference

    @property
    def reference(self) -> Reference:
        """The reference policy. It exists after ``configure_model``.

        Raises:
            ValueError: If the loss has no reference, or the weights that the reference was made from are missing.
        """
        if not self.objective.needs_reference:
            raise ValueError(f"The loss {', '.join(self.objective.weights)} uses no reference.")
        reference = self.initial_policy.reference
        if reference is None:
            assert self.policy is not None, "configure_model has not run"
            raise ValueError(
                "The reference of this checkpoint cannot be made, because its weights are not those of "
                f"{self.init_from or 'the backbone'}. Give load_from_checkpoint the `init_from` (or the module as `backbone`) "
                "that the run started from. Prediction from prompts needs no reference."
            )
        return reference

    def configure_reference(self, policy: nn.Module) -> None:
        """Make the reference; see `InitialPolicy.configure`."""
        if not self.objective.needs_reference:
            return
        self.initial_policy.configure(self, policy)
        if isinstance(self.initial_policy.reference, MovingReference):
            # Registered, so that it is saved and restored, sharded or whole.
            self.reference_average = self.initial_policy.reference.average

    def setup(self, stage: str) -> None:
        """Do what `AlignModule.setup` does, and tell a stored reference which command runs."""
        super().setup(stage)
        # Lightning warns where a module and not its data module has this hook. Here the hook is the module's: see below.
        warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer` in `LightningModule`")
        self.initial_policy.begin_stage(stage)

    def teardown(self, stage: str) -> None:
        """Free what the reference needed for this command only."""
        self.initial_policy.end_stage()

    def check_weights_loaded(self) -> None:
        """Do what `AlignModule.check_weights_loaded` does, and restore a moving reference."""
        super().check_weights_loaded()
        self.initial_policy.restore(self.policy)

    def check_by_hand(self) -> None:
        """Check that the reference needs no Trainer.

        Raises:
            ValueError: If it is scored before the run, or moved by a callback.
        """
        super().check_by_hand()
        kind = self.initial_policy.kind
        if kind in NEEDS_TRAINER and self.objective.needs_reference:
            raise ValueError(
                f"`reference` is {kind!r}, which needs a Trainer: it is {NEEDS_TRAINER[kind]}. Train with a Trainer, or set "
                "`reference` to 'frozen'."
            )

    def on_fit_start(self) -> None:
        """Score all rows under a stored reference, and check that a moving reference is updated.

        Raises:
            ValueError: If the reference moves and there is no `ReferenceUpdate`.
        """
        kind = self.initial_policy.kind
        if kind == "stored" and not is_fast_dev_run(self.trainer):
            self.initial_policy.fill(self)
        if kind == "moving" and not any(isinstance(callback, ReferenceUpdate) for callback in callbacks_of(self.trainer)):
            raise ValueError(
                "`reference` is 'moving', but no callback moves it. Add the callback ReferenceUpdate to the Trainer, or set "
                "`reference` to 'frozen'."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the hash of the reference's weights, not the weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference_sha256"] = self.initial_policy.weights

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint was trained against this reference; see `InitialPolicy.check_resumed`."""
        super().on_load_checkpoint(checkpoint)
        self.initial_policy.check_resumed(self, checkpoint)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Add stored log-probs and common beginnings to a batch of pairs while it is on the CPU, where rows can be compared."""
        batch = self.initial_policy.attach(batch, self.join)
        if isinstance(batch, dict) and {"chosen", "rejected"} <= batch.keys():
            return {**batch, "prefixes": self.join(batch).get("prefixes")}  # type: ignore[arg-type]  # a `PreferenceBatch`
        return batch

    # -- scores and losses

    def score(self, batch: PreferenceBatch) -> tuple[LogProbs, Ratios]:
        """Score a batch with one forward pass of the policy and one of the reference.

        Returns:
            Log-probs under the policy, chosen rows first (2B,), and log-ratios to the reference (B,).
        """
        both = self.join(batch)
        self.prefix_sharing.check(self.policy)
        logps, rows = token_logprobs(self.policy, both)
        policy = counted = sum_logprobs(logps, rows, both["targets"])
        if "target_weights" in both:
            counted = sum_logprobs(logps, rows, both["targets"], both["target_weights"])
        if not self.objective.needs_reference:
            return policy, log_ratios(counted, None)
        reference = batch["reference"] if "reference" in batch else self.reference.logprobs(self.policy, both)
        return policy, log_ratios(counted, reference)

    def join(self, batch: PreferenceBatch) -> TokenBatch:
        """Concatenate both sides, (2B, N), with common beginnings, and the weight of each target if `ld_alpha` is not 1."""
        both = self.prefix_sharing.attach(concatenate(batch))
        if self.ld_alpha != 1:
            both["target_weights"] = tail_weights(both["targets"], self.ld_alpha)
        return both

    def pair_losses(self, batch: PreferenceBatch, policy: LogProbs, ratios: Ratios) -> Tensor:
        """Return the loss of each pair, (B,), with the added SFT term, which is averaged per pair and not per batch."""
        weights = batch.get("weights")
        if self.confidence_weighting:
            confidence = confidence_weights(policy, response_collisions(self.policy, self.join(batch)))
            weights = confidence if weights is None else weights * confidence
        losses = self.objective(ratios, weights=weights, margins=batch.get("margins"))
        if self.sft_weight:
            likelihoods = policy.means[: len(losses)]
            losses = losses - self.sft_weight * (likelihoods * batch["weights"] if "weights" in batch else likelihoods)
        return losses

    def _check_start(self, batch: PreferenceBatch, ratios: Ratios) -> None:
        """Warn of faults in the first batch; see `lightning_align.dpo.identity`."""
        tokenizer = self.data_tokenizer
        faults = batch_faults(batch, bos_id=None if tokenizer is None else tokenizer.bos_id)
        dtype, precision = next(self.policy.parameters()).dtype, str(self.trainer.precision)
        coarse = dtype.itemsize < 4 or "16" in precision
        chosen = differs(ratios.chosen, ratios.chosen_lengths, coarse=coarse, dtype=dtype)
        rejected = differs(ratios.rejected, ratios.rejected_lengths, coarse=coarse, dtype=dtype)
        if self.objective.needs_reference and not everyone(not bool(chosen | rejected), self.device):
            both = self.join(batch)
            expected = batch["reference"] if "reference" in batch else self.reference.logprobs(self.policy, both)
            model = getattr(self.reference, "model", None)
            faults.append(identity_fault(self.policy, model, both, expected, coarse=coarse))
        for fault in faults:
            rank_zero_warn(f"the first batch, where the policy should still equal its reference: {fault}")

    # -- steps

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        """Return the sum of the pairs' losses, and what `score` returned, for callbacks."""
        self.begin_by_hand()
        with self.router_loss.recorded(self.policy):
            policy, ratios = self.score(batch)
        if batch_idx == 0 and self.trainer.global_step == 0:
            self._check_start(batch, ratios)
        losses = self.pair_losses(batch, policy, ratios)
        for side in (batch["chosen"], batch["rejected"]):
            self.count_tokens(side)
        values = {"loss": losses.detach(), **pair_metrics(policy, ratios, beta=self.beta)}
        means = dict(zip(values, torch.stack(list(values.values())).mean(dim=1).unbind(), strict=True))
        loss = self.router_loss.added(losses.sum(), len(losses), means)
        self.log_training(means, progress_bar="loss", batch_size=len(losses))
        return {"loss": self.weighted(loss, len(losses)), **detached(policy, ratios)}

    def _evaluate(self, means: PairMeans, batch: PreferenceBatch, loader: int) -> dict[str, Any]:
        policy, ratios = self.score(batch)
        values = {"loss": self.pair_losses(batch, policy, ratios), **pair_metrics(policy, ratios, beta=self.beta)}
        for each in metrics_of(means, self.trainer, loader):
            each.update(values)
        return {"margins": values["rewards/margins"], **detached(policy, ratios)}

    def validation_step(self, batch: PreferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Add a batch to ``val/loss``, ``val/rewards/...`` and ``val/logps/...``, and return what `score` returned."""
        outputs = self._evaluate(self.val_means, batch, dataloader_idx)
        self.val_margins.update(outputs["margins"])
        return outputs

    def test_step(self, batch: PreferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the same metrics under ``test/``."""
        self._evaluate(self.test_means, batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all pairs, and the margins as a histogram."""
        log_metric(self, "val", self.val_means, progress_bar=PROGRESS_BAR)
        margins = self.val_margins.compute().reshape(-1)  # a single margin has no dimension
        self.val_margins.reset()
        finite = margins[margins.isfinite()]
        if len(finite) < len(margins):
            rank_zero_warn(
                f"{len(margins) - len(finite)} of {len(margins)} pairs of the validation have margins that are not finite. The "
                "policy or its reference gives log-probs that are not numbers: the training may have diverged (lower the "
                "learning rate, clip gradients), or the precision is too low. The histogram of margins is of the other pairs."
            )
        margins = finite
        if self.trainer.sanity_checking:
            return  # a histogram of a few rows would stand beside the histograms of all rows
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger) and self.trainer.is_global_zero and len(margins):
                logger.experiment.add_histogram("val/rewards/margins_histogram", margins, self.global_step)

    def on_test_epoch_end(self) -> None:
        """Log the means over all pairs."""
        log_metric(self, "test", self.test_means, progress_bar=PROGRESS_BAR)

    def predict_step(self, batch: PromptBatch | PreferenceBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Generate responses to prompts, or score pairs.

        Returns:
            For prompts what `AlignModule.predict_step` returns. For pairs what `scored_rows` returns.
        """
        if "prompts" in batch:
            return super().predict_step(batch, batch_idx)
        policy, ratios = self.score(batch)
        return scored_rows(batch, policy, ratios, beta=self.beta)
