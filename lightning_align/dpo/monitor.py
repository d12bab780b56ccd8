"""A watch on the ways in which preference optimisation goes wrong while its loss falls."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_align.dpo.module import DPOModule
from lightning_align.generation.sampler import GenerationConfig, evaluating, generate
from lightning_align.runtime.lightning_internals import log_interval
from lightning_align.runtime.ranks import world
from lightning_align.scoring.ratios import Ratios
from lightning_align.scoring.sums import response_logprobs
from lightning_align.training.metrics import Correlation, PairMeans
from lightning_align.types import LogProbs, PreferenceBatch, TokenBatch

DISPLACEMENT = "logps/chosen_displacement"
CORRELATION = "rewards/length_correlation"
SATURATED = "rewards/saturated"
KL = "kl/reference"
REMEDIES = {
    DISPLACEMENT: "chosen responses become less likely: give `sft_weight`, the loss dpop or apo_zero, or a lower learning rate",
    CORRELATION: "margins go with the length of responses: balance the lengths of the rows, or use sigmoid_norm or `ld_alpha`",
    SATURATED: "these pairs teach nothing more: stop here, bring new pairs, or use ipo, whose margins stay finite",
    KL: "the policy leaves its reference: give a higher `beta`, a lower learning rate or fewer steps",
}


class _Sums:
    """What is summed over the pairs of a stage."""

    def __init__(self, device: torch.device) -> None:
        self.means = PairMeans(("ratios", "logps", "tokens", "saturated")).to(device)
        self.correlation = Correlation().to(device)

    def reset(self) -> None:
        self.means.reset()
        self.correlation.reset()


class PreferenceMonitor(Callback):
    """Logs how preferences are learned, over the training pairs since the last log and over all validation pairs.

    - ``logps/chosen_displacement``: change of the log-prob of chosen responses, in nats a token, since the run began: against
      the reference; where that moves, or there is none, against what was measured first.
    - ``rewards/length_correlation``: Pearson's, of the margins and of how much longer chosen is than rejected.
    - ``rewards/saturated``: share of pairs whose loss has, within 2 %, no gradient left of what it had at the reference; for
      the `sigmoid` loss those with s(margin) > 0.99. Not for losses without a reference.
    - ``kl/reference`` (validation only): KL to the reference, in nats a token of the policy's own samples, with the
      same random numbers each time, so that curves are smooth.

    Sums and counts are over all ranks, and prompts are chosen by their rows: no number depends on the layout. Each may have a
    limit, and a warning is given when one is first crossed.
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
        """Watch; without limits, in silence.

        Args:
            max_fall: nats a token by which chosen responses may become less likely.
            max_length_correlation: largest correlation of margins and lengths, of either sign.
            max_saturated: largest share of pairs without gradient.
            max_kl: largest KL to the reference, in nats a token.
            num_prompts: validation prompts, the first, that are continued for the KL; 0 leaves it out.
            max_new_tokens: longest continuation.

        Raises:
            ValueError: if a number is out of range.
        """
        limits = {"max_fall": max_fall, "max_length_correlation": max_length_correlation}
        limits |= {"max_saturated": max_saturated, "max_kl": max_kl}
        for name, limit in limits.items():
            most = 1 if name in ("max_length_correlation", "max_saturated") else float("inf")
            if limit is not None and not 0 < limit < most:
                raise ValueError(f"PreferenceMonitor: {name} is {limit}; it must be above 0" + " and below 1" * (most == 1))
        if num_prompts < 0:
            raise ValueError(f"PreferenceMonitor: num_prompts is {num_prompts}; it must be 0 or above")
        if max_kl is not None and not num_prompts:
            raise ValueError(
                f"PreferenceMonitor: max_kl is {max_kl}, but num_prompts is 0: give how many prompts to measure it on"
            )
        self.limits = dict(zip((DISPLACEMENT, CORRELATION, SATURATED, KL), limits.values(), strict=True))
        self.num_prompts = num_prompts
        self.generation = GenerationConfig(max_new_tokens=max_new_tokens)
        self.start: dict[str, float] = {}
        """Log-prob a token of chosen at the first measurement of each stage."""
        self._sums: dict[str, _Sums] = {}
        self._prompts: dict[tuple[int, ...], list[int]] = {}
        self._told = 0
        self._alarmed: set[str] = set()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out whether the module can be watched.

        Raises:
            ValueError: if it is of another method, or has no reference that could score samples.
        """
        if not isinstance(pl_module, DPOModule):
            raise ValueError(f"PreferenceMonitor: {type(pl_module).__name__} has no pairs; it is a callback of DPOModule")
        if self.num_prompts and not pl_module.objective.needs_reference:
            raise ValueError("PreferenceMonitor: num_prompts is for the KL to a reference, and the loss has none: leave it out")
        if self.num_prompts and pl_module.initial_policy.kind == "stored":
            raise ValueError(
                "PreferenceMonitor: num_prompts needs a reference that can score new texts, and a stored one cannot: give the "
                "module `reference: frozen`, or leave it out"
            )

    # -- pairs

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Add pairs, and log those since the last time where Lightning logs."""
        self._add("train", pl_module, outputs, batch)
        step, every = trainer.global_step, log_interval(trainer)
        if step != self._told and every and step % every == 0:
            self._told = step
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
        """Add pairs, and keep the first prompts."""
        if trainer.sanity_checking:
            return
        self._add("val", pl_module, outputs, batch)
        if self.num_prompts:
            self._keep_prompts(batch["chosen"], batch_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the validation pairs, and measure the KL."""
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
        saturated = torch.zeros(pairs)
        if module.objective.needs_reference:
            saturated = module.objective.saturated(ratios, margins=batch.get("margins"))
        sums.means.update(
            {
                "ratios": ratios.chosen,
                "logps": policy.sums[:pairs],
                "tokens": ratios.chosen_lengths,
                "saturated": saturated.to(module.device),
            }
        )
        sums.correlation.update(ratios.delta, ratios.chosen_lengths - ratios.rejected_lengths)

    def _log(self, stage: str, module: Any) -> dict[str, Tensor]:
        """Log what was summed, and begin anew; a collective."""
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
            # It is the same on every rank already; sync_dist only tells Lightning so.
            module.log(f"{stage}/{name}", value, batch_size=1, sync_dist=stage == "val")
            limit, number = self.limits[name], float(value)
            size = {DISPLACEMENT: -number, CORRELATION: abs(number)}.get(name, number)
            if limit is not None and not size <= limit and name not in self._alarmed:
                self._alarmed.add(name)
                bound = limit if size == number else -limit
                rank_zero_warn(
                    f"PreferenceMonitor: {stage}/{name} is {number:.3g}, beyond {bound:g}, at step {module.global_step}: "
                    f"{REMEDIES[name]}"
                )

    # -- samples

    def _keep_prompts(self, side: TokenBatch, batch_idx: int) -> None:
        """Keep the prompts of the lowest rows, in their order; by place and rank where rows have no numbers."""
        rank = world()[0]
        for index in range(len(side["tokens"])):
            key = (int(side["rows"][index]),) if "rows" in side else (batch_idx, index, rank)
            if len(self._prompts) >= self.num_prompts and key > max(self._prompts):
                continue
            length = int(side["targets"][index].int().argmax())
            self._prompts[key] = side["tokens"][index, :length].tolist()
            if len(self._prompts) > self.num_prompts:
                del self._prompts[max(self._prompts)]

    def _measure_kl(self, trainer: L.Trainer, module: Any) -> Tensor:
        """The sum over samples of log p - log q over the sum of their lengths; a collective."""
        rank, ranks = world()
        found, self._prompts = self._prompts, {}
        if ranks > 1:
            parts: list[Any] = [None] * ranks
            torch.distributed.all_gather_object(parts, found)
            found = {key: prompt for part in parts for key, prompt in part.items()}
        prompts = [found[key] for key in sorted(found)[: self.num_prompts]]
        # As many passes on every rank, since those of a sharded model are collectives: some do one prompt more than they must.
        own = list(range(rank, len(prompts), ranks))
        padded = own + [0] * (-(-len(prompts) // ranks) - len(own))
        eos_id: Any = getattr(getattr(getattr(trainer, "datamodule", None), "tokenizer", None), "eos_id", None)
        metric = PairMeans(("ratios", "tokens")).to(module.device)
        with trainer.precision_plugin.forward_context(), evaluating(module.policy):
            answers = generate(module.policy, [prompts[i] for i in padded], self.generation, eos_id=eos_id, ids=padded)
            ends = [[eos_id] if answer.reason == "eos" else [] for (answer,) in answers]
            texts = [answer.tokens + end for (answer,), end in zip(answers, ends, strict=True)]
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
        """Where the log-probs began."""
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.start = dict(state_dict["start"])


def _batch(prompts: list[list[int]], texts: list[list[int]], device: torch.device) -> TokenBatch:
    """Prompts with their continuations as targets."""
    rows = [torch.tensor(prompt + text) for prompt, text in zip(prompts, texts, strict=True)]
    tokens = pad_sequence(rows, batch_first=True).to(device)
    places = torch.arange(tokens.shape[1], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = places < lengths[:, None]
    return {"tokens": tokens, "mask": mask, "targets": mask & (places >= starts[:, None])}
