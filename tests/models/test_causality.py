"""Models that read later tokens are refused, wherever a policy is loaded."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_align.calm.module import CALMModule
from lightning_align.calm.spec import Augment
from lightning_align.dpo.module import DPOModule
from lightning_align.models.causality import check_causal
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.sft.module import SFTModule
from lightning_align.spin.module import SPINModule
from tests.models.families import REFUSED, V, build
from tests.toys import tiny_palm

SIZE = 23


class Toy(nn.Module):
    """An embedding, a mixing layer and an output layer."""

    def __init__(self, mix: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_tokens, self.mix = SIZE, mix
        self.embedding, self.output = nn.Embedding(SIZE, 8), nn.Linear(8, SIZE)
        self.convolution = nn.Conv1d(8, 8, 3)
        self.recurrent = nn.LSTM(
            8, 4 if mix == "both directions" else 8, batch_first=True, bidirectional=mix == "both directions"
        )
        self.calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        match self.mix:
            case "recurrent" | "both directions":
                x = self.recurrent(x)[0]
            case "mean":
                x = x + 0.01 * x.mean(dim=1, keepdim=True)
            case "one ahead":
                x = self.convolution(nn.functional.pad(x.mT, (1, 1))).mT
            case "convolution":
                x = self.convolution(nn.functional.pad(x.mT, (2, 0))).mT
            case "fourier":  # a causal convolution with the whole row, whose rounding depends on all tokens
                width = 2 * x.shape[1]
                kernel = torch.arange(1, x.shape[1] + 1, dtype=x.dtype).reciprocal()[:, None]
                x = torch.fft.irfft(torch.fft.rfft(x, width, dim=1) * torch.fft.rfft(kernel, width, dim=0), width, dim=1)
                x = x[:, : tokens.shape[1]]
            case "counts calls":
                self.calls += 1
                x = x + self.calls
            case "fails":
                raise RuntimeError("needs an image")
        out: Tensor = self.output(x)
        return out


@pytest.mark.parametrize("mix", ["both directions", "mean", "one ahead"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_models_that_read_later_tokens_are_refused(mix: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"The language model must be causal, but Toy is not: .* Use a model with a causal"):
        check_causal(Toy(mix).to(dtype))


@pytest.mark.parametrize("mix", ["none", "recurrent", "convolution", "fourier"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_causal_models_pass_and_are_not_changed(mix: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch")
    model = Toy(mix).to(dtype)
    model.recurrent.eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check_causal(model)
    assert caplog.text == ""
    assert model.training and not model.recurrent.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_palm_is_checked_like_any_other_model() -> None:
    check_causal(tiny_palm())
    check_causal(tiny_palm(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="must be causal, but PaLM is not"):
        check_causal(tiny_palm(causal=False))


def test_what_cannot_be_checked_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch")
    for model, reason in (
        (Toy("counts calls"), "its logits in evaluation mode differ from call to call"),
        (Toy("fails"), r"it failed on 12 tokens (needs an image)"),
        (Toy("mean").to("meta"), "its weights are not initialized yet (meta device)"),
    ):
        caplog.clear()
        check_causal(model)
        assert f"Toy: Whether it is causal was not checked, because {reason}" in caplog.text


@pytest.mark.parametrize("method", [SFTModule, DPOModule, SPINModule])
@pytest.mark.parametrize("given", ["module", "factory"])
def test_every_method_refuses_them_at_setup(method: Any, given: str) -> None:
    backbone: Any = Toy("mean") if given == "module" else lambda: Toy("mean")
    with pytest.raises(ValueError, match="must be causal, but Toy is not"):
        method(backbone).configure_model()


def test_calm_refuses_such_an_anchor_but_not_such_an_augment() -> None:
    augment = Augment(tiny_palm(causal=False), layers=1)
    with pytest.raises(ValueError, match="must be causal, but PaLM is not"):
        CALMModule(tiny_palm(causal=False), [augment]).configure_model()


def test_an_encoder_can_be_given_a_causal_mask() -> None:
    _, config = REFUSED["roberta"]
    with pytest.raises(ValueError, match=r"RobertaForCausalLM is not.*Set `config: \{is_decoder: true\}`"):
        PretrainedLM(config={"model_type": "roberta", **config})
    model = PretrainedLM(config={"model_type": "roberta", **config, "is_decoder": True}).eval()
    one = torch.randint(3, V, (1, 9))
    other = torch.cat([one[:, :-1], (one[:, -1:] + 1) % V], dim=1)
    assert torch.allclose(model(one)[0, :-1], model(other)[0, :-1], atol=1e-6)


def test_a_cache_that_gives_other_logits_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch")
    model = build("gpt2")
    assert build("gpt2").make_cache is not None
    decoder = model.decoder

    def ignore_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": None}

    decoder.register_forward_pre_hook(ignore_positions, with_kwargs=True)
    assert model.training is False and model.make_cache is None
    assert "GPT2LMHeadModel: Decoding does not use the key-value cache" in caplog.text
