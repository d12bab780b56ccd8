"""Files of a database that are cut, flipped, swapped, edited or removed: each is noticed and named, or made again."""

import json
import os
import pickle
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_align import add_documents, build_database, compact_database, delete_documents, open_retriever
from lightning_align.retrieval import access
from lightning_align.retrieval.database import HEAD, RetrievalDatabase
from lightning_align.retrieval.sealed import seal
from lightning_align.retro.datamodule import RETRODataModule
from lightning_align.runtime import files
from lightning_align.runtime.checksums import SEAL
from tests.retrieval.helpers import Listed, Projection, hashes, texts

ENCODER = Projection()


def build(root: Path, **options: Any) -> RetrievalDatabase:
    settings = {
        "encoder": ENCODER,
        "rerank": True,
        "chunk_size": 32,
        "k": 2,
        "queries": {"validation": Listed(texts(2, seed=7))},
    }
    return build_database(root, Listed(texts(6)), **{**settings, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "db"
    build(root)
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "db"))


def truncated(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def swapped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    i, j = draw.sample(range(len(content)), 2)
    changed[i], changed[j] = changed[j], changed[i]
    return bytes(changed)


def same(path: Path, before: bytes, after: bytes) -> bool:
    """Whether nothing was lost: equal bytes, or other white space of a JSON file."""
    if before == after:
        return True
    try:
        return path.suffix == ".json" and path.name != "leaks.json" and json.loads(before) == json.loads(after)
    except ValueError:
        return False


@pytest.mark.parametrize("harm", [truncated, flipped, swapped])
def test_every_damaged_file_is_noticed_and_named(root: Path, harm: Callable[[bytes, random.Random], bytes]) -> None:
    draw, tried = random.Random(0), 0
    used = RetrievalDatabase.open(root).manifest
    folders = {*used["stages"].values(), *used["queries"]["validation"].values()}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        if path != root / HEAD and path.parent.name not in folders:
            continue  # vectors of the query set, which nothing reads any more
        before = path.read_bytes()
        for _ in range(3):
            after = harm(before, draw)
            if same(path, before, after):
                continue
            path.write_bytes(after)
            with pytest.raises(ValueError) as error:
                RetrievalDatabase.open(root).verify()
            assert path.name in str(error.value) and str(path.parent) in str(error.value)
            tried += 1
        path.write_bytes(before)
    assert tried > 100
    assert RetrievalDatabase.open(root).verify()


@pytest.mark.parametrize("kind", ["chunks", "vectors", "index", "lexical", "neighbors"])
def test_a_damaged_stage_is_made_again(kind: str, root: Path, whole: Path) -> None:
    draw = random.Random(kind)
    folder = root / RetrievalDatabase.open(root).manifest["stages"][kind]
    path = draw.choice(sorted(folder.iterdir()))
    path.write_bytes(truncated(path.read_bytes(), draw))
    with pytest.warns(UserWarning, match="damaged and will be rebuilt"):
        build(root)
    assert hashes(root) == hashes(whole)


OTHER: tuple[Any, ...] = (None, 3, -1, 1e300, True, "x", "../../x", [], [3], ["x"], {}, {"x": 3}, {"x": None})


def others(content: Any) -> Iterator[Any]:
    """Yield JSON values in which a value was replaced by one of another shape, or a key is missing."""
    yield from OTHER
    if isinstance(content, dict):
        for name, value in content.items():
            yield {key: each for key, each in content.items() if key != name}
            yield from ({**content, name: other} for other in others(value))


@pytest.mark.parametrize("file", [HEAD, "chunks", "index", "lexical", "neighbors", "leaks.json"])
def test_a_json_file_of_another_shape_is_named(file: str, root: Path) -> None:
    def use() -> None:
        database = RetrievalDatabase.open(root)
        assert len(database.chunks.document_ids) == 6 and len(database.neighbors) and database.chunks.pad_id >= 0
        database.queries("validation")
        database.neighbors.hold()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            open_retriever(root, encoder=ENCODER).search([[40, 41]], 1)

    used = RetrievalDatabase.open(root).manifest
    path = {
        HEAD: root / HEAD,
        "leaks.json": root / used["queries"]["validation"]["neighbors"] / "leaks.json",
    }.get(file) or root / used["stages"][file] / "manifest.json"
    whole = json.loads(path.read_text())
    is_sealed = isinstance(whole, dict) and whole.pop(SEAL, None) is not None
    tried = 0
    for number, content in enumerate(others(whole)):
        if file != HEAD and number > len(OTHER) and number % 5:
            continue  # some of them take long enough
        # With a right hash, or each change would be found by that.
        path.write_bytes(seal(content) if is_sealed and isinstance(content, dict) else json.dumps(content).encode())
        try:
            use()
        except ValueError as error:
            assert str(root) in str(error) or "`encoder` must be" in str(error) or "tokenizer 'x'" in str(error), content
            tried += 1
        except UserWarning as warning:
            assert str(root) in str(warning)
            tried += 1
    assert tried >= len(OTHER) - 3


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", "a\\b", ""])
def test_no_name_leads_out_of_the_folder(name: str, root: Path) -> None:
    head = json.loads((root / HEAD).read_text())
    head.pop(SEAL)
    folder = root / head["stages"]["chunks"]
    for changed in (
        {**head, "base": name},
        {**head, "stages": {**head["stages"], "chunks": name}},
        {**head, "queries": {"validation": {**head["queries"]["validation"], "neighbors": name}}},
        {**head, "tokenizer": f"{name}?bos=x"},
    ):
        if name == "" and changed.get("tokenizer") != head["tokenizer"]:
            continue
        (root / HEAD).write_bytes(seal(changed))
        with pytest.raises(ValueError, match=r"database\.json cannot be used: it names"):
            RetrievalDatabase.open(root)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop(SEAL)
    (root.parent / "secret").write_text("x")
    for changed in ({**manifest, "files": {name: {"bytes": 1, "sha256": "0" * 64}}}, {**manifest, "stage": f"{name}/chunks"}):
        (folder / "manifest.json").write_bytes(seal(changed))
        (root / HEAD).write_bytes(seal(head))
        with pytest.raises(ValueError, match=r"manifest\.json is missing or damaged"):
            assert RetrievalDatabase.open(root).chunks.chunk_size


def test_a_flipped_byte_is_noticed_before_training_and_search(root: Path) -> None:
    used = RetrievalDatabase.open(root).manifest

    def flip(path: Path) -> bytes:
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        return before

    for path, loader in (
        (root / used["stages"]["chunks"] / "tokens.npy", "train"),
        (root / used["stages"]["neighbors"] / "ids.npy", "train"),
        (root / used["queries"]["validation"]["neighbors"] / "ids.npy", "val"),
        (root / used["queries"]["validation"]["chunks"] / "tokens.npy", "val"),
    ):
        before = flip(path)
        data = RETRODataModule(str(root), num_chunks=2)
        with pytest.raises(ValueError, match=rf"{path.name} does not match its hash\. Build the database again"):
            getattr(data, f"{loader}_dataloader")()
        path.write_bytes(before)
        getattr(data, f"{loader}_dataloader")()
    path = root / used["stages"]["index"] / "index.faiss"
    flip(path)
    with pytest.raises(ValueError, match=r"index\.faiss does not match its hash"):
        open_retriever(root, encoder=ENCODER)


def test_a_large_database_is_compared_only_when_asked_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = RetrievalDatabase.open(root)
    path = root / database.manifest["stages"]["chunks"] / "tokens.npy"
    size = path.stat().st_size
    path.write_bytes(bytes(size))
    assert not database.verify(at_most=size)
    assert database.verify(["index"], queries=[], at_most=1 << 20)
    with pytest.raises(ValueError, match=r"tokens\.npy does not match"):
        database.verify()


def test_an_open_reader_goes_on_after_a_compaction(root: Path) -> None:
    database, sent = RetrievalDatabase.open(root), pickle.dumps(RetrievalDatabase.open(root))
    batches = RETRODataModule(str(root), num_chunks=2, num_workers=0).train_dataloader()
    retriever = open_retriever(root, encoder=ENCODER)
    delete_documents(root, ["d0", "d1"], encoder=ENCODER)
    compact_database(root, encoder=ENCODER)
    assert retriever.search([[40, 41]], 2).tokens.ids.shape == (1, 2, 64)
    assert sum(len(batch["tokens"]) for batch in batches) > 2
    for late in (database, pickle.loads(sent)):
        with pytest.raises(ValueError, match=r"chunks-.* is missing\. If the database was compacted .* open it again"):
            assert late.chunks.tokens.size
    assert RetrievalDatabase.open(root).chunks.num_documents == 4


def test_temporary_files_of_killed_processes_are_removed(root: Path) -> None:
    (root / ".notes.tmp").write_text("of a person")
    left = [files.temporary_path(root / name) for name in (HEAD, "tokenizer-0123")]
    left[0].write_text("{")
    (left[1] / "inner").mkdir(parents=True)
    add_documents(root, Listed({"new": "a new text of some words"}), encoder=ENCODER)
    assert not any(path.exists() for path in left) and (root / ".notes.tmp").exists()


def test_a_folder_without_locks_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    temporary = files.temporary_path(tmp_path / "db" / HEAD)
    temporary.parent.mkdir()
    temporary.touch()
    with pytest.warns(UserWarning, match="has no locks, so builds in other processes are not noticed") as found:
        build(tmp_path / "db", encoder="bm25", rerank=False)
    assert sum("no locks" in str(each.message) for each in found) == 1
    assert temporary.exists(), "another build may be writing it"
    assert not os.path.exists(tmp_path / "db" / access.LOCK)


def test_file_names_that_are_not_utf8_can_be_deleted(tmp_path: Path) -> None:
    name = b"caf\xe9.txt".decode("utf-8", errors="surrogateescape")
    documents = {**texts(4), name: "words of a document with a strange name " * 5}
    build_database(tmp_path, Listed(documents), encoder="bm25", chunk_size=32, k=1)
    delete_documents(tmp_path, [name])
    made = compact_database(tmp_path)
    assert made.manifest["removed"] == [name] and RetrievalDatabase.open(tmp_path).manifest == made.manifest
