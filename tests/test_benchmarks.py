"""The benchmark scripts are listed, documented and start; commands in the texts name scripts and options that exist.

Nothing is measured here.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.run
from benchmarks.gpu import run as gpu
from benchmarks.run import HERE, PEERS, SECTIONS, TIMED, marker, sections

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = list(dict.fromkeys(script for script, *_ in SECTIONS))
TEXTS = [
    *(
        ROOT / name
        for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/RESULTS.md")
    ),
    *ROOT.glob("notebooks/*.ipynb"),
]
# Runs each script with --help in one process, so that heavy imports are paid for once.
HELP = """
import contextlib, io, json, runpy, sys
found = {}
for script in sys.argv[1:]:
    sys.argv, text = [script, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_path(script, run_name="__main__")
        code = "no exit"
    except SystemExit as end:
        code = end.code
    found[script] = [code, text.getvalue()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def help_texts() -> dict[str, str]:
    command = [sys.executable, "-W", "ignore", "-c", HELP, *SCRIPTS]
    ran = subprocess.run(command, cwd=HERE, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert {script: code for script, (code, _) in found.items()} == dict.fromkeys(SCRIPTS, 0)
    return {script: text for script, (_, text) in found.items()}


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "COLUMNS": "100"}


def commands(text: str) -> list[list[str]]:
    """Words after ``benchmarks/run.py``, up to the end of the code or the line."""
    return [shlex.split(words, comments=True) for words in re.findall(r"python benchmarks/run\.py\b([^`\n\"\\]*)", text)]


def test_every_script_is_on_the_list() -> None:
    files = {str(path.relative_to(HERE)) for path in HERE.rglob("*.py") if path.name not in ("run.py", "__init__.py")}
    assert {name for name in files if not name.startswith(("common/", "gpu/"))} == set(SCRIPTS)


def test_every_script_explains_itself_and_begins_no_work_before_its_arguments(help_texts: dict[str, str]) -> None:
    for script, text in help_texts.items():
        assert text.startswith("usage: "), script
        assert len(text.split("\n\n")[1]) > 20, f"{script} has no description"


def test_listed_options_and_named_commands_exist(help_texts: dict[str, str]) -> None:
    named = {path.name: commands(path.read_text(encoding="utf-8")) for path in TEXTS}
    assert all(named[name] for name in ("README.md", "RESULTS.md", "01_dpo.ipynb", "04_retro.ipynb")), (
        "commands look different now"
    )
    found = [words for every in named.values() for words in every] + [list(section) for section in SECTIONS]
    for words in found:
        if words and not words[0].startswith("--") and words[0] != "SCRIPT":
            assert words[0] in SCRIPTS, words
            for option in (word for word in words if word.startswith("--")):
                assert re.search(rf"{option}\b", help_texts[words[0]]), words


def test_comparisons_with_others_are_listed_and_their_options_exist(help_texts: dict[str, str]) -> None:
    assert PEERS.keys() <= set(TIMED)
    for (script, *_), more in PEERS.items():
        assert all(re.search(rf"{option}\b", help_texts[script]) for option in more if option.startswith("--"))


def test_results_have_a_section_for_each_entry_and_processor_and_no_other() -> None:
    page = sections((HERE / "RESULTS.md").read_text(encoding="utf-8"))
    lines = [line for line in page if not line.startswith(gpu.MARKER)]
    rest = set(lines)
    for script, *options in SECTIONS:
        mine = [line for line in lines if line.startswith(marker(script, tuple(options)) + "`")]
        kinds = [re.search(r", \d{4}-\d\d-\d\d, ([^,]+), \d+ cores\b", line) for line in mine]
        assert kinds, (script, options)
        assert all(kinds), mine
        assert len({kind[1] for kind in kinds if kind}) == len(kinds), mine
        rest -= set(mine)
    assert not rest


def test_the_readme_of_the_benchmarks_has_every_script() -> None:
    rows = re.findall(r"^\| `([\w/]+\.py)` \|", (HERE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted([*SCRIPTS, *(f"gpu/{script.name}.py" for script in gpu.there())])


def test_paths_into_the_benchmarks_exist() -> None:
    for path in TEXTS:
        for name in re.findall(r"benchmarks/[\w/]+\.(?:py|json|md)\b", path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{path.name} names {name}"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one listed script, which prints what it was given, and a page with a section of another command."""
    (tmp_path / "dpo").mkdir()
    code = f"""'What it was given.'
import sys
import benchmarks, lightning_align
assert {str(ROOT)!r} in benchmarks.__file__ and {str(ROOT)!r} in lightning_align.__file__
print("noise\\n## Given\\n")
print(sys.argv[1:])
"""
    (tmp_path / "dpo" / "step.py").write_text(code)
    (tmp_path / "RESULTS.md").write_text("# Old\n\n## Others\n\nkept\n\n`python benchmarks/elsewhere.py`, 2020-01-01\n")
    entries = (("dpo/step.py",), ("dpo/step.py", "--thp"))
    for name, value in {"HERE": tmp_path, "SECTIONS": entries, "TIMED": entries, "STUDIES": ()}.items():
        monkeypatch.setattr(benchmarks.run, name, value)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path / "RESULTS.md"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    benchmarks.run.main()


def test_a_script_with_its_own_options_prints_and_records_nothing(
    small: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = small.read_text()
    with pytest.raises(SystemExit, match=r"^0$"):
        run(monkeypatch, "--output", str(small), "dpo/step.py", "--seeds", "0", "1")
    assert "## Given\n\n['--seeds', '0', '1']" in capfd.readouterr().out
    with pytest.raises(SystemExit, match=r"^0$"):
        run(monkeypatch, "--pairs", "rows.jsonl", "dpo/step.py", "--seeds", "0")
    assert "## Given\n\n['--seeds', '0', '--pairs', 'rows.jsonl']" in capfd.readouterr().out
    assert small.read_text() == before


def test_comparisons_with_others_run_with_fewer_rounds(
    small: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmarks.run, "PEERS", {("dpo/step.py",): ("--rounds", "2")})
    run(monkeypatch, "--output", str(small), "--peers", "--pairs", "rows.jsonl")
    assert "['--rounds', '2', '--pairs', 'rows.jsonl']" in small.read_text()
    (line,) = (line for line in sections(small.read_text()) if "dpo/step.py" in line)
    assert line.startswith("`python benchmarks/run.py dpo/step.py` with `--rounds 2 --pairs FILE`, ")
    assert line.endswith(f", {benchmarks.run.processor()}, {os.cpu_count()} cores")
    assert "minutes so far" in capfd.readouterr().err


def test_a_run_ends_with_all_claims_in_one_table(
    small: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    claims = "| claim | required | measured |  |\n| --- | --- | --- | --- |\n"
    told = f"## Steps\n\n| side | s |\n| --- | --- |\n| ours | 1 |\n\n{claims}| speed | ≥ 3x | 4.68x | met |\n\n"
    told += f"## Answers\n\n{claims}| speed | ≥ 20x | 14.6x | **missed** |\n| memory | ≤ 1 | 0.5 | met |\n\nMore.\n"
    (small.parent / "dpo" / "step.py").write_text(f'"""Claims."""\nprint({told!r})\n')
    run(monkeypatch, "--output", str(small), "dpo/step.py")
    end = capfd.readouterr().out.partition("All claims on ")[2].splitlines()
    assert end[0] == f"{benchmarks.run.processor()}, {os.cpu_count()} cores:"
    rows = ["| Steps | speed | ≥ 3x | 4.68x | met |", "| Answers | speed | ≥ 20x | 14.6x | **missed** |"]
    assert end[4:7] == [*rows, "| Answers | memory | ≤ 1 | 0.5 | met |"]
    assert end[4:7] == end[7:], "two sections of one script, and no other tables"
    assert "All claims" not in small.read_text()


def test_a_section_of_another_processor_stays_beside_the_new_one(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("AMD EPYC", "Intel Xeon", "Intel Xeon with AMX", "Intel Xeon"):
        monkeypatch.setattr(benchmarks.run, "processor", lambda kind=kind: kind)
        run(monkeypatch, "--output", str(small), "dpo/step.py")
    ends = [re.sub(r".*\d\d, (.*), \d+ cores", r"\1", line) for line in sections(small.read_text())]
    # Whichever was measured last, the order stays.
    assert ends[:3] == ends[3:6] == ["AMD EPYC", "Intel Xeon", "Intel Xeon with AMX"]
    assert ends[6:] == ["`python benchmarks/elsewhere.py`, 2020-01-01"]


def test_the_kind_of_a_processor_has_no_marks_and_tells_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(model: str, flags: str) -> str:
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor : 0\nmodel name\t: {model}\nflags : {flags}\n")
        return benchmarks.run.processor()

    assert kind("Intel(R) Xeon(R) Processor", "avx2 amx_bf16") == "Intel Xeon with AMX"
    assert kind("Intel(R) Xeon(R) CPU @ 2.20GHz", "avx2") == "Intel Xeon"
    assert kind("AMD EPYC 7B13", "avx2") == "AMD EPYC 7B13"


@pytest.mark.parametrize("words", [(), ("dpo/step.py",), ("benchmarks/dpo/step.py",)])
def test_without_options_every_listed_section_is_recorded_and_the_others_stay(
    small: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    for pairs in ((), ("--pairs", "rows.jsonl")):  # the second run replaces what the first has written
        run(monkeypatch, *pairs, "--output", str(small), *words)
    page = small.read_text()
    first, second, third = sections(page)
    assert first.startswith("`python benchmarks/run.py dpo/step.py` with `--pairs FILE`, 20")
    assert second.startswith("`python benchmarks/run.py dpo/step.py --thp` with `--pairs FILE`, 20")
    assert third == "`python benchmarks/elsewhere.py`, 2020-01-01"
    assert "## Given\n\n['--pairs', 'rows.jsonl']" in page
    assert "## Given\n\n['--thp', '--pairs', 'rows.jsonl']" in page
    assert "noise" not in page
    assert page.startswith("# Benchmarks\n")


def test_a_failure_keeps_the_old_section_and_is_told(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "--output", str(small))
    before = small.read_text()
    (small.parent / "dpo" / "step.py").write_text('"""Fails."""\nraise SystemExit(3)\n')
    with pytest.raises(SystemExit, match=r"failed: dpo/step\.py, dpo/step\.py --thp"):
        run(monkeypatch, "--output", str(small))
    assert small.read_text() == before


def test_a_wrong_name_lists_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        run(monkeypatch, "dpo/stap.py")
    told = capsys.readouterr().err
    assert "no such script: dpo/stap.py" in told
    run(monkeypatch, "--list")
    assert capsys.readouterr().out.strip() in told
    assert all(re.search(rf"^  {script} +\S", told, re.MULTILINE) for script in SCRIPTS)
