"""Decoding on a GPU: tokens per second against what the memory allows.

A step reads all weights and the filled part of the cache once, so `bytes / bandwidth` is the shortest time of a step. The
bandwidth is that of a copy of a large tensor, which reads and writes each byte once. Models of about 0.1B and 1B weights in
bfloat16, greedy, at several batch sizes:

- grows: the cache grows with each token, and Python starts each kernel.
- static: steps of a fixed shape, started by Python.
- captured: the same steps as CUDA graphs, as `generate` runs them.
- compiled: the same steps compiled by inductor, as CUDA graphs.
- transformers: `generate` of transformers with its static cache, compiled. Only for Llama.
- vLLM: only if it can be imported, and only for Llama.

All but the last two sides include the draw of each token and its log-prob. What takes long comes last. A dry run has the sides
that a CPU has.
"""

import contextlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.common import gpu
from lightning_align.generation import capture, static
from lightning_align.generation import decoder as decoders
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.palm import PaLM
from lightning_align.models.pretrained import PretrainedLM

COMPILING = 100.0
"""Seconds that a side of `SLOW` may take."""
VOCABULARY = 32_000
SIZES: dict[str, dict[str, int]] = {
    "0.1B": {"dim": 768, "depth": 12, "heads": 12, "dim_head": 64},
    "1B": {"dim": 2048, "depth": 16, "heads": 32, "dim_head": 64},
}
QUICK, SLOW = ("grows", "static", "captured"), ("transformers", "compiled", "vLLM")
GPU_ONLY = ("captured", "compiled", "vLLM")
LLAMA_ONLY = ("transformers", "vLLM")
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


def vllm(model: PretrainedLM, prompts: list[list[int]], new: int) -> Callable[[], object]:
    """Return a function in which vLLM decodes, with the weights of a temporary folder."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

    with tempfile.TemporaryDirectory() as folder:
        model.model.save_pretrained(folder)
        engine = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", gpu_memory_utilization=0.4)
    settings = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return lambda: engine.generate(requests, settings, use_tqdm=False)


class Case(NamedTuple):
    """One row of the table."""

    side: str
    kind: str
    size: str
    batch: int

    @property
    def model(self) -> str:
        """The name of the model."""
        return f"{self.kind} {self.size}"


def cases(sizes: Iterable[str], batches: Sequence[int], *, dry: bool) -> list[Case]:
    """Return the cases in their order. Of those that take long, the largest model comes first."""
    models = [(kind, size) for size in sizes for kind in MAKE]
    order = [Case(side, *model, batch) for side in QUICK for model in models for batch in batches]
    order += [Case(side, *model, batch) for side in SLOW for model in reversed(models) for batch in batches]
    return [
        case for case in order if not (dry and case.side in GPU_ONLY) and not (case.side in LLAMA_ONLY and case.kind != "Llama")
    ]


class Bench:
    """Builds the models once, and measures cases.

    Args:
        session: The device, its clock and the table.
        sizes: The sizes of models by name.
        length: The number of tokens of each prompt.
        new: The number of tokens to decode.
        rounds: The number of timed runs of a case.
    """

    def __init__(self, session: gpu.Session, sizes: dict[str, dict[str, int]], *, length: int, new: int, rounds: int) -> None:
        self.session, self.length, self.new, self.rounds = session, length, new, rounds
        self.dtype, self.vocabulary = (torch.float32, 64) if session.dry else (torch.bfloat16, VOCABULARY)
        self.sizes = sizes
        self._built: dict[tuple[str, bool], nn.Module] = {}
        self._first: dict[tuple[str, int], list[list[int]]] = {}

    def model(self, case: Case, *, compiled: bool = False) -> nn.Module:
        """Return the model of a case."""
        key = (case.model, compiled)
        if key not in self._built:
            options = {"compile": "inductor"} if compiled else {}
            make, size = MAKE[case.kind], self.sizes[case.size]
            self._built[key] = on(self.session.device, self.dtype, make, size, self.vocabulary, **options)
        return self._built[key]

    def measure(self, case: Case) -> None:
        """Add the row of a case."""
        session, model = self.session, self.model(case)
        generator = torch.Generator().manual_seed(case.batch)
        prompts: list[list[int]] = torch.randint(1, self.vocabulary, (case.batch, self.length), generator=generator).tolist()
        found = None
        with contextlib.ExitStack() as stack:
            if case.side == "vLLM":
                assert isinstance(model, PretrainedLM)
                work = vllm(model, prompts, self.new)
            elif case.side == "transformers":
                work = partial(theirs, model, prompts, self.new, session.device, compiled=not session.dry)
            else:
                used = self.model(case, compiled=True) if case.side == "compiled" else model
                stack.enter_context(as_side(case.side, session.device))
                work = partial(ours, used, prompts, self.new)
                found = ours(used, prompts, self.new)
            step = session.median(work, rounds=self.rounds, warmup=1) / self.new
        rate = 1e12 * session.results["machine"]["copy_tb_per_s"]
        read = bytes_per_step(model, session.device, case.batch, self.length + self.new / 2)
        row = {"model": case.model, "batch": case.batch, "side": case.side, "tokens/s": case.batch / step}
        row |= {"ms per step": 1e3 * step, "share of the bandwidth": read / rate / step}
        if found is not None:
            # In bfloat16, other kernels may take another of two nearly equal tokens.
            expected = self._first.setdefault((case.model, case.batch), found)
            same = sum(a == b for a, b in zip(found, expected, strict=True))
            row[f"rows as `{QUICK[0]}`"] = f"{same} of {case.batch}"
        session.add("Decoding", row)


def main() -> None:
    """Measure and print."""
    made = gpu.parser(__doc__)
    made.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    made.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    made.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    made.add_argument("--new", type=int, default=256, help="tokens to decode")
    made.add_argument("--rounds", type=int, default=2)
    arguments = gpu.parse(made)
    dry = arguments.dry_run
    sizes = {"tiny": TINY} if dry else {name: SIZES[name] for name in arguments.sizes}
    batches, length, new = ([1, 2], 5, 6) if dry else (arguments.batches, arguments.prompt, arguments.new)
    session = gpu.Session(
        "decoding",
        "Decoding",
        f"Prompts of {length} tokens, {new} new tokens, greedy, {'float32' if dry else 'bfloat16'}, medians of "
        f"{arguments.rounds}. The time includes the prompts. The share of the bandwidth is that of the bytes that a step must "
        "read, in its time, at the speed of the copy.",
        arguments,
    )
    bench = Bench(session, sizes, length=length, new=new, rounds=arguments.rounds)
    for case in cases(sizes, batches, dry=dry):
        with session.part(
            f"{case.model}, batch {case.batch}, {case.side}", needs=COMPILING if case.side in SLOW and not dry else 10
        ):
            if case.side == "vLLM" and importlib.util.find_spec("vllm") is None:
                raise gpu.Missing("vLLM is not installed")
            bench.measure(case)
    session.finish()


if __name__ == "__main__":
    main()
