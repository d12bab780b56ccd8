"""Log-probs from hidden states, forward and backward: time, memory and error by size of tiles, against Liger and torch.

The bound is the time of three matrix products (6 T V D operations) at the speed of a large product on this device.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import gpu
from benchmarks.common.measure import MIB
from lightning_align.scoring.head import CHUNK_BYTES, head_logprobs

CHECKED = 256
"""Rows whose log-probs are compared with float64."""


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits of the whole vocabulary in bfloat16, and a softmax of them in float32."""
    return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def truth(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs of the first rows in float64, by blocks of the vocabulary."""
    rows = hidden[:CHECKED].detach().double()
    parts = [(rows @ block.detach().double().T).logsumexp(1) for block in weight.split(8192)]
    chosen = (rows * weight[targets[:CHECKED]].detach().double()).sum(1)
    return chosen - torch.stack(parts).logsumexp(0)


Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure(session: gpu.Session, name: str, score: Score, sizes: tuple[int, int, int]) -> None:
    """One row: the sum of log-probs and its gradients."""
    total, vocabulary, width = sizes
    torch.manual_seed(0)
    hidden = torch.randn(total, width, device=session.device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, device=session.device) * 2.0 / width**0.5).bfloat16().requires_grad_()
    targets = torch.randint(0, vocabulary, (total,), device=session.device)
    with torch.no_grad():
        found = score(hidden, weight, targets)
        error = float("nan")
        if found.ndim:
            error = float((found[:CHECKED].double() - truth(hidden, weight, targets)).square().mean().sqrt())
        del found
    session.free()
    before = session.used_mib()

    def work() -> None:
        hidden.grad = weight.grad = None
        score(hidden, weight, targets).sum().backward()

    seconds = session.median(work, rounds=10)
    peak = session.peak_mib() - before
    with torch.no_grad():
        forward = session.median(lambda: score(hidden, weight, targets), rounds=10)
    bound = 6 * total * vocabulary * width / gpu.REACHABLE_TFLOPS / 1e12
    session.add(
        f"{total:,} targets, vocabulary {vocabulary:,}, width {width:,}",
        {
            "side": name,
            "forward and backward, ms": 1e3 * seconds,
            "bound / time": bound / seconds,
            "forward alone, ms": 1e3 * forward,
            "peak memory above inputs, MiB": peak,
            "error, nats (rms)": error,
        },
    )


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of log-probs by Liger's fused output layer and cross-entropy. Its forward pass computes the gradients too."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    found = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")
    loss: Tensor = found[0] if isinstance(found, tuple) else found
    return -loss


def main() -> None:
    """Measure and print."""
    made = gpu.parser(__doc__)
    made.add_argument("--targets", type=int, default=8192)
    made.add_argument("--width", type=int, default=2048)
    arguments = gpu.parse(made)
    session = gpu.Session(
        "logprobs",
        "Log-probs from hidden states",
        "bfloat16 factors, medians of 10. Errors are those of single log-probs against float64. Tiles of a CPU have "
        f"{CHUNK_BYTES // MIB} MiB. Liger returns only the sum.",
        arguments,
    )
    total, width = (48, 16) if session.dry else (arguments.targets, arguments.width)
    for vocabulary in (128,) if session.dry else (32_000, 128_256):
        everything = 4 * total * vocabulary
        tiles = {"default": None, "16 MiB": 16 * MIB, "64 MiB": 64 * MIB, "256 MiB": 256 * MIB, "1 GiB": 1024 * MIB}
        sides: dict[str, Score] = {
            f"ours, tiles of {name}": (
                lambda h, w, t, given={} if size is None else {"chunk_bytes": size}: head_logprobs(h, w, None, t, **given)
            )
            for name, size in {**tiles, "everything": everything}.items()
        }
        for name, score in {**sides, "plain torch": plain, "Liger": liger}.items():
            with session.part(f"{name}, vocabulary {vocabulary:,}", needs=10):
                if name == "Liger" and (session.dry or importlib.util.find_spec("liger_kernel") is None):
                    raise gpu.Missing("liger-kernel is not installed, or there is no GPU for it")
                measure(session, name, score, (total, vocabulary, width))
    session.finish()


if __name__ == "__main__":
    main()
