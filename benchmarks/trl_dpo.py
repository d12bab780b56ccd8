"""A DPO training step on one Llama: this library against `DPOTrainer` of TRL 1.16.

Both sides get the same initial weights, the same batches with the same padding, optimizer and clipping; TRL runs its own
`training_step`, with its fused output layer, and with gradient checkpointing off (on is its default, and slower). ``stored``
sides have the reference's log-probs beforehand.
"""

import argparse
import copy
import importlib.metadata
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import _common as common
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from lightning_align.dpo.module import concatenate
from lightning_align.logprobs import response_logprobs
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.pairwise import log_ratios, sigmoid_loss
from lightning_align.reference import frozen_copy
from lightning_align.types import LogProbs, PreferenceBatch

WIDTH, DEPTH, HEADS, PAIRS = 256, 4, 4, 8
LEARNING_RATE, CLIP, BETA = 1e-4, 1.0, 0.1
NUMBER_OF_BATCHES = 6
PEER = f"TRL {importlib.metadata.version('trl')}"

Step = Callable[[int, PreferenceBatch], float]
"""A training step on the batch of this number: its loss."""


def configuration(vocabulary: int) -> LlamaConfig:
    """The model of both sides."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )


def llama(vocabulary: int) -> LlamaForCausalLM:
    """The model, with the same weights every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(configuration(vocabulary))


def inputs(batch: PreferenceBatch) -> dict[str, Tensor]:
    """A batch as TRL's collator makes it: chosen rows, then rejected ones."""
    both = concatenate(batch)
    return {
        "input_ids": both["tokens"],
        "attention_mask": both["mask"].long(),
        "completion_mask": both["targets"].long(),
    }


def peer(vocabulary: int, batches: list[PreferenceBatch], stored: bool) -> Step:
    """TRL's trainer, step by step."""
    words = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1, "<pad>": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    rows = Dataset.from_list([{"prompt": "a", "chosen": "a a", "rejected": "a"}] * PAIRS)  # the trainer asks for some
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=PAIRS,
        beta=BETA,
        max_length=1024,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    policy, reference = llama(vocabulary), llama(vocabulary)
    trainer = DPOTrainer(policy, reference, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1  # what its `train` would set
    model = trainer.model
    model.train()
    ready: list[dict[str, Tensor]] = [inputs(batch) for batch in batches]
    if stored:
        for each in ready:
            with torch.no_grad():
                chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, each)
            each |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        trainer.precompute_ref_logps, trainer.ref_model = True, None
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)

    def step(number: int, _: PreferenceBatch) -> float:
        loss = trainer.training_step(model, dict(ready[number]))
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def ours(vocabulary: int, batches: list[PreferenceBatch], stored: bool) -> Step:
    """Our loss on the same model."""
    policy = PretrainedLM(config=configuration(vocabulary).to_dict())
    policy.model.load_state_dict(llama(vocabulary).state_dict())
    reference = frozen_copy(policy)
    policy.train()
    kept: list[LogProbs] = []
    if stored:
        kept = [reference.logprobs(policy, concatenate(batch)) for batch in batches]
        del reference
    optimizer = torch.optim.AdamW(policy.parameters(), LEARNING_RATE)

    def step(number: int, batch: PreferenceBatch) -> float:
        both = concatenate(batch)
        referred = kept[number] if stored else reference.logprobs(policy, both)
        loss = sigmoid_loss(log_ratios(response_logprobs(policy, both), referred), beta=BETA).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


SIDES: dict[str, Callable[[int, list[PreferenceBatch]], Step]] = {
    "peer": partial(peer, stored=False),
    "ours": partial(ours, stored=False),
    "peer, stored": partial(peer, stored=True),
    "ours, stored": partial(ours, stored=True),
}


def load_batches(path: str | None, vocabulary: int) -> list[PreferenceBatch]:
    """Batches of a file, or synthetic ones."""
    count = NUMBER_OF_BATCHES * PAIRS
    pairs = common.synthetic_pairs(count, vocabulary) if path is None else common.file_pairs(path, count, vocabulary)
    return common.batches(pairs, PAIRS)


def memory(side: str, path: str | None, vocabulary: int) -> None:
    """Print the peak of a side over three steps, above the interpreter with its imports, in bytes."""
    batches = load_batches(path, vocabulary)
    with common.Meter() as meter, common.Memory() as used:
        step = SIDES[side](vocabulary, batches)
        for number, batch in enumerate(batches[:3]):
            step(number, batch)
    print(json.dumps({"bytes": used.bytes, "others": meter.others}))


def times(rounds: int, path: str | None, vocabulary: int) -> None:
    """Print the losses of the first steps of all sides, then their times, alternating batch by batch."""
    batches = load_batches(path, vocabulary)
    steps = {side: make(vocabulary, copy.deepcopy(batches)) for side, make in SIDES.items()}
    losses = {side: [step(number, batches[number]) for number in range(2)] for side, step in steps.items()}
    iterators: dict[str, Iterator[tuple[int, PreferenceBatch]]] = {side: cycle(enumerate(batches)) for side in SIDES}
    turns = {side: partial(lambda s: steps[s](*next(iterators[s])), side) for side in SIDES}
    print(json.dumps({"losses": losses, "times": common.alternate(turns, rounds)}))


def report(rounds: int, path: str | None, thp: bool, vocabulary: int) -> None:
    """Print the section."""
    padding, responses = common.shares(load_batches(path, vocabulary))
    data = "synthetic pairs" if path is None else "pairs of a file"
    common.heading(
        f"A DPO step on a Llama against DPOTrainer of {PEER}, vocabulary {vocabulary:,}"
        f"{', huge pages from malloc on both sides' if thp else ''}",
        f"One Llama for both, width {WIDTH}, depth {DEPTH}, {HEADS} heads, {PAIRS} pairs a step, AdamW {LEARNING_RATE:g}, clip "
        f"{CLIP}, float32, two threads; {data}: {padding:.0%} of the positions are padding, {responses:.0%} response. {rounds} "
        "rounds, alternating, after two warm-up steps a side. Memory: each side in a process of its own, resident above the "
        "interpreter with its imports, over three steps. TRL with its fused output layer, gradient checkpointing off.",
    )
    shared = ["--vocabulary", str(vocabulary), *([] if path is None else ["--pairs", path])]
    timed: Any = common.in_subprocess(__file__, "--time", "--rounds", str(rounds), *shared, thp=thp)
    timings = {side: [common.Timing(*each) for each in timed["times"][side]] for side in SIDES}
    used = {side: common.in_subprocess(__file__, "--memory", side, *shared, thp=thp)["bytes"] for side in SIDES}
    rows, claims = [], []
    for side in SIDES:
        against = side.replace("ours", "peer")
        speed = 1 / common.ratio(timings[side], timings[against])
        seconds = common.median(t.seconds for t in timings[side])
        rows.append(
            {
                "side": side,
                "s/step (median)": f"{seconds:.2f}",
                "pairs/s": f"{PAIRS / seconds:.2f}",
                "speed over the peer": f"{speed:.2f}x",
                "load of others": common.load(timings[side]),
                "peak MiB": f"{used[side] / common.MIB:,.0f}",
                "over the peer": f"{used[side] / used[against]:.2f}",
                "first losses": ", ".join(f"{loss:.6f}" for loss in timed["losses"][side]),
            }
        )
        if side != against:
            most = 0.4 if vocabulary <= 32_000 else 0.3
            share = used[side] / used[against]
            gap = max(abs(a - b) for a, b in zip(timed["losses"][side], timed["losses"][against], strict=True))
            claims += [
                common.claim(f"{side}: speed", "≥ 3x", f"{speed:.2f}x", speed >= 3),
                common.claim(f"{side}: memory", f"≤ {most}", f"{share:.2f}", share <= most),
                common.claim(f"{side}: difference of the first losses", "≤ 1e-5", f"{gap:.1e}", gap <= 1e-5),
            ]
    print(common.table(rows))
    print(common.table(claims))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--pairs", metavar="FILE", help="JSONL with prompt, chosen and rejected; else synthetic pairs")
    parser.add_argument("--thp", action="store_true", help="all sides with huge pages from malloc")
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--time", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # of the peer, about settings of ours
    if arguments.memory:
        memory(arguments.memory, arguments.pairs, arguments.vocabulary)
    elif arguments.time:
        times(arguments.rounds, arguments.pairs, arguments.vocabulary)
    else:
        report(arguments.rounds, arguments.pairs, arguments.thp, arguments.vocabulary)


if __name__ == "__main__":
    main()
