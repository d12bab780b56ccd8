"""Rows that share their beginnings: log-probs and gradients are those of separate rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_align.dpo.batch import concatenate
from lightning_align.models.documents import packing_problem, probe_rows
from lightning_align.models.lora import LoRAConfig, add_lora, lora_disabled, train_only
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.shared_rows import PrefixPlan, SharedRows, plan_prefixes, prefix_fault, shared_rows
from lightning_align.scoring.collisions import response_collisions
from lightning_align.scoring.sums import response_logprobs
from lightning_align.spin.opponent import GeometricMixture, Scoped, score
from lightning_align.types import TokenBatch
from tests.devices.pretended import GPU, PretendedGPU
from tests.models.test_varlen import reference_varlen_attn
from tests.scoring.test_unpadded import SIZES, padded, pretrained, scored
from tests.toys import Plain, preference_batch, tiny_palm, token_batch


def group(*rows: tuple[list[int], list[int]]) -> TokenBatch:
    """Rows of a prompt and an answer, padded on the right."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.zeros(len(rows), width, dtype=torch.bool)
    lengths = []
    for row, (prompt, answer) in enumerate(rows):
        lengths.append(len(prompt) + len(answer))
        tokens[row, : lengths[-1]] = torch.tensor(prompt + answer)
        targets[row, len(prompt) : lengths[-1]] = True
    targets[:, 0] = False  # no token comes before it
    return {"tokens": tokens, "mask": torch.arange(width) < torch.tensor(lengths)[:, None], "targets": targets}


PROMPT = [5, 9, 2, 14, 7]
GROUPS: dict[str, TokenBatch] = {
    "pairs": concatenate(preference_batch(5)),
    "four answers": group((PROMPT, [1, 2, 3]), (PROMPT, [1, 2, 4, 6, 6]), (PROMPT, [8]), (PROMPT, [1, 9, 9, 3])),
    "answers that begin alike": group((PROMPT, [1, 2, 3, 4]), (PROMPT, [1, 2, 3, 5, 6])),
    "the same answer twice": group((PROMPT, [1, 2, 3]), (PROMPT, [1, 2, 3])),
    "an answer that begins another": group((PROMPT, [1, 2]), (PROMPT, [1, 2, 3, 4])),
    "answers of one token": group((PROMPT, [1]), (PROMPT, [2])),
    "no prompt": group(([], [3, 1, 2]), ([], [3, 4]), ([], [5, 1, 1, 1])),
    "a prompt that was cut for one answer": group((PROMPT, [1, 2]), (PROMPT[2:], [3, 4, 4, 4])),
    "a merge over the end of the prompt": group((PROMPT, [1, 2]), ([*PROMPT[:-1], 11], [2])),
    "a row without targets": group((PROMPT, [1, 2]), (PROMPT, []), (PROMPT, [4])),
    "nothing in common": group(([1, 2], [3]), ([4, 5, 6], [7, 8]), ([9], [1])),
    "one row": group((PROMPT, [1, 2, 3])),
}
VARIANTS: list[dict[str, Any]] = [{}, {"variant": "paper"}, {"xpos": False, "tie_embeddings": False}, {"qk_rmsnorm": True}]


def shared(batch: TokenBatch) -> TokenBatch:
    return {**batch, "prefixes": plan_prefixes(batch, worth=0.0)}


def compare(model: nn.Module, batch: TokenBatch, tolerance: float, *, used: bool = True) -> None:
    """The sums and all gradients against whole padded rows, from their logits."""
    expected = padded(model, batch)
    planned = shared(batch)
    assert (shared_rows(model, planned) is not None) == used
    scale = max(1.0, *(float(x.abs().max()) for x in expected))
    for one, other in zip(expected, scored(model, planned), strict=True):
        assert float((one - other).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_shared_beginnings_equal_separate_rows(name: str, dtype: torch.dtype, tolerance: float) -> None:
    compare(tiny_palm(dtype=dtype), GROUPS[name], tolerance)


@pytest.mark.parametrize("overrides", VARIANTS[1:])
def test_each_variant_of_palm_equals_separate_rows(overrides: dict[str, Any]) -> None:
    compare(tiny_palm(dtype=torch.float64, **overrides), GROUPS["four answers"], 1e-12)


def test_the_kernel_of_a_device_equals_separate_rows() -> None:
    with (
        mock.patch("lightning_align.models.palm_unpadded.choose_kernel", lambda *_, **__: "varlen"),
        mock.patch("torch.nn.attention.varlen.varlen_attn", reference_varlen_attn),
    ):
        compare(tiny_palm(dtype=torch.float64), GROUPS["four answers"], 1e-12)
        compare(tiny_palm(dtype=torch.float64), GROUPS["pairs"], 1e-12)


@pytest.mark.parametrize("name", GROUPS)
def test_only_what_differs_is_computed(name: str) -> None:
    """The number of computed tokens is that of the different beginnings of all rows: no plan has fewer."""
    batch = GROUPS[name]
    plan = plan_prefixes(batch)
    beginnings = set()
    for row in range(len(batch["tokens"])):
        places = batch["targets"][row].nonzero().squeeze(1)
        width = max(1, int(places.max()) if len(places) else 0)
        beginnings |= {tuple(batch["tokens"][row, : end + 1].tolist()) for end in range(width)}
    assert plan.total == len(beginnings) == len(plan.where)
    model, seen = tiny_palm(), []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    prefix_fault(model)
    seen.clear()
    response_logprobs(model, shared(batch))
    assert seen == [len(beginnings)]


def test_a_plan_by_hand() -> None:
    tokens = np.array([[7, 8, 9, 1], [7, 8, 2, 0], [3, 0, 0, 0], [7, 8, 9, 5]])
    plan = PrefixPlan(tokens, [4, 3, 1, 4])
    assert plan.rows == [2, 1, 0, 3] and plan.own == [1, 3, 2, 1] and plan.total == 7 and plan.num_separate == 12
    assert plan.places.tolist() == [[1, 2, 4, 5], [1, 2, 3, 0], [0, 0, 0, 0], [1, 2, 4, 6]]
    assert plan.where.tolist() == [8, 4, 5, 6, 2, 3, 15]
    rows = SharedRows.planned(torch.from_numpy(tokens), plan)
    assert rows.tokens.tolist() == [3, 7, 8, 2, 9, 1, 5]
    assert rows.positions.tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert rows.keys.lengths == [1, 3, 4, 4]
    assert plan.saved == pytest.approx(5 / 12)


def test_ids_of_any_size_are_told_apart() -> None:
    tokens = np.array([[256, 1], [1, 256], [255, 2], [256, 65_536]])
    plan = PrefixPlan(tokens, [2, 2, 2, 2])
    assert plan.rows == [1, 2, 0, 3] and plan.own == [2, 2, 2, 1]


def stirred_adapters(model: nn.Module) -> nn.Module:
    add_lora(model, LoRAConfig(rank=2))
    train_only(model, "default")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.double()


def test_adapters_and_their_reference_equal_separate_rows() -> None:
    model, batch = stirred_adapters(tiny_palm(dtype=torch.float64)), GROUPS["pairs"]
    compare(model, batch, 1e-12)
    with torch.no_grad(), lora_disabled(model):
        expected, found = response_logprobs(model, batch).sums, response_logprobs(model, shared(batch)).sums
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_opponents_equal_separate_rows() -> None:
    model, other = stirred_adapters(tiny_palm(dtype=torch.float64)), tiny_palm(dtype=torch.float64, seed=3)
    batch = GROUPS["four answers"]
    for opponent in (Scoped(model), GeometricMixture(model, Scoped(model), 0.3), GeometricMixture(model, other, 0.3)):
        assert shared_rows(opponent, shared(batch)) is not None
        expected = score(opponent, batch)
        torch.testing.assert_close(score(opponent, shared(batch)), expected, rtol=0, atol=1e-12)
        with mock.patch("lightning_align.spin.opponent.SCORED_TOKENS", 20):
            torch.testing.assert_close(score(opponent, shared(batch)), expected, rtol=0, atol=1e-12)


def test_collisions_equal_those_of_separate_rows() -> None:
    model, batch = tiny_palm(dtype=torch.float64), GROUPS["four answers"]
    expected = response_collisions(model, batch)
    torch.testing.assert_close(response_collisions(model, shared(batch)), expected, rtol=0, atol=1e-12)


@contextmanager
def all_in_float64() -> Iterator[None]:
    """Models of transformers convert the inputs of norms to float32, which rounds the sum of two gradients once, not twice."""
    with mock.patch.object(torch, "float32", torch.float64), mock.patch.object(Tensor, "float", Tensor.double):
        yield


FAMILIES = ("llama", "gpt2", "qwen2", "qwen3", "gemma", "gemma3_text")
MORE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers_equal_separate_rows(family: str) -> None:
    more = MORE.get(family, {})
    exact = pretrained(family, **more).double()
    with all_in_float64():
        compare(exact, GROUPS["four answers"], 1e-12)
    compare(pretrained(family, **more), GROUPS["pairs"], 1e-5)


def test_checkpointed_layers_equal_separate_rows() -> None:
    model = PretrainedLM(config={"model_type": "llama", **SIZES}, gradient_checkpointing=True).double().train()
    with all_in_float64():
        compare(model, GROUPS["four answers"], 1e-12)


REFUSED: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8},  # caps its scores
    "bloom": {"n_layer": 2, "n_head": 4},  # its positions (ALiBi) are those of the sequence
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},  # the same
    "mamba": {"state_size": 4},  # its state goes on from answer to answer
}


@pytest.mark.parametrize("family", REFUSED)
@pytest.mark.filterwarnings("ignore")  # transformers recommends faster kernels
def test_models_that_would_mix_answers_compute_them_apart(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = pretrained(family, **REFUSED[family])
    with caplog.at_level("INFO"):
        compare(model, GROUPS["four answers"], 1e-5, used=False)
    assert sum("prompts of pairs are computed once per answer" in record.message for record in caplog.records) == 1


def test_rows_beyond_a_sliding_window_are_computed_apart() -> None:
    batch = group((5 * PROMPT, [1, 2, 3]), (5 * PROMPT, [2, 2]))  # 27 tokens come before the last target
    compare(pretrained("mistral", sliding_window=26), batch, 1e-5, used=False)
    compare(pretrained("mistral", sliding_window=27), batch, 1e-5)


@pytest.mark.parametrize(("context", "used"), [(64, True), (19, True), (18, False), (9, False)])
def test_the_comparison_reads_no_more_than_the_context(context: int, used: bool, caplog: pytest.LogCaptureFixture) -> None:
    """With learned positions, a token behind the context would be an error."""
    with caplog.at_level("INFO"):
        compare(pretrained("gpt2", max_position_embeddings=context).eval(), GROUPS["pairs"], 1e-5, used=used)
    assert ("its context of" in caplog.text) is not used
    problem = packing_problem(pretrained("gpt2", max_position_embeddings=context))
    assert problem is None if context >= 12 else problem is not None and "its context of 9 tokens" in problem


def test_a_model_of_logits_only_computes_rows_apart() -> None:
    compare(Plain(tiny_palm()), GROUPS["pairs"], 1e-5, used=False)
    fault = prefix_fault(Plain(tiny_palm()))
    assert fault is not None and "without their padding" in fault


class MixesAnswers(nn.Module):
    """A model whose tokens read the tokens before them in the sequence, whatever row these are of."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_palm()

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens)
        return logits

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.mix(self.model.hidden(tokens))

    @property
    def head(self) -> Any:
        return self.model.head

    def mix(self, x: Tensor) -> Tensor:
        return x + 0.01 * x.cumsum(-2)

    def longest_unpadded(self, device: torch.device) -> float:
        return 1e9

    def unpadded_hidden(self, rows: Any) -> Tensor:
        return self.mix(self.model.unpadded_hidden(rows))


def test_a_model_that_mixes_answers_is_found_out() -> None:
    model = MixesAnswers()
    fault = prefix_fault(model)
    assert fault is not None and "another answer" in fault
    assert shared_rows(model, shared(GROUPS["pairs"])) is None
    right = tiny_palm()
    off = probe_rows(right, lambda tokens, _: right.hidden(tokens) + 1e-2)
    assert off is not None and probe_rows(right, lambda tokens, _: right.hidden(tokens)) is None


class Amplifies(MixesAnswers):
    """A model that keeps rows apart, and whose last channel depends on the context as trained models do: by many deviations."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def mix(self, x: Tensor) -> Tensor:
        return torch.cat((x[..., :-1], 20 * x[..., -1:]), -1)

    def unpadded_hidden(self, rows: Any) -> Tensor:
        hidden = super().unpadded_hidden(rows)
        hidden[..., 9, -1] += self.error * hidden.std()
        return hidden


def test_the_rounding_that_a_model_amplifies_is_not_a_fault() -> None:
    """One token is off by as much as one of a pretrained model was; then by much less than a wrong position changes."""
    assert prefix_fault(Amplifies(5e-4)) is None
    fault = prefix_fault(Amplifies(1e-2))
    assert fault is not None and "another answer" in fault


def test_batches_that_save_little_are_computed_apart() -> None:
    batch = token_batch([3, 2, 5], [4, 9, 1])
    plan = plan_prefixes(batch)
    assert plan.saved < 0.1 and shared_rows(tiny_palm(), {**batch, "prefixes": plan}) is None


def test_a_batch_on_a_device_shares_without_waiting() -> None:
    model, batch = tiny_palm(), GROUPS["pairs"]
    expected = response_logprobs(model, batch)
    with PretendedGPU() as device:
        model.to(GPU)
        planned = shared(batch)
        counts = {"num_targets": int(batch["targets"][:, 1:].sum())}
        moved: Any = {name: value.to(GPU) if isinstance(value, Tensor) else value for name, value in planned.items()} | counts
        prefix_fault(model)
        device.waits.clear()
        found = response_logprobs(model, moved)
        found.sums.sum().backward()
        assert not device.waits
        sums = found.sums.cpu()
    torch.testing.assert_close(sums, expected.sums)


def test_peft_adapters_equal_separate_rows() -> None:
    model = PretrainedLM(
        config={"model_type": "llama", **SIZES},
        adapter={"r": 2, "target_modules": ["q_proj", "v_proj"]},
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.double()
    with all_in_float64():
        compare(model, GROUPS["four answers"], 1e-12)
