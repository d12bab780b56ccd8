"""Decoding on a GPU: tokens per second against what the memory allows.

A step reads all weights and the filled part of the cache once, so `bytes / bandwidth` is the shortest time of a step. The
bandwidth is measured: a copy of a large tensor reads and writes each byte once. Models of about 0.1B and 1B weights in
bfloat16, greedy, at several batch sizes:

- grows: the cache grows with each token, and Python starts each kernel.
- static: steps of a fixed shape, started by Python.
- captured: the same steps as CUDA graphs, as `generate` runs them.
- compiled: the same steps compiled by inductor, as CUDA graphs.
- transformers: `generate` of transformers with its static cache, compiled. Only for Llama.
- vLLM: only if it can be imported, and only for Llama.

All but the last two sides include the draw of each token and its log-prob. A run takes less than 8 minutes: a side that would
pass the limit is left out and said so. `--dry-run` runs every side that a CPU has with tiny sizes.
"""

import argparse
import contextlib
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lightning_align.generation import capture, static
from lightning_align.generation import decoder as decoders
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.palm import PaLM
from lightning_align.models.pretrained import PretrainedLM

LIMIT = 7 * 60.0
"""Seconds after which no further side starts."""
COMPILING = 100.0
"""Seconds that a compiled side may take."""
VOCABULARY = 32_000
SIZES: dict[str, dict[str, int]] = {
    "0.1B": {"dim": 768, "depth": 12, "heads": 12, "dim_head": 64},
    "1B": {"dim": 2048, "depth": 16, "heads": 32, "dim_head": 64},
}
QUICK, SLOW = ("grows", "static", "captured"), ("transformers", "compiled", "vLLM")
GPU_ONLY = ("captured", "compiled", "vLLM")
TINY = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16}


def make_palm(size: dict[str, int], vocabulary: int, *, compile: str | None = None) -> nn.Module:
    """Build a PaLM with random weights."""
    return PaLM(num_tokens=vocabulary, **size, compile=compile)


def make_llama(size: dict[str, int], vocabulary: int, *, compile: str | None = None) -> nn.Module:
    """Build a Llama with random weights, with 4 queries per key head."""
    config = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": size["dim"],
        "intermediate_size": 4 * size["dim"],
        "num_hidden_layers": size["depth"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": max(1, size["heads"] // 4),
        "head_dim": size["dim_head"],
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    return PretrainedLM(config=config, compile=compile)


MAKE: dict[str, Callable[..., nn.Module]] = {"PaLM": make_palm, "Llama": make_llama}


def on(device: torch.device, dtype: torch.dtype, make: Callable[..., nn.Module], *arguments: Any, **options: Any) -> nn.Module:
    """Build a model on a device, with the same weights each time."""
    torch.manual_seed(0)
    with device:
        model = make(*arguments, **options)
    return model.to(device, dtype).eval().requires_grad_(False)


def wait(device: torch.device) -> None:
    """Wait for all work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device, *, rounds: int) -> float:
    """Return the median time of a function, after one run that does not count."""
    run()
    times = []
    for _ in range(rounds):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bandwidth(device: torch.device, *, size: int) -> float:
    """Measure how many bytes per second are read and written by a copy of `size` bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, rounds=9)


@torch.no_grad()
def bytes_per_step(model: Any, device: torch.device, batch: int, columns: float) -> float:
    """Count the bytes that a step must read: all weights, and the filled columns of the cache."""
    cache = model.make_cache(1, 1)
    model.hidden(torch.tensor([[1]], device=device), cache=cache)
    layers = getattr(cache, "past", None)
    parts = cache.keys + cache.values if layers is None else [x for layer in layers.layers for x in (layer.keys, layer.values)]
    per_column = sum(part.numel() * part.element_size() for part in parts)
    return float(sum(p.numel() * p.element_size() for p in model.parameters()) + batch * columns * per_column)


@contextlib.contextmanager
def as_side(name: str, device: torch.device) -> Iterator[None]:
    """Make `generate` decode in one of our ways."""
    with (
        mock.patch.object(decoders, "STATIC", () if name == "grows" else (device.type,)),
        mock.patch.object(capture, "GRAPHS", () if name == "static" else ("cuda",)),
        # One bucket of columns, because inductor takes long for each.
        mock.patch.object(static, "WIDTH", 512 if name == "compiled" else static.WIDTH),
    ):
        yield


def ours(model: nn.Module, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Decode greedily with this package. No token ends a response."""
    config = GenerationConfig(max_new_tokens=new, temperature=0.0, batch_size=len(prompts))
    return [answer.tokens for (answer,) in generate(model, prompts, config, eos_id=None)]


def theirs(model: Any, prompts: list[list[int]], new: int, device: torch.device, *, compiled: bool) -> list[list[int]]:
    """Decode greedily with transformers and its static cache."""
    tokens = torch.tensor(prompts, device=device)
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    if not compiled:
        options["disable_compile"] = True
    out: Tensor = model.model.generate(
        tokens, attention_mask=torch.ones_like(tokens), cache_implementation="static", eos_token_id=None, **options
    )
    return out[:, tokens.shape[1] :].tolist()


def vllm_seconds(model: PretrainedLM, prompts: list[list[int]], new: int) -> float:
    """Return the seconds in which vLLM decodes, from the weights of a temporary folder."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

    with tempfile.TemporaryDirectory() as folder:
        model.model.save_pretrained(folder)
        engine = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", gpu_memory_utilization=0.4)
    settings = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return seconds(lambda: engine.generate(requests, settings, use_tqdm=False), torch.device("cuda"), rounds=2)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="run tiny sizes on the CPU")
    given = parser.parse_args(arguments)
    dry = given.dry_run
    if not dry and not torch.cuda.is_available():
        parser.error("no GPU. Use --dry-run to run tiny sizes on the CPU.")
    device, dtype = (torch.device("cpu"), torch.float32) if dry else (torch.device("cuda"), torch.bfloat16)
    sizes = {"tiny": TINY} if dry else {name: SIZES[name] for name in given.sizes}
    batches, length, new, rounds = ([1, 2], 5, 6, 1) if dry else (given.batches, given.prompt, given.new, given.rounds)
    vocabulary = 64 if dry else VOCABULARY
    start = time.perf_counter()
    rate = bandwidth(device, size=2**22 if dry else 2**31)
    what = "CPU (dry run)" if dry else torch.cuda.get_device_name()
    print(f"{what}, torch {torch.__version__}, {str(dtype)[6:]}. Measured bandwidth: {rate / 1e9:.0f} GB/s.")
    print(f"Prompts of {length} tokens, {new} new tokens, greedy. Time with the prompts; speed: share of the bandwidth.\n")
    print("| model | batch | side | tokens/s | ms per step | share of the bandwidth |\n|---|---|---|---|---|---|")
    left: list[str] = []
    models = {f"{kind} {name}": (kind, size) for name, size in sizes.items() for kind in MAKE}
    built = {key: on(device, dtype, MAKE[kind], size, vocabulary) for key, (kind, size) in models.items()}
    compiled: dict[str, nn.Module] = {}
    first: dict[tuple[str, int], list[list[int]]] = {}
    # What takes long comes last, beginning with the largest model.
    order = [(side, key, batch) for side in QUICK for key in models for batch in batches]
    order += [(side, key, batch) for side in SLOW for key in reversed(models) for batch in batches]
    for side, key, batch in order:
        model = built[key]
        theirs_too = isinstance(model, PretrainedLM)
        missing = side == "vLLM" and importlib.util.find_spec("vllm") is None
        if (
            (side in ("transformers", "vLLM") and not theirs_too)
            or missing
            or (dry and side in ("captured", "compiled", "vLLM"))
        ):
            continue
        if time.perf_counter() - start + (COMPILING if side in SLOW else 0) > LIMIT:
            left.append(f"{key}, batch {batch}, {side}")
            continue
        generator = torch.Generator().manual_seed(batch)
        prompts: list[list[int]] = torch.randint(1, vocabulary, (batch, length), generator=generator).tolist()
        if side == "vLLM" and isinstance(model, PretrainedLM):
            taken = vllm_seconds(model, prompts, new)
        elif side == "transformers":
            taken = seconds(lambda m=model, p=prompts: theirs(m, p, new, device, compiled=not dry), device, rounds=rounds)
        else:
            if side == "compiled" and key not in compiled:
                kind, size = models[key]
                compiled[key] = on(device, dtype, MAKE[kind], size, vocabulary, compile="inductor")
            used = compiled[key] if side == "compiled" else model
            with as_side(side, device):
                found = ours(used, prompts, new)
                taken = seconds(lambda m=used, p=prompts: ours(m, p, new), device, rounds=rounds)
            expected = first.setdefault((key, batch), found)
            same = sum(a == b for a, b in zip(found, expected, strict=True))
            if same < batch:  # in bfloat16, other kernels may take another of two nearly equal tokens
                print(f"<!-- {key}, {side}: {same} of {batch} rows have the tokens of `{QUICK[0]}` -->")
        step = taken / new
        share = bytes_per_step(model, device, batch, length + new / 2) / rate / step
        print(f"| {key} | {batch} | {side} | {batch / step:.0f} | {1e3 * step:.2f} | {share:.0%} |", flush=True)
    if left:
        print(f"\nLeft out for lack of time: {'; '.join(left)}.")
    print(f"\n{time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
