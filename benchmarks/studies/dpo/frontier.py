"""The reward-KL frontier of the DPO paper (arXiv 2305.18290, section 6.1), against the exact optimum.

The language has 7,776 sentences: all sequences of five tokens out of six. The reference is a PaLM that learned a Markov chain
on them. The reward is a sum over transitions. The pairs are samples of the reference with Bradley-Terry labels. Expected reward
and KL(policy || reference) of any policy are then sums over all sentences. The optimum for each beta is known, too: p(y)
proportional to q(y) exp(r(y) / beta). No policy has a higher reward at the same KL.
"""

import argparse
import copy
import functools
import itertools
import logging
import warnings
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import common
from lightning_align.dpo.batch import concatenate
from lightning_align.dpo.module import DPOModule
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
    """A batch of sentences (B, 5) after the BOS token. Each token of a sentence is a target."""
    tokens = torch.cat([torch.full((len(sentences), 1), BOS), sentences], dim=1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    targets = mask.clone()
    targets[:, 0] = False
    return {"tokens": tokens, "mask": mask, "targets": targets}


SENTENCES = torch.tensor(list(itertools.product(range(LETTERS), repeat=LENGTH)))


class Point(NamedTuple):
    """KL to the reference and expected reward of a policy."""

    kl: float
    reward: float


class Language:
    """A reference policy, a reward, and preference pairs."""

    def __init__(self, seed: int) -> None:
        """Draw transitions and rewards, train a PaLM on the transitions, and label its samples by the rewards."""
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
        """KL and reward of a policy, from its log-probs of all sentences."""
        chances = logprobs.exp()
        return Point(float((chances * (logprobs - self.logprobs)).sum()), float((chances * self.rewards).sum()))

    def optimum(self, beta: float) -> Point:
        """KL and reward of the best policy for a beta."""
        return self.point((self.logprobs + self.rewards / beta).log_softmax(dim=0))

    @functools.cached_property
    def frontier(self) -> list[Point]:
        """The optima from a large beta, close to the reference, to a small one."""
        return [self.optimum(float(beta)) for beta in np.geomspace(100, 0.05, 200)]

    def share(self, point: Point) -> float:
        """The reward gain of a policy over the reference, divided by the largest gain at the same KL."""
        best = np.interp(point.kl, *zip(*self.frontier, strict=True))
        start = self.point(self.logprobs).reward
        return (point.reward - start) / float(best - start)


@torch.no_grad()
def distribution(model: nn.Module) -> Tensor:
    """Log-probs of all sentences, normalized: a model may give some probability to the BOS token."""
    return response_logprobs(model, batch_of(SENTENCES)).sums.double().log_softmax(dim=0)


class Unshifted(DPOModule):
    """DPO with the log-probs of `unshifted_means`."""

    def score(self, batch: PreferenceBatch) -> tuple[LogProbs, Ratios]:
        """See `DPOModule`."""
        both = concatenate(batch)
        reference: Any = self.reference
        with torch.no_grad():
            expected = common.unshifted_means(reference.model, both)
        policy = common.unshifted_means(self.policy, both)
        return policy, log_ratios(policy, expected)


class Points(Callback):
    """Measures the policy at regular intervals."""

    def __init__(self, language: Language, every: int) -> None:
        """Start with no points."""
        self.language, self.every = language, every
        self.points: list[Point] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Measure."""
        if trainer.global_step % self.every == 0:
            module: Any = pl_module
            self.points.append(self.language.point(distribution(module.policy)))


class Side(NamedTuple):
    """A method, and the betas to try."""

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
    """Train a policy and return its points at intervals."""
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
    """Silence Lightning."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def report(seeds: tuple[int, ...]) -> None:
    """Print the section."""
    common.heading(
        "The reward-KL frontier, against the exact optimum",
        f"All {len(SENTENCES):,} sentences of {LENGTH} tokens; a PaLM of width 32; {PAIRS:,} pairs, {STEPS} steps of {BATCH}, "
        f"AdamW; {len(seeds)} seeds, mean (worst). KL in nats per sentence. Share: the gain in reward over the reference, "
        "divided by the gain of the best policy at the same KL.",
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
                    "reward gain": f"{mean.reward - start:.2f}",
                    "share of the best gain at this KL": f"{sum(shares) / len(seeds):.1%} ({min(shares):.1%})",
                }
            )
    print(common.table(rows))
    worst, best = min(near), max(unshifted)
    claims = [
        common.claim("DPO at KL below 1 nat: share, worst beta and seed", "≥ 90 %", f"{worst:.1%}", worst >= 0.9),
        common.claim("unshifted means: share, best beta and seed", "below DPO", f"{best:.1%}", best < worst),
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
