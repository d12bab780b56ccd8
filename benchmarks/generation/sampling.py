"""Sampling: tokens per second against PaLM-rlhf-pytorch, self-rewarding-lm-pytorch and transformers.

All models have the same size.

- PaLM-rlhf-pytorch 0.8.0: `PaLM.generate`, which has no key-value cache.
- self-rewarding-lm-pytorch 0.2.12: `sample` on our model. It computes all logits for every token.
- transformers: `generate` with its key-value cache, on a Llama.

The last claim decodes one row with a model larger than the CPU cache and compares with the machine's memory bandwidth.
"""

import argparse
import copy
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.palm import PaLM

VOCABULARY, WIDTH, DEPTH, HEADS, BATCH, PROMPT = 32_000, 256, 4, 4, 8, 64


def ours(model: nn.Module, prompts: Tensor, length: int, **settings: Any) -> Callable[[], object]:
    """Our sampler, without an end-of-sequence id, so that all sides generate the same number of tokens."""
    config = GenerationConfig(max_new_tokens=length - prompts.shape[1], **settings)
    rows = prompts.tolist()
    return lambda: generate(model, rows, config)


def palm_rlhf(prompts: Tensor, length: int) -> Callable[[], object]:
    """`PaLM.generate` of PaLM-rlhf-pytorch with its defaults, except for the progress bar."""
    from palm_rlhf_pytorch import PaLM as Peer

    model = Peer(num_tokens=VOCABULARY, dim=WIDTH, depth=DEPTH, heads=HEADS, dim_head=64).eval()
    return lambda: model.generate(length, prompts, use_tqdm=False)


def self_rewarding(model: nn.Module, prompts: Tensor, length: int) -> Callable[[], object]:
    """`sample` of self-rewarding-lm-pytorch with the settings of its SPIN trainer."""
    from self_rewarding_lm_pytorch.sampling_utils import sample, top_p

    def run() -> object:
        return sample(model, prompts, length, temperature=0.7, filter_fn=top_p, filter_kwargs={"thres": 0.9})

    return run


def llama(prompts: Tensor, length: int, dtype: torch.dtype, **settings: Any) -> Callable[[], object]:
    """`generate` of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config).eval().to(dtype)
    new = length - prompts.shape[1]
    return lambda: model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new, use_cache=True, **settings
    )


def memory_rate() -> float:
    """Memory bandwidth of this machine in bytes per second: the best of several sums over 512 MiB."""
    numbers = torch.ones(2**27)
    rates = []
    for _ in range(5):
        with common.Meter() as meter:
            numbers.sum()
        rates.append(numbers.numel() * 4 / meter.seconds)
    return max(rates)


def streaming(rounds: int) -> tuple[float, float]:
    """Memory bandwidth, and the share of it that reads weights, for batch 1 and a model larger than the CPU cache.

    The bandwidth is measured just before and just after each run, because background load can halve it.
    """
    model = PaLM(num_tokens=VOCABULARY, dim=1024, depth=12, heads=16, dim_head=64)
    bytes_per_token = 4 * sum(p.numel() for p in model.parameters())
    machine, shares = [memory_rate()], []
    generate(model, [[1] * 16], GenerationConfig(max_new_tokens=8, temperature=0))
    for _ in range(rounds):
        seconds = []
        for tokens in (8, 40):  # the difference excludes the prompt
            with common.Meter() as meter:
                generate(model, [[1] * 16], GenerationConfig(max_new_tokens=tokens, temperature=0))
            seconds.append(meter.seconds)
        machine.append(memory_rate())
        shares.append(32 * bytes_per_token / (seconds[1] - seconds[0]) / (sum(machine[-2:]) / 2))
    return common.median(machine), common.median(shares)


def report(rounds: int, length: int, peer_length: int) -> None:
    """Print the section."""
    torch.manual_seed(0)
    model = PaLM(num_tokens=VOCABULARY, dim=WIDTH, depth=DEPTH, heads=HEADS, dim_head=64).eval()
    prompts = torch.randint(2, VOCABULARY, (BATCH, PROMPT))
    nucleus = {"temperature": 0.7, "top_p": 0.9}
    version = importlib.metadata.version
    cases: list[tuple[str, float, int, dict[str, Any], Callable[[], object], int, nn.Module]] = [
        (f"palm-rlhf-pytorch {version('palm-rlhf-pytorch')}", 25.0, peer_length, {}, palm_rlhf(prompts, peer_length), 1, model),
        (
            f"self-rewarding-lm-pytorch {version('self-rewarding-lm-pytorch')}",
            25.0,
            peer_length,
            nucleus,
            self_rewarding(model, prompts, peer_length),
            1,
            model,
        ),
    ]
    for dtype, own in ((torch.float32, model), (torch.bfloat16, copy.deepcopy(model).bfloat16())):
        name = f"transformers {version('transformers')}, {str(dtype).removeprefix('torch.')}"
        greedy = llama(prompts, length, dtype, do_sample=False)
        sampled = llama(prompts, length, dtype, do_sample=True, top_k=0, **nucleus)
        cases += [
            (f"{name}, greedy", 1.5, length, {"temperature": 0}, greedy, rounds, own),
            (f"{name}, temperature 0.7, top-p 0.9", 3.0, length, nucleus, sampled, rounds, own),
        ]
    common.heading(
        "Sampling",
        f"Batch {BATCH}, prompts of {PROMPT} tokens, up to {length} tokens ({peer_length} on both sides for peers without a "
        f"cache, whose time per token grows with the length), vocabulary {VOCABULARY:,}, width {WIDTH}, depth {DEPTH}, float32 "
        f"unless stated, {torch.get_num_threads()} threads, random weights. {rounds} alternating rounds (1 for peers without a "
        "cache).",
    )
    rows, claims = [], []
    for name, least, to, settings, peer, times, own in cases:
        sides = {"ours": ours(own, prompts, to, **settings), "peer": peer}
        sides["ours"]()
        timings = common.alternate(sides, times)
        tokens = BATCH * (to - PROMPT)
        speed = 1 / common.ratio(timings["ours"], timings["peer"])
        rows.append(
            {
                "peer": name,
                **{
                    f"{side}, tokens/s": f"{tokens / common.median(t.seconds for t in timings[side]):,.0f}"
                    for side in ("peer", "ours")
                },
                "ratio": f"{speed:.1f}x",
                "background load": common.load(timings["ours"] + timings["peer"]),
            }
        )
        claims.append(common.claim(f"speed over {name}", f"≥ {least:g}x", f"{speed:.1f}x", speed >= least))
    print(common.table(rows))
    machine, share = streaming(max(5, rounds))
    claims.append(
        common.claim(
            f"batch 1, width 1,024, depth 12: share of the memory bandwidth ({machine / 1e9:.1f} GB/s) that reads weights",
            "≥ 60 %",
            f"{share:.0%}",
            share >= 0.6,
        )
    )
    print(common.table(claims))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=512, help="tokens per row, prompt included")
    parser.add_argument("--peer-length", type=int, default=512, help="the same, for peers without a key-value cache")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report(arguments.rounds, arguments.length, arguments.peer_length)


if __name__ == "__main__":
    main()
