"""Every family of `families.py` loads, scores, decodes, trains with DPO and SPIN, and is exported and read back.

`pytest -v tests/models/test_families.py` prints the table, one line per family and column.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_align.dpo.module import DPOModule
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.formats import read_model, whole_weights, write_model
from lightning_align.models.language_model import has_cache
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.scoring.logprobs import token_logprobs
from lightning_align.spin.callbacks import SelfPlayGeneration
from lightning_align.spin.datamodule import SPINDataModule
from lightning_align.spin.module import SPINModule
from tests.models.families import FAMILIES, IMAGES_AND_TEXT, REFUSED, V, build
from tests.toys import largest_difference, preference_batch, token_batch

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
EACH = pytest.mark.parametrize("family", FAMILIES)
SGD = functools.partial(torch.optim.SGD, lr=1.0)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "max_steps": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
# A cache that holds more than keys and values, or attention that is only computed on whole rows.
WITHOUT_CACHE = {
    *(
        "bamba",
        "bart",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "jamba",
        "lfm2",
        "lfm2_vl",
        "mamba",
        "mamba2",
        "minimax",
    ),
    *("openai-gpt", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv"),
    *("bert", "electra", "modernbert-decoder", "xlstm"),  # their logits are not a linear layer of hidden states
}


def alone(model: PretrainedLM, row: Tensor) -> Tensor:
    """Return the log-probs (N - 1,) of all tokens of a row but the first, by the model of transformers, in float64."""
    logits = model.model(input_ids=row[None], use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(-1, row[1:, None])[:, 0]


@EACH
def test_log_probs_are_those_of_transformers(family: str) -> None:
    model = build(family)
    if family != "xglm":  # whose mask of float32 does not fit float64
        if model.routers is not None:
            model.model.set_experts_implementation("eager")  # the grouped matrix product has no float64
        model.double()
    batch = token_batch([8, 2, 5, 1], [10, 5, 3, 12], vocabulary=V - 4)
    with torch.no_grad():
        found, rows = token_logprobs(model, batch)
        expected = []
        for row in range(4):
            tokens = batch["tokens"][row, : int(batch["mask"][row].sum())]
            expected.append(alone(model, tokens)[batch["targets"][row, 1 : len(tokens)]])
    assert rows.tolist() == [0] * 10 + [1] * 5 + [2] * 3 + [3] * 12
    # Some families compute parts in float32 whatever their dtype is.
    assert float((found - torch.cat(expected)).abs().max()) < (1e-4 if family == "xglm" else 2e-6)


@EACH
def test_rows_that_leave_at_different_times_are_decoded_as_without_a_cache(family: str) -> None:
    """The sampler's log-probs of two samples per prompt are those of each whole row, read alone."""
    model = build(family)
    assert has_cache(model) == (family not in WITHOUT_CACHE)
    prompts = [list(range(5, 17)), [3, 4, 5], [50, 51]]
    config = GenerationConfig(max_new_tokens=9, num_samples=2)
    answers = generate(model, prompts, config, limits=[9, 1, 5])
    for prompt, samples, length in zip(prompts, answers, (9, 1, 5), strict=True):
        assert len(samples) == 2 and (length == 1 or samples[0].tokens != samples[1].tokens)
        for sample in samples:
            assert len(sample.tokens) == length
            with torch.no_grad():
                expected = alone(model, torch.tensor(prompt + sample.tokens))[len(prompt) - 1 :]
            assert float((torch.tensor(sample.logprobs) - expected).abs().max()) < 2e-3


@EACH
def test_a_step_of_dpo_starts_at_log_two(family: str, tmp_path: Path) -> None:
    model = build(family).train()
    before = whole_weights(model)
    trainer = L.Trainer(**QUIET, log_every_n_steps=1, default_root_dir=tmp_path)
    data: Any = DataLoader([preference_batch(2)], batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
    trainer.fit(DPOModule(model, optimizer=SGD), data)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(math.log(2), abs=2e-4)
    changed = {name for name, value in whole_weights(model).items() if not torch.equal(value, before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # A random router may send no token to an expert, and tokens of a few rows may miss some weights.
    assert changed <= set(before) and len(changed & trained) > len(trained) / 2
    assert not changed & (set(dict(model.named_parameters())) - trained), "other parts, such as a vision tower, are frozen"


@EACH
def test_an_iteration_of_spin_starts_at_log_two(family: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1=", "response": f"it is {i + 1}"} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loop = SelfPlayGeneration(iterations=1, folder=str(tmp_path / "sets"))
    trainer = L.Trainer(**{**QUIET, "max_epochs": -1}, log_every_n_steps=1, callbacks=[loop], default_root_dir=tmp_path)
    module = SPINModule(build(family).train(), generation=GenerationConfig(max_new_tokens=6), optimizer=SGD)
    trainer.fit(
        module, SPINDataModule(str(tmp_path / "rows.jsonl"), batch_size=2, max_length=32, cache_dir=str(tmp_path / "c"))
    )
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(math.log(2), abs=2e-4)


@EACH
def test_an_export_is_read_back(family: str, tmp_path: Path) -> None:
    model = build(family)
    write_model(model, whole_weights(model), tmp_path / "out")
    again = read_model(tmp_path / "out")
    assert largest_difference(dict(again.state_dict()), dict(model.state_dict())) == 0
    tokens = token_batch([3], [8], vocabulary=V - 4)["tokens"]
    with torch.no_grad():
        assert float((again(tokens) - model(tokens)).abs().max()) < 1e-5


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_used_is_refused_with_its_reason(family: str) -> None:
    reason, config = REFUSED[family]
    with pytest.raises(ValueError, match=reason):
        PretrainedLM(config={"model_type": family, **config})


def test_a_bidirectional_encoder_is_refused_in_few_bits_too() -> None:
    reason, config = REFUSED["bert"]
    with pytest.raises(ValueError, match=reason):
        PretrainedLM(config={"model_type": "bert", **config}, dtype="bfloat16")


@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_5_vl"])
def test_a_class_of_images_and_text_keeps_its_other_parts_in_an_export(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model = build(family)
    assert family in IMAGES_AND_TEXT and model.composite
    write_model(model, whole_weights(model), tmp_path / "out")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(theirs) is type(model.model)
    assert largest_difference(dict(theirs.state_dict()), dict(model.model.state_dict())) == 0
    assert any("vis" in name for name, _ in theirs.named_parameters())


def test_text_goes_through_the_text_model_in_training_mode() -> None:
    """Gemma 3 of images and text demands token types in training mode. Its text model does not."""
    model, batch = build("gemma3"), token_batch([2, 1], [3, 4])
    plain, _ = token_logprobs(model, batch)
    model.train()
    found, _ = token_logprobs(model, batch)
    assert torch.equal(plain, found)
    assert torch.equal(model(batch["tokens"]), model.eval()(batch["tokens"]))
