"""A callback that detects known failures of preference optimization which the loss does not show."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_align.dpo.module import DPOModule
from lightning_align.generation.ends import Ends
from lightning_align.generation.sampler import GenerationConfig, evaluating, generate
from lightning_align.runtime.lightning_internals import log_interval
from lightning_align.runtime.ranks import data_world
from lightning_align.runtime.team import Team
from lightning_align.scoring.ratios import Ratios
from lightning_align.scoring.sums import response_logprobs
from lightning_align.training.metrics import Correlation, PairMeans
from lightning_align.training.tensorboard import Charts
from lightning_align.types import LogProbs, PreferenceBatch, TokenBatch

DISPLACEMENT = "logps/chosen_displacement"
CORRELATION = "rewards/length_correlation"
SATURATED = "rewards/saturated"
KL = "kl/reference"
REMEDIES = {
    DISPLACEMENT: "Chosen responses become less likely. Use `sft_weight`, the loss dpop or apo_zero, or a lower learning rate.",
    CORRELATION: "Margins follow the lengths of responses. Balance the lengths of the rows, or use sigmoid_norm or `ld_alpha`.",
    SATURATED: "These pairs have no gradient left. Stop here, add new pairs, or use ipo, which keeps margins finite.",
    KL: "The policy moves too far from its reference. Use a higher `beta`, a lower learning rate or fewer steps.",
}


class _Sums:
    """The running sums over the pairs of a stage."""

    def __init__(self, device: torch.device) -> None:
        self.means = PairMeans(("ratios", "logps", "tokens", "saturated")).to(device)
        self.correlation = Correlation().to(device)

    def reset(self) -> None:
        self.means.reset()
        self.correlation.reset()


class PreferenceMonitor(Callback):
    """Logs how preferences are learned, over the training pairs since the last log and over all validation pairs.

    - ``logps/chosen_displacement``: The change of the log-prob of chosen responses since the start of the run, in nats per
      token. It is measured against the reference. If the reference moves, or there is none, it is measured against the first
      value of the stage.
    - ``rewards/length_correlation``: Pearson correlation between the margin and the difference of the lengths of chosen and
      rejected.
    - ``rewards/saturated``: The share of pairs with less than 2 % of the gradient that they had at the reference. With the
      `sigmoid` loss these are the pairs with s(margin) > 0.99. Not logged for losses without a reference.
    - ``kl/reference`` (validation only): KL to the reference, estimated on samples of the policy, in nats per token. The
      samples use the same random numbers each time, so that curves are smooth.

    Sums and counts are over all ranks, and prompts are selected by row, so the values do not depend on the number of ranks.
    Each value can have a limit. The callback warns when a value first crosses its limit.
    """

    def __init__(
        self,
        *,
        max_fall: float | None = None,
        max_length_correlation: float | None = None,
        max_saturated: float | None = None,
        max_kl: float | None = None,
        num_prompts: int = 0,
        max_new_tokens: int = 64,
    ) -> None:
        """Set up the callback. By default there are no limits: it logs the values and does not warn.

        Args:
            max_fall: The maximum decrease of the log-prob of chosen responses, in nats per token.
            max_length_correlation: The maximum absolute correlation between margins and length differences, below 1.
            max_saturated: The maximum share of saturated pairs, below 1.
            max_kl: The maximum KL to the reference, in nats per token. Needs `num_prompts`.
            num_prompts: The number of validation prompts, from the first, that are continued to estimate the KL. Default is 0,
                which does not estimate it.
            max_new_tokens: The maximum length of a continuation, in tokens.

        Raises:
            ValueError: If an argument is out of range.
        """
        limits = {"max_fall": max_fall, "max_length_correlation": max_length_correlation}
        limits |= {"max_saturated": max_saturated, "max_kl": max_kl}
        for name, limit in limits.items():
            upper = 1 if name in ("max_length_correlation", "max_saturated") else float("inf")
            if limit is not None and not 0 < limit < upper:
                raise ValueError(f"`{name}` must be above 0{' and below 1' * (upper == 1)}, but got {limit}.")
        if num_prompts < 0:
            raise ValueError(f"`num_prompts` must be 0 or more, but got {num_prompts}.")
        if max_kl is not None and not num_prompts:
            raise ValueError(
                f"`max_kl` must be None if `num_prompts` is 0, but got {max_kl}. Set `num_prompts` to estimate the KL."
            )
        self.limits = dict(zip((DISPLACEMENT, CORRELATION, SATURATED, KL), limits.values(), strict=True))
        self.num_prompts = num_prompts
        self.generation = GenerationConfig(max_new_tokens=max_new_tokens)
        self.start: dict[str, float] = {}
        """Mean log-prob per token of chosen responses at the first measurement of each stage."""
        self._sums: dict[str, _Sums] = {}
        self._prompts: dict[tuple[int, ...], list[int]] = {}
        self._team: Team | None = None
        self._logged_step = 0
        self._warned: set[str] = set()

    @property
    def charts(self) -> Charts:
        """The charts of the callback in TensorBoard."""
        charts: dict[str, Sequence[str]] = {
            "change of the log-prob of chosen, per token": (f"train/{DISPLACEMENT}", f"val/{DISPLACEMENT}"),
            "margins follow lengths: correlation": (f"train/{CORRELATION}", f"val/{CORRELATION}"),
            "share of pairs without gradient": (f"train/{SATURATED}", f"val/{SATURATED}"),
        }
        return charts | ({"KL to the reference, per token": (f"val/{KL}",)} if self.num_prompts else {})

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the callback supports the module.

        Raises:
            ValueError: If the module is not a `DPOModule`, or `num_prompts` is set and no reference can score samples.
        """
        if not isinstance(pl_module, DPOModule):
            raise ValueError(f"PreferenceMonitor needs a DPOModule, but got {type(pl_module).__name__}. Remove the callback.")
        if self.num_prompts and not pl_module.objective.needs_reference:
            raise ValueError(
                f"`num_prompts` must be 0 with a loss without a reference, but got {self.num_prompts}. The KL needs a "
                "reference."
            )
        if self.num_prompts and pl_module.initial_policy.kind == "stored":
            raise ValueError(
                f"`num_prompts` must be 0 with a stored reference, which cannot score new texts, but got {self.num_prompts}. "
                "Set `reference: frozen` in the module, or leave `num_prompts` out."
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the group of ranks that exchange prompts."""
        if self._team is not None:
            self._team.close()
            self._team = None

    # -- pairs

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Add the pairs of the batch. Log the pairs since the last log at every logging step of Lightning."""
        self._add("train", pl_module, outputs, batch)
        step, every = trainer.global_step, log_interval(trainer)
        if step != self._logged_step and every and step % every == 0:
            self._logged_step = step
            self._log("train", pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the pairs of the batch, and keep the first prompts."""
        if trainer.sanity_checking:
            return
        self._add("val", pl_module, outputs, batch)
        if self.num_prompts:
            self._keep_prompts(batch["chosen"], batch_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the values of the validation pairs, and estimate the KL."""
        if trainer.sanity_checking or "val" not in self._sums:
            return
        values = self._log("val", pl_module)
        if self.num_prompts and values:
            self._report("val", pl_module, {KL: self._measure_kl(trainer, pl_module)})

    def _add(self, stage: str, module: Any, outputs: dict[str, Any], batch: PreferenceBatch) -> None:
        policy: LogProbs = outputs["policy"]
        ratios: Ratios = outputs["ratios"]
        if stage not in self._sums:
            self._sums[stage] = _Sums(module.device)
        pairs, sums = len(ratios.chosen), self._sums[stage]
        saturated = torch.zeros(pairs, device=module.device)
        if module.objective.needs_reference:
            saturated = module.objective.saturated(ratios, margins=batch.get("margins"))
        sums.means.update(
            {
                "ratios": ratios.chosen,
                "logps": policy.sums[:pairs],
                "tokens": ratios.chosen_lengths,
                "saturated": saturated,
            }
        )
        sums.correlation.update(ratios.delta, ratios.chosen_lengths - ratios.rejected_lengths)

    def _log(self, stage: str, module: Any) -> dict[str, Tensor]:
        """Log the values of the sums, and reset the sums. A collective: all ranks must call it."""
        sums = self._sums[stage]
        means, correlation = sums.means.compute(), sums.correlation.compute()
        sums.reset()
        if not means:
            return {}
        logps = means["logps"] / means["tokens"]
        if module.objective.needs_reference and module.initial_policy.kind != "moving":
            displacement = means["ratios"] / means["tokens"]
        else:
            displacement = logps - self.start.setdefault(stage, float(logps))
        values = {DISPLACEMENT: displacement}
        if module.objective.needs_reference:
            values[SATURATED] = means["saturated"]
        if bool(correlation.isfinite()):
            values[CORRELATION] = correlation
        self._report(stage, module, values)
        return values

    def _report(self, stage: str, module: Any, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            # The value is the same on every rank already. sync_dist only tells Lightning so.
            module.log(f"{stage}/{name}", value, batch_size=1, sync_dist=stage == "val")
            limit, number = self.limits[name], float(value)
            size = {DISPLACEMENT: -number, CORRELATION: abs(number)}.get(name, number)
            if limit is not None and not size <= limit and name not in self._warned:
                self._warned.add(name)
                bound = limit if size == number else -limit
                rank_zero_warn(
                    f"PreferenceMonitor: {stage}/{name} is {number:.3g}, beyond its limit of {bound:g}, at step "
                    f"{module.global_step}. {REMEDIES[name]}"
                )

    # -- samples

    def _keep_prompts(self, side: TokenBatch, batch_idx: int) -> None:
        """Keep the prompts with the lowest row indices. Rows without an index are ordered by batch, position and rank."""
        rank, rows = data_world()[0], side["rows"].tolist() if "rows" in side else None
        keys = [(batch_idx, index, rank) if rows is None else (rows[index],) for index in range(len(side["tokens"]))]
        kept = sorted({*self._prompts, *keys})[: self.num_prompts]
        if not set(kept) & set(keys):
            return
        tokens, lengths = side["tokens"].tolist(), side["targets"].int().argmax(dim=1).tolist()
        new = {key: row[:length] for key, row, length in zip(keys, tokens, lengths, strict=True)}
        self._prompts = {key: (self._prompts | new)[key] for key in kept}

    def _measure_kl(self, trainer: L.Trainer, module: Any) -> Tensor:
        """Compute the sum of log p - log q over all samples, divided by their total length. A collective."""
        rank, ranks = data_world()
        found, self._prompts = self._prompts, {}
        if ranks > 1:
            self._team = self._team or Team()
            found = {key: prompt for part in self._team.gather(found) for key, prompt in part.items()}
        prompts = [found[key] for key in sorted(found)[: self.num_prompts]]
        # The forward passes of a sharded model are collectives, so every rank must do the same number. Some ranks therefore
        # do one extra prompt, which is not counted.
        own = list(range(rank, len(prompts), ranks))
        padded = own + [0] * (-(-len(prompts) // ranks) - len(own))
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        ends = Ends.of(tokenizer=tokenizer, model=module.policy, config=self.generation, default=module.generation)
        metric = PairMeans(("ratios", "tokens")).to(module.device)
        with trainer.precision_plugin.forward_context(), evaluating(module.policy):
            answers = generate(module.policy, [prompts[i] for i in padded], self.generation, ends=ends, ids=padded)
            texts = [answer.tokens + ([] if answer.end is None else [answer.end]) for (answer,) in answers]
            for start in range(0, len(padded), self.generation.batch_size):
                part = slice(start, start + self.generation.batch_size)
                batch = _batch([prompts[i] for i in padded[part]], texts[part], module.device)
                policy = response_logprobs(module.policy, batch)
                ratios = policy.sums - module.reference.logprobs(module.policy, batch).sums
                real = slice(max(0, len(own) - start))
                metric.update({"ratios": ratios[real], "tokens": policy.counts[real]})
        means = metric.compute()
        return means["ratios"] / means["tokens"]

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the first log-probs of each stage."""
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the first log-probs of each stage."""
        self.start = dict(state_dict["start"])


def _batch(prompts: list[list[int]], texts: list[list[int]], device: torch.device) -> TokenBatch:
    """Make a batch of prompts with their continuations as targets."""
    rows = [torch.tensor(prompt + text) for prompt, text in zip(prompts, texts, strict=True)]
    tokens = pad_sequence(rows, batch_first=True).to(device)
    places = torch.arange(tokens.shape[1], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = places < lengths[:, None]
    return {"tokens": tokens, "mask": mask, "targets": mask & (places >= starts[:, None])}
