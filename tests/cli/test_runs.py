"""The command line from rows to checkpoints: fit, validate, predict, resume."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_align import DPOModule
from lightning_align.cli import AlignCLI, run
from tests.charts import lines_of
from tests.cli.runs import ROOT, TINY, checkpoint, config, fit, write_rows


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
    charts = lines_of(cli.trainer.log_dir)
    assert charts["loss: training and validation"] == ["train/loss", "val/loss"]
    assert charts["rewards: chosen above rejected"] == ["val/rewards/chosen", "val/rewards/rejected"]
    assert all(charts.values()), charts
    assert (Path(str(cli.trainer.log_dir)) / "samples.jsonl").is_file()
    assert (Path(str(cli.trainer.log_dir)) / "ledger.json").is_file()


def test_two_runs_in_one_folder_do_not_collide(folder: Path, sft_rows: str) -> None:
    for _ in range(2):
        fit("sft", folder, sft_rows, "--trainer.logger", "false", "--trainer.default_root_dir", "here")
    assert (folder / "here" / "config.yaml").is_file()
    assert (folder / "here" / "config_1.yaml").is_file()
    assert len(list((folder / "here").rglob("*.ckpt"))) == 2


def test_a_run_without_a_logger_leaves_the_working_directory_clean(folder: Path, sft_rows: str) -> None:
    fit("sft", folder, sft_rows, "--trainer.logger", "false")
    assert {"config.yaml", "ledger.json", "checkpoints"} <= {path.name for path in (folder / "runs/unlogged").iterdir()}
    command = ["--config", config("sft", folder), "--data.validation", sft_rows, "--trainer.logger", "false"]
    for name in ("fit", "validate"):  # both find the run again
        more = ["--data.train", sft_rows, "--trainer.max_steps", "3"] if name == "fit" else []
        cli = run([name, *command, *more, "--ckpt_path", "auto"])
        assert cli is not None and cli.trainer.ckpt_path is not None
    assert {path.name for path in folder.iterdir()} == {"sft.jsonl", "sft.yaml", ".cache", "runs"}
    assert not (folder / "runs/unlogged/config_2.yaml").exists()  # a validation keeps no record


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


@pytest.mark.parametrize("trainer", ["cpu", "gpu", "ddp", "fsdp2", "nodes"])
def test_every_trainer_configuration_parses(folder: Path, trainer: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        paths = [str(ROOT / "configs" / path) for path in ("sft/arithmetic.yaml", f"trainer/{trainer}.yaml")]
        run(["fit", "--config", paths[0], "--config", paths[1], "--print_config"])
    assert "accelerator" in capsys.readouterr().out


def test_a_row_over_the_limit_is_counted_beside_the_run(folder: Path, pair_rows: str) -> None:
    with Path(pair_rows).open("a") as file:
        file.write(json.dumps({"prompt": "x" * 99, "chosen": "b", "rejected": "c"}) + "\n")
    cli = fit("dpo", folder, pair_rows)
    ledger = json.loads((Path(str(cli.trainer.log_dir)) / "ledger.json").read_text())
    assert ledger["train"]["counts"] == {"dropped/prompt_too_long": 1, "kept": 12}


def test_a_tokenizer_of_ones_own(folder: Path, sft_rows: str) -> None:
    run(["tokenizer", sft_rows, "--output", "tokenizer.json", "--vocab_size", "300"])
    backbone = {"class_path": "lightning_align.PaLM", "init_args": {**TINY["init_args"], "num_tokens": 300}}
    model = {"class_path": "SFTModule", "init_args": {"backbone": backbone}}
    data = ["--data.train", sft_rows, "--data.tokenizer", "tokenizer.json"]
    cli = run(["fit", "--config", config("sft", folder, model=model), *data])
    assert cli is not None
    assert cli.trainer.global_step == 3


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


def test_a_fused_optimizer_is_clipped_in_bfloat16(folder: Path, sft_rows: str) -> None:
    optimizer = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.fused", "true"]
    cli = fit("sft", folder, sft_rows, *optimizer, "--trainer.gradient_clip_val", "1.0", "--trainer.precision", "bf16-mixed")
    assert cli.trainer.global_step == 3
