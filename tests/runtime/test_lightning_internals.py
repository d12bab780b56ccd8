"""Every private or undocumented part of Lightning that the package uses is listed, exists, and is used in one file only."""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader

import lightning_align
from lightning_align.runtime import lightning_internals
from lightning_align.runtime.internals_list import CHECKED_ON, INTERNALS, Internal

PACKAGE = Path(lightning_align.__file__).parent
HOME = "runtime/lightning_internals.py"
OVERRIDDEN = {"_add_subcommands", "_prepare_subcommand_parser", "_parse_ckpt_path"}
"""Methods of LightningCLI, which only a subclass can override: they are in cli.py."""


def instance(name: str, folder: Path) -> Any:
    trainer = L.Trainer(default_root_dir=folder, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False)
    made: dict[str, Any] = {
        "Trainer": trainer,
        "LightningModule": BoringModel(),
        "ModelCheckpoint": ModelCheckpoint(),
        "CombinedLoader": CombinedLoader([]),
        "LightningArgumentParser": with_subcommands(),
    }
    return made[name]


def with_subcommands() -> LightningArgumentParser:
    parser = LightningArgumentParser()
    parser.add_subcommands().add_subcommand("fit", LightningArgumentParser())
    return parser


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda internal: internal.path.rpartition(".")[2])
def test_it_exists_in_the_installed_release(internal: Internal, tmp_path: Path) -> None:
    """The message names the release that the use was checked on, for whoever installs another one."""
    head, called, rest = internal.path.partition("()")
    module, _, name = (head if called else internal.path).rpartition(".")
    names = [name]
    while True:
        try:
            found: Any = import_module(module)
            break
        except ImportError:
            module, _, name = module.rpartition(".")
            names.insert(0, name)
    if called:
        found, names = instance(names[-1], tmp_path), rest.strip(".").split(".")
    for name in names:
        assert hasattr(found, name), (
            f"{internal.path} is not in lightning {L.__version__}; it was checked on {CHECKED_ON}: {internal.why}"
        )
        found = getattr(found, name)
    assert internal.why


def test_the_list_was_checked_on_the_pinned_release() -> None:
    pins = (PACKAGE.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"lightning=={CHECKED_ON}" in pins, "check each entry of INTERNALS on the pinned release, then raise CHECKED_ON"


def private_uses(source: str) -> list[str]:
    """Private names imported from Lightning, and listed attributes of Lightning's objects."""
    # `callbacks`, `max_epochs` and the like are also names of ours; what begins with an underscore or names a loop is not.
    listed = {part for internal in INTERNALS for part in internal.path.replace("()", "").split(".")[2:] if part.startswith("_")}
    listed |= {"fit_loop", "epoch_loop", "val_loop", "epoch_progress", "batch_progress", "lr_scheduler_configs"}
    listed |= {"_get_file_writer", "_choices_actions", "fast_dev_run", "overfit_batches", "log_every_n_steps"}
    listed |= {"reload_dataloaders_every_n_epochs"}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning."):
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
            found += [part for part in (node.module or "").split(".") if part.startswith("_")]
        elif isinstance(node, ast.Attribute) and node.attr in listed - OVERRIDDEN:
            found.append(node.attr)
    return found


@pytest.mark.parametrize(
    "path", sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if p != PACKAGE / HOME)
)
def test_no_other_file_uses_one(path: str) -> None:
    assert private_uses((PACKAGE / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters",
        "trainer.fit_loop.max_epochs = 3",
        "self._trainer is None",
        "callback._last_global_step_saved",
        "trainer.fast_dev_run",
    ],
)
def test_a_planted_use_is_found(source: str) -> None:
    assert private_uses(source)


def test_what_the_functions_read_and_write(tmp_path: Path) -> None:
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=7,
        max_epochs=5,
    )
    module = BoringModel()
    assert lightning_internals.trainer_of(module) is None
    module.trainer = trainer
    assert lightning_internals.trainer_of(module) is trainer
    assert lightning_internals.log_interval(trainer) == 7
    assert not lightning_internals.is_fast_dev_run(trainer) and not lightning_internals.overfits(trainer)
    assert not lightning_internals.overfits(None)
    assert lightning_internals.datamodule_of(trainer) is None and lightning_internals.datamodule_of(None) is None
    lightning_internals.set_reload_interval(trainer, 3)
    assert lightning_internals.reload_interval(trainer) == 3
    lightning_internals.limit_epochs(trainer, 9)
    assert trainer.max_epochs == 5
    lightning_internals.limit_epochs(trainer, 2)
    assert trainer.max_epochs == 2
    callback = ModelCheckpoint()
    lightning_internals.callbacks_of(trainer).append(callback)
    assert callback in trainer.callbacks  # type: ignore[attr-defined]
    assert lightning_internals.last_saved_step(callback) == 0
    assert not lightning_internals.built_from_config()
    progress = trainer.fit_loop.epoch_progress
    progress.total.processed = progress.current.processed = 4
    lightning_internals.count_epoch_as_begun(trainer)
    assert (progress.total.ready, progress.total.started, progress.current.ready) == (5, 5, 5)
    lightning_internals.skip_no_batches(trainer, enough=1000)
    assert trainer.fit_loop.epoch_loop.batch_progress.current.completed == 0  # not resumed, so nothing to mend


def test_schedules_are_replaced_by_number(tmp_path: Path) -> None:
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=1,
        limit_val_batches=0,
    )
    trainer.fit(BoringModel())
    (config,) = trainer.lr_scheduler_configs
    new = torch.optim.lr_scheduler.StepLR(trainer.optimizers[0], step_size=3)
    lightning_internals.replace_schedule(trainer, 1, lambda: 1 / 0)  # there is none, so nothing is made
    assert config.scheduler is not new
    lightning_internals.replace_schedule(trainer, 0, lambda: new)
    assert config.scheduler is new


def test_a_summary_is_written_without_a_point_in_a_curve(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from lightning_align.training.tensorboard import log_hyperparameters

    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    log_hyperparameters([logger, object()], {"lr": 0.5, "loss": "ipo"}, metric="val/loss")
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["scalars"] == []
    plugin = events.PluginTagToContent("hparams")
    assert "_hparams_/session_start_info" in plugin and b"ipo" in plugin["_hparams_/session_start_info"]


def test_subcommands_can_be_described() -> None:
    (action,) = lightning_internals.subcommand_actions(with_subcommands())
    assert action.dest == "fit"
