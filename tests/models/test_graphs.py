"""How many graphs `torch.compile` makes, and where it breaks one: a table that may only improve.

The backend only traces. A layer must be one graph without a break, and few graphs must do for batches of any width. Counts are
of torch 2.13; a release that traces more may need fewer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_align.dpo.batch import concatenate
from lightning_align.models.lora import LoRAConfig, add_lora, lora_disabled, train_only
from lightning_align.models.palm import PaLM
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.unpadded import Unpadded
from lightning_align.models.varlen import Segments
from lightning_align.scoring.losses import LOSSES
from lightning_align.scoring.ratios import log_ratios
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import LogProbs, TokenBatch
from tests.toys import VOCABULARY, preference_batch, tiny_palm, token_batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch, when it traces a function
]
WIDTHS = (9, 14, 22, 17, 31)
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


class Most(NamedTuple):
    """The largest number of graphs and breaks."""

    graphs: int
    breaks: int = 0


def adapted() -> PaLM:
    model = tiny_palm()
    add_lora(model, LoRAConfig(rank=2))
    train_only(model, "default")
    return model


def llama() -> PretrainedLM:
    return PretrainedLM(config={"model_type": "llama", "vocab_size": VOCABULARY, "num_key_value_heads": 1, **LLAMA})


LAYERS: dict[str, tuple[Callable[[], nn.Module], Most]] = {
    # One graph for the first width and one for all others.
    "PaLM": (tiny_palm, Most(2)),
    "PaLM with norms of queries and keys": (lambda: tiny_palm(qk_rmsnorm=True), Most(2)),
    # The adapters are on or off, with gradients or without.
    "PaLM with LoRA and its reference": (adapted, Most(6)),
    "llama": (llama, Most(2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_whole_graphs(name: str) -> None:
    make, most = LAYERS[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model: Any = make()
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(module)
        return module.forward

    for block in model.blocks:
        block.compile(backend=backend)
    for width in WIDTHS:
        tokens = torch.randint(1, VOCABULARY, (3, width))
        model.hidden(tokens).sum().backward()
        if "LoRA" in name:
            with torch.no_grad(), lora_disabled(model):
                model.hidden(tokens)
    assert 0 < len(graphs) <= most.graphs
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) <= most.breaks


@torch.library.custom_op("lightning_align_tests::varlen_attn", mutates_args=())
def stand_in(q: Tensor, k: Tensor, starts: Tensor, longest: int) -> Tensor:
    """An operator of one number per query, in place of flash attention, which a CPU does not have."""
    return q * k.sum()


@stand_in.register_fake
def _(q: Tensor, k: Tensor, starts: Tensor, longest: int) -> Tensor:
    return torch.empty_like(q)


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool
) -> Tensor:  # fmt: skip
    out: Tensor = torch.ops.lightning_align_tests.varlen_attn(query, key, cu_seq_q, max_q)
    return out


@pytest.mark.parametrize(("name", "most"), [("PaLM", Most(2)), ("llama", Most(2))])
def test_layers_without_padding_are_whole_graphs(name: str, most: Most, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    for module in ("palm_unpadded", "pretrained_unpadded"):
        monkeypatch.setattr(f"lightning_align.models.{module}.choose_kernel", lambda *_, dropout: "varlen")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model: Any = LAYERS[name][0]()
    if name == "llama":
        monkeypatch.setattr("lightning_align.models.pretrained_unpadded.probe_documents", lambda *_: None)
        assert model.longest_unpadded(torch.device("cpu"))
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(module)
        return module.forward

    for block in model.blocks:
        block.compile(backend=backend)
    for number, width in enumerate(WIDTHS):
        lengths = [width, width - 4, *range(3, 4 + number)]
        tokens = torch.randint(1, VOCABULARY, (len(lengths), width))
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        with torch.no_grad():
            model.unpadded_hidden(Unpadded.of(tokens, mask, Segments.of_lengths(lengths, tokens.device)))
    assert 0 < len(graphs) <= most.graphs
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) <= most.breaks


def sft_step(model: nn.Module, batch: TokenBatch) -> Tensor:
    return -response_logprobs(model, batch).sums.sum()


def dpo_step(model: nn.Module, batch: TokenBatch) -> Tensor:
    policy = response_logprobs(model, batch)
    reference = LogProbs(torch.zeros_like(policy.sums), policy.counts)
    return LOSSES["sigmoid"](log_ratios(policy, reference), beta=0.1, label_smoothing=0.0).sum()


STEPS: dict[str, tuple[Callable[[nn.Module, TokenBatch], Tensor], Callable[[], nn.Module], Most]] = {
    # On a CPU, where lengths and targets are read.
    "SFT of PaLM": (sft_step, tiny_palm, Most(11, 10)),
    "DPO of PaLM": (dpo_step, tiny_palm, Most(11, 10)),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_has_few_breaks(name: str) -> None:
    step, make, most = STEPS[name]
    torch._dynamo.reset()
    model = make()
    batch = concatenate(preference_batch(3)) if step is dpo_step else token_batch([3, 2, 3], [4, 5, 2])
    explained = torch._dynamo.explain(step)(model, batch)
    assert 0 < explained.graph_count <= most.graphs, explained.graph_count
    assert explained.graph_break_count <= most.breaks, explained.break_reasons
