"""DPO of a Llama with 0.5 and 1 billion weights in bf16-mixed: padded, sorted and packed rows, and TRL beside them.

All sides get the same pairs, weights, optimizer and clipping. The share of the device (MFU) counts the operations that the
tokens need, not those that a side spends on padding or on computing something twice.
"""

import functools
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks import common
from benchmarks.common import gpu, gpu_models
from benchmarks.common.pairs import Pair
from lightning_align.dpo.batch import concatenate
from lightning_align.references.frozen import frozen_copy
from lightning_align.scoring.losses import sigmoid_loss
from lightning_align.scoring.ratios import log_ratios, pair_metrics
from lightning_align.scoring.sums import response_logprobs
from lightning_align.training.loading import count_targets
from lightning_align.types import LogProbs, TokenBatch

BETA, RATE, CLIP = 0.1, 1e-6, 1.0
Step = Callable[[Any], Any]


def optimizer(session: gpu.Session, model: nn.Module) -> Callable[[], None]:
    """Clipping and AdamW, fused on the device."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=not session.dry)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, CLIP)
        adamw.step()
        adamw.zero_grad()

    return update


def build(session: gpu.Session, size: str, vocabulary: int, recompute: bool) -> nn.Module:
    """Our wrapper of the Llama, with random weights made on the device."""
    from lightning_align.models.pretrained import PretrainedLM

    torch.manual_seed(0)
    config = gpu_models.configuration(size, vocabulary)
    with session.device:
        return PretrainedLM(config=config, gradient_checkpointing=recompute).to(session.device).train()


def ours(session: gpu.Session, size: str, vocabulary: int, *, stored: bool, recompute: bool) -> Step:
    """The loss and the metrics of `DPOModule`."""
    policy = build(session, size, vocabulary, recompute)
    reference = frozen_copy(policy)
    update = optimizer(session, policy)
    kept: dict[int, LogProbs] = {}

    def step(batch: TokenBatch) -> torch.Tensor:
        with torch.autocast(session.device.type, dtype=torch.bfloat16):
            if stored:
                if id(batch) not in kept:
                    kept[id(batch)] = reference.logprobs(policy, batch)
                referred = kept[id(batch)]
            else:
                referred = reference.logprobs(policy, batch)
            scored = response_logprobs(policy, batch)
            ratios = log_ratios(scored, referred)
            loss = sigmoid_loss(ratios, beta=BETA).mean()
        loss.backward()
        update()
        torch.stack([value.mean() for value in pair_metrics(scored, ratios, beta=BETA).values()])
        return loss.detach()

    return step


def peer(session: gpu.Session, size: str, vocabulary: int, *, stored: bool, recompute: bool) -> Step:
    """A step of TRL's trainer, under autocast as accelerate has it."""
    import tempfile

    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    from benchmarks.common.peer_trl import tokenizer

    config = gpu_models.configuration(size, vocabulary)
    config.pop("model_type")

    def llama() -> nn.Module:
        torch.manual_seed(0)
        with session.device:
            return LlamaForCausalLM(LlamaConfig(**config))

    rows = Dataset.from_list([{"prompt": "a", "chosen": "a a", "rejected": "a"}] * 8)  # the trainer requires a dataset
    given = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        beta=BETA,
        per_device_train_batch_size=8,
        max_length=4096,
        gradient_checkpointing=recompute,
        bf16=False,  # autocast is below, because `train`, which would add it, does not run
        use_cpu=session.dry,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = DPOTrainer(llama(), llama(), args=given, train_dataset=rows, processing_class=tokenizer())
    trainer.current_gradient_accumulation_steps = 1  # `train` would set this
    model = trainer.model.to(session.device)
    trainer.ref_model.to(session.device)
    model.train()
    update = optimizer(session, model)

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(session.device.type, dtype=torch.bfloat16):
            loss: torch.Tensor = trainer.training_step(model, dict(batch))
        update()
        return loss.detach()

    return step


def for_peer(batch: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """A batch in the format of TRL's collator: chosen rows, then rejected rows."""
    both = concatenate(common.batches(batch, len(batch))[0])
    return {
        "input_ids": both["tokens"],
        "attention_mask": both["mask"].long(),
        "completion_mask": both["targets"].long(),
    }


def for_ours(batch: Sequence[Pair]) -> TokenBatch:
    """A padded batch, with the number of its targets as the loader adds it."""
    return concatenate(count_targets(common.batches(batch, len(batch))[0]))


def measure(session: gpu.Session, side: str, size: str, vocabulary: int, groups: dict[str, list[list[Pair]]]) -> None:
    """One row: a side on its batches."""
    longest = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for batch in groups["shuffled"] for p in batch)
    layout, make, form = {
        "ours, padded": ("shuffled", ours, for_ours),
        "ours, sorted": ("sorted", ours, for_ours),
        "ours, packed": ("shuffled", ours, lambda batch: count_targets(gpu_models.packed(batch, longest))),
        "ours, sorted, stored reference": ("sorted", functools.partial(ours, stored=True), for_ours),
        "ours, sorted, recomputed": ("sorted", functools.partial(ours, recompute=True), for_ours),
        "TRL, padded": ("shuffled", peer, for_peer),
        "TRL, sorted": ("sorted", peer, for_peer),
        "TRL, sorted, recomputed": ("sorted", functools.partial(peer, recompute=True), for_peer),
    }[side]
    batches = groups[layout]
    given = make.keywords if isinstance(make, functools.partial) else {}
    made: Any = make.func if isinstance(make, functools.partial) else make
    session.free()
    step = made(session, size, vocabulary, **{"stored": False, "recompute": False, **given})
    formed = [form(batch) for batch in batches]
    moved = [
        {name: value.to(session.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        for batch in formed
    ]
    first = float(step(moved[0]))
    for batch in moved:  # every width once, for what plans or compiles by width
        step(batch)
    session.synchronize()
    seconds = []
    for batch in moved:
        seconds += session.times(functools.partial(step, batch), rounds=1, warmup=0)
    peak = session.peak_mib()
    total = sum(seconds)
    counted = [gpu_models.work(batch, size, vocabulary, reference="stored" not in side) for batch in batches]
    flops = sum(each.flops for each in counted)
    tokens = sum(each.tokens for each in counted)
    cells = sum(batch.get("tokens", batch.get("input_ids")).numel() for batch in moved)
    session.add(
        f"DPO of a Llama of {size}",
        {
            "side": side,
            "s per step": statistics.median(seconds),
            "pairs/s": len(batches[0]) * len(batches) / total,
            "tokens/s": tokens / total,
            f"share of {gpu.REACHABLE_TFLOPS:.0f} TFLOP/s": flops / total / 1e12 / gpu.REACHABLE_TFLOPS,
            "peak memory, MiB": peak,
            "padding": 1 - tokens / cells,
            "first loss": first,
        },
    )


SIDES = (
    "ours, padded",
    "TRL, padded",
    "ours, sorted",
    "TRL, sorted",
    "ours, packed",
    "ours, sorted, stored reference",
    "ours, sorted, recomputed",
    "TRL, sorted, recomputed",
)


def main() -> None:
    """Measure and print."""
    made = gpu.parser(__doc__)
    made.add_argument("--sizes", nargs="+", choices=gpu_models.SIZES, default=["0.5B", "1B"])
    made.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    made.add_argument("--pairs", type=int, default=8, help="pairs per step")
    made.add_argument("--steps", type=int, default=8, help="timed steps, each on its own batch")
    arguments = gpu.parse(made)
    vocabulary, longest, steps = (64, 64, 2) if arguments.dry_run else (gpu_models.VOCABULARY, 2048, arguments.steps)
    pairs = gpu_models.pairs(arguments.pairs * steps, vocabulary, longest=longest)
    by_length = sorted(pairs, key=lambda pair: len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)))
    size = arguments.pairs
    groups = {
        name: [order[start : start + size] for start in range(0, len(order), size)]
        for name, order in (("shuffled", pairs), ("sorted", by_length))
    }
    session = gpu.Session(
        "dpo",
        "DPO of a Llama",
        f"bf16-mixed, {size} pairs per step, vocabulary {vocabulary:,}, AdamW and clipping; {steps} steps on batches of "
        "log-normal lengths, after one step on each. Sorted batches have rows of similar length. Packed ones have rows one "
        "after the other.",
        arguments,
    )
    for name in ["tiny"] if session.dry else arguments.sizes:
        for side in arguments.sides:
            with session.part(f"{name}, {side}", needs=25):
                if side.startswith("TRL") and importlib.util.find_spec("trl") is None:
                    raise gpu.Missing("TRL is not installed")
                measure(session, side, name, vocabulary, groups)
    session.finish()


if __name__ == "__main__":
    main()
