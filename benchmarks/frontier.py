"""The reward-KL frontier of the DPO paper (arXiv 2305.18290, section 6.1), where the best that can be had is known exactly.

A language of all 7,776 sentences of five tokens out of six. The reference is a PaLM that has learned a Markov chain on them,
the reward a sum over transitions, and the pairs are samples of the reference, labelled by Bradley-Terry. Of any policy the
expected reward and KL(policy || reference) are then sums over all sentences, and so are those of the optimum for each beta,
p(y) proportional to q(y) exp(r(y) / beta): no policy has a higher reward at its KL.
"""

import argparse
import copy
import functools
import itertools
import logging
import warnings
from typing import Any, NamedTuple

import _common as common
import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_align.dpo.module import DPOModule, concatenate
from lightning_align.models.palm import PaLM
from lightning_align.references.update import ReferenceUpdate
from lightning_align.scoring.ratios import Ratios, log_ratios
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import LogProbs, PreferenceBatch, TokenBatch

LETTERS, LENGTH = 6, 5
BOS = LETTERS
PAIRS, BATCH, STEPS = 19_200, 64, 300
SEEDS = (0, 1, 2)


def batch_of(sentences: Tensor) -> TokenBatch:
    """Sentences (B, 5) after the token that begins them, each token of theirs a target."""
    tokens = torch.cat([torch.full((len(sentences), 1), BOS), sentences], dim=1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    targets = mask.clone()
    targets[:, 0] = False
    return {"tokens": tokens, "mask": mask, "targets": targets}


SENTENCES = torch.tensor(list(itertools.product(range(LETTERS), repeat=LENGTH)))


class Point(NamedTuple):
    """A policy: how far from the reference, and how well rewarded."""

    kl: float
    reward: float


class Language:
    """A reference, a reward, and pairs."""

    def __init__(self, seed: int) -> None:
        """Draw transitions and rewards, let a PaLM learn the former, and label its samples with the latter."""
        generator = torch.Generator().manual_seed(seed)
        chain = torch.randn(LETTERS + 1, LETTERS, generator=generator).log_softmax(dim=1)
        table = 0.6 * torch.randn(LETTERS + 1, LETTERS, generator=generator)
        before = batch_of(SENTENCES)["tokens"][:, :-1]
        self.rewards = table[before, SENTENCES].sum(dim=1).double()
        torch.manual_seed(seed)
        self.reference = PaLM(num_tokens=LETTERS + 1, dim=32, depth=1, heads=2, dim_head=16)
        self._imitate(chain[before, SENTENCES].sum(dim=1).exp(), generator)
        self.logprobs = distribution(self.reference)
        drawn = torch.multinomial(self.logprobs.exp(), 2 * PAIRS, replacement=True, generator=generator).view(2, PAIRS)
        wins = torch.sigmoid(self.rewards[drawn[0]] - self.rewards[drawn[1]])
        first = torch.rand(PAIRS, generator=generator, dtype=torch.float64) < wins
        self.chosen, self.rejected = torch.where(first, drawn[0], drawn[1]), torch.where(first, drawn[1], drawn[0])

    def _imitate(self, chances: Tensor, generator: torch.Generator) -> None:
        optimizer = torch.optim.AdamW(self.reference.parameters(), 3e-3)
        for _ in range(200):
            drawn = torch.multinomial(chances, 256, replacement=True, generator=generator)
            optimizer.zero_grad()
            (-response_logprobs(self.reference, batch_of(SENTENCES[drawn])).sums.mean()).backward()
            optimizer.step()

    def batches(self) -> list[PreferenceBatch]:
        """All pairs once."""
        sides = zip(self.chosen.split(BATCH), self.rejected.split(BATCH), strict=True)
        return [{"chosen": batch_of(SENTENCES[won]), "rejected": batch_of(SENTENCES[lost])} for won, lost in sides]

    def point(self, logprobs: Tensor) -> Point:
        """Of a policy's log-probs of all sentences."""
        chances = logprobs.exp()
        return Point(float((chances * (logprobs - self.logprobs)).sum()), float((chances * self.rewards).sum()))

    def optimum(self, beta: float) -> Point:
        """The best policy for a beta."""
        return self.point((self.logprobs + self.rewards / beta).log_softmax(dim=0))

    @functools.cached_property
    def frontier(self) -> list[Point]:
        """The optima from the reference itself on."""
        return [self.optimum(float(beta)) for beta in np.geomspace(100, 0.05, 200)]

    def share(self, point: Point) -> float:
        """How much of the reward above the reference's that can be had at its KL a policy has."""
        best = np.interp(point.kl, *zip(*self.frontier, strict=True))
        start = self.point(self.logprobs).reward
        return (point.reward - start) / float(best - start)


@torch.no_grad()
def distribution(model: nn.Module) -> Tensor:
    """Log-probs of all sentences, normalised over them: a model may also give some chance to its beginning token."""
    return response_logprobs(model, batch_of(SENTENCES)).sums.double().log_softmax(dim=0)


class Unshifted(DPOModule):
    """DPO on what `unshifted_means` returns."""

    def score(self, batch: PreferenceBatch) -> tuple[LogProbs, Ratios]:
        """See `DPOModule`."""
        both = concatenate(batch)
        reference: Any = self.reference
        with torch.no_grad():
            expected = common.unshifted_means(reference.model, both)
        policy = common.unshifted_means(self.policy, both)
        return policy, log_ratios(policy, expected)


class Points(Callback):
    """Measures the policy every so many steps."""

    def __init__(self, language: Language, every: int) -> None:
        """Begin with nothing."""
        self.language, self.every = language, every
        self.points: list[Point] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Measure."""
        if trainer.global_step % self.every == 0:
            module: Any = pl_module
            self.points.append(self.language.point(distribution(module.policy)))


class Side(NamedTuple):
    """A way to align, and the betas that it is tried with."""

    kind: type[DPOModule]
    given: dict[str, Any]
    betas: tuple[float, ...]


SIDES = {
    "DPO": Side(DPOModule, {}, (0.5, 0.7, 1.0, 2.0, 5.0)),
    "IPO": Side(DPOModule, {"loss": "ipo"}, (0.7, 1.0, 2.0)),
    "DPO, moving reference": Side(DPOModule, {"reference": "moving"}, (2.0, 4.0, 8.0)),
    "SimPO": Side(DPOModule, {"loss": "simpo"}, (2.0, 10.0)),
    "unshifted means": Side(Unshifted, {}, (0.1, 0.5, 2.0)),
}


def train(language: Language, name: str, beta: float, *, steps: int = STEPS, every: int = 100) -> list[Point]:
    """The points of a policy on its way."""
    side, points = SIDES[name], Points(language, every)
    moves = [ReferenceUpdate(alpha=0.6, every=50)] if side.given.get("reference") == "moving" else []
    module = side.kind(
        copy.deepcopy(language.reference),
        beta=beta,
        optimizer=functools.partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.0),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=steps),
        **side.given,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[points, *moves],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(language.batches(), batch_size=None))  # type: ignore[arg-type]  # a list is a dataset
    return points.points


def quiet() -> None:
    """No words from Lightning."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def report(seeds: tuple[int, ...]) -> None:
    """Print the section."""
    common.heading(
        "The reward-KL frontier, against the exact optimum",
        f"All {len(SENTENCES):,} sentences of {LENGTH} tokens; a PaLM of width 32; {PAIRS:,} pairs, {STEPS} steps of {BATCH}, "
        f"AdamW; {len(seeds)} seeds, mean (worst). KL in nats a sentence. Share: of the reward above the reference's "
        "that the best policy at the same KL has.",
    )
    languages = [Language(seed) for seed in seeds]
    rows, near, unshifted = [], [], []
    for name, side in SIDES.items():
        for beta in side.betas:
            finals = [train(language, name, beta)[-1] for language in languages]
            shares = [language.share(point) for language, point in zip(languages, finals, strict=True)]
            mean = Point(*(sum(values) / len(seeds) for values in zip(*finals, strict=True)))
            start = sum(language.point(language.logprobs).reward for language in languages) / len(seeds)
            if name == "DPO":
                near += [share for share, point in zip(shares, finals, strict=True) if point.kl < 1]
            if name == "unshifted means":
                unshifted += shares
            rows.append(
                {
                    "": name,
                    "beta": f"{beta:g}",
                    "KL": f"{mean.kl:.2f}",
                    "reward above the reference's": f"{mean.reward - start:.2f}",
                    "share of the best at this KL": f"{sum(shares) / len(seeds):.1%} ({min(shares):.1%})",
                }
            )
    print(common.table(rows))
    worst, best = min(near), max(unshifted)
    claims = [
        common.claim("DPO at KL below 1 nat: share of the best, worst beta and seed", "≥ 90 %", f"{worst:.1%}", worst >= 0.9),
        common.claim("the best of unshifted means", "below it", f"{best:.1%}", best < worst),
    ]
    print(common.table(claims))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    report(tuple(arguments.seeds))


if __name__ == "__main__":
    main()
