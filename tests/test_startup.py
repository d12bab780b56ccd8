"""What starting costs: the package and the help import nothing large; seconds would depend on the machine."""

import subprocess
import sys

import pytest

LARGE = {"torch", "lightning", "torchmetrics", "transformers", "datasets", "numpy", "jsonargparse", "tokenizers"}


def loaded(code: str) -> tuple[set[str], int]:
    """The modules at the top, and the number of all, after some code."""
    after = "\nimport sys; print('MODULES', *sys.modules)"
    result = subprocess.run([sys.executable, "-c", code + after], check=True, capture_output=True, text=True)
    names = result.stdout.rpartition("MODULES ")[2].split()
    return {name.partition(".")[0] for name in names}, len(names)


@pytest.mark.parametrize(
    "code",
    [
        "import lightning_align; dir(lightning_align)",
        "import sys; sys.argv = ['lightning-align', '--help']; from lightning_align.__main__ import main; main()",
    ],
)
def test_nothing_large_is_imported(code: str) -> None:
    tops, number = loaded(code)
    assert not tops & LARGE
    assert number < 200, "of which Python itself loads most"


def test_processes_that_tokenize_rows_do_without_torch() -> None:
    """With it, each of them took seven times as long to start, and four times the memory."""
    tops, _ = loaded("import lightning_align.data.workers")
    assert not tops & {"torch", "lightning", "transformers"}
