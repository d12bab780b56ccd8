"""Tests of `CALMModule`: training, resuming, loading connections, stored states, and the command line."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_align.calm.datamodule import CALMDataModule
from lightning_align.calm.module import CALMModule, composed_logprobs
from lightning_align.calm.spec import Augment
from lightning_align.calm.states import StateStore
from lightning_align.cli import run
from lightning_align.data.tasks.key_value import KeyValue
from lightning_align.generation.sampler import GenerationConfig
from lightning_align.training.callbacks import SampleLogger, SolveRate
from tests.calm.toys import MAKERS, SMALL, composed, palms
from tests.charts import lines_of
from tests.toys import Plain, gap, largest_difference, rows_of, slow_logprobs, split, state_of, tiny_palm, token_batch

SGD = functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9)
ADAM = functools.partial(torch.optim.AdamW, lr=0.01)
BATCH = token_batch([2, 1, 3, 2, 1, 2, 3, 1], [9, 8, 1, 7, 1, 1, 2, 1])


def module(**options: Any) -> CALMModule:
    anchor, augment = palms(torch.float32)
    spec = options.pop("augments", [Augment(augment, num_connections=2)])
    return CALMModule(options.pop("anchor", anchor), spec, **{"connection": SMALL, "optimizer": SGD, **options})


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "default_root_dir": folder, "max_epochs": 2, "log_every_n_steps": 1, **options})


def loader(size: int = 2) -> DataLoader[Any]:
    return DataLoader(split(BATCH, size), batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


def test_logprobs_equal_the_slow_version() -> None:
    model = composed(torch.float32)
    sums, counts = slow_logprobs(model, BATCH)
    got = composed_logprobs(model, BATCH, [None])  # type: ignore[arg-type]  # a TokenBatch, without augments
    assert got.sums.tolist() == pytest.approx(sums, abs=1e-4)
    assert got.counts.tolist() == counts


@pytest.mark.parametrize("anchor", ["palm", "llama", "gpt2", "x_transformers"])
def test_any_anchor_trains_and_predicts(anchor: str, tmp_path: Path) -> None:
    subject = module(anchor=MAKERS[anchor](), augments=[Augment(MAKERS["llama"](), num_connections=1)], optimizer=ADAM)
    fit = trainer(tmp_path, max_epochs=8, gradient_clip_val=1.0)
    (start,) = fit.validate(subject, loader(), verbose=False)
    fit.fit(subject, loader(), loader())
    # The least fall of four anchors, two seeds and six kernels is 0.2 nats.
    assert float(fit.callback_metrics["val/loss"]) < start["val/loss"] - 0.1
    subject.generation.max_new_tokens = 3
    prompts = DataLoader([{"prompts": [[1, 2], [3, 4, 5]], "rows": torch.arange(2)}], batch_size=None)  # type: ignore[arg-type]
    (rows,) = fit.predict(subject, prompts) or []
    assert [len(row["responses"][0]) for row in rows] == [3, 3]


def test_only_connections_are_saved_and_resumed(tmp_path: Path) -> None:
    start = composed(torch.float32)
    start.save_connections(tmp_path / "start.safetensors")
    begin = functools.partial(module, connections_from=str(tmp_path / "start.safetensors"), optimizer=ADAM)
    whole, first, second = begin(), begin(), begin()
    trainer(tmp_path).fit(whole, loader(), loader())
    assert largest_difference(state_of(whole.policy), state_of(start)) > 1e-3
    half = trainer(tmp_path, max_epochs=1)
    half.fit(first, loader(), loader())
    path = tmp_path / "half.ckpt"
    half.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert all(name.startswith("policy.connections.") for name in saved["state_dict"])
    assert saved["frozen"] == first.policy.identity
    trainer(tmp_path).fit(second, loader(), loader(), ckpt_path=path, weights_only=True)
    assert largest_difference(state_of(second), state_of(whole)) == 0

    anchor, augment = palms(torch.float32)
    given = {"anchor": anchor, "augments": [Augment(augment, num_connections=2)]}
    again = CALMModule.load_from_checkpoint(path, weights_only=True, **given)
    assert largest_difference(state_of(again.policy), state_of(first.policy)) == 0
    with pytest.raises(ValueError, match="`anchor` must be a model, but got None"):
        CALMModule.load_from_checkpoint(path, weights_only=True)
    anchor, augment = palms(torch.float32)
    nn.init.zeros_(anchor.norm.weight)
    given = {"anchor": anchor, "augments": [Augment(augment, num_connections=2)]}
    with pytest.raises(ValueError, match="trained with other weights of anchor"):
        CALMModule.load_from_checkpoint(path, weights_only=True, **given)


def test_training_starts_from_given_connections(tmp_path: Path) -> None:
    model = composed(torch.float32)
    model.save_connections(tmp_path / "c.safetensors")
    subject = module(connections_from=str(tmp_path / "c.safetensors"))
    subject.configure_model()
    assert largest_difference(subject.policy.trainable_state_dict(), model.trainable_state_dict()) == 0


def test_stored_states_are_computed_once_and_change_nothing(tmp_path: Path) -> None:
    composed(torch.float32).save_connections(tmp_path / "c.safetensors")
    begin: dict[str, Any] = {"connections_from": str(tmp_path / "c.safetensors"), "optimizer": ADAM}
    live, stored = module(**begin), module(store_states=str(tmp_path / "states"), **begin)
    trainer(tmp_path).fit(live, loader(), loader())
    stored.configure_model()
    calls: list[int] = []
    reader = stored.policy.readers[0]
    read = reader.read

    def counted(tokens: Tensor, *rest: Any) -> dict[int, Tensor]:
        calls.append(len(tokens))
        return read(tokens, *rest)

    reader.read = counted  # type: ignore[method-assign]
    trainer(tmp_path).fit(stored, loader(), loader())
    assert sum(calls) == 8 + 4 + 2 * 8, (
        "each training row once in two epochs, and every row of the validations and the sanity check, which store nothing"
    )
    assert largest_difference(state_of(stored.policy.connections), state_of(live.policy.connections)) < 1e-5
    calls.clear()
    trainer(tmp_path, max_epochs=1).fit(stored, loader(), loader())
    assert sum(calls) == 4 + 8, "another run finds the stored states"


@pytest.mark.parametrize("other", ["bf16-true", "bf16-mixed"])
def test_stored_states_are_kept_per_precision(other: str, tmp_path: Path) -> None:
    composed(torch.float32).save_connections(tmp_path / "c.safetensors")

    def losses(precision: Any, batches: DataLoader[Any], store: str | None) -> list[float]:
        values: list[float] = []

        class Keep(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                values.append(float(trainer.callback_metrics["train/loss"]))

        subject = module(connections_from=str(tmp_path / "c.safetensors"), store_states=store)
        fit = trainer(tmp_path, precision=precision, callbacks=[Keep()], num_sanity_val_steps=0, limit_val_batches=0)
        fit.fit(subject, batches, batches)
        return values

    store = str(tmp_path / "states")
    some = DataLoader(split(rows_of(BATCH, 0, 4), 2), batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
    want = losses(other, loader(), None)
    losses("32-true", some, store)
    assert losses(other, loader(), store) == pytest.approx(want, rel=0.02)
    assert losses("32-true", loader(), store) == pytest.approx(losses("32-true", loader(), None), abs=1e-5)
    assert len(list(Path(store).glob("*.bin"))) == 2


def test_stored_states_of_another_dtype_raise(tmp_path: Path) -> None:
    tokens = BATCH["tokens"][:2, :3]
    single, double = composed(torch.float32), composed(torch.float64)
    store = StateStore(tmp_path, "key")
    store.fetch(single.readers[0], tokens, tokens > 0)
    with pytest.raises(ValueError, match=r"\(16, 'float32'\), but the augment now has \(16, 'float64'\)"):
        store.fetch(double.readers[0], tokens + 1, tokens > 0)
    store.close()


def test_the_loss_can_be_on_all_tokens(tmp_path: Path) -> None:
    subject = module(loss_on="all")
    fit = trainer(tmp_path)
    fit.validate(subject, loader(), verbose=False)
    whole = {**BATCH, "targets": BATCH["mask"] & (torch.arange(BATCH["mask"].shape[1]) > 0)}
    sums, counts = slow_logprobs(subject.policy, whole)  # type: ignore[arg-type]
    assert float(fit.callback_metrics["val/loss"]) == pytest.approx(-sum(sums) / sum(counts), rel=1e-5)
    with pytest.raises(ValueError, match="`loss_on` must be one of response, all, but got 'some'"):
        module(loss_on="some")


def test_loss_on_all_tokens_with_a_prefix_raises() -> None:
    anchor, augment = palms(torch.float32)
    augments = [Augment(augment, num_connections=2), Augment(anchor, alignment="prefix", num_connections=2)]
    with pytest.raises(ValueError, match="but got 'all', because augment 1 reads the prompt as a prefix"):
        module(augments=augments, loss_on="all")
    module(augments=augments)


def test_default_prefix_is_the_prompt(tmp_path: Path) -> None:
    subject = module(augments=[Augment(palms(torch.float32)[1], alignment="prefix", num_connections=2)])
    trainer(tmp_path, max_epochs=1).fit(subject, loader(), loader())
    (given,) = subject._inputs(BATCH)  # type: ignore[arg-type]
    assert given is not None
    assert given.mask is not None
    assert given.mask.sum(dim=1).tolist() == [2, 1, 3, 2, 1, 2, 3, 1]


def test_augment_with_its_own_tokenizer(tmp_path: Path) -> None:
    text = [{"prompt": f"{i} and", "response": f" {i + 1}"} for i in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in text))
    data = CALMDataModule(
        str(path), validation=str(path), predict=str(path), batch_size=3, augment_tokenizers=["bytes"], cache_dir=str(tmp_path)
    )
    models = tiny_palm(num_tokens=259), tiny_palm(num_tokens=259, seed=1)
    subject = module(anchor=models[0], augments=[Augment(models[1], tokens="own", num_connections=1)])
    subject.generation.max_new_tokens = 3
    fit = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    fit.fit(subject, data)
    assert "val/bits_per_byte" in fit.callback_metrics
    rows = [row for part in fit.predict(subject, data) or [] for row in part]
    assert [row["prompt"] for row in rows] == [f"{i} and" for i in range(6)]


@pytest.mark.parametrize(
    ("tokenizers", "spec", "message"),
    [
        (["bytes"], {}, r"augment_tokenizers\[0\] must be null, because augment 0 reads the anchor's token ids"),
        (["bytes"], {"alignment": "prefix"}, r"augment 0 reads a prefix"),
        ([None, "bytes"], {}, r"must have one entry per augment, 1 in all, but got 2"),
    ],
)
def test_tokenizers_that_do_not_fit_raise_at_setup(tokenizers: Any, spec: Any, message: str, tmp_path: Path) -> None:
    data = CALMDataModule(KeyValue(4), batch_size=2, augment_tokenizers=tokenizers, cache_dir=str(tmp_path))
    augment = Augment(tiny_palm(num_tokens=259, seed=1), num_connections=1, **spec)
    subject = module(anchor=tiny_palm(num_tokens=259), augments=[augment], store_states=str(tmp_path / "states"))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, enable_checkpointing=False).fit(subject, data)
    assert subject.policy is None
    if len(tokenizers) == 1:  # with batches from elsewhere, it raises before their states are stored
        data.setup("fit")
        batches = DataLoader([next(iter(data.train_dataloader()))], batch_size=None)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, enable_checkpointing=False, num_sanity_val_steps=0).fit(subject, batches, batches)
        assert not list(tmp_path.glob("states/*"))


@pytest.mark.parametrize("spec", [{"tokens": "own"}, {"alignment": "prefix"}, {}], ids=["own tokenizer", "prefix", "aligned"])
def test_callbacks_decode_the_same_as_predict(spec: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} and", "response": f" {i + 1}"}) + "\n" for i in range(3)))
    realigned = {"augment_tokenizers": ["bytes"]} if "tokens" in spec else {}
    data = CALMDataModule(str(path), validation=str(path), predict=str(path), cache_dir=str(tmp_path), **realigned)
    # `Plain` only maps tokens to logits, so there is no cache for the prefix.
    anchor = Plain(tiny_palm(num_tokens=259)) if "alignment" in spec else tiny_palm(num_tokens=259)
    augment = Augment(tiny_palm(num_tokens=259, seed=1), num_connections=1, **spec)
    subject = module(anchor=anchor, augments=[augment], anchor_layers="model.blocks.*" if "alignment" in spec else None)
    subject.generation = GenerationConfig(max_new_tokens=3, temperature=0)
    callbacks: list[Any] = [SampleLogger(num_samples=3, max_new_tokens=3), SolveRate(KeyValue(2), max_new_tokens=3)]
    fit = trainer(tmp_path, max_epochs=1, enable_checkpointing=False, callbacks=callbacks)
    fit.fit(subject, data)
    assert "val/solved" in fit.callback_metrics
    samples = [json.loads(line)["generated"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert samples == [row["responses"][0] for part in fit.predict(subject, data) or [] for row in part]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    return tmp_path


ROOT = Path(__file__).parent.parent.parent
TINY = {"dim": 16, "depth": 4, "heads": 2, "dim_head": 8}


def shrink(name: str, folder: Path) -> list[str]:
    """Write a configuration of the repository with sizes that make its run short, and return its command-line arguments."""
    config = yaml.safe_load((ROOT / "configs" / "calm" / f"{name}.yaml").read_text())
    callbacks = config["trainer"]["callbacks"]
    for callback in callbacks:
        arguments = callback["init_args"]
        if "problems" in arguments:
            arguments["num_problems"], arguments["problems"]["init_args"]["num_rows"] = 4, 4
        else:
            arguments["every_n_train_steps"] = 2
    model = config["model"]["init_args"]
    if "backbone" in model:
        model["backbone"]["init_args"] |= TINY
    model["lr_scheduler"]["init_args"] |= {"total_steps": 4, "warmup_steps": 1}
    for source in ("train", "validation", "predict"):
        if source in config["data"]["init_args"]:
            config["data"]["init_args"][source]["init_args"]["num_rows"] = 20
    config["data"]["init_args"]["batch_size"] = 4
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1, "enable_progress_bar": False}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path)]


def test_command_line_trains_two_models_and_composes_them(folder: Path) -> None:
    for name in ("key_value_augment", "key_value_anchor"):
        run(["fit", *shrink(name, folder)])
    begin = [*shrink("key_value", folder), "--model.init_args.attention_maps", "true"]
    fitted = run(["fit", *begin])
    assert fitted is not None
    path = str(next((folder / "runs" / "calm_key_value").rglob("last.ckpt")))
    validated = run(["validate", *begin, "--ckpt_path", path])
    assert validated is not None
    before, after = fitted.trainer.callback_metrics, validated.trainer.callback_metrics
    assert float(after["val/loss"]) == pytest.approx(float(before["val/loss"]), abs=1e-6)
    assert {"val/kv_math_validation", "val/kv_math_held_out", "val/num_math", "val/kv_subs"} <= set(after)
    run(["predict", *begin, "--ckpt_path", path, "--output", "answers.jsonl"])
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 20
    loaded = CALMModule.load_from_checkpoint(path, weights_only=True)
    assert largest_difference(state_of(loaded.policy), state_of(fitted.model.policy)) == 0
    events = EventAccumulator(str(fitted.trainer.log_dir))
    events.Reload()
    tags = events.Tags()
    assert "train/contribution/augment0_layer4_to_layer1" in tags["scalars"]
    assert "val/attention/augment0_layer4_to_layer3" in tags["images"]
    charts = lines_of(fitted.trainer.log_dir)
    assert len(charts["norm that connections add, relative to the stream"]) == 3
    assert all(lines for title, lines in charts.items()), charts


def test_bare_trainer(tmp_path: Path) -> None:
    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return split(BATCH, 2)[index]  # type: ignore[no-any-return]

    anchor, augment = palms(torch.float32)
    subject = CALMModule(anchor, [Augment(augment, every=2)], connection=SMALL)
    trainer(tmp_path, max_epochs=1).fit(subject, DataLoader(Rows(), batch_size=None), DataLoader(Rows(), batch_size=None))
    assert gap(subject(BATCH["tokens"]), anchor(BATCH["tokens"])) > 0


def test_configurations_share_one_table() -> None:
    tasks = []
    for path in sorted((ROOT / "configs" / "calm").glob("key_value*.yaml")):
        data = yaml.safe_load(path.read_text())["data"]["init_args"]
        tasks += [KeyValue(**{**data[name]["init_args"], "num_rows": 1}) for name in ("train", "validation")]
    assert len({json.dumps(task.table) for task in tasks}) == 1
