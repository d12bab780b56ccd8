"""The command line as its users meet it: real configurations, real files, and everything they get wrong."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_align import DPOModule
from lightning_align.cli import AlignCLI, ResumeHint, run

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "class_path": "lightning_align.PaLM",
    "init_args": {"num_tokens": 259, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # The command line's own arguments are not pytest's.
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    return tmp_path


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def sft_rows(folder: Path) -> str:
    return write_rows(folder / "sft.jsonl", [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(12)])


@pytest.fixture
def pair_rows(folder: Path) -> str:
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 2)} for i in range(12)]
    return write_rows(folder / "pairs.jsonl", rows)


def config(name: str, folder: Path, **changes: object) -> str:
    """A small run's configuration file."""
    module = {"sft": "SFTModule", "dpo": "DPOModule"}[name]
    content: dict[str, object] = {
        "seed_everything": 3,
        "model": {"class_path": module, "init_args": {"backbone": TINY, "generation": {"max_new_tokens": 4}}},
        "data": {"class_path": module.replace("Module", "DataModule"), "init_args": {"batch_size": 4, "max_length": 32}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": "runs", "name": name, "default_hp_metric": False},
            },
        },
    }
    content.update(changes)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def fit(name: str, folder: Path, rows: str, *extra: str, **changes: object) -> AlignCLI:
    data = ["--data.init_args.train", rows, "--data.init_args.validation", rows]
    cli = run(["fit", "--config", config(name, folder, **changes), *data, *extra])
    assert cli is not None
    return cli


def checkpoint(cli: AlignCLI) -> str:
    return str(next(Path(cli.trainer.log_dir or "").rglob("*.ckpt")))


def test_from_rows_to_an_aligned_checkpoint(folder: Path, sft_rows: str, pair_rows: str) -> None:
    sft = fit("sft", folder, sft_rows, "--trainer.callbacks+", "SampleLogger", "--trainer.callbacks.max_new_tokens", "4")
    started = checkpoint(sft)
    dpo_config = folder / "dpo_only.yaml"
    content = yaml.safe_load(Path(config("dpo", folder)).read_text())
    del content["model"]["init_args"]["backbone"]  # the checkpoint says what it is of
    dpo_config.write_text(yaml.safe_dump(content))
    begin = ["--config", str(dpo_config), "--model.init_args.init_from", started]
    rows = ["--data.init_args.train", pair_rows, "--data.init_args.validation", pair_rows]
    dpo = run(["fit", *begin, *rows])
    assert dpo is not None
    aligned = checkpoint(dpo)

    validated = run(["validate", *begin, "--data.init_args.validation", pair_rows, "--ckpt_path", aligned])
    assert validated is not None
    before, after = dpo.trainer.callback_metrics, validated.trainer.callback_metrics
    assert float(after["val/loss"]) == pytest.approx(float(before["val/loss"]), abs=1e-6)
    assert {"val/rewards/chosen", "val/rewards/rejected", "val/rewards/margins", "val/rewards/accuracies"} <= set(after)

    run(["predict", *begin, "--data.init_args.predict", pair_rows, "--ckpt_path", aligned, "--output", "scores.jsonl"])
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [row["row"] for row in scores] == list(range(12))
    assert all(row["rewards_margins"] == pytest.approx(row["rewards_chosen"] - row["rewards_rejected"]) for row in scores)
    mean = sum(row["rewards_margins"] for row in scores) / 12
    assert mean == pytest.approx(float(after["val/rewards/margins"]), abs=1e-5)

    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": "1+1="}, {"prompt": "22+1="}])
    run(["predict", *begin, "--data.init_args.predict", prompts, "--ckpt_path", aligned, "--output", "texts.jsonl"])
    texts = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in texts] == ["1+1=", "22+1="]
    assert all(len(row["responses"]) == 1 for row in texts)


def test_a_checkpoint_outlives_the_file_that_it_began_from(folder: Path, sft_rows: str, pair_rows: str) -> None:
    started = checkpoint(fit("sft", folder, sft_rows))
    begin = ["--config", config("dpo", folder), "--model.init_from", started]
    dpo = run(["fit", *begin, "--data.train", pair_rows])
    assert dpo is not None
    aligned = checkpoint(dpo)
    Path(started).unlink()

    module = DPOModule.load_from_checkpoint(aligned, weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(module.policy.parameters(), dpo.model.policy.parameters(), strict=True))
    run(["predict", *begin, "--data.predict", sft_rows, "--ckpt_path", aligned, "--output", "texts.jsonl"])
    assert len((folder / "texts.jsonl").read_text().splitlines()) == 12
    with pytest.raises(SystemExit, match="init_from"):
        run(["validate", *begin, "--data.validation", pair_rows, "--ckpt_path", aligned])
    with pytest.raises(SystemExit, match="there is no such file"):
        run(["fit", *begin, "--data.train", pair_rows])


def test_tensorboard_shows_the_documented_names(folder: Path, pair_rows: str) -> None:
    cli = fit("dpo", folder, pair_rows, "--trainer.callbacks+", "SampleLogger", "--trainer.callbacks.max_new_tokens", "4")
    events = EventAccumulator(str(cli.trainer.log_dir))
    events.Reload()
    tags = events.Tags()
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"}
    expected = {f"{stage}/{name}" for stage in ("train", "val") for name in {"loss", *names}}
    expected |= {"train/lr", "train/grad_norm", "train/tokens_per_second", "train/padding_share"}
    assert expected <= set(tags["scalars"])
    assert "val/rewards/margins_histogram" in tags["histograms"]
    assert any(tag.startswith("val/samples/0") for tag in tags["tensors"])
    assert (Path(str(cli.trainer.log_dir)) / "samples.jsonl").is_file()
    assert (Path(str(cli.trainer.log_dir)) / "ledger.json").is_file()


def test_two_runs_in_one_folder_do_not_collide(folder: Path, sft_rows: str) -> None:
    for _ in range(2):
        fit("sft", folder, sft_rows, "--trainer.logger", "false", "--trainer.default_root_dir", "here")
    assert (folder / "here" / "config.yaml").is_file()
    assert (folder / "here" / "config_1.yaml").is_file()
    assert len(list((folder / "here").rglob("*.ckpt"))) == 2


def test_the_csv_logger_serves_as_well(folder: Path, sft_rows: str) -> None:
    fit("sft", folder, sft_rows, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "csv")
    (metrics,) = (folder / "csv").rglob("metrics.csv")
    assert "val/loss" in metrics.read_text().splitlines()[0]


def test_configurations_compose_and_a_later_one_wins(folder: Path, sft_rows: str) -> None:
    (folder / "later.yaml").write_text(
        "trainer:\n  max_steps: 2\nmodel:\n  init_args:\n    optimizer:\n      class_path: SGD\n      init_args: {lr: 0.5}\n"
    )
    cli = run(["fit", "--config", config("sft", folder), "--config", "later.yaml", "--data.init_args.train", sft_rows])
    assert cli is not None
    assert cli.trainer.global_step == 2
    assert type(cli.trainer.optimizers[0]).__name__ == "SGD"


def test_a_printed_configuration_parses_to_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sft/arithmetic", "dpo/arithmetic", "sft/jsonl", "dpo/jsonl"):
        extra = ["--model.init_args.init_from", "x.ckpt"] if name.startswith("dpo") else []
        if name == "sft/jsonl":
            extra = ["--config", str(ROOT / "configs/model/palm_small.yaml")]
        printed = []
        given = ["--config", str(ROOT / f"configs/{name}.yaml"), *extra]
        for _ in range(2):
            with pytest.raises(SystemExit, match="0"):
                run(["fit", *given, "--print_config"])
            printed.append(capsys.readouterr().out)
            Path("printed.yaml").write_text(printed[-1])
            given = ["--config", "printed.yaml"]
        assert printed[0] == printed[1]
        assert "Unable to serialize" not in printed[0]


@pytest.mark.parametrize("trainer", ["cpu", "gpu", "ddp", "fsdp2"])
def test_every_trainer_configuration_parses(folder: Path, trainer: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        paths = [str(ROOT / "configs" / path) for path in ("sft/arithmetic.yaml", f"trainer/{trainer}.yaml")]
        run(["fit", "--config", paths[0], "--config", paths[1], "--print_config"])
    assert "accelerator" in capsys.readouterr().out


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


def test_a_row_over_the_limit_is_counted_beside_the_run(folder: Path, pair_rows: str) -> None:
    with Path(pair_rows).open("a") as file:
        file.write(json.dumps({"prompt": "x" * 99, "chosen": "b", "rejected": "c"}) + "\n")
    cli = fit("dpo", folder, pair_rows)
    ledger = json.loads((Path(str(cli.trainer.log_dir)) / "ledger.json").read_text())
    assert ledger["train"]["counts"] == {"dropped/prompt_too_long": 1, "kept": 12}


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


def test_a_tokenizer_of_ones_own(folder: Path, sft_rows: str) -> None:
    run(["tokenizer", sft_rows, "--output", "tokenizer.json", "--vocab_size", "300"])
    backbone = {"class_path": "lightning_align.PaLM", "init_args": {**TINY["init_args"], "num_tokens": 300}}
    model = {"class_path": "SFTModule", "init_args": {"backbone": backbone}}
    data = ["--data.train", sft_rows, "--data.tokenizer", "tokenizer.json"]
    cli = run(["fit", "--config", config("sft", folder, model=model), *data])
    assert cli is not None
    assert cli.trainer.global_step == 3


@pytest.mark.parametrize("command", [["--help"], ["fit", "--help"], ["tokenizer", "--help"], ["judge", "--help"]])
def test_the_console_script_helps(command: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", "lightning_align", *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: lightning-align" in result.stdout
    assert result.stderr == ""


def test_what_a_command_says_wins_over_the_checkpoint_and_the_checkpoint_over_defaults(
    folder: Path, sft_rows: str, pair_rows: str
) -> None:
    started = checkpoint(fit("sft", folder, sft_rows))
    aligned = checkpoint(fit("dpo", folder, pair_rows, "--model.init_from", started, "--model.beta", "0.2"))
    (folder / "bare.yaml").write_text("model: {class_path: DPOModule}\ndata: {class_path: DPODataModule}\n")
    bare = ["--config", "bare.yaml", "--ckpt_path", aligned, "--trainer.accelerator", "cpu"]
    metrics = []
    for beta in ([], ["--model.beta", "0.4"]):
        cli = run(["validate", *bare, "--data.validation", pair_rows, *beta])
        assert cli is not None
        metrics.append(float(cli.trainer.callback_metrics["val/rewards/margins"]))
    assert metrics[1] == pytest.approx(2 * metrics[0])

    said = ["--model.generation.num_samples", "2", "--model.generation.temperature", "0.5"]
    cli = run(["predict", *bare, "--data.predict", sft_rows, "--output", "texts.jsonl", *said])
    assert cli is not None
    assert (cli.model.generation.max_new_tokens, cli.model.generation.temperature) == (4, 0.5)
    assert all(len(json.loads(line)["responses"]) == 2 for line in (folder / "texts.jsonl").read_text().splitlines())


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
            ["sharded.ckpt", "fsdp2.yaml", "models.checkpoint sharded.ckpt sharded-whole.ckpt"],
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


@pytest.mark.parametrize("end", [{"max_steps": 5}, {"max_epochs": 2}])
def test_a_run_that_ends_between_two_checkpoints_is_saved_to_its_end(end: dict[str, int], folder: Path, sft_rows: str) -> None:
    keep = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}

    def train(name: str, length: dict[str, int], *extra: str) -> AlignCLI:
        every = {"init_args": {"dirpath": name, "every_n_train_steps": 4, "save_last": True}}
        trainer = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "callbacks": [{**keep, **every}]}
        return fit("sft", folder, sft_rows, *extra, trainer={**trainer, "max_epochs": -1, **length})

    whole = train("whole", {"max_steps": 7})
    train("cut", end)
    steps = torch.load(folder / "cut" / "last.ckpt", weights_only=True)["global_step"]
    assert steps == end.get("max_steps", 6)
    resumed = train("cut", {"max_steps": 7}, "--ckpt_path", "cut/last.ckpt")
    ours, theirs = (cli.model.state_dict() for cli in (resumed, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


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


def test_a_fused_optimizer_is_clipped_in_bfloat16(folder: Path, sft_rows: str) -> None:
    optimizer = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.fused", "true"]
    cli = fit("sft", folder, sft_rows, *optimizer, "--trainer.gradient_clip_val", "1.0", "--trainer.precision", "bf16-mixed")
    assert cli.trainer.global_step == 3


def test_help_is_of_a_readable_length(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in ((["--help"], "judge"), (["fit", "--model.help", "DPOModule"], "lightning_align.PaLM")):
        with pytest.raises(SystemExit, match="0"):
            run(arguments)
        text = capsys.readouterr().out
        assert expected in text
        assert "torch.nn.Conv1d" not in text
        assert len(text.splitlines()) < 120


def test_help_documents_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    for group, names in (("model", ("SFTModule", "DPOModule")), ("data", ("SFTDataModule", "DPODataModule"))):
        for name in names:
            with pytest.raises(SystemExit, match="0"):
                run(["fit", f"--{group}.help", name])
            text = capsys.readouterr().out
            options = [line for line in text.splitlines() if line.startswith(f"  --{group}.")]
            assert options
            # An argument without a description shows its type alone.
            undocumented = [block for block in text.split(f"\n  --{group}.")[1:] if _description(block) == ""]
            assert not undocumented, (name, undocumented)


def _description(block: str) -> str:
    if "[CLASS_PATH_OR_NAME]" in block or block.startswith(("lora.", "generation.", "lora CONFIG", "generation CONFIG")):
        return "a nested group"
    return " ".join(block.partition("  ")[2].split()).partition("(type:")[0].partition("(required")[0].strip()
