"""PEFT adapters are trained, compared with the model without them, written and read back."""

from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_align import DPODataModule, DPOModule, ExportModel, PretrainedLM
from lightning_align.cli import run
from lightning_align.models.building import backbone_spec, build_backbone
from lightning_align.models.language_model import has_hidden
from lightning_align.models.peft_adapters import peft_disabled
from lightning_align.references.frozen import AdaptersOff, FrozenCopy
from lightning_align.scoring.sums import response_logprobs
from tests.models.test_pretrained import FAMILIES, batch
from tests.toys import largest_difference

peft = pytest.importorskip("peft", reason="needs the extra hf")
DORA = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "v_proj"]}
TOKENS = torch.arange(3, 15)[None]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-align"])
    torch.manual_seed(0)
    model = PretrainedLM(config={"model_type": "llama", **FAMILIES["llama"], "vocab_size": 259})
    model.model.save_pretrained("base")
    row = '{"prompt": "a", "chosen": "bcd", "rejected": "xyz"}\n{"prompt": "b", "chosen": "c", "rejected": "y"}\n'
    Path("pairs.jsonl").write_text(row)
    return "./base"


def test_dora_trains_against_the_model_without_it(base: str) -> None:
    from transformers import AutoModelForCausalLM

    plain = PretrainedLM(base).eval()
    policy = PretrainedLM(base, adapter=DORA)
    assert has_hidden(policy)
    assert all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)
    module = DPOModule(policy, beta=1.0, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.05))
    off = {name: False for name in ("enable_progress_bar", "enable_model_summary", "logger")}
    trainer = L.Trainer(max_steps=4, max_epochs=-1, accelerator="cpu", callbacks=[ExportModel("merged")], **off)  # type: ignore[arg-type]
    trainer.fit(module, DPODataModule("pairs.jsonl", batch_size=2, max_length=32))
    trainer.save_checkpoint("last.ckpt")
    assert float(trainer.callback_metrics["train/loss"]) < 0.5  # from 0.69; the worst of four seeds is 0.35

    # The reference is the initial model, without a copy of it.
    assert isinstance(module.reference, AdaptersOff)
    rows = batch()
    referred = module.reference.logprobs(policy, rows).sums  # type: ignore[arg-type]
    assert torch.equal(referred, response_logprobs(plain, rows).sums)  # type: ignore[arg-type]
    policy.eval()
    trained = policy(TOKENS).detach()
    assert float((trained - plain(TOKENS)).detach().abs().max()) > 0.01

    # Written merged at the end of the run and as adapters only from the checkpoint, then read back.
    run(["export", "last.ckpt", "--output", "adapter", "--adapter_only", "true"])
    merged = AutoModelForCausalLM.from_pretrained("merged")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter").eval()
    again = PretrainedLM(base, adapter="adapter").eval()
    for logits in (merged(TOKENS).logits, theirs(input_ids=TOKENS).logits, again(TOKENS)):
        assert float((logits - trained).detach().abs().max()) < 1e-5
    restored = DPOModule.load_from_checkpoint("last.ckpt").policy
    assert largest_difference(dict(restored.state_dict()), dict(policy.state_dict())) == 0


def test_the_reference_of_trained_adapters_is_a_frozen_copy(base: str) -> None:
    policy = PretrainedLM(base, adapter=DORA)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    policy.model.save_pretrained("trained")
    module = DPOModule(PretrainedLM(base, adapter="trained"))
    module.configure_model()
    assert isinstance(module.reference, FrozenCopy)
    expected = response_logprobs(policy.eval(), batch()).sums.detach()  # type: ignore[arg-type]
    torch.testing.assert_close(module.reference.logprobs(module.policy, batch()).sums, expected)  # type: ignore[arg-type]
    # A checkpoint rebuilds it without the folder, from the stored configuration, and then loads its weights.
    again = build_backbone(backbone_spec(module.policy))  # type: ignore[arg-type]
    assert again.adapters_off is None, "the model without trained adapters is not the reference"
    trains = {name for name, p in module.policy.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trains
    again.load_state_dict(module.policy.state_dict())
    torch.testing.assert_close(response_logprobs(again.eval(), batch()).sums, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "beside", [{}, {"modules_to_save": ["lm_head", "input_layernorm"]}, {"trainable_token_indices": [5, 9]}, {"bias": "all"}]
)
def test_switching_adapters_off_and_on_changes_nothing(base: str, beside: dict[str, object]) -> None:
    """Layers that PEFT trains whole once stayed off after the first reference pass, and did not train."""
    policy = PretrainedLM(base, adapter={"r": 4, "target_modules": ["q_proj"], **beside}).eval()
    plain = PretrainedLM(base).eval()
    trains = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert len(trains) > 2
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    trained = policy(TOKENS).detach()
    with peft_disabled(policy):
        off = policy(TOKENS).detach()
    assert torch.equal(off, plain(TOKENS)) and not torch.equal(off, trained)
    assert torch.equal(policy(TOKENS), trained)
    assert [name for name, parameter in policy.named_parameters() if parameter.requires_grad] == trains


def test_bad_adapters_are_named(base: str) -> None:
    with pytest.raises(ValueError, match=r"adapter base must contain adapter_config\.json"):
        PretrainedLM(base, adapter="base")
    with pytest.raises(ValueError, match="must be a configuration of PEFT"):
        PretrainedLM(base, adapter={"rank": 3})
    PretrainedLM(config={"model_type": "llama", **FAMILIES["llama"], "hidden_size": 64}, adapter=DORA).model.save_pretrained(
        "wide"
    )
    with pytest.raises(ValueError, match=r"adapter wide .*LlamaForCausalLM"):
        PretrainedLM(base, adapter="wide")
