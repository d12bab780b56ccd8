"""A database that several processes build, that may only be read, that is moved, and that is compacted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

import lightning_align.retrieval.stages as stages
from lightning_align import add_documents, build_database, compact_database, delete_documents, open_retriever
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.retrieval import access
from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retrieval.stages import file_hash

SECRET = "the passphrase is xyzzyplugh and nobody else has it"


class Bytes:
    """A tokenizer of another library: the bytes of this one under a class of its own."""

    def __init__(self) -> None:
        self._inner = load_tokenizer("bytes")
        self.fingerprint = "other-bytes"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "texts"
    made.mkdir()
    for number in range(8):
        (made / f"{number}.txt").write_text(f"document number {number} about apples, kept in shed {number * 7}\n" * 6)
    (made / "secret.txt").write_text(f"{SECRET}\n" * 3)
    return made


def build(root: Path, folder: Path, **options: Any) -> RetrievalDatabase:
    return build_database(root, str(folder), **{"encoder": "bm25", "chunk_size": 16, "k": 1, **options})


def content(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): file_hash(path) for path in sorted(root.rglob("*")) if path.is_file()}


def on_disk(root: Path, text: str) -> bool:
    needle = text.encode()
    raw = any(needle in path.read_bytes() for path in root.rglob("*") if path.is_file())
    return raw or any(needle in (np.load(p) - 3).clip(0, 255).astype(np.uint8).tobytes() for p in root.rglob("tokens.npy"))


def test_a_second_build_waits_and_names_the_first(tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "db"
    root.mkdir()
    script = (
        "import sys, time; from pathlib import Path; from lightning_align.retrieval.access import one_build\n"
        "from lightning_align.runtime.team import Team\n"
        "with one_build(Path(sys.argv[1]), Team()):\n    print('held', flush=True); time.sleep(float(sys.argv[2]))\n"
    )
    first = subprocess.Popen([sys.executable, "-c", script, str(root), "600"], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        told: list[str] = []
        with pytest.MonkeyPatch.context() as patch:

            def warning(message: str, *values: object) -> None:
                told.append(message % values)
                first.kill()  # a lock ends with its process

            patch.setattr(access._logger, "warning", warning)
            build(root, folder)
        assert len(told) == 1 and f"process {first.pid} on " in told[0] and str(root) in told[0]
        assert not (root / access.LOCK).exists()
    finally:
        first.kill()
        first.communicate()


def test_a_database_may_lie_in_the_folder_of_its_texts(folder: Path) -> None:
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"left out 1 \(db\): a retrieval database"):
            names = build(folder / "db", folder).chunks.document_ids
        assert names == sorted(path.name for path in folder.iterdir() if path.is_file())
    assert len([*(folder / "db").glob("chunks-*")]) == 1
    with pytest.raises(ValueError, match=r"must not be files of the database, but they list .build.lock"):
        build(folder, folder)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_database_needs_a_folder(kind: str, tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "db"
    if kind == "file":
        root.touch()
    else:
        root.symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"must be a folder for the database, but {root} is a {kind}"):
        build(root, folder)


def test_nothing_is_written_to_a_finished_database(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "db"
    made = build(root, folder)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    monkeypatch.setattr(os, "access", lambda path, mode, **_: mode != os.W_OK)  # root may write everywhere

    def refuse(*_: object) -> None:
        raise AssertionError("written to a folder that may only be read")

    monkeypatch.setattr(stages, "publish", refuse)
    again = build(root, folder)
    assert again.manifest == made.manifest
    assert open_retriever(root).search([made.chunks.chunk(0)], 1).ids.shape == (1, 1)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def bpe(path: Path) -> str:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*alphabet, "<pad>", "<s>", "</s>", "<end>"])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(["<pad>", "<s>", "</s>", "<end>"])
    model.save(str(path))
    return path.name


@pytest.mark.parametrize("form", ["bytes", "object", "file", "file with options", "transformers", "transformers object"])
def test_a_database_opens_anywhere(form: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name: Any = bpe(tmp_path / "tok.json")
    if form.startswith("transformers"):
        load_tokenizer(name).save("saved")  # type: ignore[attr-defined]  # of a file
        name = "saved" if form == "transformers" else load_tokenizer("saved")
    elif form in ("bytes", "object"):
        name = "bytes" if form == "bytes" else load_tokenizer("bytes")
    elif form == "file with options":
        name = "tok.json?eos_token=<end>"
    expected = build(Path("db"), folder, tokenizer=name).chunks.tokenizer_fingerprint
    for made in ("tok.json", "saved"):
        path = tmp_path / made
        if path.exists():
            path.rename(tmp_path / f"{made}.gone")
    (tmp_path / "elsewhere").mkdir()
    Path("db").rename(tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir("/")
    moved = tmp_path / "elsewhere" / "moved"
    retriever = open_retriever(moved)
    assert retriever.tokenizer_fingerprint == expected
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "note.txt").write_text("a note on plums\n")
    add_documents(moved, str(tmp_path / "more"))
    gone = delete_documents(moved, ["note.txt"])
    assert gone.manifest["generation"] == 2 and gone.chunks.tokenizer_fingerprint == expected
    other = "bytes" if form not in ("bytes", "object") else str(tmp_path / "tok.json.gone")
    if other != "bytes":
        Path(other).rename(tmp_path / "other.json")
        other = str(tmp_path / "other.json")
    with pytest.raises(ValueError, match="`tokenizer` must be the one that"):
        open_retriever(moved, tokenizer=other)


def test_a_tokenizer_of_another_library_is_given_again(tmp_path: Path, folder: Path) -> None:
    build(tmp_path / "db", folder, tokenizer=Bytes())
    with pytest.raises(ValueError, match="Pass an equal one as `tokenizer`"):
        open_retriever(tmp_path / "db")
    assert open_retriever(tmp_path / "db", tokenizer=Bytes()).tokenizer_fingerprint == "other-bytes"  # type: ignore[arg-type]


def test_a_changed_copy_is_refused(tmp_path: Path, folder: Path) -> None:
    name = bpe(tmp_path / "tok.json")
    build(tmp_path / "db", folder, tokenizer=str(tmp_path / name))
    (copy,) = (tmp_path / "db").glob("tokenizer-*/tokenizer.json")
    copy.write_text(copy.read_text().replace('"!": 0', '"!": 1').replace('"\\"": 1', '"\\"": 0'))
    with pytest.raises(ValueError, match="is not the one that the chunks were made with"):
        open_retriever(tmp_path / "db")


def test_deleted_text_leaves_the_disk_and_stays_deleted(tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "db"
    num_documents = len(build(root, folder).chunks.document_ids)
    assert on_disk(root, SECRET)
    delete_documents(root, ["secret.txt"])
    assert on_disk(root, SECRET), "until it is compacted"
    compacted = compact_database(root)
    assert not on_disk(root, SECRET) and not on_disk(root, "xyzzyplugh")
    names = [f"{number}.txt" for number in range(8)]
    assert compacted.chunks.document_ids == names and compacted.manifest["deleted"] == []
    # equal to a database that never had the document
    (tmp_path / "without").mkdir()
    for name in names:
        (tmp_path / "without" / name).write_bytes((folder / name).read_bytes())
    never = build(tmp_path / "other", tmp_path / "without")
    for table in ("ids", "mask", "distances"):
        assert np.array_equal(getattr(compacted.neighbors, table), getattr(never.neighbors, table)), table
    assert np.array_equal(compacted.chunks.tokens, never.chunks.tokens)
    # the same build again writes nothing of it
    again = build(root, folder)
    assert again.manifest == compacted.manifest and not on_disk(root, SECRET)
    assert compact_database(root).manifest == compacted.manifest
    # another build leaves the deleted document out, as before
    (folder / "9.txt").write_text("document number 9, new\n" * 6)
    with pytest.warns(UserWarning, match="1 documents that were deleted from it stay deleted, such as 'secret.txt'"):
        rebuilt = build(root, folder)
    number = rebuilt.chunks.document_ids.index("secret.txt")
    assert rebuilt.manifest["deleted"] == [number] and len(rebuilt.chunks.document_ids) == num_documents + 1


def test_a_deleted_document_can_be_added_again(tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "db"
    build(root, folder)
    delete_documents(root, ["secret.txt"])
    compact_database(root)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "secret.txt").write_text(f"{SECRET}\n")
    added = add_documents(root, str(tmp_path / "more"))
    assert added.chunks.document_ids[-1] == "secret.txt" and "removed" not in added.manifest


def test_former_generations_leave_the_disk(tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "db"
    build(root, folder)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "note.txt").write_text("a note on plums\n" * 4)
    (root / "notes of a person").mkdir()
    added = add_documents(root, str(tmp_path / "more"))
    before = open_retriever(root)
    folders = len(list(root.iterdir()))
    compacted = compact_database(root)
    assert len(list(root.iterdir())) < folders and (root / "notes of a person").is_dir()
    assert compacted.chunks.document_ids == added.chunks.document_ids
    assert before.search([compacted.chunks.chunk(0)], 1).ids.shape == (1, 1), "an open retriever goes on"
    assert build(root, folder).manifest == compacted.manifest, "and keeps the added document"


def test_many_deletions_compact_by_themselves(tmp_path: Path, folder: Path) -> None:
    build(tmp_path / "db", folder)
    few = delete_documents(tmp_path / "db", ["secret.txt"])
    assert few.manifest["deleted"]
    most = delete_documents(tmp_path / "db", [f"{number}.txt" for number in range(6)])
    assert most.manifest["deleted"] == [] and most.chunks.document_ids == ["6.txt", "7.txt"]
    with pytest.raises(ValueError, match="`compact_above` must be a share"):
        delete_documents(tmp_path / "db", ["6.txt"], compact_above=2)


class Stopped(BaseException):
    pass


def test_a_compaction_that_is_stopped_anywhere_is_done_by_the_next(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(name: str) -> Path:
        root = tmp_path / name
        build(root, folder)
        delete_documents(root, ["secret.txt"])
        return root

    expected = prepared("whole")
    compact_database(expected)
    wanted = content(expected)
    real, left = stages.publish, 0

    def publish(*arguments: Any) -> None:
        nonlocal left
        if left == 0:
            raise Stopped
        left -= 1
        real(*arguments)

    stopped = 0
    for number in range(0, 60, 4):
        root = prepared(f"stopped{number}")
        left = number
        with monkeypatch.context() as patch:
            patch.setattr(stages, "publish", publish)
            try:
                compact_database(root)
            except Stopped:
                stopped += 1
            else:
                break
        assert open_retriever(root).search([[8, 9, 10]], 1).ids.shape == (1, 1), "the former generation is whole"
        compact_database(root)
        assert content(root) == wanted, number
    assert stopped >= 3, "and the last attempt was not stopped"


def test_sigterm_ends_a_build_at_once_and_it_goes_on(tmp_path: Path, folder: Path) -> None:
    script = (
        "import sys, time; from lightning_align import build_database\n"
        "from lightning_align.data.documents import DocumentSource, load_documents\n"
        "class Slow(DocumentSource):\n"
        "    inner = load_documents(sys.argv[2])\n"
        "    def documents(self):\n"
        "        for document in self.inner.documents():\n"
        "            print('read', flush=True); time.sleep(float(sys.argv[3])); yield document\n"
        "build_database(sys.argv[1], Slow(), encoder='bm25', chunk_size=16, k=1)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "db"), str(folder)]
    process = subprocess.Popen([*command, "600"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "read\n"
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - started < 30
    assert "stopped by SIGTERM. Repeat the command to go on" in error and "Traceback" not in error
    assert not (tmp_path / "db" / access.LOCK).exists()
