"""Embeddings for added tokens: their start, their training beside adapters, exports, references and resumed runs."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_align import DPODataModule, DPOModule, LoRAConfig, PretrainedLM, SFTDataModule, SFTModule
from lightning_align.models.building import backbone_spec, build_backbone
from lightning_align.models.embeddings import resize_embeddings
from lightning_align.models.formats import merged_weights, read_model, whole_weights, write_adapter, write_model
from tests.toys import largest_difference, tiny_palm

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
OLD, NEW = 280, 290
TOKENS = torch.tensor([[3, 90, 281, 17, 289, 60, 280], [5, 6, 7, 95, 288, 1, 285]])
QUIET: dict[str, Any] = {
    **{name: False for name in ("logger", "enable_progress_bar", "enable_model_summary")},
    "accelerator": "cpu",
    "log_every_n_steps": 1,
}
ADAM = partial(torch.optim.AdamW, lr=0.01)
LORA = {"r": 2, "target_modules": ["q_proj"]}
ADAPTERS: dict[str, Any] = {
    "no adapter": None,
    "LoRA": LORA,
    "DoRA on all layers": {"r": 2, "target_modules": "all-linear", "use_dora": True},
    "whole layers": {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]},
    "factors": {"r": 2, "target_modules": ["embed_tokens", "lm_head"]},
    "PiSSA": {**LORA, "init_lora_weights": "pissa"},
}


@pytest.fixture(params=["llama", "gemma2"])
def base(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with a model with its own output layer, or with one tied to an embedding that is scaled."""
    monkeypatch.chdir(tmp_path)
    return make_base(request.param)


def make_base(family: str) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": OLD}
    extra = {"head_dim": 16, "num_key_value_heads": 1} if family == "gemma2" else {}
    PretrainedLM(config={"model_type": family, **sizes, **extra}).model.save_pretrained("base")
    return "./base"


def stir(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def row_of(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    return weight.detach()


def test_new_rows_start_at_the_mean(base: str) -> None:
    plain, resized = PretrainedLM(base), PretrainedLM(base, resize_embeddings=NEW)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs.resize_token_embeddings(NEW, mean_resizing=True)
    assert resized.num_tokens == resized.model.config.vocab_size == NEW and resized.num_new_tokens == NEW - OLD
    for find in ("get_input_embeddings", "get_output_embeddings"):
        rows, before, others = (row_of(getattr(model, find)()) for model in (resized.model, plain.model, theirs))
        assert torch.equal(rows[:OLD], before)
        # By hand: the mean in float64. The noise has a standard deviation of 3e-5 of that of the rows.
        expected = before.double().mean(0)
        assert 0 < float((rows[OLD:].double() - expected).abs().max()) < 3e-4 * float(before.std())
        torch.testing.assert_close(rows[OLD:], others[OLD:], atol=3e-4 * float(before.std()), rtol=0)
    tied = plain.model.lm_head.weight is plain.model.model.embed_tokens.weight
    assert (resized.model.lm_head.weight is resized.model.model.embed_tokens.weight) == tied
    # The logits of old tokens do not change, and building again gives the same bits, although the random state has moved.
    with torch.no_grad():
        torch.testing.assert_close(resized(TOKENS[:, :2])[..., :OLD], plain(TOKENS[:, :2]), atol=1e-5, rtol=0)
    again = PretrainedLM(base, resize_embeddings=NEW)
    assert largest_difference(dict(again.state_dict()), dict(resized.state_dict())) == 0


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # where PEFT itself reads the adapters
@pytest.mark.parametrize("name", ADAPTERS)
def test_exports_have_the_new_rows(name: str, base: str) -> None:
    adapter = ADAPTERS[name]
    if adapter is not None:
        peft = pytest.importorskip("peft", reason="needs the extra hf")
    model = PretrainedLM(base, adapter=adapter and dict(adapter), resize_embeddings=NEW)
    tied = bool(model.model.config.tie_word_embeddings)
    stir(model)
    model.eval()
    expected = model(TOKENS).detach()
    write_model(model, merged_weights(model, whole_weights(model)), "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out").eval()
    torch.testing.assert_close(theirs(TOKENS).logits.detach(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(read_model("out")(TOKENS).detach(), expected, atol=1e-4, rtol=0)
    assert theirs.config.vocab_size == NEW
    # Layers that train apart are parted; rows that train stay tied.
    assert theirs.config.tie_word_embeddings == (tied and name not in ("whole layers", "factors"))
    # A checkpoint rebuilds the model from its description.
    again = build_backbone(json.loads(json.dumps(backbone_spec(model))))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(TOKENS), expected)
    if adapter is None or name == "PiSSA":
        return
    write_adapter(model, whole_weights(model), "adapter")
    bare = transformers.AutoModelForCausalLM.from_pretrained(base)
    bare.resize_token_embeddings(NEW)
    served = peft.PeftModel.from_pretrained(bare, "adapter").eval()
    torch.testing.assert_close(served(input_ids=TOKENS).logits.detach(), expected, atol=1e-4, rtol=0)
    alone = PretrainedLM(base, adapter="adapter", resize_embeddings=NEW).eval()
    torch.testing.assert_close(alone(TOKENS).detach(), expected, atol=1e-4, rtol=0)


def _tokenizer() -> str:
    """Write a tokenizer of bytes with words that were added, the last of them with the largest id of all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made: Any = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(["<eos>", *alphabet])}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<eos>"])
    made.add_tokens([f"<new{i}>" for i in range(NEW - 257)])
    made.save("t.json")
    rows = [
        {"prompt": f"<new{23 + i}>", "chosen": f"yes<new{32 - i}>", "rejected": "no", "response": "a<new32>"} for i in range(8)
    ]
    for name, keys in {"pairs": ("prompt", "chosen", "rejected"), "rows": ("prompt", "response")}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in rows))
    return "t.json"


class FirstReward(L.Callback):
    """Keeps the rewards of the first step, before the first update."""

    def __init__(self) -> None:
        self.rewards: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not self.rewards:
            self.rewards = [abs(float(trainer.callback_metrics[f"train/rewards/{side}"])) for side in ("chosen", "rejected")]


@pytest.mark.parametrize("name", ["no adapter", "LoRA", "PiSSA"])
def test_rewards_start_at_zero_and_a_run_resumes_exactly(name: str, base: str) -> None:
    if ADAPTERS[name] is not None:
        pytest.importorskip("peft", reason="needs the extra hf")
    tokenizer = _tokenizer()

    def run(steps: int, **options: Any) -> tuple[DPOModule, FirstReward]:
        torch.manual_seed(3)  # of the adapters that a resumed run replaces
        first, adapter = FirstReward(), ADAPTERS[name] and dict(ADAPTERS[name])
        policy = PretrainedLM(base, adapter=adapter, resize_embeddings=NEW)
        trainer = L.Trainer(max_steps=steps, **QUIET, callbacks=[first], enable_checkpointing=False)
        module = DPOModule(policy, optimizer=ADAM)
        trainer.fit(module, DPODataModule("pairs.jsonl", tokenizer=tokenizer, batch_size=4, max_length=32), **options)
        trainer.save_checkpoint(f"{steps}.ckpt")
        return module, first

    begun = row_of(PretrainedLM(base, resize_embeddings=NEW).model.get_input_embeddings())
    whole, first = run(4)
    assert max(first.rewards) < 1e-5
    run(2)
    resumed, _ = run(4, ckpt_path="2.ckpt")
    assert largest_difference(dict(resumed.policy.state_dict()), dict(whole.policy.state_dict())) == 0
    # The rows of new tokens have moved, by the embedding and by the output layer.
    write_model(whole.policy, merged_weights(whole.policy, whole_weights(whole.policy)), "out")
    after = row_of(transformers.AutoModelForCausalLM.from_pretrained("out").get_input_embeddings())
    assert bool(((after - begun)[OLD : OLD + 8].abs().amax(-1) > 1e-4).all())


def test_more_tokens_than_embeddings_are_refused_with_the_remedy(base: str) -> None:
    tokenizer = _tokenizer()
    trainer = L.Trainer(max_steps=1, **QUIET, enable_checkpointing=False)
    data: Any = SFTDataModule("rows.jsonl", tokenizer=tokenizer, batch_size=4)
    with pytest.raises(ValueError, match=rf"model has {OLD} tokens, but the tokenizer has {NEW}.*`resize_embeddings: {NEW}`"):
        trainer.fit(SFTModule(PretrainedLM(base)), data)


def test_what_would_not_train_is_refused(base: str) -> None:
    with pytest.raises(ValueError, match=rf"at least the {OLD} tokens that the model has, but got 200"):
        PretrainedLM(base, resize_embeddings=200)
    assert PretrainedLM(base, resize_embeddings=OLD).num_new_tokens == 0
    module = SFTModule(PretrainedLM(base, resize_embeddings=NEW), lora=LoRAConfig(rank=2))
    with pytest.raises(ValueError, match=r"`lora` freezes the embeddings, so the 10 tokens .*\{r: 2, lora_alpha: 16\}`"):
        module.configure_model()
    pytest.importorskip("peft", reason="needs the extra hf")
    kinds = [{"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}]
    kinds += [{**LORA, "modules_to_save": ["embed_tokens"]}]
    for adapter in kinds:
        with pytest.raises(ValueError, match=r"adds 10 tokens, whose rows would not train beside this `adapter`"):
            PretrainedLM(base, adapter=adapter, resize_embeddings=NEW)


@pytest.mark.parametrize("tie", [True, False])
def test_a_palm_is_resized(tie: bool, tmp_path: Path) -> None:
    model = tiny_palm(tie_embeddings=tie)
    with torch.no_grad():
        before, old = model(torch.tensor([[1, 2, 3]])), model.token_emb.weight.clone()
    assert resize_embeddings(model, 30) == 7
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 29]]))
        torch.testing.assert_close(model(torch.tensor([[1, 2, 3]]))[..., :23], before, atol=1e-5, rtol=0)
    assert logits.shape[-1] == 30
    torch.testing.assert_close(model.token_emb.weight[23:], old.mean(0).expand(7, -1), atol=1e-3, rtol=0)
    write_model(model, whole_weights(model), tmp_path / "out")
    assert torch.equal(read_model(tmp_path / "out")(torch.tensor([[1, 2, 29]])), logits)
    with pytest.raises(ValueError, match="at least the 30 tokens"):
        resize_embeddings(model, 20)
