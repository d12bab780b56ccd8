"""From a model of transformers and rows, by the command line, to a folder that transformers reads: each method takes it."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_align import PaLM, PretrainedLM
from lightning_align.cli import run
from lightning_align.export.card import model_card
from lightning_align.models.language_model import has_cache
from tests.models.test_pretrained import make
from tests.toys import largest_difference

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "What comes after "


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small Llama and its tokenizer, and rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    rows = [{"prompt": f"{PROMPT}{i}?", "response": f" {i + 1}"} for i in range(16)]
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": " no"} for row in rows]
    for name, content in {"rows": rows, "pairs": pairs, "prompts": rows[:2]}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    run(["tokenizer", "rows.jsonl", "--output", "tokenizer.json", "--vocab_size", "300"])
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, num_key_value_heads=2, max_position_embeddings=128, **sizes)).save_pretrained(
        "base"
    )
    specials = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_file="tokenizer.json", **specials).save_pretrained("base")
    return tmp_path


def small(**model: Any) -> str:
    trainer = {
        "accelerator": "cpu",
        "max_steps": 2,
        "val_check_interval": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    data = {"batch_size": 4, "eval_batch_size": 4, "max_length": 64}
    schedule = {"lr_scheduler": {"init_args": {"total_steps": 2, "warmup_steps": 1}}, "generation": {"max_new_tokens": 4}}
    content = {"trainer": trainer, "data": {"init_args": data}, "model": {"init_args": {**schedule, **model}}}
    Path("small.yaml").write_text(yaml.safe_dump(content))
    return "small.yaml"


def start(config: str, *words: str, **changes: dict[str, Any]) -> Any:
    """Run a configuration as it is, but for what makes it small."""
    small()
    content = yaml.safe_load(Path("small.yaml").read_text())
    content["model"]["init_args"] |= changes.pop("model")
    content["data"]["init_args"] = changes.pop("data", content["data"]["init_args"])
    Path("small.yaml").write_text(yaml.safe_dump(content))
    cli = run(["fit", "--config", str(ROOT / "configs" / config), "--config", "small.yaml", *words])
    assert cli is not None
    return cli


def fit(method: str, rows: str, **model: Any) -> Any:
    # With a dot: of a bare name that is gone one would ask the hub.
    words = ["--data.train", rows, "--data.validation", rows, "--model.init_args.backbone.init_args.name", "./base"]
    config = ROOT / "configs" / method / "huggingface.yaml"
    cli = run(["fit", "--config", str(config), "--config", small(**model), *words])
    assert cli is not None
    return cli


def logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits.detach()
    return logits


@pytest.mark.parametrize(("method", "rows"), [("sft", "rows.jsonl"), ("dpo", "pairs.jsonl")])
def test_in_and_out_by_the_command_line(method: str, rows: str) -> None:
    cli = fit(method, rows)
    out = Path(str(cli.trainer.log_dir)) / "export"
    tokens = torch.arange(12)[None]
    assert float((logits_of(out, tokens) - cli.model(tokens).detach()).abs().max()) < 1e-6
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
    card = (out / "README.md").read_text()
    assert "| base model | ./base |" in card and f"{method.upper()}Module" in card and rows in card and "val/loss" in card
    assert "library_name: transformers" in card and "AutoModelForCausalLM.from_pretrained" in card

    # The same from the checkpoint, where the folder that the run began from is gone.
    checkpoint = str(cli.trainer.checkpoint_callback.last_model_path)
    Path("base").rename("gone")
    run(["export", checkpoint, "--output", "late"])  # with the tokenizer that the run exported
    assert torch.equal(logits_of(Path("late"), tokens), logits_of(out, tokens))
    with pytest.raises(SystemExit, match="has no adapters"):
        run(["export", checkpoint, "--output", "adapter", "--adapter_only", "true"])


def test_adapters_alone() -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    cli = fit("dpo", "pairs.jsonl", lora={"rank": 2, "targets": ["q_proj", "v_proj"]})
    checkpoint = str(cli.trainer.checkpoint_callback.last_model_path)
    assert Path(checkpoint).stat().st_size < Path("base/model.safetensors").stat().st_size
    run(["export", checkpoint, "--output", "adapter", "--adapter_only", "true"])
    tokens = torch.arange(12)[None]
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")
    assert float((theirs(input_ids=tokens).logits - cli.model(tokens)).detach().abs().max()) < 1e-6
    # Merged, when the run ended and from the checkpoint.
    run(["export", checkpoint, "--output", "merged"])
    for out in (Path("merged"), Path(str(cli.trainer.log_dir)) / "export"):
        assert float((logits_of(out, tokens) - cli.model(tokens).detach()).abs().max()) < 1e-5


def test_the_card_of_a_model_of_this_package_sends_nobody_to_transformers() -> None:
    card = model_card(PaLM(num_tokens=8, dim=8, depth=1, heads=1, dim_head=8), "SFTModule", {}, {}, {})
    assert "library_name: lightning-align" in card and "transformers" not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "card", "exec")
    assert "read_model(folder)" in code


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which torch hides from others
def test_compiled_layers_train_and_leave_under_their_own_names() -> None:
    cli = fit("sft", "rows.jsonl", backbone={"init_args": {"compile": "eager", "gradient_checkpointing": True}})
    assert cli.model.policy.compile_backend == "eager"
    assert list(cli.model.policy.state_dict()) == list(PretrainedLM("base").state_dict())
    tokens = torch.arange(12)[None]
    out = Path(str(cli.trainer.log_dir)) / "export"
    assert float((logits_of(out, tokens) - cli.model(tokens).detach()).abs().max()) < 1e-6


def test_self_play_on_a_model_of_transformers() -> None:
    cli = fit("spin", "rows.jsonl", lr_scheduler=None)
    assert cli.trainer.global_step > 0
    assert (Path(str(cli.trainer.log_dir)) / "export" / "model.safetensors").is_file()


def test_a_model_with_fewer_tokens_than_its_tokenizer_is_named_before_training() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    few = PretrainedLM(config={"model_type": "llama", "vocab_size": 200, **sizes})
    few.model.save_pretrained("base")
    with pytest.raises(SystemExit, match=r"the model has 200 tokens, but the tokenizer has \d+. Give the model at least"):
        fit("sft", "rows.jsonl")


def test_composition_by_the_command_line() -> None:
    shutil.copytree("base", "augment")
    cli = start(
        "calm/huggingface.yaml",
        *("--data.train", "rows.jsonl", "--data.validation", "rows.jsonl"),
        # Two layers of the augment; by name, each would ask the hub once.
        model={
            "anchor": {"class_path": "PretrainedLM", "init_args": {"name": "./base"}},
            "augments": [{"model": {"class_path": "PretrainedLM", "init_args": {"name": "./augment"}}, "every": 1}],
        },
    )
    base = PretrainedLM("base").state_dict()
    assert largest_difference({n: p for n, p in cli.model.policy.anchor.state_dict().items() if n in base}, base) == 0
    assert cli.trainer.global_step == 2 and bool(cli.trainer.callback_metrics["val/loss"].isfinite())


def test_retrofit_by_the_command_line() -> None:
    Path("texts").mkdir()
    for number in range(20):
        Path(f"texts/{number}.txt").write_text(f"text {number}: " + " ".join(str(number * i) for i in range(40)))
    decoder = {"class_path": "lightning_align.PretrainedLM", "init_args": {"name": "./base"}}
    cli = start(
        "retro/huggingface.yaml",
        model={"backbone": {"init_args": {"decoder": decoder}}},
        data={"num_chunks": 2, "batch_size": 4},
    )
    base = PretrainedLM("base").state_dict()
    assert largest_difference(dict(cli.model.policy.decoder.state_dict()), base) == 0
    assert cli.trainer.global_step == 2 and cli.trainer.callback_metrics["val/bits_per_byte"].isfinite()


def test_retrofit_and_composition() -> None:
    """RETRO reads between the layers of a model of transformers; CALM composes two."""
    from lightning_align import CALM, RETRO, Augment, GenerationConfig, generate
    from lightning_align.calm.connections import ConnectionConfig
    from lightning_align.retro.model import NeighborTokens

    base, tokens = PretrainedLM("base"), torch.arange(24)[None]
    retro = RETRO(PretrainedLM("base"), chunk_size=8, heads=2, dim_head=8, train_decoder=False)
    neighbors = NeighborTokens(torch.randint(0, 300, (1, 3, 2, 16)), torch.ones(1, 3, 2, 16, dtype=torch.bool))
    assert torch.equal(retro(tokens), base(tokens))
    assert torch.equal(retro(tokens, neighbors=neighbors), base(tokens)), "its gates begin closed"
    with torch.no_grad():
        retro.cross[0].out.weight.normal_()  # type: ignore[union-attr, operator]
    changed = (retro(tokens, neighbors=neighbors) - base(tokens)).abs().amax(-1)[0] > 0
    assert not bool(changed[:7].any()) and bool(changed[7:].all())

    composed = CALM(base, [Augment(make("gpt2"), every=1, tokens="shared")], connection=ConnectionConfig(heads=2))
    assert torch.equal(composed(tokens), PretrainedLM("base")(tokens))

    # Decoding, in which the augment has a cache as well, goes on as if the text so far were read anew.
    composed = CALM(PretrainedLM("base"), [Augment(PretrainedLM("base"), every=1)], connection=ConnectionConfig(heads=2))
    assert has_cache(composed)
    with torch.no_grad():
        for connection in composed.connections:
            connection.to_out.weight.normal_(std=0.5)  # type: ignore[union-attr, operator]
    prompts = [[5, 6, 7, 8], [9, 3]]
    greedy = GenerationConfig(max_new_tokens=6, temperature=0.0)
    for prompt, (found,) in zip(prompts, generate(composed.eval(), prompts, greedy, eos_id=None), strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(composed(torch.tensor([ids]))[0, -1].argmax()))
        assert found.tokens == ids[len(prompt) :]
