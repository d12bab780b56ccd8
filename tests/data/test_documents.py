"""Sources of documents: odd entries of folders, files that are no text, and files of many documents."""

import gzip
import os
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lightning_align.data import texts
from lightning_align.data.documents import FileDocuments, FolderDocuments, RowDocuments, load_documents
from lightning_align.data.texts import list_entries
from tests.retrieval.helpers import write_folder


def test_entries_that_are_no_files_are_named_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, {"a.txt": "A", "sub/b.txt": "B", "folder.txt/c.txt": "C", "left/d.txt": "D"})
    (tmp_path / "sub" / "loop").symlink_to("..")
    for number in range(5):
        (tmp_path / f"{number}.txt").symlink_to("nowhere")
    (tmp_path / "left" / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        with pytest.warns(UserWarning) as seen:
            found = [d.id for d in FolderDocuments(str(tmp_path), glob="**/*.txt", exclude=["left"]).documents()]
    assert found == ["a.txt", "folder.txt/c.txt", "sub/b.txt"]
    said = "\n".join(sorted(str(warning.message) for warning in seen))
    for message in (
        "left out 1 (sub/loop): a link to a folder, which is not followed",
        "left out 5 (0.txt, 1.txt, 2.txt and 2 more): a link that leads nowhere",
        "left out 2 (pipe.txt, socket.txt): a socket, a pipe or a device",
        "left out 1 (folder.txt): a folder that is named like a file",
    ):
        assert message in said
    assert len(seen) == 4


def test_names_that_are_not_utf8_have_a_name(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("x")
    except OSError:
        pytest.skip("this file system takes only names of UTF-8")
    for part in ("train", "held_out"):
        source = FolderDocuments(str(tmp_path), part=part, held_out=0.999999 if part == "held_out" else 1e-6)
        assert [tuple(document) for document in source.documents()] == [("caf\\xe9.txt", "x")]


def test_files_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, {"a.txt": "A", "b.txt": "B"})
    opened = Path.open

    def refuse(path: Path, *arguments: object) -> object:
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"b.txt is not a text file: it cannot be read \(Permission denied\)"):
        list(FolderDocuments(str(tmp_path)).documents())
    with pytest.warns(UserWarning, match="b.txt is skipped: it cannot be read"):
        assert len(list(FolderDocuments(str(tmp_path), on_bad_file="skip").documents())) == 1


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.pdf", b"%PDF-1.4\n%text", "it is PDF.* Convert it to plain text first, such as with pdftotext"),
        ("a.txt", b"%PDF-1.4\n%text", "it is PDF"),
        ("a.html", b"<p>text</p>", "it is HTML.* trafilatura"),
        ("a.txt", b"\xef\xbb\xbf \n<!DOCTYPE HTML>\n<html>", "it is HTML"),
        ("a.docx", b"PK\x03\x04", "it is an office document.* pandoc"),
        ("a.rtf", b"{\\rtf1 text}", "an office document"),
        ("a.txt", "text".encode("utf-16"), "begins UTF-16. Convert it with iconv"),
        ("a.txt", b"caf\xe9", "byte 4 is 0xe9, which is not UTF-8"),
        ("a.txt", "café".encode()[:-1], "byte 4 is 0xc3, which is not UTF-8"),
        ("a.txt", b"ab\0", "byte 3 is 0, as in a binary file"),
        ("a.txt.gz", gzip.compress(b"some text" * 9, mtime=0)[:-9], "cannot be read"),
        ("a.jsonl", b"{}\n", "file of rows. Give its path itself"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0), "file of rows. Give its path itself"),
    ],
)
def test_files_that_are_no_text_are_refused_by_name(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a text file: .*{match}"):
        list(FolderDocuments(str(tmp_path)).documents())


def test_positions_are_of_the_file_in_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_PIECE", 4)
    (tmp_path / "a.txt").write_text("héllo wörld, 日本語のテキスト", encoding="utf-8")
    assert texts.read_text(tmp_path / "a.txt") == "héllo wörld, 日本語のテキスト"
    (tmp_path / "a.txt").write_bytes(b"abc\xc3\xa9defg\xe9")
    with pytest.raises(ValueError, match="byte 10 is 0xe9"):
        texts.read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("separator", ["\n\n", "<|end|>", "a"])
def test_a_separator_makes_documents_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, separator: str
) -> None:
    monkeypatch.setattr(texts, "_PIECE", piece)
    whole = separator.join(["one\n", "", "zwei é", " \n", "thr<|en|", "fou\nr"]) + separator
    expected = [text for text in whole.split(separator) if text.strip()]
    content = whole.encode()
    (tmp_path / "c.txt").write_bytes(content)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(content, mtime=0))
    (tmp_path / "c.txt.zst").write_bytes(pa.compress(content, codec="zstd", asbytes=True))
    for name in ("c.txt", "c.txt.gz", "c.txt.zst"):
        found = list(FileDocuments(str(tmp_path / name), separator=separator).documents())
        assert [d.text for d in found] == expected and [d.id for d in found] == [
            f"{name}#{i}" for i in range(1, len(expected) + 1)
        ]
    assert len(list(FolderDocuments(str(tmp_path), separator=separator).documents())) == 3 * len(expected)


def test_a_path_of_a_file_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("x\n\ny")
    (tmp_path / "r.jsonl.zst").write_bytes(pa.compress(b'{"text": "row"}\n', codec="zstd", asbytes=True))
    assert [tuple(d) for d in load_documents(str(tmp_path / "c.txt")).documents()] == [("c.txt", "x\n\ny")]
    rows = load_documents(str(tmp_path / "r.jsonl.zst"))
    assert isinstance(rows, RowDocuments) and [tuple(d) for d in rows.documents()] == [("1", "row")]
    with pytest.raises(ValueError, match="`separator` must be a text"):
        FileDocuments(str(tmp_path / "c.txt"), separator="")
    with pytest.raises(ValueError, match="`path` must be a text file"):
        FileDocuments(str(tmp_path / "no.txt"))


def test_a_split_of_a_file_is_complete_and_an_empty_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("\n\n".join(f"document {i}" for i in range(100)))
    parts = [FileDocuments(str(path), separator="\n\n", part=part, held_out=0.2) for part in ("train", "held_out")]
    train, held_out = ({d.id for d in part.documents()} for part in parts)
    assert not train & held_out and len(train | held_out) == 100 and 8 < len(held_out) < 35
    with pytest.raises(ValueError, match=r"no document in the part 'held_out': all 1 are in the other part.*`separator`"):
        list(FileDocuments(str(path), part="held_out", held_out=1e-6).documents())
    with pytest.raises(ValueError, match=r"no file that matches .*1 match, but are in the other part. Change `held_out`"):
        list(FolderDocuments(str(tmp_path), part="held_out", held_out=1e-6).documents())


@pytest.mark.parametrize("exclude", [["**/b", "**/*.md"], ["a/b", "**/c/*"], ["**/.h*", "a/**/c"], []])
@pytest.mark.parametrize("patterns", [["**/*"], ["**/*.t?t"], ["a/*", "**/b/*.txt"], ["**/[ab]*", "*.md"]])
def test_entries_are_those_of_glob(tmp_path, patterns, exclude):
    draw = np.random.default_rng(0)
    for _ in range(40):
        folder = tmp_path.joinpath(*draw.choice(["a", "b", "c", ".hidden", "d.txt"], draw.integers(0, 4)))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(draw.choice(["a.md", "b.txt", ".h.txt", "x"]))).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    left_out = {path for pattern in exclude for path in tmp_path.glob(pattern)}
    expected = {
        str(path.relative_to(tmp_path))
        for pattern in patterns
        for path in tmp_path.glob(pattern)
        if path.is_file() and left_out.isdisjoint((path, *path.parents))
    }
    assert list(list_entries(tmp_path, patterns, exclude)[0]) == sorted(expected)


@pytest.mark.parametrize("piece", [1, 2, 3, 1 << 20])
def test_an_empty_line_of_another_system_separates(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(texts, "_PIECE", piece)
    (tmp_path / "a.txt").write_bytes(b"one\r\nmore\r\n\r\ntwo\n\nthree\r\n\nfour\r\r\nfive\r\n")
    found = [document.text for document in FileDocuments(str(tmp_path / "a.txt"), separator="\n\n").documents()]
    assert found == ["one\r\nmore", "two", "three", "four\r\r\nfive\r\n"]
