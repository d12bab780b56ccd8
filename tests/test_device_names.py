"""Code asks whether a tensor is on the CPU, not whether it is on CUDA: other devices are like CUDA in what is slow on them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lightning_align"
NAMES = {"is_cuda", "is_xpu", "is_mps"}
DEVICES = {"cuda", "xpu", "mps"}
ALLOWED: dict[str, set[str]] = {
    "console/chat.py": {"cuda", "mps"},  # chooses a device
    "console/env.py": {"cuda"},  # prints what there is
    "generation/capture.py": {"cuda"},  # has graphs
    "generation/decoder.py": {"cuda"},  # the devices whose steps have a fixed shape, for the graphs
    "generation/looks.py": {"cuda", "mps"},  # one has streams and pinned memory, the other no float64
    "models/varlen.py": {"cuda", "xpu"},  # the devices that have the kernels
    "retrieval/device_search.py": {"cuda", "xpu"},  # the devices with float64
    "runtime/transfer.py": {"cuda"},  # has pinned memory
    "training/loading.py": {"cuda", "xpu"},  # the devices with pinned memory
    "training/auto_precision.py": {"cuda"},  # says whether it multiplies bfloat16
    "training/optimizers.py": {"cuda"},  # has a fused optimizer
    "models/causality.py": {"mps"},  # has no float64, and a single random number generator
    "scoring/sums.py": {"mps"},  # has no float64
}
"""The files that name a device because of a feature of it, and the names."""


def named(source: str) -> set[str]:
    """The devices that a source names: as a string, as ``torch.cuda``, or as ``tensor.is_cuda``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.partition(":")[0] in DEVICES:
            found.add(node.value.partition(":")[0])
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            found.add(node.attr)
        elif isinstance(node, ast.Attribute) and node.attr in DEVICES and getattr(node.value, "id", "") == "torch":
            found.add(node.attr)
    return found


FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def test_no_file_names_a_device_without_need() -> None:
    found = {file: names for file in FILES if (names := named((ROOT / file).read_text(encoding="utf-8")))}
    assert {file: names - ALLOWED.get(file, set()) for file, names in found.items() if names - ALLOWED.get(file, set())} == {}
    assert found.keys() == ALLOWED.keys(), "a file no longer names a device"


@pytest.mark.parametrize(
    ("source", "devices"),
    [
        ("x.is_cuda", {"is_cuda"}),
        ("if x.device.type == 'cuda': pass", {"cuda"}),
        ("torch.zeros(3, device='cuda:1')", {"cuda"}),
        ("torch.cuda.synchronize()", {"cuda"}),
        ("x.device.type in ('cpu', 'mps')", {"mps"}),
        ("x.device.type != 'cpu'", set()),
        ("'cuda is mentioned'", set()),
    ],
)
def test_planted_names_are_found(source: str, devices: set[str]) -> None:
    assert named(source) == devices
