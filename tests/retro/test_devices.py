"""The Trainer that encodes within a run uses the devices of the run."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_align.retrieval.advisor import advise
from lightning_align.retro.callbacks import trainer_like

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False}


@pytest.fixture
def four_gpus() -> Iterator[None]:
    cuda = "lightning.fabric.accelerators.cuda."
    with ExitStack() as stack:
        for name, value in (("is_available", True), ("auto_device_count", 4)):
            stack.enter_context(mock.patch.object(CUDAAccelerator, name, staticmethod(lambda value=value: value)))
        for path, value in (
            (cuda + "num_cuda_devices", 4),
            (cuda + "_get_all_visible_cuda_devices", [0, 1, 2, 3]),
            ("torch.cuda.is_available", True),
            ("torch.cuda.device_count", 4),
        ):
            stack.enter_context(mock.patch(path, lambda value=value: value))
        stack.enter_context(mock.patch(cuda + "_check_cuda_matmul_precision", lambda device: None))
        yield


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"devices": [2, 3], "strategy": "ddp"}, [2, 3]),
        ({"devices": "2,3", "strategy": "ddp"}, [2, 3]),
        ({"devices": [1, 0], "strategy": "ddp"}, [1, 0]),
        ({"devices": [3, 0, 2], "strategy": DDPStrategy()}, [3, 0, 2]),
        ({"devices": -1, "strategy": "ddp"}, [0, 1, 2, 3]),
        ({"devices": "auto", "strategy": "ddp"}, [0, 1, 2, 3]),
        ({"devices": 2, "strategy": "fsdp"}, [0, 1]),
        ({"devices": [3]}, [3]),
        ({"devices": 1, "strategy": SingleDeviceStrategy("cuda:2")}, [2]),
        ({"devices": 1}, [0]),
    ],
)
def test_encodes_on_the_gpus_of_the_run(options: dict[str, Any], expected: list[int]) -> None:
    run = L.Trainer(accelerator="gpu", **options, **QUIET)
    used = trainer_like(run).strategy
    devices = getattr(used, "parallel_devices", None) or [used.root_device]
    assert devices == [torch.device("cuda", index) for index in expected]


@pytest.mark.parametrize(("options", "number"), [({}, 1), ({"devices": 2, "strategy": "ddp"}, 2), ({"devices": "auto"}, None)])
def test_encodes_on_the_cpu_of_the_run(options: dict[str, Any], number: int | None) -> None:
    run = L.Trainer(accelerator="cpu", **options, **QUIET)
    used = trainer_like(run)
    assert used.num_devices == (number or run.num_devices)
    assert used.strategy.root_device == torch.device("cpu")


def test_advice_is_the_same_on_machines_with_and_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two million vectors are searched on the CPU, so that a GPU must not make a flat index of them."""
    faiss = "lightning_align.retrieval.faiss_seam.num_gpus"
    found = []
    for number in (0, 8):
        monkeypatch.setattr(faiss, lambda number=number: number)
        found.append(advise(1_900_000, 384, memory=2**40).factory)
    assert found[0] == found[1] != "Flat"
