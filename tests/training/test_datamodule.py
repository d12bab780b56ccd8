import json
import os
import pickle

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_align.data.mixture import SourcePart
from lightning_align.data.rows import RowTask
from lightning_align.dpo.datamodule import DPODataModule
from lightning_align.sft.datamodule import SFTDataModule
from tests.data.helpers import write_jsonl


class Sums(RowTask):
    """Sums of one-digit numbers.

    Args:
        num_rows: How many.
    """

    def __init__(self, num_rows: int = 20) -> None:
        self.num_rows = num_rows

    @property
    def fingerprint(self):
        return str(self.num_rows)

    def rows(self):
        for i in range(self.num_rows):
            yield {"prompt": f"{i % 10}+{i // 10}=", "response": str(i % 10 + i // 10)}

    def grade(self, prompt, response):
        return response == str(eval(prompt.removesuffix("=")))


class Recorder(L.LightningModule):
    """Learns nothing and remembers the rows that it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
        self.validated = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["rows"].tolist())
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        self.validated += batch["rows"].tolist()

    def predict_step(self, batch, batch_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _trainer(tmp_path, **options):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": str(tmp_path),
    }
    return L.Trainer(**(settings | options))


def _sft(tmp_path, **options):
    settings = {"train": Sums(50), "validation": Sums(21), "batch_size": 4, "cache_dir": str(tmp_path / "cache")}
    return SFTDataModule(**(settings | options))


def _open(data, *stages):
    data.prepare_data()
    for stage in stages:
        data.setup(stage)
    return data


def test_fit_sees_every_row_and_leaves_a_ledger(tmp_path):
    module = Recorder()
    _trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(module, datamodule=_sft(tmp_path))
    assert len(module.seen) == 26
    for epoch in (module.seen[:13], module.seen[13:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(50))
    assert module.seen[:13] != module.seen[13:]
    assert sorted(module.validated) == sorted([*range(21)] * 2)
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert {stage: entry["rows"] for stage, entry in ledger.items()} == {"train": 50, "validation": 21}


MIXTURE = [SourcePart(Sums(30), weight=2), SourcePart(Sums(50), weight=3.0)]


@pytest.mark.parametrize(("train", "stop"), [(Sums(50), 5), (Sums(50), 13), (Sums(50), 16), (MIXTURE, 5), (MIXTURE, 21)])
def test_a_trainer_resumes_on_the_right_batch(tmp_path, train, stop):
    whole = Recorder()
    settings = {"train": train, "mixture_stop": "all_exhausted"}
    _trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(whole, datamodule=_sft(tmp_path, **settings))

    def keep():
        folder = tmp_path / "checkpoints"
        return L.pytorch.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=stop, save_top_k=-1)

    options = {"limit_val_batches": 0, "enable_checkpointing": True}
    first, second = Recorder(), Recorder()
    trainer = _trainer(tmp_path, max_epochs=-1, max_steps=stop, callbacks=[keep()], **options)
    trainer.fit(first, datamodule=_sft(tmp_path, **settings))
    trainer = _trainer(tmp_path, max_epochs=2, callbacks=[keep()], **options)
    trainer.fit(
        second,
        datamodule=_sft(tmp_path, **settings),
        ckpt_path=tmp_path / "checkpoints" / f"step={stop}.ckpt",
        weights_only=True,
    )
    assert first.seen + second.seen == whole.seen


def test_overfit_batches_repeats_whole_batches(tmp_path):
    module = Recorder()
    _trainer(tmp_path, max_epochs=2, overfit_batches=2, num_sanity_val_steps=0).fit(module, datamodule=_sft(tmp_path))
    assert [len(batch) for batch in module.seen] == [4] * 4
    assert module.seen[:2] == module.seen[2:]


def test_without_validation_rows(tmp_path):
    module = Recorder()
    data = _sft(tmp_path, validation=None, num_workers=1)
    trainer = _trainer(tmp_path, max_epochs=1)
    trainer.fit(module, datamodule=data)
    assert len(module.seen) == 13
    assert trainer.limit_val_batches == 1.0
    with pytest.raises(ValueError, match="no source of validation rows"):
        trainer.validate(module, datamodule=data)


def test_predict_gives_prompts_in_order_or_pairs(tmp_path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "p" * (9 - i)} for i in range(7)])
    data = _sft(tmp_path, predict=prompts, batch_size=3)
    batches = _trainer(tmp_path).predict(Recorder(), datamodule=data)
    assert [batch["rows"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert batches[2]["prompts"] == [[1, 115, 115, 115]]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": str(i), "rejected": "no"} for i in range(5)])
    for predict, key in ((pairs, "chosen"), (prompts, "prompts")):
        data = DPODataModule(predict=predict, cache_dir=str(tmp_path / "cache"))
        (batch,) = _trainer(tmp_path).predict(Recorder(), datamodule=data)
        assert key in batch


def test_pairs(tmp_path):
    rows = [{"prompt": "p", "chosen": "y" * (1 + i % 5), "rejected": "no"} for i in range(10)]
    source = write_jsonl(tmp_path / "pairs.jsonl", rows)
    data = _open(DPODataModule(source, validation=source, cache_dir=str(tmp_path / "cache")), "fit")
    batches = list(data.train_dataloader())
    assert [batch["chosen"]["tokens"].shape[0] for batch in batches] == [8, 2]
    assert all((batch["chosen"]["rows"] == batch["rejected"]["rows"]).all() for batch in batches)
    assert data.validation_prompts(1) == [([1, 115], "p", "y")]


def test_rows_of_several_files(tmp_path):
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", [{"prompt": f"{i}", "response": "r"}] * 2) for i in range(2)]
    data = _open(SFTDataModule(paths, validation=f"{tmp_path}/*.jsonl", cache_dir=str(tmp_path / "cache")), "fit")
    assert [data.ledgers[stage].num_kept for stage in ("train", "validation")] == [4, 4]
    assert [prompt for _, prompt, _ in data.validation_prompts(9)] == ["0", "0", "1", "1"]
    write_jsonl(tmp_path / "1.jsonl", [{"prompt": "p", "response": ""}])
    with pytest.raises(ValueError, match=r"1\.jsonl:1 has an empty text"):
        _open(SFTDataModule(paths, cache_dir=str(tmp_path / "cache")), "fit")


def test_columns_roles_and_shapes_from_the_command_line(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [{"ask": {"text": "q"}, "reply": "a"}, {"ask": {"text": "p"}, "reply": "b"}])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SFTDataModule, "data")
    arguments = ["--data.columns={prompt: ask.text, response: reply}", "--data.roles.visitor=user", "--data.shape=auto"]
    arguments += [f"--data.train={train}", f"--data.validation={train}", f"--data.cache_dir={tmp_path / 'cache'}"]
    data = _open(parser.instantiate_classes(parser.parse_args(arguments)).data, "fit")
    assert data.mapping.roles == {"visitor": "user"}
    assert [prompt[1:] for prompt in data.validation_prompts(5)] == [("q", "a"), ("p", "b")]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"ask": {"text": "q"}}])
    data = SFTDataModule(
        predict=prompts, columns={"prompt": "ask.text", "response": "reply"}, cache_dir=str(tmp_path / "cache")
    )
    (batch,) = _trainer(tmp_path).predict(Recorder(), datamodule=data)
    assert [len(ids) for ids in batch["prompts"]] == [2]
    for settings, message in (
        ({"columns": {"prompt": "ask.txt"}}, "The columns are: text"),
        ({"shape": "sharegpt"}, "'sharegpt' needs"),
    ):
        with pytest.raises(ValueError, match=message):
            _open(SFTDataModule(train, cache_dir=str(tmp_path / "cache"), **settings), "fit")
    with pytest.raises(ValueError, match="`shape` must be one of"):
        SFTDataModule(train, shape="parrot")


def test_labelled_and_ranked_rows_for_scoring(tmp_path):
    labelled = [{"prompt": "p", "completion": "ab"[i % 2] * i, "label": i % 2 == 0} for i in range(1, 5)]
    ranked = [{"prompt": "p", "answers": [{"text": "a", "score": 1}, {"text": "b", "score": 2}]}]
    for name, rows, expected in (("labelled", labelled, 2), ("ranked", ranked, 1)):
        source = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        data = DPODataModule(predict=source, cache_dir=str(tmp_path / "cache"))
        (batch,) = _trainer(tmp_path).predict(Recorder(), datamodule=data)
        assert len(batch["chosen"]["tokens"]) == expected


def test_a_mixture_from_a_configuration(tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", [{"ask": f"{i}", "reply": "r"} for i in range(4)])
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    two = write_jsonl(tmp_path / "two.jsonl", [{"conversations": said}] * 9)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SFTDataModule, "data", sub_configs=True)
    columns = {"prompt": "ask", "response": "reply"}
    parts = [{"source": one, "weight": 1, "columns": columns}, {"source": [two], "weight": 2}]
    task = {"source": {"class_path": f"{__name__}.Sums", "init_args": {"num_rows": 3}}}
    plain = [{"source": two}, {"source": one, "columns": columns}, task]
    settings = {"train": parts, "validation": plain, "batch_size": 3, "cache_dir": str(tmp_path / "cache")}
    arguments = [f"--data.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]
    parsed = parser.parse_object({"data": settings})
    again = parser.parse_string(parser.dump(parsed))
    for config in (parsed, again, parser.parse_args(arguments)):
        data = parser.instantiate_classes(config).data
        module = Recorder()
        _trainer(tmp_path, max_epochs=3, num_sanity_val_steps=0).fit(module, datamodule=data)
        epochs = [[row for batch in module.seen[start : start + 4] for row in batch] for start in (0, 4, 8)]
        assert [sum(row < 4 for row in rows) for rows in epochs] == [4, 4, 4]
        # An epoch has 8 of the 9 rows of the second source. The ninth is the first of the next epoch.
        assert [sum(row >= 4 for row in rows) for rows in epochs] == [8, 8, 8]
        assert {row for row in epochs[0] + epochs[1] if row >= 4} == set(range(4, 13))
        assert sorted(module.validated) == sorted([*range(16)] * 3)
        prompts = [prompt[1:] for prompt in data.validation_prompts(15)]
        assert prompts[9:] == [*[(f"{i}", "r") for i in range(4)], ("0+0=", "0"), ("1+0=", "1")]
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert {name: entry["rows"] for name, entry in ledger.items()} == {
        f"train/{one}": 4, f"train/{two}": 9, f"validation/{two}": 9, f"validation/{one}": 4, "validation/Sums": 3,
    }  # fmt: skip


def test_mixtures_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"all or none must have a `weight`.*rows\.jsonl \(weight 1\), Sums \(weight None\)"):
        SFTDataModule([SourcePart("rows.jsonl", weight=1), SourcePart(Sums())])
    with pytest.raises(ValueError, match="`weight` of Sums must be a positive number, but got 0"):
        SFTDataModule([SourcePart(Sums(), weight=0), SourcePart("rows.jsonl", weight=1)])
    with pytest.raises(ValueError, match="`mixture_stop` must be one of"):
        SFTDataModule("rows.jsonl", mixture_stop="never")


def test_validation_prompts_and_grader(tmp_path):
    data = _open(_sft(tmp_path), "fit")
    assert [prompt[1:] for prompt in data.validation_prompts(2)] == [("0+0=", "0"), ("1+0=", "1")]
    assert data.tokenizer.decode(data.validation_prompts(1)[0][0]) == "0+0="
    assert len(data.validation_prompts(99)) == 21
    assert data.grader.grade("1+2=", "3")
    assert SFTDataModule("rows.jsonl").grader is None


def test_a_row_that_was_dropped_does_not_shift_the_prompts(tmp_path):
    rows = [{"prompt": "a", "response": ""}, {"prompt": "b", "response": "c"}]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = _open(_sft(tmp_path, validation=source, on_bad_row="skip"), "fit")
    assert data.validation_prompts(5) == [([1, 101], "b", "c")]


def test_a_policy_too_small_for_the_tokenizer_is_refused(tmp_path):
    module = Recorder()
    module.policy = torch.nn.Linear(1, 1)
    module.policy.num_tokens = 100
    with pytest.raises(ValueError, match="the model has 100 tokens, but the tokenizer has 259"):
        _trainer(tmp_path, max_steps=1).fit(module, datamodule=_sft(tmp_path))


def test_pickles_do_not_grow_with_the_rows(tmp_path):
    sizes = []
    for num_rows in (50, 500):
        data = _open(_sft(tmp_path, train=Sums(num_rows)), "fit")
        assert next(iter(data.train_dataloader()))
        sizes.append(len(pickle.dumps(data)))
        assert len(pickle.dumps(data.train_dataloader().dataset)) < 1000
    assert abs(sizes[1] - sizes[0]) < 20


def test_the_command_line_takes_paths_and_tasks(tmp_path, capsys):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SFTDataModule, "data")
    path = f"{__name__}.Sums"
    parsed = parser.parse_object(
        {"data": {"train": "rows.jsonl", "validation": {"class_path": path, "init_args": {"num_rows": 7}}}}
    )
    data = parser.instantiate_classes(parsed).data
    assert data.sources["train"] == "rows.jsonl"
    assert data.sources["validation"].num_rows == 7
    # The command line of Lightning takes sub-configurations from files. A file of rows must not be taken for one.
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SFTDataModule, "data", sub_configs=True)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "r"}] * 2)
    (tmp_path / "rows.json").write_text('[{"prompt": "p", "response": "r"}]')
    for argument in (rows, str(tmp_path / "rows.json")):
        assert parser.instantiate_classes(parser.parse_args([f"--data.train={argument}"])).data.sources["train"] == argument
    for argument, expected in (("[a.jsonl, b/*.csv]", ["a.jsonl", "b/*.csv"]), ("b/[0-9].csv", "b/[0-9].csv")):
        data = parser.instantiate_classes(parser.parse_args([f"--data.train={argument}"])).data
        assert data.sources["train"] == expected
    assert SFTDataModule(tmp_path / "rows.jsonl")._parts["train"][0].rows == rows
    parsed = parser.parse_args(["--data.train", path, "--data.train.num_rows=9", "--data.validation=v.jsonl"])
    for config in (parsed, parser.parse_string(parser.dump(parsed))):
        data = parser.instantiate_classes(config).data
        assert data.sources["validation"] == "v.jsonl"
        assert data.sources["train"].num_rows == 9
    assert "source of the training rows" in parser.format_help()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be 1 or more, but got 0"),
        ({"eval_batch_size": 0}, "`eval_batch_size` must be 1 or more, but got 0"),
        ({"max_length": 1}, "`max_length` must be 2 or more, but got 1"),
        ({"truncation": "middle"}, "`truncation` must be one of .* but got 'middle'"),
        ({"mask_turns": "none"}, "`mask_turns` must be one of .* but got 'none'"),
        ({"on_bad_row": "cry"}, "`on_bad_row` must be one of .* but got 'cry'"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SFTDataModule("rows.jsonl", **options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"rows\.jsonl:17 is not JSON: Expecting property name"),
        ({"prompt": "p", "answer": "x"}, r"rows\.jsonl:17 has no field 'response' \(it has 'answer', 'prompt'\)"),
        ({"prompt": "p", "response": 4}, r"rows\.jsonl:17 has a value of type int in field 'response', expected a string"),
        ({"prompt": "p", "response": ""}, r"rows\.jsonl:17 has an empty text in field 'response'"),
    ],
)
def test_bad_rows_are_named_before_training(tmp_path, line, message):
    rows = [{"prompt": "p", "response": "r"}] * 16
    data = _sft(tmp_path, train=write_jsonl(tmp_path / "rows.jsonl", [*rows, line]))
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path, max_steps=1).fit(Recorder(), datamodule=data)


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file nowhere\.jsonl"):
        SFTDataModule("nowhere.jsonl", cache_dir=str(tmp_path)).prepare_data()
    with pytest.raises(ValueError, match=r"no source of test rows. Give `test` to SFTDataModule"):
        _sft(tmp_path).test_dataloader()
    with pytest.raises(ValueError, match="not open yet"):
        _sft(tmp_path).train_dataloader()
    assert os.listdir(tmp_path) == []
