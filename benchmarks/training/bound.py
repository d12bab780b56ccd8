"""Training steps against their bound: the time of their matrix products and attention alone.

The products of a step are recorded with their shapes, strides and order, and run again on random numbers, alternating with the
step itself. Their share of the step's time is what an implementation of the same arithmetic, with the same kernels, could reach
at most. The rest is listed by a profile: the operators that take most of the other time.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.calm import step as calm_step
from benchmarks.dpo import step as dpo_step
from benchmarks.retro import step as retro_step
from lightning_align import CALM, Augment, ConnectionConfig, PaLM
from lightning_align.retro.model import NeighborTokens
from lightning_align.scoring.head import target_logprobs
from lightning_align.scoring.sums import response_logprobs

VOCABULARY, WIDTH, DEPTH, HEADS = dpo_step.VOCABULARY, dpo_step.WIDTH, dpo_step.DEPTH, dpo_step.HEADS
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")
Step = Callable[[], None]


class Recorder(TorchDispatchMode):
    """Records the products that run under it, to run them again on random numbers of the same shapes and strides."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and record it if it is a product."""
        out = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") in PRODUCTS + ATTENTION:
            alike = tuple(self._like(arg, place) for place, arg in enumerate(args))
            self.calls.append((func, alike, {name: self._like(arg, name) for name, arg in (kwargs or {}).items()}))
        return out

    def _like(self, value: Any, place: int | str) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value.clone()
        key = place, value.shape, value.stride(), value.dtype
        if key not in self._made:
            extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            numbers = torch.randn(extent, dtype=value.dtype) * 0.05
            self._made[key] = numbers.as_strided(value.shape, value.stride())  # a size may have the stride 0
        return self._made[key]

    @torch.no_grad()
    def run(self) -> None:
        """Run all products again, in their order."""
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


def palm() -> PaLM:
    """The model of SFT, DPO and SPIN."""
    return PaLM(num_tokens=VOCABULARY, dim=WIDTH, depth=DEPTH, heads=HEADS, dim_head=64)


def sft() -> Step:
    """A step of fine-tuning on the responses of 16 rows."""
    rows = common.batches(common.synthetic_pairs(16, VOCABULARY), 16)[0]["chosen"]
    model = palm()

    def loss() -> Tensor:
        sums, counts = response_logprobs(model, rows)
        return -sums.sum() / counts.sum()

    return retro_step.step(model, loss)


def dpo() -> Step:
    """A step of DPO on 8 pairs, with a frozen reference."""
    run, batch = dpo_step.stepper("PaLM"), dpo_step.load_batches(None)[0]
    return lambda: run(batch)


def spin_scoring() -> Step:
    """Log-probs of 32 responses under an opponent, without gradients."""
    rows = common.batches(common.synthetic_pairs(32, VOCABULARY), 32)[0]["rejected"]
    model = palm().eval()

    def run() -> None:
        with torch.no_grad():
            response_logprobs(model, rows)

    return run


def calm() -> Step:
    """A step of the connections between two frozen models, on 8 rows of 256 tokens."""
    anchor, augment = (
        PaLM(num_tokens=VOCABULARY, dim=dim, depth=8, heads=dim // 64, dim_head=64) for dim in (WIDTH, WIDTH // 2)
    )
    spec = Augment(augment, connections=calm_step.pairs(), alignment="aligned")
    model = CALM(anchor, spec, connection=ConnectionConfig(heads=8, dim_head=64))
    optimizer = torch.optim.AdamW(model.connections.parameters(), lr=1e-4)
    tokens = torch.randint(0, VOCABULARY, (calm_step.ROWS, calm_step.LENGTH))
    return lambda: calm_step.ours_step(model, optimizer, tokens, [None])


def retro() -> Step:
    """A step on 4 rows of 512 tokens with 2 neighbors per chunk."""
    model = retro_step.ours()
    tokens = torch.randint(4, retro_step.VOCABULARY, (retro_step.BATCH, retro_step.LENGTH + 1))
    shape = retro_step.BATCH, retro_step.LENGTH // retro_step.CHUNK, retro_step.NEIGHBORS, 2 * retro_step.CHUNK
    found = torch.randint(4, retro_step.VOCABULARY, shape)
    neighbors = NeighborTokens(found, torch.ones_like(found, dtype=torch.bool))

    def loss() -> Tensor:
        hidden = model.hidden(tokens[:, :-1], neighbors=neighbors)
        return -target_logprobs(hidden.flatten(0, 1), model.head, tokens[:, 1:].flatten()).mean()

    return retro_step.step(model, loss)


STEPS: dict[str, Callable[[], Step]] = {"SFT": sft, "DPO": dpo, "SPIN, scoring": spin_scoring, "CALM": calm, "RETRO": retro}


def others(step: Step, number: int = 4) -> str:
    """Name the operators that take most of the time beside the products, with their shares of the step."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    events = seen.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    names = [f"aten::{name}" for name in PRODUCTS + ATTENTION]
    rest = sorted((e for e in events if e.key not in names), key=lambda event: -event.self_cpu_time_total)
    return ", ".join(f"{event.key.removeprefix('aten::')} {event.self_cpu_time_total / total:.0%}" for event in rest[:number])


def report(methods: list[str], rounds: int) -> None:
    """Print the section."""
    common.heading(
        "Training steps against their bound",
        f"PaLM of width {WIDTH}, depth {DEPTH} (CALM 8 and 8), vocabulary {VOCABULARY:,} (RETRO {retro_step.VOCABULARY:,}), "
        f"float32, AdamW, random weights, {torch.get_num_threads()} threads, {rounds} alternating rounds. The bound is the "
        "time of the step's matrix products and attention alone.",
    )
    rows, claims = [], []
    for method in methods:
        torch.manual_seed(0)
        step = STEPS[method]()
        step()
        recorder = Recorder()
        with FlopCounterMode(display=False) as flops, recorder:
            step()
        timings = common.alternate({"step": step, "products": recorder.run}, rounds)
        share = common.ratio(timings["products"], timings["step"])
        seconds = common.median(t.seconds for t in timings["products"])
        rows.append(
            {
                "step": method,
                "GFLOP": f"{flops.get_total_flops() / 1e9:,.1f}",
                "products, GFLOP/s": f"{flops.get_total_flops() / 1e9 / seconds:,.1f}",
                "step, ms": f"{1e3 * common.median(t.seconds for t in timings['step']):,.0f}",
                "products, ms": f"{1e3 * seconds:,.0f}",
                "share reached": f"{share:.0%}",
                "most of the rest": others(step),
                "background load": common.load(timings["step"] + timings["products"]),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
        claims.append(common.claim(f"{method}: share of the bound", "≥ 70 %", f"{share:.0%}", share >= 0.7))
    print(common.table(rows))
    print(common.table(claims))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report(arguments.methods, arguments.rounds)


if __name__ == "__main__":
    main()
