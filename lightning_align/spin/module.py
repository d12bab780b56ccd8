"""Self-play fine-tuning: Chen et al. 2024, arXiv 2401.01335, algorithm 1.

Iteration t draws y' ~ q(.|x) from an opponent q. The opponent is the policy at the start of the iteration. The iteration then
minimizes

    l(b [(log p(y|x) - log q(y|x)) - (log p(y'|x) - log q(y'|x))])

over the policy p. Here y is the real response, y' is the generated response, b is `beta` and l is the logistic loss. The
population minimizer is q (p_data / q)^(1/b) up to a constant, so the policy stops changing exactly at q = p_data.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_align.generation.ends import say_once
from lightning_align.generation.sampler import generate
from lightning_align.models.building import Backbone
from lightning_align.references.frozen import frozen_copy
from lightning_align.references.moving import moving_reference
from lightning_align.references.protocol import MovingReference
from lightning_align.references.update import ReferenceUpdate
from lightning_align.runtime.lightning_internals import callbacks_of, datamodule_of, searches_rate
from lightning_align.scoring.losses import LOSSES, LossName, check_loss
from lightning_align.scoring.ratios import Ratios, log_ratios
from lightning_align.scoring.sums import response_logprobs
from lightning_align.spin.batches import content_number, is_paired, on_host, real_rows, sent, split_rows, tied
from lightning_align.spin.callbacks import SelfPlayGeneration
from lightning_align.spin.charts import CHARTS, KL_CHARTS, METRICS
from lightning_align.spin.generations import answer_ids, join_pairs
from lightning_align.spin.opponent import Opponent, OpponentKind, score
from lightning_align.training.arguments import PolicyArguments, Unpack
from lightning_align.training.evaluation import log_values, metrics_of, parts_of
from lightning_align.training.metrics import PairMeans, TokenNLL
from lightning_align.training.module import AlignModule
from lightning_align.training.shared_prefix import PrefixSharing, SharedPrefix
from lightning_align.training.tensorboard import Charts
from lightning_align.types import LogProbs, SelfPlayBatch, TokenBatch

Generate = Literal["per_iteration", "per_step"]


class SPINModule(AlignModule):
    """Self-play fine-tuning: trains a language model to prefer demonstrations over its own earlier responses."""

    default_lr = 5e-6
    default_dropout = False

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
        shared_prefix: SharedPrefix = "auto",
        **shared: Unpack[PolicyArguments],
    ) -> None:
        """Store the settings. ``configure_model`` builds policy and opponent.

        Args:
            backbone: The language model; see `AlignModule`. Not needed with `init_from`.
            loss: The loss of a pair: `sigmoid`, `hinge`, `exponential` or `correlation` (the four of the SPIN paper),
                `sigmoid_norm` (on mean log-probs), `ipo` or `robust`. Default is `sigmoid`.
            beta: The strength of the KL penalty (lambda in the paper). A smaller value takes larger steps away from the
                opponent. A list has one value per iteration. Default is 0.1.
            label_smoothing: The label smoothing of `sigmoid`, `sigmoid_norm` and `robust`. Default is 0.
            sft_weight: The weight of an added loss -log p(real) / |real|. It keeps the real responses from becoming less
                likely. Default is 0.
            opponent: The opponent: `iterate` (the policy at the start of the iteration), `ema` (a moving average of the
                policy), `base` (the policy at the start of the run), or `mixture` (the geometric mean of iterate and base).
                Default is `iterate`.
            ema_decay: The decay per optimizer step of the opponent `ema`. The callback `ReferenceUpdate` replaces it by
                another rule: only every few steps, only after some steps, or with a warm-up. Default is 0.99.
            base_weight: The weight of the base in the opponent `mixture`. Default is 0.5.
            generate: When to generate. With `per_iteration`, the opponent generates all responses at the start of an
                iteration, as in the paper. With `per_step`, the current policy generates the responses of each batch and the
                opponent scores them. Default is `per_iteration`.
            monitor_kl: Whether to log the KL divergence of each iteration from the base. This keeps a copy of the base, unless
                only adapters train. Default is false.
            shared_prefix: Whether the prompt of a pair is computed once for both responses; see `DPOModule`. Default is `auto`.
            **shared: `init_from`, `lora`, `optimizer`, `lr_scheduler`, `generation`, `dropout`, `router_aux_loss_coef` and
                `activation_checkpointing` of `AlignModule`. With `lora`, an opponent that must be kept is a second set of
                adapters on the same backbone. The schedule restarts with each iteration. `generation` is also how the opponent
                responds.

        Raises:
            ValueError: If an argument is out of range.
        """
        super().__init__(backbone, **shared)
        self._betas = list(beta) if isinstance(beta, Sequence) else [beta]
        for value in self._betas:
            check_loss(loss, beta=value, label_smoothing=label_smoothing)
        choices: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
            ("opponent", opponent, get_args(OpponentKind)),
            ("generate", generate, get_args(Generate)),
        )
        for name, choice, known in choices:
            if choice not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, but got {choice!r}.")
        if not self._betas:
            raise ValueError("`beta` must be a number or a list with one number per iteration, but got an empty list.")
        if sft_weight < 0:
            raise ValueError(f"`sft_weight` must be at least 0, but got {sft_weight}.")
        if not 0 < ema_decay < 1:
            raise ValueError(f"`ema_decay` must be above 0 and below 1, but got {ema_decay}.")
        if not 0 < base_weight < 1:
            raise ValueError(
                f"`base_weight` must be above 0 and below 1, but got {base_weight}. For 0 use the opponent `iterate`, for 1 "
                "use `base`."
            )
        self.loss, self.label_smoothing, self.sft_weight = loss, label_smoothing, sft_weight
        self.opponent_kind: OpponentKind = opponent
        self.generate_mode: Generate = generate
        self.ema_decay, self.base_weight, self.monitor_kl = ema_decay, base_weight, monitor_kl
        self.iteration = 0
        """The current iteration, counted from 0. `SelfPlayGeneration` sets it."""
        self.opponent = cast(Opponent, None)
        self.base_hash: str | None = None
        """The hash of the base if a copy is kept. Generated sets store it to identify their run."""
        self._stepping = False
        self.prefix_sharing = PrefixSharing(shared_prefix, dropout=not self.dropout.off)
        self.val_means, self.test_means = PairMeans(METRICS), PairMeans(METRICS)
        self.val_nll, self.test_nll = TokenNLL(), TokenNLL()

    @property
    def beta(self) -> float:
        """The beta of the current iteration. Iterations beyond the end of a list use its last value."""
        return self._betas[min(self.iteration, len(self._betas) - 1)]

    def configure_callbacks(self) -> list[Callback]:
        """Return a `SelfPlayGeneration` callback with default settings, unless the Trainer already has one."""
        warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer` in `LightningModule`")
        present = any(isinstance(callback, SelfPlayGeneration) for callback in callbacks_of(self.trainer))
        return [*super().configure_callbacks(), *([] if present else [SelfPlayGeneration()])]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Plan the common beginnings of pairs while they are on the CPU, where rows can be compared."""
        return {**batch, "pairs": self.prefix_sharing.attach(batch["pairs"])} if is_paired(batch) else batch

    # -- the opponent

    def configure_reference(self, policy: nn.Module) -> None:
        """Build the parts of the opponent that cannot be computed from the policy later."""
        moves = self.opponent_kind in ("iterate", "mixture") and self.generate_mode == "per_step"
        moving = None
        if moves or self.opponent_kind == "ema":
            moving = moving_reference(
                policy,
                lora=self.lora,
                share=not self.is_sharded,
                convert=self.convert_like_policy,
                shard=self.shard_like_policy,
            )
            # Registering the average saves it in checkpoints, sharded or not, and restores it.
            self.opponent_average = moving.average
        base = None
        if self.lora is None and (self.opponent_kind in ("base", "mixture") or self.monitor_kl):
            if self.source.awaits_weights:
                raise ValueError(
                    f"`opponent` {self.opponent_kind!r} or `monitor_kl` needs the weights at the start of the run, "
                    f"but `init_from` is {self.init_from}, which is not a file. Give the checkpoint that the run started from."
                )
            base = frozen_copy(policy, share=not self.is_sharded).model
            self.base_hash = self.hash_once(base)
            base = self.shard_like_policy(self.convert_like_policy(base))
        self.opponent = Opponent(
            self.opponent_kind, moving=moving, base=base, scoped=self.lora is not None, weight=self.base_weight
        )

    @property
    def charts(self) -> Charts:  # type: ignore[override] # of other methods, it does not depend on settings
        """The charts of the method in TensorBoard."""
        return {**CHARTS, **(KL_CHARTS if self.monitor_kl else {})}

    @property
    def reference(self) -> MovingReference | None:
        """The moving average that is the opponent `ema`, which `ReferenceUpdate` updates. None for other opponents."""
        return self.opponent.moving if self.opponent_kind == "ema" else None

    def check_weights_loaded(self) -> None:
        """Do what `AlignModule.check_weights_loaded` does, and restore the opponent."""
        super().check_weights_loaded()
        self.restore_opponent()

    def restore_opponent(self) -> None:
        """Copy a restored average into the opponent. Must be called before the opponent is first used."""
        if self.opponent.moving is not None:
            self.opponent.moving.restore(self.policy)

    def on_train_start(self) -> None:
        """Prepare the run as in `AlignModule`.

        Raises:
            ValueError: If `Tuner.lr_find` runs, which removes the callback that generates responses.
        """
        if searches_rate(self.trainer):
            raise ValueError(
                "`Tuner.lr_find` removes all callbacks, and SPINModule needs SelfPlayGeneration. Find the rate with "
                "a DPOModule or an SFTModule, or give the optimizer its `lr`."
            )
        super().on_train_start()

    def begin_iteration(self, iteration: int) -> None:
        """Begin an iteration: the current policy becomes the iterate."""
        self.iteration = iteration
        if self.opponent.moving is not None and self.opponent_kind != "ema":
            self.opponent.moving.update(self.policy, alpha=1.0)

    def schedule_steps(self) -> float:
        """Refuse `total_steps: auto`, because the schedule restarts with each iteration."""
        raise ValueError(
            "`total_steps` is 'auto', but self-play restarts the schedule. Give the optimizer steps of an iteration."
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Configure the optimizer as in `AlignModule`. The opponent `ema` is updated after each optimizer step."""
        configured: Any = super().configure_optimizers()
        optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
        for group in optimizer.param_groups:
            group.setdefault("base_lr", group.get("initial_lr", group["lr"]))
        moving = self.opponent.moving
        own_rule = not any(isinstance(callback, ReferenceUpdate) for callback in callbacks_of(self.trainer))
        if self.opponent_kind == "ema" and moving is not None and own_rule:

            def follow(*_: Any) -> None:
                if not self._stepping:
                    return
                self._stepping = False
                moving.update(self.policy, alpha=1 - self.ema_decay)

            # This is an optimizer hook because Lightning has no hook between the optimizer step and the saving of a checkpoint.
            optimizer.register_step_post_hook(follow)
        return cast(OptimizerLRScheduler, configured)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Mark the next optimizer step as real.

        To save or load the state of a sharded optimizer, torch takes extra steps with gradients of 0. These must not update the
        average.
        """
        super().on_before_optimizer_step(optimizer)
        self._stepping = True

    def average_gradients(self, optimizer: Optimizer) -> None:
        """Do what `AlignModule.average_gradients` does, and mark the next optimizer step as real."""
        super().average_gradients(optimizer)
        self._stepping = True

    # -- training

    def training_step(self, batch: SelfPlayBatch | TokenBatch, batch_idx: int) -> Tensor:
        """Return the sum of the losses of all pairs except ties. It is later divided by their number in the optimizer batch."""
        self.begin_by_hand()
        both = self.paired(batch, "train")
        with self.router_loss.recorded(self.policy):
            policy, ratios, ties = self.score(both)
        losses = self.pair_losses(policy, ratios)
        self.count_tokens(both["pairs"])
        values = self.metrics(losses, policy, ratios, ties)
        means = dict(zip(values, torch.stack(list(values.values())).mean(dim=1).unbind(), strict=True))
        # Not `losses[~ties]`: to find how many there are, the host would wait for a GPU, here and in the backward pass.
        loss = self.router_loss.added(losses.masked_fill(ties, 0).sum(), (~ties).sum(), means)
        self.log_training(means, progress_bar="loss", batch_size=len(losses))
        return self.weighted(loss, (~ties).sum())

    def score(self, batch: SelfPlayBatch) -> tuple[LogProbs, Ratios, Tensor]:
        """Score a batch under the policy.

        Returns:
            The log-probs under the policy with real rows first, (2B,), the log-ratios to the opponent, (B,), and whether each
            pair is a tie, (B,).
        """
        self.prefix_sharing.check(self.policy)
        policy = response_logprobs(self.policy, self.prefix_sharing.attach(batch["pairs"]))
        ratios = log_ratios(policy, LogProbs(batch["opponent"], policy.counts))
        return policy, ratios, tied(batch["pairs"])

    def pair_losses(self, policy: LogProbs, ratios: Ratios) -> Tensor:
        """Compute the loss of each pair including the SFT term, (B,)."""
        losses = LOSSES[self.loss](ratios, beta=self.beta, label_smoothing=self.label_smoothing)
        return losses - self.sft_weight * policy.means[: len(losses)] if self.sft_weight else losses

    @torch.no_grad()
    def metrics(self, losses: Tensor, policy: LogProbs, ratios: Ratios, ties: Tensor) -> dict[str, Tensor]:
        """Compute the logged metrics, each with one value per pair, (B,)."""
        real, generated = self.beta * ratios.chosen, self.beta * ratios.rejected
        logps_real, logps_generated = policy.sums.detach().chunk(2)
        values = (losses.detach(), real, generated, real - generated, (real > generated).float())
        return dict(zip(METRICS, (*values, logps_real, logps_generated, ties.float()), strict=True))

    def paired(self, batch: Any, stage: str) -> SelfPlayBatch:
        """Return a batch with generated responses: its own, or those of its iteration, or new ones.

        Args:
            batch: A `SelfPlayBatch`, or real rows; see `lightning_align.spin.batches.real_rows`.
            stage: The stage, `train` or `validation`.
        """
        if is_paired(batch):
            return cast(SelfPlayBatch, batch)
        rows = real_rows(batch)
        if self.generate_mode == "per_step":
            # All validations use the same random numbers, so that they can be compared.
            return self.play(rows, iteration=self.trainer.global_step if stage == "train" else 0)
        if self.by_hand:
            raise ValueError(
                "SPINModule: `generate` per iteration needs a Trainer, whose callback SelfPlayGeneration writes the generated "
                "responses. Train with a Trainer, set the generation to per step, or give batches with generated responses "
                "(`SelfPlayBatch`)."
            )
        loop = next(callback for callback in callbacks_of(self.trainer) if isinstance(callback, SelfPlayGeneration))
        return loop.own.attach(self.trainer, rows, stage)

    def play(self, batch: TokenBatch, *, iteration: int) -> SelfPlayBatch:
        """Generate responses of the policy to a batch of real rows, and score both responses under the opponent.

        Args:
            batch: Real rows.
            iteration: A number that selects the random numbers.
        """
        tokenizer, ends = self.data_tokenizer, self.ends()
        if not ends.ids and ends.stop is None:
            say_once("No token ends a response, because there is no tokenizer. Set `eos_token` in `generation`.")
        device = batch["tokens"].device
        numbers = batch["rows"].tolist() if "rows" in batch else None
        rows, targets, prompts = split_rows(on_host(batch))
        most = getattr(datamodule_of(self.trainer), "max_length", None)
        answers = generate(
            self.policy,
            [row[:n].tolist() for row, n in zip(rows, prompts, strict=True)],
            self.generation,
            ends=ends,
            ids=[content_number(row) for row in rows] if numbers is None else numbers,
            iteration=iteration,
            limits=None if most is None else [most - n for n in prompts],
        )
        generated = [
            torch.cat((row[:n], row.new_tensor(answer_ids(vars(answer)))))
            for row, n, (answer, *_) in zip(rows, prompts, answers, strict=True)
        ]
        pairs = join_pairs(rows, targets, generated, prompts, pad_id=0 if tokenizer is None else tokenizer.pad_id)
        pairs = sent(self.prefix_sharing.attach(pairs), device)
        return {"pairs": pairs, "opponent": score(self.opponent.player(self.policy), pairs)}

    # -- evaluation

    def _evaluate(self, means: PairMeans, nll: TokenNLL, batch: Any, loader: int) -> None:
        nlls = metrics_of(nll, self.trainer, loader)
        if not is_paired(batch) and self.trainer.state.fn != TrainerFn.FITTING:
            rows = real_rows(batch)
            logprobs = response_logprobs(self.policy, rows)
            for each in nlls:
                each.update(*logprobs, rows.get("num_bytes"))
            return
        policy, ratios, ties = self.score(self.paired(batch, "validation"))
        values = self.metrics(self.pair_losses(policy, ratios), policy, ratios, ties)
        half = len(ratios.chosen)
        for mean, each in zip(metrics_of(means, self.trainer, loader), nlls, strict=True):
            mean.update(values)
            each.update(policy.sums[:half], policy.counts[:half])

    def validation_step(self, batch: SelfPlayBatch | TokenBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update ``val/nll`` of the real responses and, within `fit`, ``val/loss`` and ``val/rewards/...``."""
        self._evaluate(self.val_means, self.val_nll, batch, dataloader_idx)

    def test_step(self, batch: TokenBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update ``test/nll``."""
        self._evaluate(self.test_means, self.test_nll, batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all pairs."""
        self._log_means("val", self.val_means, self.val_nll)

    def on_test_epoch_end(self) -> None:
        """Log the means over all rows."""
        self._log_means("test", self.test_means, self.test_nll)

    def _log_means(self, stage: str, all_means: PairMeans, all_nll: TokenNLL) -> None:
        parts = zip(parts_of(all_means, self.trainer), parts_of(all_nll, self.trainer), strict=True)
        for loader, (means, nll) in [(None, (all_means, all_nll)), *enumerate(parts)]:
            values = means.compute() if means.update_called else {}
            values |= {
                "nll" if name == "loss" else name: value for name, value in (nll.compute() if nll.update_called else {}).items()
            }
            means.reset()
            nll.reset()
            log_values(self, stage, values, loader=loader, progress_bar=("loss", "rewards/accuracies"))
