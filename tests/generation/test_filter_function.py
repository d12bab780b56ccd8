"""Filters of the user: functions from logits to logits, by object and by import path."""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lightning_align.cli import run
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.spin.callbacks import SelfPlayGeneration
from tests.spin.runs import GENERATION, finish, set_rows
from tests.toys import tiny_palm

PROMPTS = [[3, 4], [5, 6, 7], [8]]


def keep_multiples(logits: Tensor, of: int = 2) -> Tensor:
    """Keep the ids that a number divides. Changes its argument, as a careless filter does."""
    return logits.masked_fill_(torch.arange(logits.shape[-1]) % of != 0, -torch.inf)


def shifted(logits: Tensor) -> Tensor:
    return logits + 7.5


def nothing(logits: Tensor) -> Tensor:
    return torch.full_like(logits, -torch.inf)


def narrower(logits: Tensor) -> Tensor:
    return logits[:, :-1]


def no_tensor(logits: Tensor) -> list[float]:
    return [0.0]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("given", [keep_multiples, f"{__name__}.keep_multiples"])
def test_only_tokens_that_it_keeps_are_drawn(given: Any, temperature: float) -> None:
    model = tiny_palm()
    config = GenerationConfig(
        max_new_tokens=12, temperature=temperature, filter_fn=given, filter_kwargs={"of": 5}, num_samples=3, batch_size=2
    )
    plain = generate(model, PROMPTS, dataclasses.replace(config, filter_fn=None, filter_kwargs={}))
    assert any(token % 5 for samples in plain for answer in samples for token in answer.tokens)
    for prompt, samples in zip(PROMPTS, generate(model, PROMPTS, config), strict=True):
        for answer in samples:
            assert all(token % 5 == 0 for token in answer.tokens) and len(answer.tokens) == 12
            # Log-probs are those of the model, without the filter.
            ids = torch.tensor([prompt + answer.tokens])
            logps = model(ids)[0].log_softmax(-1).detach()
            expected = [float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(answer.tokens)]
            assert answer.logprobs == pytest.approx(expected, abs=1e-4)


def test_it_sees_logits_before_temperature_and_filters() -> None:
    """A constant added to all logits changes nothing, also with the other filters."""
    config = GenerationConfig(max_new_tokens=8, temperature=0.5, top_k=9, top_p=0.9)
    expected = generate(tiny_palm(), PROMPTS, config)
    assert generate(tiny_palm(), PROMPTS, dataclasses.replace(config, filter_fn=shifted)) == expected


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (nothing, r"no token|not finite|NaN|infinite|removed"),
        (narrower, r"narrower must return logits of shape \(3, 23\), but got shape \(3, 22\)"),
        (no_tensor, r"no_tensor must return logits of shape \(3, 23\), but got list"),
    ],
)
def test_filters_that_return_no_logits_raise(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny_palm(), PROMPTS, GenerationConfig(max_new_tokens=4, filter_fn=function))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filter_fn": lambda logits: logits}, "`filter_fn` of GenerationConfig must be a function that can be imported"),
        ({"filter_fn": functools.partial(keep_multiples, of=3)}, "must be a function that can be imported"),
        ({"filter_fn": 3}, "must be a function that can be imported by its module and name, or its import path, but got 3"),
        ({"filter_fn": "keep"}, "must be the import path of a function, but got 'keep'"),
        ({"filter_fn": "no.such.module"}, "must be the import path of a function, but got 'no.such.module'"),
        ({"filter_fn": "math.no_such"}, "must be the import path of a function, but got 'math.no_such'"),
        ({"filter_fn": "math.pi"}, "must be the import path of a function, but 'math.pi' is 3.14"),
        ({"filter_kwargs": {"a": 1}}, "`filter_kwargs` of GenerationConfig must be empty without `filter_fn`"),
    ],
)
def test_other_values_raise(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**arguments)


def test_self_play_with_a_filter(tmp_path: Path) -> None:
    config = GenerationConfig(**{**vars(GENERATION), "filter_fn": keep_multiples, "filter_kwargs": {"of": 3}})
    _, module = finish(tmp_path, generation=config, loop={"iterations": 1, "epochs": 1})
    assert all(token % 3 == 0 for row in set_rows(tmp_path, 0) for token in row["generated"][0]["tokens"])
    assert module.hparams["generation"]["filter_fn"] == f"{__name__}.keep_multiples"
    torch.load(tmp_path / "last.ckpt", weights_only=True)

    class Other:
        whole = False

    loop: Any = {"backend": Other()}
    with pytest.raises(ValueError, match="`backend` of SelfPlayGeneration is Other, which cannot call the `filter_fn`"):
        finish(tmp_path / "other", generation=config, loop=loop)
    assert SelfPlayGeneration().backend.whole is False


def test_it_is_set_in_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+1=", "response": str(i)}) + "\n" for i in range(4)))
    # The full name, because another package that tests import has a PaLM, too.
    backbone = {
        "class_path": "lightning_align.PaLM",
        "init_args": {"num_tokens": 259, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8},
    }
    generation = {"max_new_tokens": 3, "filter_fn": f"{__name__}.keep_multiples", "filter_kwargs": {"of": 4}}
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {
        "model": {"class_path": "SPINModule", "init_args": {"backbone": backbone, "generation": generation}},
        "data": {"class_path": "SPINDataModule", "init_args": {"train": "rows.jsonl", "batch_size": 4, "max_length": 32}},
        "trainer": {
            **quiet,
            "max_epochs": -1,
            "callbacks": [{"class_path": "SelfPlayGeneration", "init_args": {"iterations": 1, "folder": "sets"}}],
        },
    }
    Path("spin.yaml").write_text(yaml.safe_dump(settings))
    run(["fit", "--config", "spin.yaml"])
    tokens = [token for row in set_rows(tmp_path, 0) for token in row["generated"][0]["tokens"]]
    assert tokens and all(token % 4 == 0 for token in tokens)
