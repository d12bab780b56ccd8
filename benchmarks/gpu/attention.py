"""Which kernel each call of attention gets, its time with every kernel, and what a new width costs.

The calls are recorded from models of realistic size: training, prefill and decoding of PaLM, training of a Llama, and the
encoder and the cross-attention of RETRO. Each is then repeated with every backend of `sdpa_kernel` in turn.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import gpu

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
DTYPE = torch.bfloat16


class Recorder(TorchFunctionMode):
    """Records the calls of attention within a ``with`` block, each kind once."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("attn_mask", "dropout_p", "is_causal")
            given = {**dict(zip(names, args[3:], strict=False)), **kwargs}
            q, k, v = (given.pop(n) if n in given else args[i] for i, n in enumerate(("query", "key", "value")))
            mask = given.get("attn_mask")
            layout = tuple((tuple(t.shape), t.stride()) for t in (q, k, v))
            kind = layout, None if mask is None else tuple(mask.shape), given.get("is_causal"), given.get("enable_gqa")
            self.calls.setdefault(kind, ((q.detach(), k.detach(), v.detach()), given))
        return func(*args, **kwargs)


def record(session: gpu.Session) -> dict[str, list[tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]]]:
    """The calls of each model, by what it did."""
    import lightning_align as la
    from lightning_align.retro.model import NeighborTokens
    from lightning_align.scoring.logprobs import token_logprobs

    dry, device = session.dry, session.device
    rows, width, dim, heads = (2, 24, 16, 2) if dry else (8, 1024, 1024, 16)
    found: dict[str, Any] = {}

    def recorded(name: str, work: Callable[[], object]) -> None:
        with session.part(f"recording of {name}"):
            with torch.no_grad(), torch.autocast(device.type, dtype=DTYPE), Recorder() as recorder:
                work()
            found[name] = list(recorder.calls.values())

    def batch(vocabulary: int) -> Any:
        tokens = torch.randint(1, vocabulary, (rows, width), device=device)
        lengths = torch.linspace(width // 2, width, rows, device=device).long()
        mask = torch.arange(width, device=device) < lengths[:, None]
        return {"tokens": tokens * mask, "mask": mask, "targets": mask & (torch.arange(width, device=device) >= width // 4)}

    palm = la.PaLM(num_tokens=512, dim=dim, depth=1, heads=heads, dim_head=dim // heads).to(device).eval()
    recorded("PaLM, training", lambda: token_logprobs(palm, batch(512)))

    def decode(lengths: list[int]) -> None:
        prompts = [torch.randint(1, 512, (length,)).tolist() for length in lengths]
        la.generate(palm, prompts, la.GenerationConfig(max_new_tokens=3, batch_size=rows))

    recorded("PaLM, decoding, equal prompts", lambda: decode([width] * rows))
    recorded("PaLM, decoding, ragged prompts", lambda: decode([width // 2 + i * width // (2 * rows) for i in range(rows)]))
    sizes = {"hidden_size": dim, "intermediate_size": 4 * dim, "num_hidden_layers": 1, "num_attention_heads": heads}
    config = {"model_type": "llama", "vocab_size": 512, "num_key_value_heads": max(1, heads // 4), **sizes}
    llama = la.PretrainedLM(config=config).to(device).eval()
    recorded("Llama, training", lambda: token_logprobs(llama, batch(512)))

    def retro() -> None:
        chunk, k = (8, 2) if dry else (64, 2)
        model = la.RETRO(la.PaLM(num_tokens=512, dim=dim, depth=1, heads=heads, dim_head=dim // heads), chunk_size=chunk)
        model = model.to(device).eval()
        tokens = torch.randint(1, 512, (rows, 3 * chunk), device=device)
        neighbors = torch.randint(1, 512, (rows, 3, k, 2 * chunk), device=device)
        there = torch.ones_like(neighbors, dtype=torch.bool)
        model.hidden(tokens, neighbors=NeighborTokens(neighbors, there))

    recorded("RETRO", retro)
    return found


def fresh(inputs: tuple[Tensor, ...], *, grad: bool) -> list[Tensor]:
    """Random inputs of the same layout, expanded where the recorded ones are."""
    made = []
    for tensor in inputs:
        sizes = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        order = sorted(range(tensor.ndim), key=lambda d: -tensor.stride(d))
        base = torch.randn([sizes[d] for d in order], device=tensor.device, dtype=DTYPE, requires_grad=grad)
        made.append(base.permute([order.index(d) for d in range(tensor.ndim)]).expand(tensor.shape))
    return made


def kernels(session: gpu.Session, work: Callable[[], object]) -> str:
    """The kernels of a run that took most of its time, by the profiler."""
    work()
    session.synchronize()
    with profile(activities=[ProfilerActivity.CPU] if session.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        work()
        session.synchronize()
    events = prof.key_averages()
    if session.dry:
        timed = [(event.self_cpu_time_total, event.key) for event in events]
    else:
        on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        timed = [(event.self_device_time_total, event.key) for event in on_gpu]
    return "; ".join(name[:70] for _, name in sorted(timed, reverse=True)[:2]) or "none seen"


def backends(session: gpu.Session, name: str, inputs: Any, given: dict[str, Any], *, grad: bool) -> None:
    """One row: the chosen kernel and the time with each backend, forward, or forward and backward."""
    q, k, v = fresh(inputs, grad=grad)

    def work() -> None:
        out = F.scaled_dot_product_attention(q, k, v, **given)
        if grad:
            torch.autograd.grad(out, (q, k, v), out.detach())

    mask = given.get("attn_mask")
    shape = "×".join(map(str, q.shape))
    row: dict[str, Any] = {
        "call": name,
        "q (B, H, N, K)": shape,
        "keys": k.shape[-2],
        "mask": "causal" if given.get("is_causal") else "none" if mask is None else "×".join(map(str, mask.shape)),
        "pass": "forward and backward" if grad else "forward",
        "default, ms": 1e3 * session.median(work, rounds=20),
    }
    for backend, chosen in BACKENDS.items():
        try:
            with sdpa_kernel([chosen]):
                row[f"{backend}, ms"] = 1e3 * session.median(work, rounds=20)
        except RuntimeError as error:
            refused = "kernel" in str(error).lower()
            row[f"{backend}, ms"] = "refused" if refused else f"{type(error).__name__}: {str(error)[:60]}"
    row["kernels of the default"] = kernels(session, work)
    session.add("Kernels", row)


def widths(session: gpu.Session) -> None:
    """The first and the second call of each of 20 new widths: some backends plan or compile for each."""
    first_width, (rows, heads, size) = (33, (2, 2, 16)) if session.dry else (1001, (8, 16, 64))
    names = ["default", "math"] if session.dry else ["default", "flash", "cudnn"]
    for number, name in enumerate(names):
        with session.part(f"new widths, {name}"):
            firsts, seconds = [], []
            for width in range(first_width + 20 * number, first_width + 20 * number + (3 if session.dry else 20)):
                made = [torch.randn(rows, heads, width, size, device=session.device, dtype=DTYPE) for _ in range(3)]
                q, k, v = (tensor.requires_grad_() for tensor in made)
                for found in (firsts, seconds):
                    session.synchronize()
                    start = time.perf_counter()
                    with sdpa_kernel(list(BACKENDS.values()) if name == "default" else [BACKENDS[name]]):
                        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                    torch.autograd.grad(out, (q, k, v), out.detach())
                    session.synchronize()
                    found.append(1e3 * (time.perf_counter() - start))
            row = {"backend": name, "widths": len(firsts), "first call, ms": statistics.median(firsts)}
            row |= {"slowest first call, ms": max(firsts), "second call, ms": statistics.median(seconds)}
            session.add("New widths", row)


def varlen(session: gpu.Session) -> None:
    """Attention over rows without padding, if torch and the device have it, against padded rows."""
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, size, longest = (3, 2, 16, 24) if session.dry else (16, 16, 64, 1024)
    lengths = torch.linspace(longest // 4, longest, rows).long()
    ends = F.pad(lengths.cumsum(0), (1, 0)).to(device=session.device, dtype=torch.int32)
    total, most = int(lengths.sum()), int(lengths.max())
    q, k, v = (torch.randn(total, heads, size, device=session.device, dtype=DTYPE, requires_grad=True) for _ in range(3))
    wide = [torch.randn(rows, heads, longest, size, device=session.device, dtype=DTYPE, requires_grad=True) for _ in range(3)]

    def padded() -> None:
        out = F.scaled_dot_product_attention(*wide, is_causal=True)
        torch.autograd.grad(out, wide, out.detach())

    def packed() -> None:
        out = varlen_attn(q, k, v, ends, ends, most, most, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        torch.autograd.grad(out, (q, k, v), out.detach())

    row: dict[str, Any] = {"rows": rows, "padding": 1 - total / (rows * longest)}
    row["padded, ms"] = 1e3 * session.median(padded, rounds=20)
    if session.dry:
        row["varlen_attn, ms"] = "needs CUDA"
    else:
        row["varlen_attn, ms"] = 1e3 * session.median(packed, rounds=20)
    session.add("Without padding, forward and backward", row)


def main() -> None:
    """Measure and print."""
    arguments = gpu.parse(gpu.parser(__doc__))
    session = gpu.Session(
        "attention",
        "Kernels of attention",
        "Medians of 20 runs in bfloat16. The default is what torch chooses. A refused backend cannot run the call.",
        arguments,
    )
    for name, calls in record(session).items():
        for inputs, given in calls:
            for grad in (False, True) if "training" in name or name == "RETRO" else (False,):
                with session.part(f"{name}, {tuple(inputs[0].shape)}, {'backward' if grad else 'forward'}", needs=15):
                    backends(session, name, inputs, given, grad=grad)
    widths(session)
    with session.part("attention without padding"):
        varlen(session)
    session.finish()


if __name__ == "__main__":
    main()
