"""Steps of a fixed shape give the tokens and log-probs of steps that grow, and are captured once."""

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_align.calm.connections import ConnectionConfig
from lightning_align.calm.model import CALM
from lightning_align.calm.spec import Augment
from lightning_align.generation import decoder as decoders
from lightning_align.generation import static
from lightning_align.generation.decoder import make_decoder
from lightning_align.generation.sampler import GenerationConfig, evaluating, generate
from lightning_align.generation.static import StaticDecoder
from lightning_align.models.lora import LoRAConfig, add_lora
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.retro.decoding import RetrievalDecoder
from lightning_align.spin.opponent import GeometricMixture, Scoped
from tests.retro.toys import ToyRetriever, tiny_retro
from tests.toys import VOCABULARY, tiny_palm

FULL = os.environ.get("FULL_STUDIES", "0") not in ("", "0")
CPU = torch.device("cpu")
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = GenerationConfig(max_new_tokens=20, batch_size=4, num_samples=2, top_p=0.9)


def llama(family: str = "llama", **more: Any) -> PretrainedLM:
    torch.manual_seed(0)
    config = {"model_type": family, "vocab_size": VOCABULARY, "num_key_value_heads": 1, **SIZES}
    model = PretrainedLM(config=config, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else None
    return model


def adapted() -> nn.Module:
    model = tiny_palm()
    add_lora(model, LoRAConfig(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model


def composition(*, own: Callable[[], nn.Module] = tiny_palm) -> nn.Module:
    augments = [Augment(tiny_palm(seed=1), num_connections=2), Augment(llama(), num_connections=1)]
    model = CALM(own(), augments, connection=ConnectionConfig(heads=2, gate=True))
    with torch.no_grad():
        for parameter in model.connections.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.3)
    return model


def retrieving(conditioned: bool = True) -> nn.Module:
    return RetrievalDecoder(tiny_retro(conditioned=conditioned), ToyRetriever(), num_neighbors=3)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "PaLM": tiny_palm,
    "PaLM with norms of queries and keys": lambda: tiny_palm(qk_rmsnorm=True),
    "PaLM of the paper": lambda: tiny_palm(variant="paper", tie_embeddings=False),
    "adapters": adapted,
    "adapters off": lambda: Scoped(adapted()),
    "llama": llama,
    "qwen2": lambda: llama("qwen2"),
    "mixture": lambda: GeometricMixture(tiny_palm(), tiny_palm(seed=1), 0.5),
    "mixture of adapters": lambda: GeometricMixture(model := adapted(), Scoped(model), 0.5),
    "composition": composition,
    "composition on llama": lambda: composition(own=llama),
    "retrieval": retrieving,
    "retrieval without conditions": lambda: retrieving(conditioned=False),
}


FEW = list(MODELS) if FULL else ["PaLM", "llama", "composition", "retrieval"]
LEAST = list(MODELS) if FULL else ["mixture", "retrieval"]


def prompts(count: int, longest: int = 20) -> list[list[int]]:
    numbers = random.Random(0)
    return [[numbers.randrange(1, VOCABULARY) for _ in range(numbers.randrange(1, longest))] for _ in range(count)]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Use steps of a fixed shape on the CPU, in small buckets. Returns a list with the number of steps."""
    steps = [0]
    step = StaticDecoder.step

    def counted(self: StaticDecoder, tokens: Tensor) -> Tensor:
        steps[0] += 1
        return step(self, tokens)

    monkeypatch.setattr(decoders, "STATIC", ("cpu",))
    monkeypatch.setattr(static, "WIDTH", 16)
    monkeypatch.setattr(StaticDecoder, "step", counted)
    return steps


@pytest.mark.parametrize("name", FEW)
def test_samples_are_those_of_a_growing_cache(name: str, request: pytest.FixtureRequest) -> None:
    """Prompts of many lengths end at different times, leave, and others join. Rows and columns need several buckets."""
    model = MODELS[name]().double()
    expected = generate(model, prompts(8), CONFIG, eos_id=5)
    steps = request.getfixturevalue("on_cpu")
    found = generate(model, prompts(8), CONFIG, eos_id=5)
    assert found == expected and steps[0] > 20
    assert len({tuple(one.tokens) for row in expected for one in row}) > 8
    for one, other in zip((r for row in found for r in row), (r for row in expected for r in row), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", LEAST)
def test_logits_are_those_of_a_growing_cache(name: str) -> None:
    model: Any = MODELS[name]().double()
    texts = prompts(3)
    with evaluating(model):
        grows = make_decoder(model, texts, limit=40, copies=1, device=CPU)
        fixed = StaticDecoder(model, texts, limit=40, copies=1, device=CPU)
        one, other = grows.start(1), fixed.start(1)
        for _ in range(40):
            assert float((one - other).abs().max()) < 1e-12
            tokens = one.argmax(-1)
            one, other = grows.step(tokens), fixed.step(tokens)


def test_rows_leave_and_join_in_the_same_memory(on_cpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With prompts of one length, the buffers are allocated once, and buckets are powers of 2."""
    monkeypatch.setattr(static, "WIDTH", 64)
    seen = set[tuple[int, int]]()
    memory = set[int]()
    run = static.Captures.run

    def watched(self: Any, key: Any, make: Any) -> Tensor:
        seen.add(key)
        return run(self, key, make)

    insert = static.StaticDecoder._read

    def inserted(self: Any, *arguments: Any) -> Tensor:
        out = insert(self, *arguments)
        memory.add(self.cache._buffers.tensors[0].data_ptr())
        return out

    monkeypatch.setattr(static.Captures, "run", watched)
    monkeypatch.setattr(static.StaticDecoder, "_read", inserted)
    generate(
        tiny_palm(), [[1 + row % 5, 2, 3] for row in range(30)], GenerationConfig(max_new_tokens=40, batch_size=8), eos_id=5
    )
    assert len(memory) == 1
    assert {rows for rows, _ in seen} <= {1, 2, 4, 8} and {width for _, width in seen} == {64}


COMPILED = ["PaLM", "llama"] + (["adapters", "adapters off", "mixture", "PaLM of the paper"] if FULL else [])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", COMPILED)
def test_a_hundred_tokens_are_one_graph(name: str) -> None:
    """Per bucket of rows, also when rows have left. The backend only traces."""
    torch._dynamo.reset()
    graphs: list[nn.Module] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(module)
        return module.forward

    model: Any = MODELS[name]()
    with evaluating(model):
        made = StaticDecoder(
            model,
            [[1, 2, 3], [4, 5], [6]],
            limit=150,
            copies=1,
            device=CPU,
            wrap=lambda step: torch.compile(step, backend=backend, fullgraph=True, dynamic=False),
        )
        logits = made.start(1)
        for _ in range(100):
            logits = made.step(logits.argmax(-1))
        assert len(graphs) == 1
        made.select([0, 2])
        logits = logits[[0, 2]]
        for _ in range(20):
            logits = made.step(logits.argmax(-1))
    assert len(graphs) == 2


class Recorder(TorchDispatchMode):
    """Records the operators with the shapes of their inputs, and the memory of the inputs that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.made = set[int]()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        kept = [x.untyped_storage().data_ptr() for x in given if x.untyped_storage()._cdata not in self.made]
        self.calls.append((func, [(x.shape, x.stride(), x.dtype) for x in given], kept))
        out = func(*args, **(kwargs or {}))
        results = [one for one in torch.utils._pytree.tree_leaves(out) if isinstance(one, Tensor)]
        known = {x.untyped_storage()._cdata for x in given}
        self.made |= {x.untyped_storage()._cdata for x in results} - known
        self.hold = (getattr(self, "hold", []), results)  # so that no memory is used twice
        if func._schema.name in ("aten::cat", "aten::copy_", "aten::clone", "aten::_to_copy", "aten::index_select"):
            self.moved += results[0].numel()
        return out


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in FEW if name not in COMPILED])
def test_each_token_runs_the_same_operators_on_the_same_memory(name: str) -> None:
    """What a CUDA graph needs. A step with retrieval that searches is not captured."""
    model: Any = MODELS[name]()
    with evaluating(model):
        made = StaticDecoder(model, [[1, 2, 3], [4, 5, 6]], limit=60, copies=1, device=CPU)
        logits = made.start(1)
        first: list[Any] = []
        runs = 0
        captured = made.captures.run

        def recorded(key: Any, make: Any) -> Tensor:
            nonlocal first, runs
            with Recorder() as recorder:
                out = captured(key, make)
            if runs:  # the first run makes the step
                assert not first or recorder.calls == first
                first = recorder.calls
            runs += 1
            return out

        made.captures.run = recorded  # type: ignore[method-assign]
        for _ in range(12):
            logits = made.step(logits.argmax(-1))
    assert runs > (7 if "retrieval" in name else 11)


@torch.no_grad()
@pytest.mark.parametrize("name", ["PaLM", "llama", "mixture", "composition"])
def test_a_step_copies_a_column_and_not_the_cache(name: str) -> None:
    """The numbers that a step copies and concatenates do not depend on the length of the cache."""
    model: Any = MODELS[name]()
    moved = []
    for limit in (100, 1500):
        with evaluating(model):
            made = StaticDecoder(model, [[1, 2, 3], [4, 5]], limit=limit, copies=1, device=CPU)
            made.step(made.start(1).argmax(-1))
            made.lengths = [limit] * 2  # a step over all columns
            with Recorder() as recorder:
                made.step(torch.tensor([1, 2]))
        moved.append(recorder.moved)
    assert moved[0] == moved[1] < 4000, moved


@torch.no_grad()
@pytest.mark.parametrize("name", ["PaLM", "llama", "mixture", "composition"])
@pytest.mark.parametrize("fixed", [False, True])
def test_prompts_of_one_length_are_read_without_a_mask(name: str, fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash kernels take no mask. Rows of a growing cache decode without one, too."""
    masks: list[Tensor | None] = []
    attend = F.scaled_dot_product_attention

    def watched(query: Tensor, *arguments: Any, **options: Any) -> Tensor:
        masks.append(options.get("attn_mask"))
        return attend(query, *arguments, **options)

    model: Any = MODELS[name]()
    texts = [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]]
    if fixed:
        texts.append([1, 2])  # causality hides the pads on the right
    with evaluating(model):
        if fixed:
            model.make_cache(1, 1).static  # noqa: B018  # finds out whether it is right
            made: Any = StaticDecoder(model, texts, limit=8, copies=1, device=CPU)
        else:
            made = make_decoder(model, texts, limit=8, copies=1, device=CPU)
        monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
        logits = made.start(1)
        own = len(masks)
        assert own and not [mask for mask in masks if mask is not None]
        if not fixed:
            made.step(logits.argmax(-1))
            assert len(masks) > own and not [mask for mask in masks if mask is not None]


def test_models_without_a_static_cache_decode_with_theirs(on_cpu: list[int]) -> None:
    """Sliding windows, and prefixes of any length."""
    config = {"model_type": "mistral", "vocab_size": VOCABULARY, "num_key_value_heads": 1, "sliding_window": 4, **SIZES}
    prefix = CALM(tiny_palm(), [Augment(tiny_palm(seed=1), num_connections=1, alignment="prefix")])
    for model in (PretrainedLM(config=config), prefix):
        assert generate(model, [[1, 2, 3]], GenerationConfig(max_new_tokens=3), eos_id=None)
    assert on_cpu == [0]


def test_a_model_that_reads_columns_otherwise_is_found_out() -> None:
    """Its attention looks at the column before its own only."""
    from lightning_align.models.pretrained_static import static_fault

    model = llama()
    assert static_fault(model) is None
    attention = model.model.model.layers[0].self_attn
    forward = attention.forward

    def shifted(*arguments: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
        mask = None if attention_mask is None else attention_mask.roll(1, -1)
        return forward(*arguments, attention_mask=mask, **options)

    attention.forward = shifted
    assert "differ" in str(static_fault(model))
