"""The exchange of files with another engine: the folder that it opens, and the answers that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_align.generation.backend import FileBackend
from lightning_align.generation.ends import Ends
from lightning_align.generation.handoff import Served, request_seed
from lightning_align.generation.sampler import Generation, GenerationConfig
from lightning_align.models.formats import merged_weights, read_model, whole_weights
from lightning_align.models.language_model import logits_of
from lightning_align.models.pretrained import PretrainedLM
from tests.toys import VOCABULARY, tiny_palm

EOS, PROMPTS, IDS = 5, [[3, 1], [4], [2, 7, 1]], [10, 11, 14]
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def ask(
    folder: Path,
    *,
    rows: slice = slice(None),
    wait: float = 0.0,
    model: nn.Module | None = None,
    ends: Ends | None = None,
    **settings: Any,
) -> list[list[Generation]]:
    config = GenerationConfig(**{"max_new_tokens": 4, "seed": 11, **settings})
    return FileBackend(str(folder), wait_seconds=wait).generate(
        model or tiny_palm(),
        PROMPTS[rows],
        config,
        ends=ends or Ends.exactly(EOS, config=config),
        ids=IDS[rows],
        iteration=2,
        limits=[4, 3, 9][rows],
    )


def row(number: int, tokens: Any = (7, 8), reason: Any = "eos", **more: Any) -> dict[str, Any]:
    return {"id": number, "responses": [{"tokens": tokens, "reason": reason, **more}]}


def answers_path(folder: Path) -> Path:
    with pytest.raises(ValueError, match="does not exist yet"):
        ask(folder)
    (prompts,) = (folder / "iteration_2").glob("prompts-*.jsonl")
    return prompts.with_name(prompts.name.replace("prompts", "responses"))


GOOD = [row(10), row(11, [6, 7, EOS]), row(14, [1, 2, 3, 4], "length", logprobs=[-1, -2, -0.5, -3])]


def test_good_answers_are_read_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    path = answers_path(tmp_path)
    path.write_text("".join(json.dumps(answer) + "\n" for answer in reversed(GOOD)))
    answers = ask(tmp_path)
    assert [[(a.tokens, a.reason, a.end) for a in samples] for samples in answers] == [
        [([7, 8], "eos", EOS)],
        [([6, 7], "eos", EOS)],
        [([1, 2, 3, 4], "length", None)],
    ]
    assert answers[2][0].logprobs == [-1, -2, -0.5, -3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (row(12), r":2 answers prompt 12, which was not asked. Remove the row"),
        (row(10), r":2 answers prompt 10 again, after line 1. Remove one"),
        (row(11, [6, VOCABULARY]), rf":2, response 0: `tokens` must be ids from 0 to {VOCABULARY - 1}, but got {VOCABULARY}"),
        (row(11, [6, -1]), r":2, response 0: `tokens` must be ids .* but got -1"),
        (row(11, [6, 1.5]), r":2, response 0: `tokens` must be ids .* but got 1.5"),
        (row(11, [6, True]), r":2, response 0: `tokens` must be ids .* but got True"),
        (row(11, "67"), r":2, response 0 is not valid. Expected"),
        (row(11, reason="done"), r":2, response 0: `reason` must be eos, stop or length, but got 'done'"),
        (row(11, reason="stop"), r":2, response 0: `reason` is 'stop', but there are no stop texts"),
        (row(11, reason=None), r":2, response 0: `reason` must be"),
        (row(11, [6], "length"), r":2, response 0: `reason` is 'length', but it has only 1 of at most 3 tokens"),
        (row(11, [6, 7, 8, 9], "length"), r":2, response 0 has 4 tokens, with its end. Expected at most 3"),
        (row(11, [6, 7, 8]), r":2, response 0 has 4 tokens, with its end"),
        (row(11, logprobs=[-1.0]), r":2, response 0: `logprobs` must have one value per token, but got 1"),
        (row(11, logprobs=[-1.0, float("nan")]), r":2, response 0: `logprobs` must be finite"),
        (row(11, logprobs=[-1.0, 3.0]), r":2, response 0: `logprobs` must be finite and at most 0"),
        (row(11, end=9), r":2, response 0: `end` must be one of"),
        ({"id": 11, "responses": []}, r":2 has 0 responses to prompt 11. Expected 1"),
        ({"id": "11", "responses": []}, r":2 is not a valid row"),
        ({"id": 11}, r":2 is not a valid row"),
        ([11], r":2 is not a valid row"),
    ],
)
def test_a_wrong_row_is_named(wrong: Any, message: str, tmp_path: Path) -> None:
    path = answers_path(tmp_path)
    path.write_text("".join(json.dumps(answer) + "\n" for answer in (GOOD[0], wrong, GOOD[2])))
    with pytest.raises(ValueError, match=message):
        ask(tmp_path, wait=30)  # a wrong row does not become right by waiting


def test_a_file_that_is_not_complete_is_named_and_waited_for(tmp_path: Path) -> None:
    path = answers_path(tmp_path)
    lines = "".join(json.dumps(answer) + "\n" for answer in GOOD)
    path.write_text(lines[: lines.index("\n") + 1])
    with pytest.raises(ValueError, match="has no row for 2 of 3 prompts, such as prompt 11"):
        ask(tmp_path, wait=0.05)
    path.write_text(lines[:-9])
    with pytest.raises(ValueError, match=":3 ends in the middle of a row"):
        ask(tmp_path)
    path.write_text("oops\n" + lines)
    with pytest.raises(ValueError, match=":1 is not a valid row"):
        ask(tmp_path)


def test_prompts_that_were_asked_are_not_asked_again(tmp_path: Path) -> None:
    """A run that was killed after it stored some rows asks only for the others."""
    path = answers_path(tmp_path)
    with pytest.raises(ValueError, match=path.name):
        ask(tmp_path, rows=slice(1, 3))
    path.write_text("".join(json.dumps(answer) + "\n" for answer in GOOD))
    assert [samples[0].tokens for samples in ask(tmp_path, rows=slice(1, 3))] == [[6, 7], [1, 2, 3, 4]]
    assert len(list((tmp_path / "iteration_2").glob("prompts-*"))) == 1


def test_the_settings_are_handed_over_and_may_not_change(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist yet"):
        ask(tmp_path, temperature=0.7, top_p=0.9, num_samples=2)
    settings = json.loads((tmp_path / "iteration_2" / "generation.json").read_text())
    assert settings["iteration"] == 2 and settings["ends"]["eos_token_id"] == [EOS]
    assert settings["sampling"] == {
        "n": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 4,
        "seed": 11,
        "stop": [],
        "stop_token_ids": [EOS],
        "include_stop_str_in_output": True,
    }
    with pytest.raises(ValueError, match=r"other settings: `temperature` was 0.7 and is now 0.5.*, or set them back"):
        ask(tmp_path, temperature=0.5, top_p=0.9, num_samples=2)


def served(model: nn.Module) -> Served:
    config = GenerationConfig(max_new_tokens=4, temperature=0.7, top_p=0.9)
    return Served(model, merged_weights(model, whole_weights(model)), None, Ends.exactly([EOS, 6], config=config), config)


def test_the_folder_opens_as_a_model_with_its_settings(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = PretrainedLM(config=LLAMA).eval()
    backend = FileBackend(str(tmp_path))
    for _ in range(2):
        backend.sync_model(served(model), iteration=0)
    folder, tokens = tmp_path / "iteration_0" / "model", torch.tensor([[3, 1, 4]])
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(opened(tokens).logits, model(tokens))
    told = opened.generation_config
    assert (told.do_sample, told.temperature, told.top_p, told.top_k, told.eos_token_id) == (True, 0.7, 0.9, 0, [EOS, 6])
    with torch.no_grad():
        model.model.lm_head.weight.add_(1)
    with pytest.raises(ValueError, match=r"model has other weights .* Give the backend another `folder`"):
        backend.sync_model(served(model), iteration=0)


def test_models_of_any_kind_are_handed_over(tmp_path: Path) -> None:
    palm, tokens = tiny_palm().eval(), torch.tensor([[3, 1, 4]])
    FileBackend(str(tmp_path)).sync_model(served(palm), iteration=0)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(read_model(tmp_path / "iteration_0" / "model"), tokens), palm(tokens))
    FileBackend(str(tmp_path)).sync_model(served(nn.Linear(2, 3)), iteration=1)
    assert (tmp_path / "iteration_1" / "model" / "model.safetensors").is_file()


def test_seeds_of_requests_differ() -> None:
    seeds = {request_seed(s, t, n) for s in range(4) for t in range(4) for n in range(100)}
    assert len(seeds) == 1600 and all(0 <= seed < 2**31 for seed in seeds)
