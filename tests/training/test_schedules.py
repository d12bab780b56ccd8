"""The learning-rate schedule, step by step."""

import math
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch

from lightning_align import Arithmetic, PaLM, SFTDataModule, SFTModule, SPINModule
from lightning_align.training.schedules import WarmupDecay, run_length

TINY = {"num_tokens": 259, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8}


def rates(steps: int, peak: float = 1.0, **arguments: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = WarmupDecay(optimizer, **arguments)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_warm_up_reaches_the_peak_and_the_first_step_moves() -> None:
    assert rates(6, peak=2.0, total_steps=10, warmup_steps=4, decay="none") == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_linear_decay() -> None:
    assert rates(7, total_steps=5, warmup_steps=1, decay="linear") == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0, 0])


def test_cosine_decay() -> None:
    expected = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    assert rates(6, total_steps=4) == pytest.approx([*expected, 0.0])


def test_hold_then_decay_to_a_share() -> None:
    seen = rates(12, total_steps=10, decay="linear", decay_from=0.6, final=0.2)
    assert seen == pytest.approx([1] * 7 + [0.8, 0.6, 0.4, 0.2, 0.2])


def test_groups_keep_their_proportions() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 10.0}], lr=1.0)
    schedule = WarmupDecay(optimizer, total_steps=4, warmup_steps=2)
    assert schedule.get_last_lr() == [0.5, 5.0]


def test_it_goes_on_from_its_state() -> None:
    def start() -> tuple[torch.optim.Optimizer, WarmupDecay]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, WarmupDecay(optimizer, total_steps=8, warmup_steps=3)

    optimizer, schedule = start()
    for _ in range(5):
        optimizer.step()
        schedule.step()
    other, resumed = start()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    for one, its in ((optimizer, schedule), (other, resumed)):
        one.step()
        its.step()
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("tensor", [False, True])
def test_a_run_that_is_extended_goes_on_by_its_new_settings(tensor: bool) -> None:
    def start(total_steps: int) -> tuple[torch.optim.Optimizer, WarmupDecay]:
        # Adam takes its rate as a tensor too, which is then to be changed in place.
        rate: Any = torch.tensor(2.0) if tensor else 2.0
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=rate, foreach=not tensor)
        return optimizer, WarmupDecay(optimizer, total_steps=total_steps, warmup_steps=1, decay="linear", final=0.1)

    def steps(optimizer: torch.optim.Optimizer, schedule: WarmupDecay, number: int) -> list[float]:
        seen = []
        for _ in range(number):
            seen.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            schedule.step()
        return seen

    whole = steps(*start(9), 9)
    short, schedule = start(4)
    steps(short, schedule, 4)
    longer, extended = start(9)
    longer.load_state_dict(short.state_dict())
    extended.load_state_dict(schedule.state_dict())
    assert [float(rate) for rate in extended.get_last_lr()] == pytest.approx(whole[4:5])
    assert steps(longer, extended, 5) == pytest.approx(whole[4:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "got 0 and 0"),
        ({"total_steps": 5, "warmup_steps": 6}, "got 5 and 6"),
        ({"total_steps": 5, "warmup_steps": -1}, "got 5 and -1"),
        ({"total_steps": 5, "decay_from": 1.0}, r"got 1\.0 and 0\.0"),
        ({"total_steps": 5, "final": 1.5}, r"got 0\.0 and 1\.5"),
        ({"total_steps": 5, "decay": "exponential"}, "but got 'exponential'"),
    ],
)
def test_an_invalid_schedule_is_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rates(1, **arguments)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_steps": 9, "max_epochs": -1}, 9),
        ({"max_epochs": 3}, 12),  # 8 rows in batches of 2
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 6),  # the last optimizer batch of an epoch is smaller
        ({"max_epochs": 3, "max_steps": 5}, 5),
    ],
)
def test_auto_takes_the_length_of_the_run(limits: dict[str, Any], expected: int, tmp_path: Any) -> None:
    module = SFTModule(PaLM(**TINY), lr_scheduler=partial(WarmupDecay, total_steps="auto", warmup_steps=100, decay="linear"))
    rows = SFTDataModule(Arithmetic(8), batch_size=2, cache_dir=str(tmp_path))
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(**limits, **off, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(module, rows)
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(schedule, WarmupDecay)
    assert trainer.global_step == expected
    assert (schedule.total_steps, schedule.warmup_steps) == (expected, expected // 2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0


def test_auto_without_a_length_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="no Trainer that knows the length"):
        WarmupDecay(optimizer)
    with pytest.raises(ValueError, match="neither `max_steps` nor `max_epochs`"), run_length(lambda: math.inf):
        WarmupDecay(optimizer)
    with (
        pytest.raises(ValueError, match="self-play restarts the schedule"),
        run_length(SPINModule(PaLM(**TINY)).schedule_steps),
    ):
        WarmupDecay(optimizer)
    with run_length(lambda: pytest.fail("a schedule with a number asks for no length")):  # type: ignore[misc]
        WarmupDecay(optimizer, total_steps=3)
