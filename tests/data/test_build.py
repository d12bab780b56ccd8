"""Stores of many rows: the same bytes from any number of processes, after any interruption."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_align.data import build, files, parts
from lightning_align.data.blocks import read_pieces
from lightning_align.data.rows import read_rows
from lightning_align.data.store import Recipe, build_store
from lightning_align.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from tests.data.chats import CHATML
from tests.data.helpers import WORDS, chat_tokenizer, small_bpe, write_jsonl

PAIRS: dict[str, Any] = {"kind": "dpo", "accepted": ("pair",), "max_length": 64}


def make_recipe(**changes: Any) -> Recipe:
    settings = {"truncation": "keep_start", "mask_turns": "last_turn", "on_bad_row": "fail", **PAIRS}
    return Recipe(**(settings | changes))


def make_pairs(number: int) -> list[dict[str, Any]]:
    numbers = random.Random(number)

    def text() -> str:
        return " ".join(numbers.choices(WORDS, k=numbers.randint(1, 20)))

    return [{"prompt": text(), "chosen": f"{text()} {i}", "rejected": f"{text()} no"} for i in range(number)]


def run(path: Path, source: Any, recipe: Recipe, tokenizer: Tokenizer, num_workers: int) -> bytes:
    """Build a store and return the bytes of both its files."""
    build_store(path, source=source, split="train", recipe=recipe, tokenizer=tokenizer, num_workers=num_workers)
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, path.with_suffix(".json").name]
    return path.read_bytes() + path.with_suffix(".json").read_bytes()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take 200 rows for many."""
    monkeypatch.setattr(build, "_SMALL_ROWS", 200)
    monkeypatch.setattr(build, "_SMALL_BLOCKS", 2)
    monkeypatch.setattr(parts, "ROWS_PER_PART", 300)
    monkeypatch.setattr(files, "_LINE_BYTES", 10_000)


SOURCES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "pairs": (make_pairs(1500), {}),
    "prompts": (make_pairs(600), {"accepted": ("prompt",), "prompts_only": True}),
    "bad rows": (
        [row for pair in make_pairs(800) for row in (pair, "{oops", {**pair, "extra": 1}, {"prompt": "x"})],
        {"on_bad_row": "skip", "max_length": 90},
    ),
    "texts": ([{"text": pair["chosen"]} for pair in make_pairs(1500)], {"accepted": ("response", "messages", "text")}),
    "chats": (
        [
            {"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["chosen"]}]}
            for p in make_pairs(700)
        ],
        {"accepted": ("response", "messages", "text"), "max_length": 400},
    ),
    "ranked": (
        [{"prompt": p["prompt"], "answers": [p["chosen"], p["rejected"], "c"], "ranks": [1, 2, 3]} for p in make_pairs(700)],
        {},
    ),
    "labelled": (
        [
            {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
            for side in ("chosen", "rejected")
            for p in make_pairs(500)
        ],
        {},
    ),
    "labelled later": (
        [
            *make_pairs(900),
            *({"prompt": "p", "completion": f"c {i}", "label": i % 2 == 0} for i in range(50)),
        ],
        {},
    ),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, kind) for name in SOURCES for kind in ("bytes", "bpe")), ("chats", "chatml"), ("pairs", "chatml")],
)
@pytest.mark.usefixtures("small_parts")
def test_any_number_of_processes_writes_the_same_bytes(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, changes = SOURCES[name]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizers = {
        "bytes": ByteTokenizer,
        "bpe": lambda: small_bpe(tmp_path),
        "chatml": lambda: chat_tokenizer(CHATML, tmp_path),
    }
    tokenizer, recipe = tokenizers[kind](), make_recipe(**changes)
    expected = run(tmp_path / "alone" / "x.arrow", source, recipe, tokenizer, 1)
    assert run(tmp_path / "two" / "x.arrow", source, recipe, tokenizer, 2) == expected
    monkeypatch.setattr(build, "_SMALL_ROWS", 10**6)
    monkeypatch.setattr(build, "_SMALL_BLOCKS", 10**6)
    assert run(tmp_path / "small" / "x.arrow", source, recipe, tokenizer, 1) == expected
    assert json.loads((tmp_path / "alone" / "x.json").read_text())["num_stored"] > 100


@pytest.mark.usefixtures("small_parts")
def test_duplicates_are_counted_across_blocks_and_processes(tmp_path: Path) -> None:
    rows = make_pairs(600)
    source = write_jsonl(tmp_path / "rows.jsonl", [*rows, *rows[:250], *rows[:10]])
    recipe = make_recipe(max_length=1000)
    _, ledger = build_store(
        tmp_path / "c" / "x.arrow", source=source, split="train", recipe=recipe, tokenizer=ByteTokenizer(), num_workers=2
    )
    assert (ledger.counts, ledger.notes) == ({"kept": 860}, {"duplicate": 260})


@pytest.mark.usefixtures("small_parts")
def test_every_kind_of_file_is_read_in_blocks(tmp_path: Path) -> None:
    rows = make_pairs(2500)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2000)
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pa.CompressedOutputStream(str(tmp_path / "rows.jsonl.zst"), "zstd") as packed:
        packed.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\n" + "".join(f"{','.join(row.values())}\n" for row in rows))
    stores = set()
    for suffix in ("jsonl", "json", "jsonl.zst", "csv", "parquet", "arrow"):
        source = str(tmp_path / f"rows.{suffix}")
        found = read_pieces(source)
        pieces = list(found.pieces)
        assert [row.fields for piece in pieces for row in piece.block.rows()] == rows
        assert [row.origin for piece in pieces for row in piece.block.rows()] == [row.origin for row in read_rows(source)]
        assert found.total is not None
        assert 0.99 * found.total < pieces[-1].reached <= found.total  # the end mark of an Arrow file is not read
        assert [piece.reached for piece in pieces] == sorted(piece.reached for piece in pieces)
        run(tmp_path / suffix / "x.arrow", source, make_recipe(), ByteTokenizer(), 2)
        stores.add((tmp_path / suffix / "x.arrow").read_bytes())
    assert len(stores) == 1


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_first_bad_row_is_reported_and_nothing_is_left(num_workers: int, tmp_path: Path) -> None:
    rows: list[Any] = make_pairs(1500)
    rows[900] = rows[1400] = "{oops"
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"rows\.jsonl:901 is not JSON"):
        run(tmp_path / "c" / "x.arrow", source, make_recipe(), ByteTokenizer(), num_workers)
    assert list((tmp_path / "c").iterdir()) == []


class OwnTokenizer(ByteTokenizer):
    """A tokenizer that other processes cannot have."""

    def __reduce__(self) -> Any:
        raise TypeError("it has a handle of this process")


@pytest.mark.usefixtures("small_parts")
def test_a_tokenizer_that_cannot_be_sent_is_used_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", make_pairs(500))
    expected = run(tmp_path / "bytes" / "x.arrow", source, make_recipe(), ByteTokenizer(), 1)
    assert run(tmp_path / "own" / "x.arrow", source, make_recipe(), OwnTokenizer(), 2) == expected
    assert "it has a handle of this process" in caplog.text
    assert "One process tokenizes them." in caplog.text


@pytest.mark.usefixtures("small_parts")
def test_a_process_that_dies_is_reported_and_its_parts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", make_pairs(1500))
    expected = run(tmp_path / "whole" / "x.arrow", source, make_recipe(), ByteTokenizer(), 1)
    finish = parts.Parts.finish

    def finish_and_kill(self: parts.Parts, *, is_last: bool = False) -> None:
        finish(self, is_last=is_last)
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        for child in children:
            if b"serve()" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(parts.Parts, "finish", finish_and_kill)
        with pytest.raises(ValueError, match=r"ended with exit status -9.*continues where it stopped"):
            run(tmp_path / "c" / "x.arrow", source, make_recipe(), ByteTokenizer(), 2)
    assert (tmp_path / "c" / "x.parts" / "000000.json").exists()
    assert run(tmp_path / "c" / "x.arrow", source, make_recipe(), ByteTokenizer(), 2) == expected


SCRIPT = """
import sys
from pathlib import Path
from lightning_align.data import build, files, parts
from lightning_align.data.recipe import Recipe
from lightning_align.data.tokenizer import FileTokenizer
build._SMALL_ROWS, parts.ROWS_PER_PART, files._LINE_BYTES = 200, 1000, 10_000
path, source, tokenizer, workers = sys.argv[1:]
options = {"kind": "dpo", "accepted": ("pair",), "max_length": 64, "on_bad_row": "skip"}
recipe = Recipe(truncation="keep_start", mask_turns="last_turn", **options)
build.Build(Path(path), source, "train", recipe, FileTokenizer(tokenizer), int(workers)).run()
"""


def start(folder: Path, path: Path, num_workers: int) -> subprocess.Popen[bytes]:
    arguments = [str(path), str(folder / "rows.jsonl"), str(folder / "bpe.json"), str(num_workers)]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], env=environment, stderr=subprocess.DEVNULL)


def finished(path: Path) -> dict[str, int]:
    """Return the finished parts of a store, with the time at which each was written."""
    found = {}
    for file in path.with_suffix(".parts").glob("*.json"):
        with suppress(FileNotFoundError):  # the build came to its end, and removed the parts
            found[file.name] = file.stat().st_mtime_ns
    return found


def test_a_build_that_is_killed_continues_after_its_finished_parts(tmp_path: Path) -> None:
    small_bpe(tmp_path)
    rows = [row for pair in make_pairs(4000) for row in (pair, {"prompt": "bad"})][:7000]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    whole, path = tmp_path / "whole" / "x.arrow", tmp_path / "killed" / "x.arrow"
    assert start(tmp_path, whole, 1).wait(300) == 0
    numbers, kept, kills = random.Random(0), dict[str, int](), 0
    while not path.with_suffix(".json").exists() and kills < 30:
        process = start(tmp_path, path, 1 + kills % 2)
        while len(finished(path)) <= len(kept) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(numbers.uniform(0, 0.2))
        process.kill()
        process.wait()
        now = finished(path)
        # A finished part is the same file as before, unless the build came to its end and removed it.
        assert path.exists() or kept.items() <= now.items()
        kept, kills = now, kills + 1
    assert kills > 2
    assert start(tmp_path, path, 2).wait(300) == 0
    assert path.read_bytes() == whole.read_bytes()
    assert path.with_suffix(".json").read_bytes() == whole.with_suffix(".json").read_bytes()
    recipe = make_recipe(on_bad_row="skip")
    tokenizer = FileTokenizer(str(tmp_path / "bpe.json"))
    run(path, str(tmp_path / "rows.jsonl"), recipe, tokenizer, 1)  # removes what a kill at the very end left


def test_processes_that_build_the_same_store_wait_for_each_other(tmp_path: Path) -> None:
    small_bpe(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", make_pairs(2000))
    assert start(tmp_path, tmp_path / "alone" / "x.arrow", 1).wait(300) == 0
    processes = [start(tmp_path, tmp_path / "shared" / "x.arrow", number) for number in (1, 1, 2)]
    assert [process.wait(300) for process in processes] == [0, 0, 0]
    for name in ("x.arrow", "x.json"):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert len(list((tmp_path / "shared").iterdir())) == 2


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_damaged_part_is_encoded_again(tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", make_pairs(1500))
    expected = run(tmp_path / "whole" / "x.arrow", source, make_recipe(), ByteTokenizer(), 1)
    with monkeypatch.context() as patch:
        patch.setattr(build, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "c" / "x.arrow", source, make_recipe(), ByteTokenizer(), 1)
    folder = tmp_path / "c" / "x.parts"
    assert len(list(folder.glob("*.arrow"))) >= 5
    with (folder / "000002.arrow").open("r+b") as file:
        file.seek(200)
        file.write(b"\x55")
    assert run(tmp_path / "c" / "x.arrow", source, make_recipe(), ByteTokenizer(), 1) == expected
