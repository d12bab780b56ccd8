"""Validation and test on several loaders: each has the metrics that it has alone, and all rows together theirs."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_align.calm.datamodule import CALMDataModule
from lightning_align.calm.module import CALMModule
from lightning_align.calm.spec import Augment
from lightning_align.cli import run
from lightning_align.dpo.datamodule import DPODataModule
from lightning_align.dpo.module import DPOModule
from lightning_align.dpo.monitor import PreferenceMonitor
from lightning_align.retro.datamodule import RETRODataModule
from lightning_align.retro.indexing import build_database
from lightning_align.retro.module import RETROModule
from lightning_align.sft.datamodule import SFTDataModule
from lightning_align.sft.module import SFTModule
from lightning_align.spin.callbacks import SelfPlayGeneration
from lightning_align.spin.datamodule import SPINDataModule
from lightning_align.spin.module import SPINModule
from lightning_align.training.callbacks import SampleLogger
from tests.cli.runs import TINY
from tests.data.helpers import write_jsonl
from tests.retro.toys import tiny_retro
from tests.toys import tiny_palm
from tests.training.runs import ADAMW, trainer

ROWS = [
    {
        "prompt": "p" * (1 + i % 3),
        "response": "ab" * (1 + i % 5),
        "chosen": "ab" * (1 + i % 5),
        "rejected": "c" * (1 + i % 4),
    }
    for i in range(12)
]
# Sets of other sizes, so that a mean of means is not the mean.
SETS = {"easy": ROWS[:3], "hard": ROWS[3:]}
SAME = {"rel": 1e-5, "abs": 1e-6}


def palm() -> Any:
    return tiny_palm(num_tokens=259)


def made(method: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """A module, and a data module of a training set and the validation and test sets in the options."""
    if method == "retro":
        for name, texts in {"docs": ["the quick brown fox jumps over the lazy dog"] * 4, **TEXTS}.items():
            (folder / name).mkdir(exist_ok=True)
            for number, text in enumerate(texts):
                (folder / name / f"{number}.txt").write_text(f"{text} {number}" * 2)
        if not (folder / "db").exists():
            queries = {name: str(folder / name) for name in TEXTS}
            build_database(folder / "db", str(folder / "docs"), encoder="bm25", queries=queries, chunk_size=8, k=2)
        sets = {stage: list(SETS) if isinstance(sets, dict) else Path(sets).stem for stage, sets in options.items()}
        data: Any = RETRODataModule(
            str(folder / "db"), num_chunks=2, batch_size=2, on_leak="warn", **{"validation": None, **sets}
        )
        return RETROModule(tiny_retro(decoder=tiny_palm(num_tokens=259, depth=3), chunk_size=8), optimizer=ADAMW), data
    kinds: dict[str, Any] = {"sft": SFTDataModule, "dpo": DPODataModule, "calm": CALMDataModule, "spin": SPINDataModule}
    modules: dict[str, Any] = {
        "sft": lambda: SFTModule(palm(), optimizer=ADAMW),
        "dpo": lambda: DPOModule(palm(), optimizer=ADAMW),
        "calm": lambda: CALMModule(palm(), [Augment(palm(), num_connections=1)], optimizer=ADAMW),
        "spin": lambda: SPINModule(palm(), optimizer=ADAMW, generation={"max_new_tokens": 4}),
    }
    train = write_jsonl(folder / "train.jsonl", ROWS)
    return modules[method](), kinds[method](
        train, shape="plain", batch_size=2, max_length=32, cache_dir=str(folder / "c"), **options
    )


TEXTS = {
    "easy": ["a lazy dog and a quick fox"],
    "hard": ["the sun is warm at noon today", "moon and sun and sky, all day long"],
}


def sets_of(folder: Path) -> dict[str, str]:
    return {name: write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in SETS.items()}


@pytest.mark.filterwarnings("ignore:.*have near-duplicates in the database")
@pytest.mark.parametrize("method", ["sft", "dpo", "calm", "spin", "retro"])
@pytest.mark.parametrize("stage", ["validation", "test"])
def test_each_set_has_the_metrics_that_it_has_alone(method: str, stage: str, tmp_path: Path) -> None:
    sets, run_of = sets_of(tmp_path), {"validation": "validate", "test": "test"}[stage]
    prefix = "val" if stage == "validation" else "test"

    def measure(source: Any) -> dict[str, float]:
        module, data = made(method, tmp_path, **{stage: source})
        (first, *_) = getattr(trainer(tmp_path), run_of)(module, data, verbose=False)
        return dict(first)

    both = measure(sets)
    for name, source in sets.items():
        alone = measure(source)
        assert alone and both.keys() >= alone.keys()
        for key, value in alone.items():
            of_set = key.replace(f"{prefix}/", f"{prefix}/{name}/", 1)  # also of meta/val/documents
            assert both[of_set] == pytest.approx(value, **SAME, nan_ok=True), key
    if method != "retro":  # two query sets are not one
        all_rows = measure([sets["easy"], sets["hard"]])
        for key, value in all_rows.items():
            assert both[key] == pytest.approx(value, **SAME)


@pytest.mark.parametrize("method", ["sft", "dpo", "calm", "spin"])
def test_a_fit_validates_on_each_set(method: str, tmp_path: Path) -> None:
    """Also a second time, with the callbacks that look at validation batches, and a checkpoint by the loss of one set."""
    module, data = made(method, tmp_path, validation=sets_of(tmp_path))
    keep = ModelCheckpoint(tmp_path / "kept", monitor="val/hard/loss", filename="best")
    play = [SelfPlayGeneration(iterations=2, epochs=1, folder=str(tmp_path / "sets"))] if method == "spin" else []
    watch = [PreferenceMonitor(num_prompts=2, max_new_tokens=2)] if method == "dpo" else []
    epochs = -1 if method == "spin" else 2
    run = trainer(tmp_path, max_epochs=epochs, callbacks=[keep, *play, *watch], enable_checkpointing=True)
    run.fit(module, data)
    values = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")}
    assert {"val/loss", "val/easy/loss", "val/hard/loss"} <= values.keys()
    assert values["val/easy/loss"] != pytest.approx(values["val/hard/loss"], abs=1e-4)
    assert (tmp_path / "kept" / "best.ckpt").is_file()
    if method == "spin":
        # Each set has responses of its own.
        lines = (tmp_path / "sets/iteration_0/validation/hard/part-00000.jsonl").read_text().splitlines()
        answered = [json.loads(line)["prompt"] for line in lines]
        assert sorted(answered) == sorted(row["prompt"] for row in SETS["hard"])


def test_loaders_without_names_are_numbered(tmp_path: Path) -> None:
    module, data = made("sft", tmp_path, validation=sets_of(tmp_path))
    data.prepare_data()
    data.setup("validate")
    loaders = data.val_dataloader()
    values = trainer(tmp_path).validate(module, list(loaders.values()), verbose=False)[0]
    named = trainer(tmp_path).validate(module, loaders, verbose=False)[0]
    assert values["val/loss/loader_1"] == named["val/hard/loss"] != values["val/loss/loader_0"]
    assert values["val/loss"] == named["val/loss"]


def test_a_single_loader_keeps_its_names(tmp_path: Path) -> None:
    module, data = made("sft", tmp_path, validation=sets_of(tmp_path)["easy"])
    (values,) = trainer(tmp_path).validate(module, data, verbose=False)
    assert values.keys() == {"val/loss", "val/perplexity", "val/bits_per_byte"}


def test_sets_are_named_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-align"])
    sets = sets_of(tmp_path)
    cli = run(
        [
            *("validate", "--model", "SFTModule", "--model.backbone", json.dumps(TINY), "--data", "SFTDataModule"),
            *("--data.validation", json.dumps(sets), "--trainer.logger", "false", "--trainer.accelerator", "cpu"),
        ]
    )
    assert cli is not None
    assert cli.trainer.callback_metrics.keys() >= {"val/loss", "val/easy/loss", "val/hard/loss"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"source": "a.jsonl", "weight": "2"}, r"A mixture is a list: \[\{source: a.jsonl, weight: 2\}"),
        ({}, "several sources by name, but got {}"),
        ({"a/b": "a.jsonl"}, "without a slash, but got 'a/b'"),
    ],
)
def test_bad_names_are_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SFTDataModule(validation=source)


def test_samples_come_from_the_first_set(tmp_path: Path) -> None:
    module, data = made("sft", tmp_path, validation=sets_of(tmp_path))
    data.prepare_data()
    data.setup("fit")
    assert [text for _, text, _ in data.validation_prompts(2)] == [row["prompt"] for row in SETS["easy"][:2]]
    trainer(tmp_path, callbacks=[SampleLogger(num_samples=2, max_new_tokens=2)]).fit(module, data)
