"""The benchmark of decoding on a GPU runs with tiny sizes on a CPU."""

import pytest

from benchmarks.gpu.decoding import main


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_decoding_runs_dry(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--dry-run"])
    out = capsys.readouterr().out
    rows = [line.split("|")[1:4] for line in out.splitlines() if line.startswith("|")][2:]
    found = {tuple(cell.strip() for cell in row) for row in rows}
    expected = {(model, batch, side) for model in ("PaLM tiny", "Llama tiny") for batch in "12" for side in ("grows", "static")}
    assert found == expected | {("Llama tiny", batch, "transformers") for batch in "12"}
    assert "rows have the tokens" not in out and "Left out" not in out
