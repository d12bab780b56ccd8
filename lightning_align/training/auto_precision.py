"""A measured choice of the precision: bfloat16 on processors that multiply it faster, float32 on the others."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from statistics import median
from typing import Any, Literal, NamedTuple, cast

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_align.models.checkpoint import read_checkpoint
from lightning_align.runtime.lightning_internals import new_loaders, requeued_path
from lightning_align.runtime.memory import keep_freed_memory
from lightning_align.runtime.team import of_first_rank
from lightning_align.training.by_hand import LoopByHand

Chosen = Literal["32-true", "bf16-mixed"]
AUTO = "auto"
"""The value of `--trainer.precision` that stands for this choice."""
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
"""Instructions that multiply bfloat16. Without one, processors convert to float32 first, which is slower."""
ROUNDS = 3
"""How often each precision is timed, after a warm-up."""
PATIENCE = 60.0
"""Seconds after which no further round begins."""
GAIN = 1.05
"""How many times as fast bfloat16 must be. Less is not worth its rounding."""


class Choice(NamedTuple):
    """A precision, and why it was chosen."""

    precision: Chosen
    reason: str

    def __str__(self) -> str:
        """Say both in one line."""
        return f"precision auto: {self.precision} ({self.reason})"


def bf16_instructions() -> list[str]:
    """Return the names of the instructions of this processor that multiply bfloat16."""
    found = torch.cpu.get_capabilities()
    return [name for name in INSTRUCTIONS if found.get(name)]


def faster(step: Callable[[], Any], *, clock: Callable[[], float] = time.perf_counter) -> Choice:
    """Time a step in float32 and under autocast to bfloat16, alternating, and choose.

    Args:
        step: A forward and a backward pass. It is called at least four times.
        clock: The clock.
    """
    contexts: dict[Chosen, Callable[[], AbstractContextManager[Any]]] = {
        "32-true": nullcontext,
        "bf16-mixed": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    began, seconds = clock(), {name: list[float]() for name in contexts}
    for number in range(1 + ROUNDS):
        if number > 1 and clock() - began > PATIENCE:
            break
        for name, context in contexts.items():
            start = clock()
            with context():
                step()
            if number:
                seconds[name].append(clock() - start)
    full, half = (median(seconds[name]) for name in contexts)
    if full >= GAIN * half:
        return Choice("bf16-mixed", f"{half:.3g} s a step; 32-true {full:.3g} s")
    return Choice("32-true", f"{full:.3g} s a step; bf16-mixed {half:.3g} s")


class AutoPrecision(Callback):
    """Chooses between ``32-true`` and ``bf16-mixed`` at the start of a run, and says which one it takes and why.

    ``--trainer.precision auto`` of the command line adds it. In code, it is the first callback of a Trainer of which
    ``precision`` is left out:

        Trainer(callbacks=[AutoPrecision(), ...])

    On a CPU with instructions for bfloat16 (AMX, AVX512-BF16, those of ARM), it tries forward and backward passes of a copy
    of the module both ways, on a training batch. The module, its metrics and the random numbers stay as they are. The
    copy takes the memory of a second model meanwhile. Other CPUs take ``32-true``. GPUs take ``bf16-mixed`` if they have it.

    The choice is in the checkpoint. A run that is resumed takes it without measuring, also on another machine. Commands other
    than `fit` take that of the checkpoint, or ``32-true``. Rank 0 decides for all ranks.
    """

    def __init__(self, ckpt_path: str | None = None) -> None:
        """Choose nothing yet.

        Args:
            ckpt_path: The checkpoint that `fit`, `validate`, `test` or `predict` gets. A Trainer opens it only after the
                choice. The command line fills it in.
        """
        self.ckpt_path = ckpt_path
        self.choice: Choice | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose, before anything is computed in the precision of the Trainer.

        Raises:
            ValueError: If the Trainer has a precision already, or shards the model on CPUs.
        """
        if self.choice is None and type(trainer.precision_plugin) is not Precision:
            raise ValueError(
                f"AutoPrecision chooses the precision, but the Trainer has precision {trainer.precision!r}. Leave it out, or "
                "remove the callback."
            )
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                "precision auto must be used on one device or with DDP, but the strategy is "
                f"{type(trainer.strategy).__name__}. Give the precision: bf16-mixed or 32-true."
            )
        # Only `fit` measures. A later command of the same process keeps the choice.
        choice = _recorded(self.ckpt_path or requeued_path(trainer)) or self.choice or _choose(trainer, pl_module)
        self.choice = of_first_rank(choice)
        device = trainer.strategy.root_device.type
        trainer.strategy.precision_plugin = (
            MixedPrecision("bf16-mixed", device) if self.choice.precision == "bf16-mixed" else Precision()
        )
        rank_zero_info(str(self.choice))

    def state_dict(self) -> dict[str, Any]:
        """Return the choice."""
        return {} if self.choice is None else {"precision": self.choice.precision}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the choice with that of the checkpoint.

        Raises:
            ValueError: If they differ.
        """
        saved, own = state_dict.get("precision"), self.choice and self.choice.precision
        if saved not in (None, own):
            raise ValueError(
                f"precision auto takes {own} here, but the checkpoint is of a run in {saved}. Give the checkpoint to the "
                "callback too, AutoPrecision(ckpt_path=...), so that the run goes on as it began."
            )


def _recorded(path: str | None) -> Choice | None:
    """Return the choice in a checkpoint, or None."""
    if path is None:
        return None
    states = read_checkpoint(path).get("callbacks") or {}
    found = states.get(AutoPrecision.__qualname__, {}).get("precision")
    return None if found is None else Choice(cast(Chosen, found), "as in the checkpoint")


def _choose(trainer: L.Trainer, module: L.LightningModule) -> Choice:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return Choice("bf16-mixed", "the GPU supports it") if supported else Choice("32-true", "the GPU has no bfloat16")
    if device.type != "cpu":
        return Choice("32-true", f"bfloat16 is not tried on {device.type}")
    if not bf16_instructions():
        return Choice("32-true", "this processor has no instructions for bfloat16")
    if trainer.state.fn != TrainerFn.FITTING:
        return Choice("32-true", "only fit measures")
    try:
        return faster(trial_step(trainer, module))
    except Exception as error:  # modules of others may need a Trainer in many ways
        return Choice("32-true", f"a step cannot be tried apart from the run: {str(error)[:120] or type(error).__name__}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Say nothing that the run says again."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def trial_step(trainer: L.Trainer, module: L.LightningModule) -> Callable[[], None]:
    """Return a function that takes forward and backward passes of a copy of a module.

    Args:
        trainer: The Trainer, in a fit, after the setup of the data module.
        module: The module. Its ``training_step`` must work without a Trainer.
    """
    keep_freed_memory()  # as in the run
    device = trainer.strategy.root_device
    with isolate_rng(), _quiet():
        given = getattr(getattr(trainer, "datamodule", None), "trial_batch", None)
        batch = given() if given is not None else next(iter(new_loaders(trainer)[0]))
        copy = deepcopy(module)
        copy.configure_model()
    copy.to(device).train()
    if isinstance(copy, LoopByHand):
        copy.begin_trial()
    batch = move_data_to_device(batch, device)

    def step() -> None:
        with isolate_rng():
            made: Any = copy.training_step(batch, 1)
            loss = made["loss"] if isinstance(made, dict) else made
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ValueError("training_step returned no loss with a gradient")
        loss.backward()
        copy.zero_grad()

    return step
