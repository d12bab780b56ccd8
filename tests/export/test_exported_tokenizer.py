"""The tokenizer of an exported folder is the tokenizer of the run, whatever kind it is."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align.cli import run
from lightning_align.data.tokenizer import ByteTokenizer, describe_tokenizer, load_tokenizer, tokenizer_differences
from lightning_align.data.tokenizer.record import has_other_tokens
from lightning_align.training.tokenizer import record_of
from tests.cli.runs import TINY, checkpoint, config, fit
from tests.data.helpers import chat_tokenizer

TEXTS = ["What is 2+2?", " four\n\n\tand  more ", "Zażółć 你好 🙂", "it's <|user|> x"]
CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "Hi 1"}, {"role": "assistant", "content": "Yo 2"}]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    rows = [{"prompt": f"{i}+1=", "response": f"{i + 1} is it"} for i in range(12)]
    Path("sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def _make(kind: str, folder: Path) -> str:
    if kind == "bytes":
        return "bytes"
    if kind.startswith("file"):
        run(["tokenizer", "sft.jsonl", "--output", "t.json", "--vocab_size", "270"])
        return "t.json" if kind == "file" else "t.json?bos="
    made: Any = chat_tokenizer(TEMPLATE if kind == "chat" else "", folder)
    made.save("theirs")
    if kind == "no template":
        Path("theirs/chat_template.jinja").unlink(missing_ok=True)
        settings = json.loads(Path("theirs/tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        Path("theirs/tokenizer_config.json").write_text(json.dumps(settings))
    return "./theirs"


def _fit(tokenizer: str, folder: Path, **model: Any) -> Any:
    size = {**TINY, "init_args": {**TINY["init_args"], "num_tokens": 400}}  # type: ignore[dict-item]
    init_args = {"backbone": size, **model}
    words = ["--data.tokenizer", tokenizer, "--data.max_length", "64"]
    return fit("sft", folder, "sft.jsonl", *words, model={"class_path": "SFTModule", "init_args": init_args})


def _same(tokenizer: str, exported: str) -> None:
    """Compare what training sees with what this package and transformers make of the exported folder."""
    from transformers import AutoTokenizer

    own, theirs, served = load_tokenizer(tokenizer), load_tokenizer(exported), AutoTokenizer.from_pretrained(exported)
    assert tokenizer_differences(describe_tokenizer(own), describe_tokenizer(theirs)) == []
    start = [] if own.bos_id is None else [own.bos_id]
    for text, encoding in zip(TEXTS, own.encode_batch(TEXTS), strict=True):
        assert theirs.encode_batch([text])[0].ids == encoding.ids
        assert served(text)["input_ids"] == [*start, *encoding.ids]
        assert theirs.decode(encoding.ids) == text == served.decode(encoding.ids)
    assert served.eos_token_id == own.eos_id
    for generate in (False, True):
        messages = CHAT[:2] if generate else CHAT
        segments = own.render(messages, add_generation_prompt=generate)
        ids = start if not segments[0].text.startswith("<bos>") else []
        for segment in segments:
            ids = ids + own.encode_batch([segment.text])[0].ids + ([own.eos_id] if segment.eos else [])
        rendered = served.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False)
        assert served(rendered, add_special_tokens=False)["input_ids"] == ids


@pytest.mark.parametrize("kind", ["bytes", "file", "file without bos", "chat", "no template"])
def test_a_run_exports_its_own_tokenizer(kind: str, folder: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer = _make(kind, folder)
    callback = {"class_path": "ExportModel", "init_args": {"folder": "at_the_end"}}
    Path("export.yaml").write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
    cli = _fit(tokenizer, folder) if kind != "bytes" else fit("sft", folder, "sft.jsonl", "--config", "export.yaml")
    run(["export", checkpoint(cli), "--output", "late"])
    _same(tokenizer, "late")
    if kind == "bytes":
        _same(tokenizer, "at_the_end")
    # The exported tokenizer continues the run, and can be given by its own name.
    assert not has_other_tokens(record_of(checkpoint(cli)) or {}, record_of("late") or {})
    run(["export", checkpoint(cli), "--output", "again", "--tokenizer", "late"])
    _same(tokenizer, "again")


def test_another_tokenizer_is_refused_with_what_differs(folder: Path) -> None:
    pytest.importorskip("transformers")
    path = checkpoint(_fit(_make("chat", folder), folder))
    run(["tokenizer", "sft.jsonl", "--output", "t.json", "--vocab_size", "265"])
    other = Path("other")
    loaded: Any = load_tokenizer("./theirs")
    loaded.save(other)
    file = other / ("chat_template.jinja" if (other / "chat_template.jinja").is_file() else "tokenizer_config.json")
    file.write_text(file.read_text().replace("[{{ m.role }}]", "<{{ m.role }}>"))
    faults = {"bytes": r"other tokens \(259 tokens instead of", "t.json": "other tokens", "./other": "template"}
    for given, fault in faults.items():
        with pytest.raises(SystemExit, match=rf"trained with, \./theirs, but {given} is another one: .*{fault}"):
            run(["export", path, "--output", "out", "--tokenizer", given])
        assert not Path("out").exists()
    with pytest.warns(UserWarning, match="not the tokenizer .* another chat template"):
        run(["export", path, "--output", "out", "--tokenizer", "./other", "--force_tokenizer", "true"])
    _same("./other", "out")


def test_a_sequence_without_the_first_token_is_another_tokenizer(folder: Path) -> None:
    path = checkpoint(_fit(_make("file", folder), folder))
    with pytest.raises(SystemExit, match="begins with no special id and ends with id 2, instead of: begins with id 1"):
        run(["export", path, "--output", "out", "--tokenizer", "t.json?bos="])


def test_a_tokenizer_that_is_gone_or_changed_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = _fit(_make("file", folder), folder)
    path = checkpoint(cli)
    kept = Path("t.json").read_text()
    for change, fault in (
        (lambda: Path("t.json").unlink(), r"is not found \(tokenizer t\.json: there is no such file"),
        (lambda: run(["tokenizer", "sft.jsonl", "--output", "t.json", "--vocab_size", "260"]), "t.json has changed since then"),
    ):
        change()
        with pytest.raises(SystemExit, match=rf"(?s)trained with, t\.json, .*{fault}.*--tokenizer none"):
            run(["export", path, "--output", "out"])
    run(["export", path, "--output", "alone", "--tokenizer", "none"])
    assert Path("alone/model.safetensors").is_file() and not Path("alone/tokenizer.json").exists()
    # The run's own export has it.
    (Path(path).parent.parent / "export").mkdir()
    Path("moved.json").write_text(kept)
    tokenizer: Any = load_tokenizer("moved.json")
    tokenizer.save(Path(path).parent.parent / "export")
    run(["export", path, "--output", "out"])
    Path("t.json").write_text(kept)
    _same("t.json", "out")
    # A checkpoint of earlier versions names none.
    saved = torch.load(path, weights_only=True)
    del saved["tokenizer"]
    torch.save(saved, "old.ckpt")
    capsys.readouterr()
    run(["export", "old.ckpt", "--output", "old"])
    assert "without a tokenizer" in capsys.readouterr().out


def test_a_run_from_another_folder_finds_its_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(checkpoint(_fit(_make("file", folder), folder))).resolve()
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    run(["export", str(path), "--output", "out"])
    _same(str(folder / "t.json"), "out")


def test_adapters_get_a_tokenizer_that_is_given(folder: Path) -> None:
    cli = _fit(_make("file", folder), folder)
    start = checkpoint(cli)
    words = ["--model.init_from", start, "--data.tokenizer", "t.json"]
    model = {"class_path": "SFTModule", "init_args": {"lora": {"rank": 2}}}
    tuned = checkpoint(fit("sft", folder, "sft.jsonl", *words, model=model))
    run(["export", tuned, "--output", "bare", "--adapter_only", "true"])
    assert not Path("bare/tokenizer.json").exists()
    with pytest.raises(SystemExit, match="is another one"):
        run(["export", tuned, "--output", "wrong", "--adapter_only", "true", "--tokenizer", "bytes"])
    run(["export", tuned, "--output", "full", "--adapter_only", "true", "--tokenizer", "t.json"])
    _same("t.json", "full")


def test_records_of_earlier_versions(tmp_path: Path) -> None:
    """They have no more than three hashes, and called the vocabulary of bytes by another hash."""
    earlier = {"name": "bytes", "fingerprint": "bytes-1", "vocabulary": "bytes-1"}
    ByteTokenizer().save(tmp_path)
    assert tokenizer_differences(earlier, describe_tokenizer(ByteTokenizer())) == []
    exported = record_of(tmp_path)
    assert exported is not None and tokenizer_differences(earlier, exported) == []
    run(["tokenizer", "sft.jsonl", "--output", "t.json", "--vocab_size", "259"])
    other = describe_tokenizer(load_tokenizer("t.json"))
    assert has_other_tokens(earlier, other) and has_other_tokens(other, earlier)
    short = {name: other[name] for name in ("name", "fingerprint", "vocabulary")}
    changed = describe_tokenizer(load_tokenizer("t.json?eos=<pad>"))
    assert tokenizer_differences(short, changed) == [
        "it has another chat template, other special tokens or another preprocessing"
    ]


def test_a_folder_is_compared_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ByteTokenizer().save(tmp_path)
    monkeypatch.setattr("lightning_align.training.tokenizer.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    record = record_of(tmp_path)
    assert record is not None and not has_other_tokens(describe_tokenizer(ByteTokenizer()), record)
    assert config("sft", tmp_path)
