"""The measurements for a GPU run with tiny sizes on a CPU. Their numbers mean nothing here."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.gpu import DRY, Session, markdown, parser
from benchmarks.gpu import run as runner

NAMES = [script.name for script in runner.there()]


def test_every_script_has_its_place_in_the_order() -> None:
    files = {path.stem for path in runner.HERE.glob("*.py")} - {"run"}
    assert files == set(NAMES)
    assert all(script.seconds <= 480 for script in runner.ORDER)


@pytest.mark.filterwarnings("ignore")  # as the scripts run alone
@pytest.mark.parametrize("name", NAMES)
def test_scripts_run_without_a_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--dry-run", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(runner.HERE / f"{name}.py"), run_name="__main__")
    found: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["complete"] and found["dry_run"]
    assert not {part: reason for part, reason in found["failed"].items() if not reason.startswith("Missing")}
    printed = capsys.readouterr().out
    assert DRY in printed and all(f"{name}:" in printed for name in found["tables"])
    assert all(rows for rows in found["tables"].values()) and found["tables"]


def test_without_a_gpu_only_a_dry_run_begins(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.common import gpu

    monkeypatch.setattr(sys, "argv", ["dpo.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^2$"):
        gpu.parse(parser("what"))
    assert "--dry-run" in capsys.readouterr().err


def session(tmp_path: Path, **more: Any) -> Session:
    arguments = parser("what").parse_args(["--dry-run", "--output", str(tmp_path)])
    for name, value in more.items():
        setattr(arguments, name, value)
    return Session("some", "Some", "What it measures.", arguments)


def test_a_part_that_fails_or_comes_too_late_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    measured = session(tmp_path)
    with measured.part("first"):
        raise RuntimeError("no kernel")
    with measured.part("third"):
        measured.add("Table", {"side": "ours", "ms": 12345.6})
        measured.add("Table", {"side": "peer", "MiB": float("nan")})
    kept = json.loads((tmp_path / "some.json").read_text())  # before it has ended
    assert not kept["complete"] and kept["failed"]["first"] == "RuntimeError: no kernel"
    text = markdown(kept)
    assert "The run was stopped before its end." in text and "first failed. RuntimeError: no kernel" in text
    assert "| side | ms | MiB |" in text and "| ours | 12,346 |  |" in text and "| peer |  | – |" in text
    with pytest.raises(SystemExit, match=r"^1$"), measured.part("late", needs=1e6):
        pytest.fail("ran")
    kept = json.loads((tmp_path / "some.json").read_text())
    assert kept["complete"] and kept["failed"]["late"].startswith("not run, and no part after it")


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three scripts: one that fails, one that hangs, and one that measures."""
    start = """
import sys
from benchmarks.common import gpu
session = gpu.Session({name!r}, {name!r}, "Something.", gpu.parse(gpu.parser("x")))
session.add("Table", {{"value": 1}})
"""
    for name, end in (("fails", "sys.exit(3)"), ("good", "session.finish()")):
        (tmp_path / f"{name}.py").write_text('"""Does."""' + start.format(name=name) + end + "\n")
    # It imports nothing that takes long, so that a busy machine does not stop it before it has results.
    hangs = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
(folder / "hangs.json").write_text((folder / "fails.json").read_text().replace("fails", "hangs"))
time.sleep(600)
"""
    (tmp_path / "hangs.py").write_text('"""Does."""' + hangs)
    monkeypatch.setattr(runner, "HERE", tmp_path)
    order = (runner.Script("fails", 900), runner.Script("hangs", 1), runner.Script("absent", 60), runner.Script("good", 900))
    monkeypatch.setattr(runner, "ORDER", order)
    monkeypatch.setattr(runner, "GRACE", 10)
    return tmp_path


def test_the_run_goes_on_after_failures_and_keeps_their_results(
    scripts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = scripts / "out"
    monkeypatch.setattr(sys, "argv", ["run.py", "--dry-run", "--output", str(folder)])
    with pytest.raises(SystemExit, match=r"not complete: fails, hangs"):
        runner.main()
    said = capsys.readouterr().out
    assert "fails: exit status 3" in said and "hangs: stopped, its time was up" in said and "good: complete" in said
    report = (folder / "report.md").read_text()
    assert report.count("## GPU: ") == 3 and report.count("The run was stopped before its end.") == 2
    assert report.count(runner.MARKER) == 3


def test_dry_runs_are_not_published_and_others_replace_their_sections(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = scripts / "RESULTS.md"
    page.write_text("# Head\n\n## Kept\n\nkept\n\n`python benchmarks/run.py dpo/step.py`, 2020-01-01\n")
    monkeypatch.setattr(runner, "PAGE", page)
    measured = Session("good", "Good", "Text.", parser("x").parse_args(["--dry-run", "--output", str(scripts)]))
    measured.add("Table", {"value": 1})
    with pytest.raises(SystemExit, match="dry run"):
        runner.publish(scripts)
    for value in (2, 3):
        results = {**measured.results, "dry_run": False, "tables": {"Table": [{"value": str(value)}]}}
        (scripts / "good.json").write_text(json.dumps(results))
        runner.publish(scripts)
    text = page.read_text()
    assert text.startswith("# Head\n") and "kept" in text and text.count("## GPU: Good") == 1
    assert "| 3 |" in text and "| 2 |" not in text
