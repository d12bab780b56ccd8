"""The parser of the command line: names of shipped configurations, a readable help, and short errors."""

import os
import re
import sys
from typing import Any, ClassVar, Literal, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_align.console.configs import resolve
from lightning_align.console.errors import explain, unknown_command
from lightning_align.console.pages import COMMANDS

TRACEBACK = "LIGHTNING_ALIGN_TRACEBACK"


class HelpFormatter(DefaultHelpFormatter):
    """The default help, without the lists of all modules and optimizers of torch."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        # Lines that are indented are columns.
        return "\n".join(line if line.startswith(" ") else fill(line, width, indent) for line in text.splitlines())

    def _get_help_string(self, action: Any) -> str:
        text = super()._get_help_string(action)
        head, found, classes = text.partition(", known subclasses: ")
        names = classes.rstrip(")").split(", ")
        if not found or len(names) <= 12:
            return text
        # Sorted, because their order is that of imports.
        own = [name for name in sorted(names) if name.startswith("lightning_align.") and name.count(".") == 1]
        own = [name for name in own if not name.endswith("Module")]
        return f"{head}, a class by its path{', such as ' if own else ''}{', '.join(own)})"


class ShortErrors(ArgumentParser):
    """A parser whose errors have at most three lines."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2 and at most three lines that say what is wrong."""
        if not self.exit_on_error:  # parsers of classes only raise
            super().error(message, ex)
        if os.environ.get(TRACEBACK) and ex is not None:
            raise ex
        print(f"lightning-align: error: {self.explained(message)}", file=sys.stderr)
        sys.exit(2)

    def explained(self, message: str) -> str:
        """Shorten a message."""
        raise NotImplementedError

    def option_names(self) -> list[str]:
        """Return the names of the options, such as ``trainer.max_steps``."""
        names = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
        return [name for name in names if not name.endswith((".help", "+"))]


class FileParser(ShortErrors):
    """The parser of a command that works on files."""

    command: ClassVar[str] = ""
    """The command."""

    def explained(self, message: str) -> str:
        """Shorten a message."""
        return explain(message, command=self.command, options=self.option_names())


class AlignParser(ShortErrors, LightningArgumentParser):
    """Lightning's parser with a shorter help, also for the parsers that it makes for classes."""

    commands: ClassVar[dict[str, "AlignParser"]] = {}
    """The parser of each command."""
    given: ClassVar[list[str]] = []
    """The command line of the process, for messages."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, **kwargs})
        for action in self._actions:
            if action.dest == "config":
                action.help = "A configuration file, or the name of a shipped configuration (`lightning-align configs`)."

    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse a command line, in which ``--config`` can be the name of a shipped configuration."""
        return super().parse_args(resolve(sys.argv[1:] if args is None else list(args)), *others, **kwargs)

    # Parsing has checked a configuration. To check it again takes as long as to parse it.

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """Return a configuration as text."""
        text: str = super().dump(*args, **{"skip_validation": True, **kwargs})
        return text

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Write a configuration to a file."""
        super().save(*args, **{"skip_validation": True, **kwargs})

    def allow(self, option: str, value: str) -> None:
        """Let an option take one value more than its type says."""
        action: Any = next(action for action in self._actions if action.dest == option)
        action._typehint = action._typehint | Literal[value]

    def explained(self, message: str) -> str:
        """Shorten a message."""
        words = AlignParser.given
        command = next((word for word in words if word in AlignParser.commands), "")
        if "invalid choice" in message and "subcommand" in message:
            wrong = re.search(r"invalid choice: '?([^'\s]+)", message)
            return unknown_command(wrong[1] if wrong else "", COMMANDS)
        parser = AlignParser.commands.get(command, self)
        return explain(message, command=command, options=parser.option_names(), arguments=words)
