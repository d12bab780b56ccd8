"""A step of online self-play, generation included, against `SPINTrainer` of self-rewarding-lm-pytorch.

The peer has no model, so it trains `TransformerWrapper` of x-transformers. Ours trains a PaLM of the same width, depth and
number of heads under Lightning's Trainer. Both generate responses with temperature 0.7 and top-p 0.9 and score real and
generated responses under policy and opponent. The peer has its own process, because our fits change the settings of the
allocator.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import io
import json
import sys
import tempfile
import warnings
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import common
from lightning_align import GenerationConfig, PaLM, SPINModule

WIDTH, DEPTH, HEADS, BATCH, PROMPT = 256, 4, 4, 8, 64
# Vocabulary, tokens per row, required speedup.
CASES = ((32_000, 256, 12.0), (256, 512, 20.0))


class Rows(L.LightningDataModule):
    """The same batch for every step. Responses never end early, because the peer's do not."""

    tokenizer = SimpleNamespace(eos_id=-1, pad_id=0, decode=None)

    def __init__(self, rows: Tensor, steps: int) -> None:
        super().__init__()
        self.rows, self.steps, self.max_length = rows, steps, rows.shape[1]

    def train_dataloader(self) -> Any:
        """Batches."""
        targets = (torch.arange(self.max_length) >= PROMPT).expand_as(self.rows)
        batch = {"tokens": self.rows, "mask": torch.ones_like(targets), "targets": targets}
        return DataLoader([batch] * self.steps, batch_size=None)  # type: ignore[arg-type]


def ours(rows: Tensor, vocabulary: int, steps: int) -> list[common.Timing]:
    """Times of our steps, after one warm-up step."""
    length = rows.shape[1]
    module = SPINModule(
        PaLM(num_tokens=vocabulary, dim=WIDTH, depth=DEPTH, heads=HEADS, dim_head=64),
        generate="per_step",
        optimizer=functools.partial(torch.optim.Adam, lr=1e-6),
        generation=GenerationConfig(max_new_tokens=length - PROMPT, temperature=0.7, top_p=0.9),
    )
    clock = common.Clock()
    with tempfile.TemporaryDirectory() as folder:  # of the policy that an iteration begins with
        trainer = L.Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            max_steps=steps + 1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
        )
        trainer.fit(module, Rows(rows, steps + 1))
    return clock.timings[1:]


def peer(rows: Tensor, vocabulary: int) -> common.Timing:
    """Time of one step of the peer's trainer."""
    from self_rewarding_lm_pytorch import SPINTrainer
    from x_transformers import Decoder, TransformerWrapper

    length = rows.shape[1]
    layers = Decoder(dim=WIDTH, depth=DEPTH, heads=HEADS, rotary_pos_emb=True, attn_flash=True)
    model = TransformerWrapper(num_tokens=vocabulary, max_seq_len=length + 1, attn_layers=layers)
    trainer = SPINTrainer(
        model,
        train_sft_dataset=TensorDataset(rows, torch.full((len(rows),), PROMPT)),
        max_seq_len=length,
        batch_size=BATCH,
        grad_accum_steps=1,
        epochs=1,
        accelerate_kwargs={"cpu": True},
    )
    with common.Meter() as meter, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer()
    return common.Timing(meter.seconds, meter.others)


def batch(vocabulary: int, length: int) -> Tensor:
    """The rows of both sides."""
    torch.manual_seed(0)
    return torch.randint(2, vocabulary, (BATCH, length))


def report(steps: int, cases: list[int]) -> None:
    """Print the section."""
    version = importlib.metadata.version("self-rewarding-lm-pytorch")
    tokens = " and ".join(f"{CASES[number][1]} tokens" for number in cases)
    common.heading(
        f"A step of self-play against SPINTrainer of self-rewarding-lm-pytorch {version}, {tokens}",
        f"Online, generation included: batch {BATCH}, prompts of {PROMPT} tokens, width {WIDTH}, depth {DEPTH}, float32, "
        f"{torch.get_num_threads()} threads, random weights. One step of the peer; "
        f"{2 * steps} steps of ours, half before it and half after.",
    )
    rows, claims = [], []
    for number in cases:
        vocabulary, length, least = CASES[number]
        rows_of_both = batch(vocabulary, length)
        mine = ours(rows_of_both, vocabulary, steps)
        threads = str(torch.get_num_threads())
        theirs = [common.Timing(**common.in_subprocess(__file__, "--peer", str(number), "--threads", threads))]
        mine += ours(rows_of_both, vocabulary, steps)
        seconds, other = common.median(t.seconds for t in mine), theirs[0].seconds
        cells = {"vocabulary": f"{vocabulary:,}", "tokens": str(length), "peer, s/step": f"{other:.2f}"}
        rows.append(
            {
                **cells,
                "ours, s/step (median)": f"{seconds:.2f}",
                "ratio": f"{other / seconds:.1f}x",
                "background load": common.load(mine + theirs),
            }
        )
        speed = other / seconds
        print(f"{vocabulary} {length}: {other:.2f} s against {seconds:.2f} s", file=sys.stderr, flush=True)
        what = f"speed of a step, vocabulary {vocabulary:,}, {length} tokens"
        claims.append(common.claim(what, f"≥ {least:g}x", f"{speed:.1f}x", speed >= least))
    print(common.table(rows))
    print(common.table(claims))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--cases", type=int, nargs="+", default=[0, 1], help=f"indices of {CASES}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", type=int, help="run one step of the peer for this case and print JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    if arguments.peer is None:
        report(arguments.steps, arguments.cases)
    else:
        vocabulary, length, _ = CASES[arguments.peer]
        print(json.dumps(peer(batch(vocabulary, length), vocabulary)._asdict()))


if __name__ == "__main__":
    main()
