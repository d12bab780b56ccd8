"""What the command line says of itself."""

import subprocess
import sys

import pytest

from lightning_align.cli import run


@pytest.mark.parametrize("command", ["tokenizer", "judge"])
def test_other_commands_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run([command, "--help"])
    assert f"usage: lightning-align {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["--help"], ["fit", "--help"]])
def test_the_console_script_helps(command: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", "lightning_align", *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: lightning-align" in result.stdout
    assert result.stderr == ""


def test_help_is_of_a_readable_length(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in ((["--help"], "judge"), (["fit", "--model.help", "DPOModule"], "lightning_align.PaLM")):
        with pytest.raises(SystemExit, match="0"):
            run(arguments)
        text = capsys.readouterr().out
        assert expected in text
        assert "torch.nn.Conv1d" not in text
        assert len(text.splitlines()) < 145


def test_help_documents_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    for group, names in (("model", ("SFTModule", "DPOModule")), ("data", ("SFTDataModule", "DPODataModule"))):
        for name in names:
            with pytest.raises(SystemExit, match="0"):
                run(["fit", f"--{group}.help", name])
            text = capsys.readouterr().out
            options = [line for line in text.splitlines() if line.startswith(f"  --{group}.")]
            assert options
            # An argument without a description shows its type alone.
            undocumented = [block for block in text.split(f"\n  --{group}.")[1:] if _description(block) == ""]
            assert not undocumented, (name, undocumented)


def _description(block: str) -> str:
    if "[CLASS_PATH_OR_NAME]" in block or block.startswith(("lora.", "generation.", "lora CONFIG", "generation CONFIG")):
        return "a nested group"
    return " ".join(block.partition("  ")[2].split()).partition("(type:")[0].partition("(required")[0].strip()
