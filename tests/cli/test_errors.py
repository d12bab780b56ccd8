"""The command line names what it cannot use, and what to do about it."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_align.cli import ResumeHint, run
from tests.cli.runs import checkpoint, config, fit


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model.init_args.betta", "1"], "betta"),
        (["--model.init_args.backbone.init_args.dept", "1"], "dept"),
        (["--data.init_args.batchsize", "1"], "batchsize"),
        (["--trainer.max_stepz", "1"], "max_stepz"),
        (["--model.init_args.loss", "sigmoidal"], "sigmoidal"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_misspelt_key_is_named(
    folder: Path, pair_rows: str, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(["fit", "--config", config("dpo", folder), "--data.init_args.train", pair_rows, *arguments])
    assert stopped.value.code not in (0, None)
    assert named in capsys.readouterr().err


def test_a_misspelt_key_of_a_file_is_named(folder: Path, pair_rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(Path(config("dpo", folder)).read_text())
    content["model"]["init_args"]["backbone"]["init_args"]["dimm"] = 3
    Path("wrong.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit):
        run(["fit", "--config", "wrong.yaml", "--data.init_args.train", pair_rows])
    assert "dimm" in capsys.readouterr().err


def test_bad_input_ends_before_the_first_step_and_says_what_to_do(folder: Path, pair_rows: str, sft_rows: str) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}

    def rows(name: str, *lines: str) -> str:
        (folder / name).write_text("".join(line + "\n" for line in lines))
        return name

    ok = json.dumps(good)
    cases = {
        "wrong path": ("there.jsonl", ["there.jsonl"]),
        "empty file": (rows("empty.jsonl"), ["empty.jsonl"]),
        "not JSON": (
            rows("json.jsonl", *[json.dumps({**good, "prompt": f"p{i}"}) for i in range(16)], "{oops"),
            ["json.jsonl:17"],
        ),
        "missing field": (
            rows("missing.jsonl", ok, json.dumps({"prompt": "x", "chosen": "b"})),
            ["missing.jsonl:2", "rejected"],
        ),
        "wrong type": (rows("type.jsonl", ok, json.dumps({**good, "chosen": 3})), ["type.jsonl:2", "chosen", "int"]),
        "empty response": (rows("none.jsonl", ok, json.dumps({**good, "chosen": ""})), ["none.jsonl:2", "chosen"]),
        "identical pair": (rows("same.jsonl", ok, json.dumps({**good, "rejected": "b"})), ["same.jsonl:2"]),
        "folder": (str(folder), [str(folder)]),
        "other form": (sft_rows, ["sft.jsonl:1", "chosen"]),
    }
    for name, (path, named) in cases.items():
        with pytest.raises(SystemExit) as stopped:
            fit("dpo", folder, path)
        message = str(stopped.value.code)
        assert all(word in message for word in named), (name, message)


def test_bad_weights_and_places_are_named(folder: Path, sft_rows: str, pair_rows: str) -> None:
    started = checkpoint(fit("sft", folder, sft_rows))
    wider = ["--model.init_args.backbone.init_args.dim", "32"]
    cases = [
        (["--model.init_args.init_from", started, *wider], ["token_emb.weight", "(259, 16)", "(259, 32)"]),
        (["--model.init_args.init_from", "none.ckpt"], ["none.ckpt"]),
        (["--model.init_args.init_from", pair_rows], ["pairs.jsonl", "cannot be read"]),
        (["--model.init_args.backbone.init_args.num_tokens", "100"], ["259", "100"]),
        (["--model.init_args.label_smoothing", "0.1", "--model.init_args.loss", "ipo"], ["label_smoothing", "ipo"]),
        (["--model.init_args.beta", "0"], ["beta"]),
    ]
    for arguments, named in cases:
        with pytest.raises(SystemExit) as stopped:
            fit("dpo", folder, pair_rows, *arguments)
        assert all(word in str(stopped.value.code) for word in named), (arguments, stopped.value.code)
    (folder / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        arguments = ["--data.init_args.predict", sft_rows, "--output", "file/out.jsonl"]
        run(["predict", "--config", config("sft", folder), *arguments])
    assert "file/out.jsonl" in str(stopped.value.code) or "out.jsonl" in str(stopped.value.code)


def test_a_checkpoint_that_cannot_be_gone_on_from_is_named(folder: Path, sft_rows: str, pair_rows: str) -> None:
    started = checkpoint(fit("sft", folder, sft_rows))
    (folder / "cut.ckpt").write_bytes(Path(started).read_bytes()[:-500])
    (folder / "sharded.ckpt").mkdir()
    (folder / "sharded.ckpt" / "meta.pt").touch()
    cases = [
        ("sft", ["none.ckpt"], ["none.ckpt", "no such file"]),
        ("sft", [sft_rows], ["sft.jsonl", "cannot be read"]),
        ("sft", ["cut.ckpt"], ["cut.ckpt", "cannot be read"]),
        ("sft", ["runs"], ["runs", "is a folder", "version_0"]),
        (
            "sft",
            ["sharded.ckpt"],
            ["sharded.ckpt", "trainer/fsdp2", "models.checkpoint sharded.ckpt sharded-whole.ckpt"],
        ),
        ("dpo", [started], ["SFTModule", "DPOModule", "--model.init_from"]),
        ("sft", [started, "--model.backbone.init_args.dim", "32"], ["another model", "(259, 16)", "(259, 32)"]),
    ]
    for name, given, named in cases:
        with pytest.raises(SystemExit) as stopped:
            fit(name, folder, sft_rows if name == "sft" else pair_rows, "--ckpt_path", *given)
        message = str(stopped.value.code)
        assert all(word in message for word in named), (given, message)
        assert "weights_only" not in message


def test_what_a_constructor_refuses_is_said_without_the_whole_configuration(folder: Path, sft_rows: str) -> None:
    model = {"class_path": "SFTModule"}
    with pytest.raises(SystemExit) as stopped:
        run(["fit", "--config", config("sft", folder, model=model), "--data.train", sft_rows])
    assert "`init_from` (a checkpoint), or both" in str(stopped.value.code)
    assert "Namespace" not in str(stopped.value.code)
    with pytest.raises(SystemExit, match=r"--data\.train"):
        run(["fit", "--config", config("sft", folder), "--data.validation", sft_rows])


def test_places_that_cannot_be_written_are_named(folder: Path, sft_rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for logger in ("TensorBoardLogger", "CSVLogger"):
        with pytest.raises(SystemExit, match=r"sft\.jsonl/logs: Not a directory"):
            fit("sft", folder, sft_rows, "--trainer.logger", logger, "--trainer.logger.save_dir", f"{sft_rows}/logs")
    with pytest.raises(SystemExit, match=r"^[^\n]*is a folder"):
        run(["predict", "--config", config("sft", folder), "--data.predict", sft_rows, "--output", "runs"])

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "here.ckpt")

    with monkeypatch.context() as patch:
        patch.setattr("lightning.fabric.plugins.io.torch_io._atomic_save", full)
        with pytest.raises(SystemExit, match=r"here\.ckpt: No space left on device"):
            fit("sft", folder, sft_rows)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(SystemExit, match=r"tokenizer\.json: cannot be written \(No space left on device\)"):
            run(["tokenizer", sft_rows, "--output", "tokenizer.json", "--vocab_size", "300"])


def test_who_stops_a_run_is_told_how_to_go_on(
    folder: Path, sft_rows: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = fit("sft", folder, sft_rows)
    assert any(isinstance(callback, ResumeHint) for callback in cli.trainer.callbacks)
    path = Path(checkpoint(cli))
    for hints in (1, 0):
        caplog.clear()
        with caplog.at_level("INFO"):
            ResumeHint().on_exception(cli.trainer, cli.model, KeyboardInterrupt())
        assert caplog.text.count(f"--ckpt_path {path}") == hints
        path.write_bytes(path.read_bytes()[:-500])  # as a full disk leaves it

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_align.data.tokenizer.training._texts_of_files", stop)
    with pytest.raises(SystemExit, match="130"):
        run(["tokenizer", sft_rows, "--output", "tokenizer.json"])
