"""Self-play on a Markov chain, whose distribution is known, against continued SFT for the same number of steps.

Each seed has its own chain. A PaLM is fine-tuned on demonstrations of the chain. Every arm then starts from this model and
takes the same number of optimizer steps on the same demonstrations. After each third of the steps two metrics are computed on
the test split. Validity is the share of responses sampled at temperature 1 that are possible under the chain. Divergence is
KL(chain || model) per response in nats, exact for each symbol and averaged over responses of the chain. The study also records
the length of sampled responses, the share that hit the length limit, and slips: the first impossible symbol of a response.

The settings of all arms, SFT included, are the best of a grid by final validity, on a separate chain and split. Results go to a
JSON file after each arm. Results that are already there are not computed again.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from benchmarks import common
from lightning_align import (
    GenerationConfig,
    MarkovChain,
    PaLM,
    SelfPlayGeneration,
    SFTDataModule,
    SFTModule,
    SPINDataModule,
    SPINModule,
    WarmupDecay,
    generate,
)
from lightning_align.data.tasks.markov import END
from lightning_align.data.tokenizer import ByteTokenizer
from lightning_align.runtime.modes import evaluating
from lightning_align.scoring.ratios import Ratios, log_ratios
from lightning_align.spin.batches import tied
from lightning_align.types import LogProbs, SelfPlayBatch

ROWS, BATCH, BASE_EPOCHS, LENGTH = 1000, 32, 30, 28
EPOCHS = (4, 8, 12)
"""Epochs over the demonstrations after which an arm is measured."""
LOOP: dict[str, Any] = {"iterations": 3, "epochs": [4, 2, 2], "replay": 1}
"""With replay later iterations have twice the pairs. Each of the three iterations takes a third of the steps."""
FRESH: dict[str, Any] = {"iterations": 3, "epochs": 4, "replay": 0}
"""Without replay, for the same number of steps."""
# Grid of settings for each family of arms.
GRIDS: dict[str, list[dict[str, Any]]] = {
    "continued SFT": [{"lr": 1e-4}, {"lr": 3e-4}, {"lr": 2e-3}],
    # In theory one iteration reaches the data distribution at beta 1, goes part of the way at 2 and overshoots at 0.5.
    "SPIN": [
        *({"lr": lr, "beta": beta} for beta in (0.5, 1.0, 2.0) for lr in (1e-4, 3e-4, 1e-3)),
        {"lr": 1e-4, "beta": 0.1},
        {"lr": 1e-3, "beta": 0.3},
        {"lr": 3e-4, "beta": 1.0, "opponent": "mixture"},
    ],
    "SPIN, with an SFT term": [
        {"lr": 3e-4, "beta": 0.1, "sft_weight": 1.0},
        {"lr": 3e-4, "beta": 1.0, "sft_weight": 1.0},
        {"lr": 1e-3, "beta": 1.0, "sft_weight": 1.0},
    ],
    "unshifted means": [
        {"lr": 1e-4, "beta": 0.1, "generate": "per_step", "unshifted": True, "loop": FRESH},
        {"lr": 1e-3, "beta": 0.1, "generate": "per_step", "unshifted": True, "loop": FRESH},
    ],
    # Not arms of the study, but tried as remedies: a new opponent each epoch, four responses per prompt instead of four
    # epochs, responses of the current policy, a loss that does not saturate, mean log-probs.
    "SPIN, otherwise": [
        {"lr": 3e-4, "beta": 1.0, "loop": {"iterations": 12, "epochs": 1, "replay": 0}},
        {"lr": 1e-3, "beta": 0.1, "loop": {"iterations": 12, "epochs": 1, "replay": 0}},
        {"lr": 3e-4, "beta": 0.1, "sft_weight": 1.0, "loop": {"iterations": 12, "epochs": 1, "replay": 0}},
        {"lr": 3e-4, "beta": 1.0, "num_samples": 4, "loop": {"iterations": 3, "epochs": 1, "replay": 0}},
        {"lr": 3e-5, "beta": 1.0, "num_samples": 4, "loop": {"iterations": 3, "epochs": 1, "replay": 0}},
        {"lr": 3e-5, "beta": 0.1, "num_samples": 4, "loop": {"iterations": 3, "epochs": 1, "replay": 0}},
        {
            **{"lr": 1e-4, "beta": 0.1, "opponent": "ema", "ema_decay": 0.9, "generate": "per_step"},
            "loop": {"iterations": 1, "epochs": 12},
        },
        {"lr": 1e-4, "beta": 0.5, "loss": "ipo"},
        {"lr": 3e-4, "beta": 2.0, "loss": "sigmoid_norm"},
    ],
}
# Arms of the study: the family whose settings they use, and the loop (empty for SFT).
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "continued SFT": ("continued SFT", {}),
    "SPIN": ("SPIN", LOOP),
    "SPIN, with an SFT term": ("SPIN, with an SFT term", LOOP),
    "SPIN, one long iteration": ("SPIN", {"iterations": 1, "epochs": 12}),
    "SPIN, no replay": ("SPIN", FRESH),
    "unshifted means, online": ("unshifted means", FRESH),
}
TUNING = 100
"""Seed of the chain for choosing settings."""
Point = dict[str, float]


class Ruler:
    """Measures a model against the chain of its demonstrations."""

    def __init__(self, chain: int, split: Any, *, num_rows: int = 400, num_samples: int = 1000) -> None:
        self.task, self.tokenizer = MarkovChain(num_rows, chain=chain, split=split, seed=1), ByteTokenizer()
        rows = list(self.task.rows())
        self.prompts = [row["prompt"] for row in MarkovChain(num_samples, chain=chain, split=split, seed=2).rows()]
        ids = [[1, *self.ids(row["prompt"] + row["response"])] for row in rows]
        width = max(map(len, ids))
        self.tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        self.truth = torch.zeros(len(rows), width, self.tokenizer.vocab_size)
        for number, row in enumerate(rows):
            for place in range(len(row["response"]) + 1):
                for symbol, share in self.task.distribution(row["prompt"], row["response"][:place]).items():
                    token = self.tokenizer.eos_id if symbol == END else self.ids(symbol)[0]
                    self.truth[number, len(row["prompt"]) + place, token] = share

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode_batch([text])[0].ids

    def measure(self, model: nn.Module) -> Point:
        """Validity, divergence and the other metrics."""
        with evaluating(model):
            logps = model(self.tokens).float().log_softmax(-1)
        divergence = (self.truth * (self.truth.clamp(min=1e-30).log() - logps)).sum((1, 2)).mean()
        config = GenerationConfig(max_new_tokens=self.task.max_symbols + 1, batch_size=250)
        answers = generate(model, [[1, *self.ids(prompt)] for prompt in self.prompts], config, eos_id=self.tokenizer.eos_id)
        texts = [(answer.finished, self.tokenizer.decode(answer.tokens)) for (answer,) in answers]
        valid = [done and self.task.grade(prompt, text) for prompt, (done, text) in zip(self.prompts, texts, strict=True)]
        right = [self._right(prompt, text) for prompt, (_, text) in zip(self.prompts, texts, strict=True)]
        wrong = sum(count < len(text) for count, (_, text) in zip(right, texts, strict=True))
        return {
            "validity": sum(valid) / len(valid),
            "divergence": float(divergence),
            "length": sum(len(text) for _, text in texts) / len(texts),
            "unfinished": sum(not done for done, _ in texts) / len(texts),
            "slips": wrong / (sum(right) + wrong),
        }

    def _right(self, prompt: str, text: str) -> int:
        """Number of symbols before the first impossible one."""
        places = (place for place, symbol in enumerate(text) if symbol not in self.task.distribution(prompt, text[:place]))
        return next(places, len(text))


class Measure(Callback):
    """Measures after the given epochs."""

    def __init__(self, ruler: Ruler, epochs: set[int]) -> None:
        self.ruler, self.epochs, self.points = ruler, epochs, list[Point]()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure."""
        if trainer.current_epoch + 1 in self.epochs:
            policy: Any = pl_module.policy
            self.points.append({"steps": trainer.global_step, **self.ruler.measure(policy)})


class Unshifted(SPINModule):
    """SPIN with the log-probs of `unshifted_means`."""

    def score(self, batch: SelfPlayBatch) -> tuple[LogProbs, Ratios, torch.Tensor]:
        """See `SPINModule`."""
        pairs = batch["pairs"]
        player = self.opponent.player(self.policy)
        with evaluating(player):
            expected = common.unshifted_means(player, pairs)
        policy = common.unshifted_means(self.policy, pairs)
        return policy, log_ratios(policy, expected), tied(pairs)


class Seed:
    """A chain, its demonstrations, and the model fine-tuned on them."""

    def __init__(
        self, seed: int, folder: Path, *, split: str = "test", rows: int = ROWS, base_epochs: int = BASE_EPOCHS
    ) -> None:
        self.seed, self.folder, self.ruler = seed, folder / f"seed_{seed}", Ruler(seed, split)
        self.task, self.base = MarkovChain(rows, chain=seed), self.folder / "base.ckpt"
        self.rows, self.base_epochs = rows, base_epochs

    def fit(self, module: L.LightningModule, data: L.LightningDataModule, *callbacks: Callback, epochs: int) -> L.Trainer:
        """Train without logger, checkpoints and progress bar."""
        L.seed_everything(self.seed, verbose=False)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            callbacks=list(callbacks),
            default_root_dir=self.folder,
        )
        trainer.fit(module, data)
        return trainer

    def data(self, kind: type[SFTDataModule] | type[SPINDataModule], *, grouped: bool = False) -> Any:
        """The demonstrations.

        The SFT loss is a mean over the tokens of a batch. Grouping by length would change the weights of short and long rows,
        so SFT does not group. The loss of pairs is a mean over pairs, so grouping does not matter there.
        """
        options: dict[str, Any] = {"batch_size": BATCH, "max_length": LENGTH, "group_by_length": grouped}
        return kind(self.task, **options, cache_dir=str(self.folder / "cache"))

    def start(self) -> Point:
        """Fine-tune the base model unless it exists, and measure it."""
        if not self.base.exists():
            torch.manual_seed(self.seed)
            model = PaLM(num_tokens=259, dim=64, depth=2, heads=4, dim_head=16, variant="paper", qk_rmsnorm=True)
            steps = self.base_epochs * -(-self.rows // BATCH)
            schedule = functools.partial(WarmupDecay, total_steps=steps, warmup_steps=20, decay="linear")
            optimizer = functools.partial(torch.optim.AdamW, lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0)
            module = SFTModule(model, optimizer=optimizer, lr_scheduler=schedule)
            trainer = self.fit(module, self.data(SFTDataModule), epochs=self.base_epochs)
            trainer.save_checkpoint(self.base)
        module = SFTModule(init_from=str(self.base))
        module.configure_model()
        return {"steps": 0, **self.ruler.measure(module.policy)}

    def run(self, settings: dict[str, Any], loop: dict[str, Any]) -> list[Point]:
        """Train an arm from the base model: self-play with a loop, SFT without."""
        optimizer = functools.partial(torch.optim.AdamW, lr=settings["lr"], betas=(0.9, 0.98), weight_decay=0.0)
        if not loop:
            measure = Measure(self.ruler, set(EPOCHS))
            module = SFTModule(init_from=str(self.base), optimizer=optimizer)
            self.fit(module, self.data(SFTDataModule), measure, epochs=EPOCHS[-1])
            return measure.points
        epochs = loop["epochs"]
        each = epochs if isinstance(epochs, list) else [epochs] * loop["iterations"]
        ends = {sum(each[: number + 1]) for number in range(len(each))} if len(each) > 1 else set(EPOCHS)
        measure = Measure(self.ruler, ends)
        # The published code samples with these settings.
        sampled = {"temperature": 0.7, "top_p": 0.9} if settings.get("unshifted") else {}
        player = (Unshifted if settings.get("unshifted") else SPINModule)(
            init_from=str(self.base),
            optimizer=optimizer,
            generation=GenerationConfig(
                max_new_tokens=LENGTH, batch_size=250, seed=self.seed, num_samples=settings.get("num_samples", 1), **sampled
            ),
            **{name: value for name, value in settings.items() if name not in ("lr", "num_samples", "loop", "unshifted")},
        )
        with tempfile.TemporaryDirectory(dir=self.folder) as sets:
            play = SelfPlayGeneration(**loop, folder=sets)
            self.fit(
                player, self.data(SPINDataModule, grouped=settings.get("generate") != "per_step"), play, measure, epochs=-1
            )
        return measure.points


def tune(results: dict[str, Any], output: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """The best settings of each grid by final validity."""
    tried, study = results.setdefault("tuning", []), Seed(TUNING, folder, split="validation")
    trials: list[dict[str, Any]] = [{"arm": name, "settings": settings} for name, grid in GRIDS.items() for settings in grid]
    done = [{"arm": trial["arm"], "settings": trial["settings"]} for trial in tried]
    for trial in trials:
        if trial not in done:
            start = time.perf_counter()
            loop = {} if trial["arm"] == "continued SFT" else trial["settings"].get("loop", LOOP)
            trial["points"] = [study.start(), *study.run(trial["settings"], loop)]
            tried.append(trial)
            common.save(output, results)
            told = ", ".join(f"{point['validity']:.3f} ({point['divergence']:.3f})" for point in trial["points"])
            print(
                f"{trial['arm']} {trial['settings']}: {told}; {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True
            )
    best = {}
    for name in GRIDS:
        mine = [trial for trial in tried if trial["arm"] == name]
        best[name] = max(mine, key=lambda trial: trial["points"][-1]["validity"])["settings"]
    results["settings"] = best
    return best


def report(results: dict[str, Any]) -> None:
    """Print the section."""
    seeds = results["seeds"]
    settings = "; ".join(
        f"{family}: " + ", ".join(f"{name} {value}" for name, value in results["settings"][family].items() if name != "loop")
        for family in {family: None for family, _ in ARMS.values()}
    )
    common.heading(
        "Self-play on a Markov chain",
        f"Order 2, 16 symbols with 3 successors each, responses of up to 24 symbols, {ROWS:,} demonstrations. PaLM of width 64 "
        f"and depth 2, fine-tuned for {BASE_EPOCHS} epochs. Then the same number of steps for every arm, {BATCH} "
        f"demonstrations per step. Settings: {settings}. Means over {len(seeds)} seeds, each with its own chain, after each "
        "third of the steps. Validity: share of possible responses, sampled at temperature 1. Divergence: KL(chain || model) "
        "per response in nats. Slips: impossible symbols per symbol, counted up to the first.",
    )
    rows = []
    for name in ("base", *ARMS):
        points = [seed[name] for seed in seeds.values()]
        cells = {"arm": name}
        for quantity, form in (("validity", "{:.1%}"), ("divergence", "{:.2f}"), ("length", "{:.1f}"), ("slips", "{:.2%}")):
            means = [sum(p[i][quantity] for p in points) / len(points) for i in range(len(points[0]))]
            cells[quantity] = ", ".join(map(form.format, means))
        ends = [100 * p[-1]["validity"] for p in points]
        cells["final validity by seed"] = ", ".join(f"{end:.1f}" for end in ends)
        rows.append(cells)
    print(common.table(rows))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/spin_markov"))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"seeds": {}}
    best = tune(results, arguments.output, arguments.folder)
    for number in arguments.seeds:
        done, study = results["seeds"].setdefault(str(number), {}), Seed(number, arguments.folder)
        missing = [name for name in ARMS if name not in done]
        if missing:
            done["base"] = [study.start()]
        for name in missing:
            family, loop = ARMS[name]
            done[name] = study.run(best[family], loop)
            common.save(arguments.output, results)
    report(results)


if __name__ == "__main__":
    main()
