"""``lightning-align env``: versions, devices and kernels, for bug reports."""

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec

import lightning_align

PACKAGES = (
    "torch",
    "lightning",
    "pytorch-lightning",
    "torchmetrics",
    "jsonargparse",
    "tokenizers",
    "safetensors",
    "tensorboard",
    "pyarrow",
    "transformers",
    "peft",
    "datasets",
    "sentence-transformers",
    "faiss-cpu",
    "faiss-gpu",
    "lancedb",
    "qdrant-client",
    "flash-attn",
    "triton",
    "bitsandbytes",
    "vllm",
)
"""Packages that the library uses, or that change what it does."""
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_LOGS",
    "NCCL_SOCKET_IFNAME",
    "LD_PRELOAD",
)
"""Variables that change numbers, speed or memory. Others can hold secrets and are not printed."""


def report() -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"lightning-align {lightning_align.__version__} ({_installed()})"
    yield f"Python {platform.python_version()} ({platform.python_implementation()}), {platform.platform()}"
    yield ""
    for name in PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    yield ""
    yield from _devices()
    yield ""
    yield from (f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)


def _installed() -> str:
    try:
        direct = distribution("lightning-align").read_text("direct_url.json") or ""
    except PackageNotFoundError:
        return "not installed"
    return "from a checkout" if '"editable": true' in direct or '"editable":true' in direct else "installed"


def _devices() -> Iterator[str]:
    import torch

    yield f"CPU: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch, {_kernels()}"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield f"CUDA: no device (torch is built {f'for CUDA {built}' if built else 'without CUDA'})"
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        memory = properties.total_memory / 2**30
        yield f"CUDA {number}: {properties.name}, compute {properties.major}.{properties.minor}, {memory:.0f} GiB"
    if torch.cuda.is_available():
        kernels = torch.backends.cuda
        kinds = {"flash": kernels.flash_sdp_enabled(), "memory-efficient": kernels.mem_efficient_sdp_enabled()}
        yield f"Attention kernels: {', '.join(name for name, on in kinds.items() if on) or 'none'} and math"
        yield f"cuDNN {torch.backends.cudnn.version()}, bfloat16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
    if find_spec("torch.backends.mps") and torch.backends.mps.is_available():
        yield "MPS: available"


def _kernels() -> str:
    import torch

    parts = [f"kernels {torch.backends.cpu.get_cpu_capability()}"]
    parts += ["oneDNN"] if torch.backends.mkldnn.is_available() else []
    parts += ["MKL"] if torch.backends.mkl.is_available() else []
    return ", ".join(parts)


def main(arguments: Sequence[str]) -> int:
    """Run ``lightning-align env`` and return the exit status."""
    if list(arguments) not in ([], ["--help"]):
        print("usage: lightning-align env", file=sys.stderr)
        return 2
    if arguments:
        print("usage: lightning-align env\n\nPrint versions, devices and kernels. Paste it into a bug report.")
        return 0
    print("\n".join(report()).rstrip())
    return 0
