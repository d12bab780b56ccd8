"""The console script, and ``python -m lightning_align`` for launchers that start modules."""

import sys

HELP = """\
usage: lightning-align {fit,validate,test,predict,tokenizer,judge,export} ...

Align and augment language models.

options:
  -h, --help            Show this help message and exit.
  -c CONFIG, --config CONFIG
                        Path to a configuration file in json or yaml format.
  --print_config [=flags]
                        Print the configuration after applying all other arguments and exit. The optional flags
                        customizes the output and are one or more keywords separated by comma. The supported flags
                        are: skip_default, skip_unset.

subcommands:
  For more details of each subcommand, add it as an argument followed by --help.

  Available subcommands:
                        (required)
    fit                 Train, and validate at intervals.
    validate            Validate once.
    test                Test once.
    predict             Generate responses or score pairs, and write the results to a JSONL file.

Also:
tokenizer: train a tokenizer on your rows (`lightning-align tokenizer --help`)
judge: turn graded samples of a task into preference pairs (`lightning-align judge --help`)
export: write a model that transformers and vLLM read (`lightning-align export --help`)
Show the arguments of a class: `lightning-align fit --model.help DPOModule`, `--data.help DPODataModule`.
"""
"""The parser's help. Building the parser takes seconds. A test compares the two."""


def main() -> None:
    """Run the command line."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(HELP, end="")
        return
    from lightning_align import cli

    cli.main()


if __name__ == "__main__":
    main()
