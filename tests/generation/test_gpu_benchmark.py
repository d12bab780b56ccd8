"""The benchmark of decoding on a GPU runs with tiny sizes on a CPU."""

import json
from pathlib import Path

import pytest

from benchmarks.gpu.decoding import main


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_decoding_runs_dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["decoding", "--dry-run", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    rows = json.loads((tmp_path / "decoding.json").read_text())["tables"]["Decoding"]
    expected = {(model, batch, side) for model in ("PaLM tiny", "Llama tiny") for batch in "12" for side in ("grows", "static")}
    expected |= {("Llama tiny", batch, "transformers") for batch in "12"}
    assert {(row["model"], row["batch"], row["side"]) for row in rows} == expected
    for row in rows:
        assert float(row["ms per step"]) > 0
        assert row["side"] == "transformers" or row["rows as `grows`"] == f"{row['batch']} of {row['batch']}"
