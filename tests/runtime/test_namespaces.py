"""A project that imports `pytorch_lightning` is told which import to change."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_align import DPOModule, PaLM, SFTModule

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pl = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.demos.boring_classes import BoringModel

TINY = {"num_tokens": 259, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8}
QUIET = {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


class Mine(SFTModule):
    """A user's subclass."""


@pytest.mark.parametrize("kind", [SFTModule, DPOModule, Mine])
@pytest.mark.parametrize("call", ["fit", "validate", "test", "predict"])
def test_their_trainer_refuses_our_modules_and_says_why(kind: type[L.LightningModule], call: str) -> None:
    trainer = pl.Trainer(**QUIET, enable_checkpointing=False)
    with pytest.raises(TypeError, match=r"import lightning\.pytorch as pl"):
        getattr(trainer, call)(kind(PaLM(**TINY)), DataLoader([0]))


def test_a_compiled_module_is_refused_with_the_same_words() -> None:
    compiled = SimpleNamespace(_orig_mod=SFTModule(PaLM(**TINY)))  # torch.compile is slow, and wraps a module like this
    with pytest.raises(TypeError, match=r"import lightning\.pytorch as pl"):
        pl.utilities.compile._check_mixed_imports(compiled)


def test_their_own_modules_and_other_mistakes_are_left_alone() -> None:
    trainer = pl.Trainer(**QUIET, enable_checkpointing=False)
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        trainer.fit(torch.nn.Linear(1, 1))
    module = BoringModel()
    trainer.fit(module)
    assert trainer.global_step == 1


def test_their_callbacks_in_our_trainer_are_named() -> None:
    trainer = L.Trainer(**QUIET, callbacks=[pl.callbacks.LearningRateMonitor()], enable_checkpointing=False)  # type: ignore[list-item]
    module = SFTModule(PaLM(**TINY))
    module.trainer = trainer
    with pytest.warns(UserWarning, match="parts of `pytorch_lightning`: LearningRateMonitor"):
        module.setup("fit")


@pytest.mark.parametrize("first", ["pytorch_lightning", "lightning_align"])
def test_the_order_of_the_imports_does_not_matter(first: str) -> None:
    second = {"pytorch_lightning": "lightning_align", "lightning_align": "pytorch_lightning"}[first]
    code = (
        f"import warnings; warnings.filterwarnings('ignore')\nimport {first}\nimport {second}\n"
        "from pytorch_lightning.utilities import compile\nassert compile._check_mixed_imports.knows_lightning_align"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
