"""Compiled layers give the same results as uncompiled ones, with the same weight names."""

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.compile import from_compiled
from torch import Tensor, nn

from lightning_align import Augment, CALMModule, DPOModule, GenerationConfig, PaLM, PretrainedLM, SFTModule, generate
from lightning_align.scoring.sums import response_logprobs
from lightning_align.types import PreferenceBatch
from tests.models.test_pretrained import FAMILIES, V, batch
from tests.toys import largest_difference, tiny_palm, token_batch

# This backend only traces. The code that other backends generate is torch's responsibility.
BACKEND = "eager"
# torch suppresses this warning when its own code triggers it, but the tests turn warnings into errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def make(kind: str, compile: str | None) -> nn.Module:
    torch.manual_seed(0)
    if kind == "palm":
        return PaLM(num_tokens=V, dim=32, depth=3, heads=2, dim_head=16, compile=compile)
    return PretrainedLM(config={"model_type": kind, **FAMILIES[kind]}, compile=compile)


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each function was compiled."""
    import torch._dynamo.convert_frame as convert

    torch._dynamo.reset()
    counts: Counter[str] = Counter()
    compile_frame = convert._compile

    def counted(code: Any, *args: Any, **kwargs: Any) -> Any:
        counts[code.co_name] += 1
        return compile_frame(code, *args, **kwargs)

    monkeypatch.setattr(convert, "_compile", counted)
    return counts


def gradients(model: nn.Module) -> dict[str, Tensor]:
    response_logprobs(model, batch()).sums.sum().backward()  # type: ignore[arg-type]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["palm", "llama"])
def test_compiled_and_plain_models_agree(kind: str, graphs: Counter[str]) -> None:
    plain, compiled = make(kind, None), make(kind, BACKEND)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert largest_difference(gradients(compiled), gradients(plain)) < 1e-6
    once = graphs.total()
    assert 0 < once <= 3, (
        "identical layers share their compilations, at most one each for the first shape, the second shape and dynamic shapes"
    )
    # Decoding runs the uncompiled layers.
    sampled = generate(compiled.eval(), [[5, 6, 7], [8]], GenerationConfig(max_new_tokens=4, temperature=0.0), eos_id=None)
    assert sampled == generate(plain.eval(), [[5, 6, 7], [8]], GenerationConfig(max_new_tokens=4, temperature=0.0), eos_id=None)
    assert graphs.total() == once


def test_a_copy_is_compiled_and_a_checkpoint_is_not(graphs: Counter[str]) -> None:
    model = make("palm", BACKEND)
    copied = copy.deepcopy(model)
    copied(torch.arange(5)[None])
    assert graphs.total() > 0
    module = SFTModule(model)
    assert "compile" not in module.hparams["backbone"]["init_args"]


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"`compile` must be a backend .*inductor.*, but got 'inducktor'"):
        make("palm", "inducktor")


METHODS: dict[str, Callable[[], Any]] = {
    "sft": lambda: SFTModule(tiny_palm()),
    "dpo": lambda: DPOModule(tiny_palm(), shared_prefix=True),
    "calm": lambda: CALMModule(tiny_palm(), [Augment(tiny_palm(seed=1, dim=8), every=1)]),
}


def pair_of_widths(prompt: int, chosen: int, rejected: int) -> PreferenceBatch:
    """Two pairs whose answers follow the same prompt, so that a plan of common beginnings is worth its cost."""
    sides = [token_batch([prompt] * 2, [response, 1], seed=response) for response in (chosen, rejected)]
    sides[1]["tokens"][:, :prompt] = sides[0]["tokens"][:, :prompt]
    return {"chosen": sides[0], "rejected": sides[1]}


@pytest.mark.parametrize("method", METHODS)
def test_whole_steps_are_not_compiled_again_after_the_warm_up(method: str, graphs: Counter[str]) -> None:
    module: Any
    plain: Any
    module, plain = (copy.deepcopy(each) for each in [METHODS[method]()] * 2)
    for each in (module, plain):
        torch.manual_seed(0)
        each.configure_model()
    optimized: Any = torch.compile(module, backend=BACKEND)
    compiled = from_compiled(optimized)  # as `Trainer.fit` does

    def step(each: Any, widths: tuple[int, int, int]) -> dict[str, Tensor]:
        pair = pair_of_widths(*widths)
        output = each.training_step(pair if method == "dpo" else pair["chosen"], 0)
        (output["loss"] if isinstance(output, dict) else output).backward()
        found = {name: p.grad.clone() for name, p in each.named_parameters() if p.grad is not None}
        each.zero_grad()
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler calls what its other parts warn of
        for _ in range(2):
            for widths in ((12, 3, 2), (14, 2, 5), (13, 4, 4), (16, 6, 4)):
                assert largest_difference(step(compiled, widths), step(plain, widths)) < 1e-6
        once = graphs.total()
        assert once > 0
        for widths in ((11, 4, 4), (15, 3, 7), (18, 5, 2), (12, 7, 3)):
            step(compiled, widths)
    assert graphs.total() == once, graphs
