"""The command line: ``lightning-align fit | validate | test | predict``, and two commands on files.

Everything is a ``LightningCLI``: a configuration is a constructor's arguments, ``--config`` may be given several times,
and class names need no module path.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace, auto_cli
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import lightning_align
from lightning_align.callbacks import PredictionWriter
from lightning_align.data.tasks.arithmetic import judge_file
from lightning_align.data.tokenizer import train_tokenizer

COMMANDS: dict[str, Callable[..., Any]] = {"tokenizer": train_tokenizer, "judge": judge_file}
"""Commands that work on files and need no Trainer."""

TRACEBACK = "LIGHTNING_ALIGN_TRACEBACK"


class SaveConfig(SaveConfigCallback):
    """Saves the configuration beside the run, under the next free name if a run has saved one there before."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the name, then save."""
        folder, number = Path(trainer.log_dir or trainer.default_root_dir), 0
        name = self.config_filename
        while trainer.is_global_zero and not self.already_saved and (folder / name).exists():
            number += 1
            name = f"config_{number}.yaml"
        self.config_filename = trainer.strategy.broadcast(name)
        super().setup(trainer, pl_module, stage)


class AlignCLI(LightningCLI):
    """The four Trainer commands, with any LightningModule and any LightningDataModule."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        # A checkpoint is data: it may hold tensors and primitives, and nothing that runs when it is read.
        parser.set_defaults({"weights_only": True})
        if subcommand == "predict":
            parser.add_argument("--output", type=str, default="predictions.jsonl", help="JSONL file for the predictions")
            # What goes to the file need not be held in memory as well.
            parser.set_defaults({"return_predictions": False})
        return parser

    def before_predict(self) -> None:
        """Write predictions to the file that ``--output`` names."""
        config: Namespace = self.config["predict"]
        self.trainer.callbacks.insert(0, PredictionWriter(config["output"]))  # type: ignore[attr-defined]


def _quieten() -> None:
    """Keep off the screen what a user can do nothing about."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec", category=FutureWarning)  # lightning 2.6
    # A checkpoint remembers its folder; one that is validated or continued elsewhere is no mistake.
    warnings.filterwarnings("ignore", message="The dirpath has changed from", category=UserWarning)
    advertisements = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not advertisements.filters:
        advertisements.addFilter(lambda record: "Tip:" not in record.getMessage())


def _refuse_empty_files(arguments: Sequence[str]) -> None:
    """The parser reads an empty file in the place of a source as "null", and would go on as if none had been given."""
    words = [part for argument in arguments for part in argument.split("=", 1)]
    for flag, value in pairwise(words):
        if flag.startswith("--data.") and Path(value).is_file() and not Path(value).stat().st_size:
            raise ValueError(f"{flag} is {value}, which is an empty file: give one with rows")


def main() -> None:
    """The console script."""
    run()


def run(args: Sequence[str] | None = None) -> AlignCLI | None:
    """Run the command line.

    Args:
        args: such as ``["fit", "--config", "configs/sft/arithmetic.yaml"]``; by default the process's own.

    Returns:
        What ran, with its ``trainer``, ``model`` and ``datamodule``; None for a command that has no Trainer.

    Raises:
        SystemExit: with status 1 and a message if what the user gave cannot be used, 2 if it cannot be parsed.
    """
    arguments = sys.argv[1:] if args is None else list(args)
    _quieten()
    for name in lightning_align.__all__:
        getattr(lightning_align, name)  # a class can be named without its path once it is imported
    try:
        _refuse_empty_files(arguments)
        if arguments and arguments[0] in COMMANDS:
            auto_cli(
                COMMANDS[arguments[0]],
                args=arguments[1:],
                prog=f"lightning-align {arguments[0]}",
                as_positional=arguments[0] == "tokenizer",
            )
            return None
        return AlignCLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=1,
            save_config_callback=SaveConfig,
            trainer_defaults={
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": "runs", "default_hp_metric": False},
                }
            },
            parser_kwargs={
                "prog": "lightning-align",
                "description": "Align and augment language models. "
                "Also: `lightning-align tokenizer --help`, `lightning-align judge --help`.",
                "default_env": False,
            },
            args=None if args is None else arguments,
        )
    except ValueError as error:
        # What a user can mend is a ValueError that says how; forty frames of a trainer above it help nobody.
        if os.environ.get(TRACEBACK):
            raise
        sys.exit(f"lightning-align: error: {error}\n(the traceback is printed with {TRACEBACK}=1)")
