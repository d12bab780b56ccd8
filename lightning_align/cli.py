"""The command line: ``lightning-align fit | validate | test | predict``, and three commands that work on files.

It is a ``LightningCLI``: a configuration holds the arguments of constructors, ``--config`` can be given several times, and
class names need no module path.
"""

import logging
import os
import signal
import sys
import warnings
import zipfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NoReturn, cast

import lightning as L
import torch
from jsonargparse import Namespace, auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lightning_align
from lightning_align.console.advice import advise, mismatch, with_nearest
from lightning_align.console.arguments import overlay, refuse_empty_files, root_of
from lightning_align.console.chat import chat
from lightning_align.console.evaluate import evaluate
from lightning_align.console.last import LastLink
from lightning_align.console.pages import EPILOG, USAGE
from lightning_align.console.parser import TRACEBACK, AlignParser, FileParser
from lightning_align.console.progress import RunProgress, announce_places, has_own_bar
from lightning_align.data.tasks.arithmetic import judge_file
from lightning_align.data.tokenizer import train_tokenizer
from lightning_align.export.checkpoint import export_checkpoint
from lightning_align.models.checkpoint import gather_command, read_checkpoint
from lightning_align.runtime.lightning_internals import callbacks_of, is_fast_dev_run, last_saved_step, subcommand_actions
from lightning_align.runtime.run_folder import UNLOGGED, records_folder
from lightning_align.runtime.subnormal import flush_subnormal
from lightning_align.runtime.team import of_first_rank
from lightning_align.training.auto_precision import AUTO, AutoPrecision
from lightning_align.training.callbacks import PredictionWriter
from lightning_align.training.interrupts import InterruptCheckpoint
from lightning_align.training.module import AlignModule
from lightning_align.training.newest import checkpoint_folders, choose_checkpoint

FILE_COMMANDS: dict[str, Callable[..., Any]] = {
    "tokenizer": train_tokenizer,
    "judge": judge_file,
    "export": export_checkpoint,
    "chat": chat,
    "eval": evaluate,
}
"""Commands that work on files, without a Trainer."""

DESCRIPTIONS = {
    "fit": "Train, and validate at intervals.",
    "validate": "Validate once.",
    "test": "Test once.",
    "predict": "Generate responses or score pairs, and write the results to a JSONL file.",
}


class ResumeHint(Callback):
    """Prints how to resume after a run was stopped or failed."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Print the last complete checkpoint. A checkpoint is incomplete if the disk was full."""
        interrupted = [c.path for c in callbacks_of(trainer) if isinstance(c, InterruptCheckpoint)]
        saved = [getattr(trainer.checkpoint_callback, name, "") for name in ("last_model_path", "best_model_path")]
        for bar in callbacks_of(trainer):
            if isinstance(bar, RunProgress):
                bar.on_exception(trainer, pl_module, exception)
        for path in (*interrupted, *saved):
            if path and (zipfile.is_zipfile(path) or Path(path).is_dir()):
                rank_zero_info(f"stopped at step {trainer.global_step}; to resume, repeat the command with --ckpt_path {path}")
                return


class LastCheckpoint(Callback):
    """Saves the last step of a run that ends between two checkpoints of `every_n_train_steps`.

    It saves in the hook that Lightning saves steps in. A run resumed from a checkpoint of a later hook would not be the same.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every `last.ckpt` at the last step."""
        epochs = trainer.max_epochs
        last_epoch = epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
        ended = trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch)
        if is_fast_dev_run(trainer) or not ended:
            return
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or not callback.save_last or callback.dirpath is None:
                continue
            if last_saved_step(callback) == trainer.global_step:
                continue
            name = f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
            # Set before saving, because the checkpoint contains it.
            callback.last_model_path = callback.last_model_path or str(Path(callback.dirpath) / name)
            trainer.save_checkpoint(callback.last_model_path, callback.save_weights_only)


KEYWORDS = ("last", "best", "hpc", "registry")
"""Values of `--ckpt_path` that are not paths."""


class SaveConfig(SaveConfigCallback):
    """Saves the configuration in the run's folder, under the next free name."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the name and save."""
        folder, number = records_folder(trainer), 0
        if folder is None:
            return
        name = self.config_filename
        while trainer.is_global_zero and not self.already_saved and (folder / name).exists():
            number += 1
            name = f"config_{number}.yaml"
        self.config_filename = of_first_rank(name)
        super().setup(trainer, pl_module, stage)


class AlignCLI(LightningCLI):
    """The four Trainer commands, for any LightningModule and LightningDataModule."""

    interrupts: ClassVar[InterruptCheckpoint | None] = None
    """The callback of the running `fit`, which knows the signal that has come."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        words = sys.argv[1:] if kwargs.get("args") is None else kwargs["args"]
        self._command = words[0] if isinstance(words, list) and words else None
        super().__init__(*args, **kwargs)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for action in subcommand_actions(parser):
            action.help = DESCRIPTIONS[action.dest]  # Lightning takes the first lines of docstrings, which are cut

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self._command != subcommand and self._command in self.subcommands():
            return self.init_parser(**kwargs)  # it is only named in messages, and its arguments take long to collect
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.usage = f"lightning-align {subcommand} --config CONFIG [--config CONFIG ...] [options]"
        AlignParser.commands[subcommand] = cast(AlignParser, parser)
        # A checkpoint is data. It may hold tensors and primitives, and no code that runs when it is loaded.
        parser.set_defaults({"weights_only": True})
        if subcommand == "predict":
            parser.add_argument("--output", type=str, default="predictions.jsonl", help="JSONL file for the predictions")
            # Predictions go to the file, so they need not be kept in memory.
            parser.set_defaults({"return_predictions": False})
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of Trainer, module and data module. `--trainer.precision` may be `auto`."""
        super().add_core_arguments_to_parser(parser)
        cast(AlignParser, parser).allow("trainer.precision", AUTO)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make the Trainer, with a progress bar that counts the steps of the run."""
        measured = self._get(self.config, "trainer.precision") == AUTO
        if measured:
            kwargs["precision"] = None
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except TypeError as error:
            raise ValueError(f"the Trainer refuses its settings: {error}") from error  # as it does with most of them
        if measured:
            callbacks_of(trainer).insert(0, AutoPrecision(self._get(self.config, "ckpt_path")))
        config = self.config[self.config["subcommand"]].get("trainer") or {}
        if trainer.accumulate_grad_batches < 1:  # Lightning divides by it
            raise ValueError(f"`accumulate_grad_batches` must be 1 or more, but got {trainer.accumulate_grad_batches}.")
        RunProgress.install(trainer, configured=has_own_bar(config.get("callbacks")))
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (KeyError, AttributeError, TypeError) as error:
            if (message := mismatch(self.model, self.datamodule, error)) is None:
                raise
            raise ValueError(message) from error

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, and keep them to parse them again when a checkpoint is given."""
        self._args = cast("Sequence[str] | None", args)
        super().parse_arguments(parser, args)
        trainer = self.config.get("fit", {}).get("trainer") or {}
        if trainer.get("logger") is False and trainer.get("default_root_dir") is None:
            trainer["default_root_dir"] = UNLOGGED  # and not the working directory

    def _parse_ckpt_path(self) -> None:
        """Use the checkpoint's arguments where the command line gives none. Lightning lets the checkpoint override both."""
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if path == "auto":
            path = self._choose_checkpoint(command)
        if not path or path in KEYWORDS or "://" in path:
            return
        if (Path(path) / "config.json").is_file():
            self._use_folder(path, command)
            return
        if Path(path).is_dir():
            self._check_sharded(path, self.config[command].trainer)
            return
        saved: dict[str, Any] = dict(read_checkpoint(path).get("hyper_parameters") or {})
        given = self.parser.parse_args(self._args, defaults=False)[command].get("model")
        model = self.config[command].model
        made_by = saved.get("_class_path") or model.class_path
        if made_by.rpartition(".")[2] != model.class_path.rpartition(".")[2]:
            raise ValueError(
                f"--ckpt_path {path} must be of a run of {model.class_path}, but is of {made_by}. To start a new run from its "
                "weights, give it as --model.init_from. To resume that run, give its own configuration."
            )
        module, _, name = model.class_path.rpartition(".")
        if not issubclass(getattr(import_module(module), name), AlignModule):
            super()._parse_ckpt_path()
            return
        own = {name: value for name, value in saved.items() if not name.startswith("_")}
        arguments = overlay(own, given.init_args.as_dict() if "init_args" in (given or ()) else {})
        merged = {"class_path": model.class_path, "init_args": arguments}
        self.config = self.parser.parse_object({command: {"model": merged}}, self.config)

    def _choose_checkpoint(self, command: str) -> str | None:
        """Replace ``auto`` by the newest complete checkpoint of the run, and print which one it is."""
        config = self.config[command]
        trainer = config.trainer.as_dict()
        found = choose_checkpoint(trainer, resumes=command == "fit", module=config.model.class_path)
        path = None if found.path is None else str(found.path)
        for reason in found.skipped:
            rank_zero_info(f"--ckpt_path auto skips a file: {reason}")
        if path is None and command != "fit":
            places = ", ".join(map(str, checkpoint_folders(trainer)))
            raise ValueError(f"--ckpt_path auto must find a checkpoint, but there is none in {places}. Run `fit` first.")
        rank_zero_info(
            "--ckpt_path auto finds no checkpoint: the run starts from the beginning"
            if path is None
            else f"--ckpt_path auto takes {path} (step {found.step})"
        )
        self.config[command]["ckpt_path"] = path
        return path

    def _use_folder(self, path: str, command: str) -> None:
        """Use the model of an exported folder in place of the one in the configuration."""
        model = self.config[command].model
        if command == "fit":
            raise ValueError(
                f"--ckpt_path {path} must be a checkpoint, but is an exported model, from which a run cannot be resumed. To "
                "start a new run from it, give it as --model.init_from."
            )
        named = [name for name in ("backbone", "anchor", "augments") if name in (model.get("init_args") or ())]
        arguments = {**dict.fromkeys(named), "init_from": path}
        merged = {"class_path": model.class_path, "init_args": arguments}
        self.config = self.parser.parse_object({command: {"model": merged, "ckpt_path": None}}, self.config)

    @staticmethod
    def _check_sharded(path: str, trainer: Namespace) -> None:
        command, strategy = gather_command(path), trainer.strategy
        if command is None:
            read_checkpoint(path)  # raises, because it is not a file
        if isinstance(strategy, str) and "fsdp" not in strategy:
            raise ValueError(
                f"--ckpt_path {path} is a sharded checkpoint (a folder), which needs a sharded strategy. Add "
                f"--config trainer/fsdp2, or convert it to a single file that any run can resume from: {command}"
            )

    def before_fit(self) -> None:
        """Save the last step, also of a run that is stopped, and print how to resume."""
        AlignCLI.interrupts = InterruptCheckpoint()
        callbacks_of(self.trainer).extend([LastCheckpoint(), AlignCLI.interrupts, ResumeHint(), LastLink()])

    def after_fit(self) -> None:
        """Print where the checkpoint, the log and the export are."""
        announce_places(self.trainer)

    def before_predict(self) -> None:
        """Write predictions to the file that ``--output`` names."""
        config: Namespace = self.config["predict"]
        callbacks_of(self.trainer).insert(0, PredictionWriter(config["output"]))


def _quieten(command: str) -> None:
    """Hide warnings that users cannot act on."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec", category=FutureWarning)  # lightning 2.6
    # A checkpoint stores its folder. Using it in another folder is not a mistake.
    warnings.filterwarnings("ignore", message="The dirpath has changed from", category=UserWarning)
    if command != "fit":
        # The states of training callbacks are only needed for training.
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`", category=UserWarning)
    advertisements = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not advertisements.filters:
        advertisements.addFilter(lambda record: "Tip:" not in record.getMessage())


def _exit_with(message: str, error: Exception) -> NoReturn:
    """Exit with status 1 and a message of at most two lines, or raise the error if the traceback is wanted."""
    if os.environ.get(TRACEBACK):
        raise error
    sys.exit(f"lightning-align: error: {with_nearest(message)}\n(the traceback is printed with {TRACEBACK}=1)")


def main() -> None:
    """The console script."""
    flush_subnormal()
    run()


def run(args: Sequence[str] | None = None) -> AlignCLI | None:
    """Run the command line.

    Args:
        args: Arguments such as ``["fit", "--config", "sft/arithmetic"]``. Default is those of the process.

    Returns:
        The command line that ran, with ``trainer``, ``model`` and ``datamodule``. None for a command without a Trainer.

    Raises:
        SystemExit: With status 1 and a message if an argument cannot be used, with status 2 if it cannot be parsed.
    """
    arguments = sys.argv[1:] if args is None else list(args)
    AlignParser.given = arguments
    _quieten(arguments[0] if arguments else "")
    for name in lightning_align.__all__:
        getattr(lightning_align, name)  # a class that is imported can be named without its path
    try:
        refuse_empty_files(arguments)
        if arguments and arguments[0] in FILE_COMMANDS:
            FileParser.command = arguments[0]
            if arguments[0] == "chat" and len(arguments) > 2 and not any(word.startswith("-") for word in arguments[1:3]):
                arguments.insert(2, "--compare")
            auto_cli(
                FILE_COMMANDS[arguments[0]],
                args=arguments[1:],
                prog=f"lightning-align {arguments[0]}",
                as_positional=arguments[0] != "judge",
                parser_class=FileParser,
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
                "usage": USAGE,
                "description": "Align and augment language models.",
                "epilog": EPILOG,
                "default_env": False,
                **{name: {"description": text} for name, text in DESCRIPTIONS.items()},
            },
            parser_class=AlignParser,
            args=None if args is None else arguments,
        )
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)  # Lightning's own status is 0, as if the run were complete
    except RuntimeError as error:
        # A worker of the data loader gets the signal too, and its death is an error of the data loader.
        if AlignCLI.interrupts is not None and AlignCLI.interrupts.status:
            sys.exit(AlignCLI.interrupts.status)
        if not isinstance(error, torch.OutOfMemoryError) and "which is not available" not in str(error):
            raise
        _exit_with(advise(error), error)
    except ValueError as error:
        # A ValueError tells the user what to do. The traceback through the Trainer would hide it.
        _exit_with(root_of(error), error)
    except OSError as error:
        # Full disks, missing permissions: errors of the system that Lightning, loggers and libraries pass on.
        place = error.filename2 or error.filename
        _exit_with(f"{place or 'the disk'}: {error.strerror or error}. Choose another path or free this one.", error)
    except (MisconfigurationException, ModuleNotFoundError) as error:
        # Settings that Lightning refuses and packages that are missing: libraries say so in a line or two.
        _exit_with(advise(error), error)
    except KeyboardInterrupt:
        print("lightning-align: stopped", file=sys.stderr)
        sys.exit(130)  # as shells count an interrupt
    except SystemExit as end:
        # Lightning ends an interrupted command with status 1.
        if end.code == 1 and isinstance(end.__context__, KeyboardInterrupt):
            sys.exit(130)
        raise
