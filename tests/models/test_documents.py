"""Packed documents: positions and masks by hand, and log-probs and gradients equal to those of each document alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_align.models.documents import check_packing, document_mask, document_positions, packing_problem
from lightning_align.models.lora import LoRAConfig, add_lora
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import TokenBatch
from tests.models.test_pretrained import FAMILIES, SIZES, make
from tests.toys import Plain, gap, tiny_palm, token_batch

# The lengths of prompts and responses of the rows of each sequence. One row has no prompt to speak of, one is long.
SEQUENCES = (((3, 4), (1, 1), (5, 9)), ((2, 11), (4, 2)), ((6, 3),))


def packed_and_alone(vocabulary: int = 23) -> tuple[TokenBatch, TokenBatch]:
    """The same rows as a packed batch and as a padded one."""
    pairs = [pair for sequence in SEQUENCES for pair in sequence]
    rows = token_batch([p for p, _ in pairs], [r for _, r in pairs], vocabulary=vocabulary)
    width = max(sum(p + r for p, r in sequence) for sequence in SEQUENCES)
    packed: dict[str, Tensor] = {
        "tokens": torch.zeros(len(SEQUENCES), width, dtype=torch.long),
        "targets": torch.zeros(len(SEQUENCES), width, dtype=torch.bool),
        "document_ids": torch.full((len(SEQUENCES), width), -1),
    }
    document = 0
    for row, sequence in enumerate(SEQUENCES):
        start = 0
        for prompt, response in sequence:
            length = prompt + response
            place = slice(start, start + length)
            packed["tokens"][row, place] = rows["tokens"][document, :length]
            packed["targets"][row, place] = rows["targets"][document, :length]
            packed["document_ids"][row, place] = document
            document, start = document + 1, start + length
    return {**packed, "mask": packed["document_ids"] >= 0}, rows  # type: ignore[typeddict-item]


def alone(model: nn.Module, rows: TokenBatch) -> Tensor:
    """Score one row at a time, without padding."""
    sums = []
    for i, length in enumerate(rows["mask"].sum(1).tolist()):
        names = ("tokens", "mask", "targets")
        sums.append(response_logprobs(model, {name: rows[name][i : i + 1, :length] for name in names}).sums)  # type: ignore
    return torch.cat(sums)


def compare(model: nn.Module, vocabulary: int, tolerance: float) -> None:
    packed, rows = packed_and_alone(vocabulary)
    weights = torch.linspace(-1, 1, len(rows["tokens"]))
    results = []
    for score in (lambda: response_logprobs(model, packed).sums, lambda: alone(model, rows)):
        model.zero_grad()
        sums = score()
        (sums * weights).sum().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]
        results.append((sums.detach(), gradients))
    (sums, gradients), (expected, slow) = results
    assert gap(sums, expected) <= tolerance * max(1.0, float(expected.abs().max()))
    scale = max(1.0, *(float(g.abs().max()) for g in slow))
    assert max(gap(a, b) for a, b in zip(gradients, slow, strict=True)) <= tolerance * scale
    assert response_logprobs(model, packed).counts.tolist() == rows["targets"].sum(1).tolist()


def test_positions_and_mask_by_hand() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 2, 2], [3, 3, -1, -1, -1, -1]])
    assert document_positions(documents).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 0, 0, 0]]
    mask = document_mask(documents)
    assert mask[0].int().tolist()[:4] == [[1, 1, 1, 0, 0, 0]] * 3 + [[0, 0, 0, 1, 0, 0]]
    assert mask[1].int().sum(1).tolist() == [2, 2, 0, 0, 0, 0]


VARIANTS: list[dict[str, Any]] = [{}, {"variant": "paper"}, {"xpos": False, "tie_embeddings": False}, {"qk_rmsnorm": True}]


@pytest.mark.parametrize("overrides", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_palm_is_exact(overrides: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    compare(tiny_palm(dtype=dtype, **overrides), 23, tolerance)


def test_palm_is_exact_with_a_mask() -> None:
    """The path of a GPU and of compiled layers."""
    model = tiny_palm(dtype=torch.float64)
    packed, _ = packed_and_alone()
    grouped = model.hidden(packed["tokens"], documents=packed["document_ids"])
    model.compile_backend = "eager"
    masked = model.hidden(packed["tokens"], documents=packed["document_ids"])
    assert gap(grouped[packed["mask"]], masked[packed["mask"]]) < 1e-12
    compare(model, 23, 1e-12)


def test_adapters_are_exact_also_on_the_output_layer() -> None:
    for targets in (["in_proj"], ["in_proj", "to_logits"]):
        model = tiny_palm(dtype=torch.float64, tie_embeddings=False)
        add_lora(model, LoRAConfig(rank=2, targets=targets))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        compare(model.double(), 23, 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers_are_exact(family: str) -> None:
    # These compute norms or softmax in float32 in any dtype.
    compare(make(family).double(), 96, 1e-6 if family in ("gemma2", "gemma3_text", "cohere") else 1e-12)
    compare(make(family), 96, 1e-5)


def test_gradient_checkpointing_is_exact() -> None:
    model = make("llama", gradient_checkpointing=True).double()
    model.train()
    compare(model, 96, 1e-12)


RECURRENT: dict[str, dict[str, Any]] = {
    "falcon_h1": {
        **SIZES,
        "num_key_value_heads": 2,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
    "mamba": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4},  # its positions (ALiBi) ignore documents
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},  # its attention ignores documents
}


@pytest.mark.parametrize("family", RECURRENT)
@pytest.mark.filterwarnings("ignore")  # transformers recommends faster kernels
def test_models_that_mix_documents_are_refused(family: str) -> None:
    torch.manual_seed(0)
    model = PretrainedLM(config={"model_type": family, **RECURRENT[family]})
    model.train()
    with pytest.raises(ValueError, match=r"`packing` must be false for PretrainedLM\(.*\), but got true: its outputs"):
        response_logprobs(model, packed_and_alone(96)[0])
    assert model.training
    assert model.model.training


def test_the_check_is_made_once_and_accepts_half_precision() -> None:
    model = tiny_palm()
    check_packing(model)
    model.forward = None  # type: ignore[method-assign,assignment]  # a second check would fail
    check_packing(model)
    assert packing_problem(tiny_palm(dtype=torch.bfloat16)) is None


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"for Plain.* its forward pass has no argument `documents`"):
        response_logprobs(Plain(tiny_palm()), packed_and_alone()[0])


def test_the_first_token_of_a_document_is_no_target() -> None:
    packed, _ = packed_and_alone()
    packed["targets"][0, 7] = True
    with pytest.raises(ValueError, match="must be false at the first token of every document"):
        response_logprobs(tiny_palm(), packed)
