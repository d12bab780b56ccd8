"""Self-play fine-tuning: Chen et al. 2024, arXiv 2401.01335, algorithm 1.

Iteration t draws y' ~ q(.|x) from an opponent q, the policy as it is when the iteration begins, and minimises

    l(b [(log p(y|x) - log q(y|x)) - (log p(y'|x) - log q(y'|x))])

over the policy p, with y the real response and l the logistic loss. Its population minimiser is q (p_data / q)^(1/b) up to a
constant, so it stands still exactly at q = p_data.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_align.generation.sampler import generate
from lightning_align.models.building import Backbone
from lightning_align.models.weights import weights_hash
from lightning_align.references.frozen import frozen_copy
from lightning_align.references.moving import moving_reference
from lightning_align.runtime.lightning_internals import callbacks_of
from lightning_align.scoring.losses import LOSSES, LossName, check_loss
from lightning_align.scoring.ratios import Ratios, log_ratios
from lightning_align.scoring.sums import response_logprobs
from lightning_align.spin.callbacks import SelfPlayGeneration
from lightning_align.spin.generations import answer_ids, join_pairs
from lightning_align.spin.opponent import Opponent, OpponentKind, score
from lightning_align.training.arguments import PolicyArguments, Unpack
from lightning_align.training.metrics import PairMeans, TokenNLL
from lightning_align.training.module import AlignModule
from lightning_align.types import LogProbs, SelfPlayBatch, TokenBatch

Generate = Literal["per_iteration", "per_step"]
METRICS = (
    "loss",
    "rewards/real",
    "rewards/generated",
    "rewards/margins",
    "rewards/accuracies",
    "logps/real",
    "logps/generated",
    "tie_rate",
)


class SPINModule(AlignModule):
    """Trains a language model to tell demonstrations from what it wrote itself, again and again."""

    default_lr = 5e-6

    def __init__(
        self,
        backbone: Backbone | None = None,
        *,
        loss: LossName = "sigmoid",
        beta: float | Sequence[float] = 0.1,
        label_smoothing: float = 0.0,
        sft_weight: float = 0.0,
        opponent: OpponentKind = "iterate",
        ema_decay: float = 0.99,
        base_weight: float = 0.5,
        generate: Generate = "per_iteration",
        monitor_kl: bool = False,
        **shared: Unpack[PolicyArguments],
    ) -> None:
        """Describe the run; policy and opponent are built in ``configure_model``.

        Args:
            backbone: The language model; see `AlignModule`. Not needed with `init_from`.
            loss: `sigmoid` (SPIN), `sigmoid_norm` (on mean log-probs), `hinge`, `ipo`, or `robust`.
            beta: the paper's lambda: a smaller one takes larger steps away from the opponent. A list has one an iteration.
            label_smoothing: for `sigmoid`, `sigmoid_norm` and `robust`.
            sft_weight: weight of an added -log p(real) / |real|, which keeps the real responses from becoming less likely.
            opponent: `iterate` (the policy as the iteration began), `ema`, `base` (as the run began), or `mixture` (the
                geometric mean of iterate and base).
            ema_decay: of the opponent `ema`, a step.
            base_weight: of the base in the opponent `mixture`.
            generate: `per_iteration`, all responses at once from the opponent, as in the paper; or `per_step`, those of a batch
                from the policy as it is, scored by the opponent.
            monitor_kl: log the divergence of each iteration from the base; keeps a copy of it, where only adapters train not.
            **shared: `init_from`, `lora`, `optimizer`, `lr_scheduler` and `generation` of `AlignModule`. With `lora`, an
                opponent that must be kept is a second set of adapters on the same backbone. The schedule restarts with each
                iteration. `generation` is also how the opponent responds.

        Raises:
            ValueError: if the loss or the opponent cannot use these numbers.
        """
        super().__init__(backbone, **shared)
        self._betas = [beta] if isinstance(beta, (int, float)) else list(beta)
        for value in self._betas:
            check_loss(loss, beta=value, label_smoothing=label_smoothing)
        choices: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
            ("opponent", opponent, get_args(OpponentKind)),
            ("generate", generate, get_args(Generate)),
        )
        for name, choice, known in choices:
            if choice not in known:
                raise ValueError(f"{name} is {choice!r}; it must be one of {', '.join(known)}")
        if not self._betas:
            raise ValueError("beta is an empty list; give a number, or one an iteration")
        if sft_weight < 0:
            raise ValueError(f"sft_weight is {sft_weight}; it must be 0 or above")
        if not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay is {ema_decay}; it must be above 0 and below 1")
        if not 0 < base_weight < 1:
            raise ValueError(f"base_weight is {base_weight}; it must be above 0 and below 1 (0 is `iterate`, 1 is `base`)")
        self.loss, self.label_smoothing, self.sft_weight = loss, label_smoothing, sft_weight
        self.opponent_kind: OpponentKind = opponent
        self.generate_mode: Generate = generate
        self.ema_decay, self.base_weight, self.monitor_kl = ema_decay, base_weight, monitor_kl
        self.iteration = 0
        """Counted from 0; `SelfPlayGeneration` sets it."""
        self.opponent = cast(Opponent, None)
        self.base_hash: str | None = None
        """Of the base that is kept: generated sets remember whose they are."""
        self._stepping = False
        self.val_means, self.test_means = PairMeans(METRICS), PairMeans(METRICS)
        self.val_nll, self.test_nll = TokenNLL(), TokenNLL()

    @property
    def beta(self) -> float:
        """That of the iteration; after the last one of a list, the last."""
        return self._betas[min(self.iteration, len(self._betas) - 1)]

    def configure_callbacks(self) -> list[Callback]:
        """The loop over iterations, unless the trainer has one with settings of its own."""
        present = any(isinstance(callback, SelfPlayGeneration) for callback in callbacks_of(self.trainer))
        return [] if present else [SelfPlayGeneration()]

    # -- the opponent

    def configure_reference(self, policy: nn.Module) -> None:
        """Keep of the opponent what cannot be had from the policy when it is needed."""
        moves = self.opponent_kind in ("iterate", "mixture") and self.generate_mode == "per_step"
        moving = None
        if moves or self.opponent_kind == "ema":
            moving = moving_reference(policy, lora=self.lora, convert=self.convert_like_policy, shard=self.shard_like_policy)
            # Registered, so that it is saved, sharded or whole, and restored.
            self.opponent_average = moving.average
        base = None
        if self.lora is None and (self.opponent_kind in ("base", "mixture") or self.monitor_kl):
            if self.source.awaits_weights:
                raise ValueError(
                    f"opponent {self.opponent_kind!r} needs the weights that the run began with: {self.init_from} is no file"
                )
            base = frozen_copy(policy).model
            self.base_hash = weights_hash(base)
            base = self.shard_like_policy(self.convert_like_policy(base))
        self.opponent = Opponent(
            self.opponent_kind, moving=moving, base=base, scoped=self.lora is not None, weight=self.base_weight
        )

    def check_weights_loaded(self) -> None:
        """Do what `AlignModule.check_weights_loaded` does, and restore the opponent."""
        super().check_weights_loaded()
        self.restore_opponent()

    def restore_opponent(self) -> None:
        """Play with the average that a checkpoint may have brought; once, before the opponent is asked anything."""
        if self.opponent.moving is not None:
            self.opponent.moving.restore(self.policy)

    def begin_iteration(self, iteration: int) -> None:
        """The policy as it is now becomes the iterate."""
        self.iteration = iteration
        if self.opponent.moving is not None and self.opponent_kind != "ema":
            self.opponent.moving.update(self.policy, alpha=1.0)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """As in `AlignModule`; the opponent `ema` follows the steps that the optimizer really takes."""
        configured: Any = super().configure_optimizers()
        optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
        for group in optimizer.param_groups:
            group.setdefault("base_lr", group.get("initial_lr", group["lr"]))
        moving = self.opponent.moving
        if self.opponent_kind == "ema" and moving is not None:

            def follow(*_: Any) -> None:
                if not self._stepping:
                    return
                self._stepping = False
                moving.update(self.policy, alpha=1 - self.ema_decay)

            # A hook of the optimizer: Lightning has none after its step, and checkpoints are written before the batch ends.
            optimizer.register_step_post_hook(follow)
        return cast(OptimizerLRScheduler, configured)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Expect a step: torch takes some of its own, with gradients of 0, to save or load the state of a sharded optimizer."""
        super().on_before_optimizer_step(optimizer)
        self._stepping = True

    # -- training

    def training_step(self, batch: SelfPlayBatch | TokenBatch, batch_idx: int) -> Tensor:
        """Sum of the pairs' losses, to be divided by the pairs of the optimizer batch that are no ties."""
        both: SelfPlayBatch = batch if "pairs" in batch else self.play(batch)  # type: ignore[assignment]
        policy, ratios, ties = self.score(both)
        losses = self.pair_losses(policy, ratios)
        self.count_tokens(both["pairs"])
        values = self.metrics(losses, policy, ratios, ties)
        means = torch.stack(list(values.values())).mean(dim=1).unbind()
        self.log_training(dict(zip(values, means, strict=True)), progress_bar="loss", batch_size=len(losses))
        return self.weighted(losses[~ties].sum(), (~ties).sum())

    def score(self, batch: SelfPlayBatch) -> tuple[LogProbs, Ratios, Tensor]:
        """Log-probs under the policy, real rows first (2B,); log-ratios to the opponent (B,); and which pairs are ties (B,)."""
        policy = response_logprobs(self.policy, batch["pairs"])
        ratios = log_ratios(policy, LogProbs(batch["opponent"], policy.counts))
        return policy, ratios, tied(batch["pairs"])

    def pair_losses(self, policy: LogProbs, ratios: Ratios) -> Tensor:
        """The loss of each pair, (B,), with the added SFT term."""
        losses = LOSSES[self.loss](ratios, beta=self.beta, label_smoothing=self.label_smoothing)
        return losses - self.sft_weight * policy.means[: len(losses)] if self.sft_weight else losses

    @torch.no_grad()
    def metrics(self, losses: Tensor, policy: LogProbs, ratios: Ratios, ties: Tensor) -> dict[str, Tensor]:
        """What is logged, a value a pair (B,)."""
        real, generated = self.beta * ratios.chosen, self.beta * ratios.rejected
        logps_real, logps_generated = policy.sums.detach().chunk(2)
        values = (losses.detach(), real, generated, real - generated, (real > generated).float())
        return dict(zip(METRICS, (*values, logps_real, logps_generated, ties.float()), strict=True))

    def play(self, batch: TokenBatch) -> SelfPlayBatch:
        """Let the policy answer the prompts of a batch of real rows, and the opponent score both answers."""
        tokenizer = self.data_tokenizer
        lengths, prompts = batch["mask"].sum(1).tolist(), batch["targets"].int().argmax(1).tolist()
        rows = [row[:length] for row, length in zip(batch["tokens"], lengths, strict=True)]
        most = getattr(getattr(self.trainer, "datamodule", None), "max_length", max(lengths))
        ids = batch["rows"].tolist() if "rows" in batch else range(len(rows))
        if tokenizer is None:
            raise ValueError("generate is 'per_step', which needs a data module with a `tokenizer` to know how responses end")
        answers = generate(
            self.policy,
            [row[:n].tolist() for row, n in zip(rows, prompts, strict=True)],
            self.generation,
            eos_id=tokenizer.eos_id,
            ids=ids,
            iteration=self.trainer.global_step,
            limits=[most - n for n in prompts],
            decode=tokenizer.decode,
        )
        generated = [
            torch.cat((row[:n], row.new_tensor(answer_ids(vars(answer), tokenizer.eos_id))))
            for row, n, (answer, *_) in zip(rows, prompts, answers, strict=True)
        ]
        targets = [target[:length] for target, length in zip(batch["targets"], lengths, strict=True)]
        pairs = join_pairs(rows, targets, generated, prompts, pad_id=tokenizer.pad_id)
        return {"pairs": pairs, "opponent": score(self.opponent.player(self.policy), pairs)}

    # -- evaluation

    def _evaluate(self, means: PairMeans, nll: TokenNLL, batch: SelfPlayBatch | TokenBatch) -> None:
        if "pairs" not in batch:
            nll.update(*response_logprobs(self.policy, batch), batch.get("num_bytes"))
            return
        policy, ratios, ties = self.score(cast(SelfPlayBatch, batch))
        means.update(self.metrics(self.pair_losses(policy, ratios), policy, ratios, ties))
        half = len(ratios.chosen)
        nll.update(policy.sums[:half], policy.counts[:half])

    def validation_step(self, batch: SelfPlayBatch | TokenBatch, batch_idx: int) -> None:
        """Add a batch to ``val/nll`` of the real responses and, within a fit, to ``val/rewards/...``."""
        self._evaluate(self.val_means, self.val_nll, batch)

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Add a batch to ``test/nll``."""
        self._evaluate(self.test_means, self.test_nll, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all pairs."""
        self._log_means("val", self.val_means, self.val_nll)

    def on_test_epoch_end(self) -> None:
        """Log the means over all rows."""
        self._log_means("test", self.test_means, self.test_nll)

    def _log_means(self, stage: str, means: PairMeans, nll: TokenNLL) -> None:
        values = means.compute() if means.update_called else {}
        values |= {
            "nll" if name == "loss" else name: value for name, value in (nll.compute() if nll.update_called else {}).items()
        }
        means.reset()
        nll.reset()
        self.log_evaluation(stage, values, progress_bar=("loss", "rewards/accuracies"))


def tied(pairs: TokenBatch) -> Tensor:
    """Which generated rows are the real ones, (B,) bool: they teach nothing, and their gradient would be 0."""
    same = [(a == b).all(dim=1) for a, b in (pairs[name].chunk(2) for name in ("tokens", "mask", "targets"))]
    return same[0] & same[1] & same[2]
