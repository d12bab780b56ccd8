"""The model card: what it says, and that its code runs as it is printed, in the folder that was written."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from lightning_align import DPODataModule, DPOModule, ExportModel, LoRAConfig, PaLM, PretrainedLM, SFTDataModule, SFTModule
from lightning_align.export.card import model_card, shortened
from lightning_align.export.papers import LOSSES as PAPERS
from lightning_align.export.papers import METHODS, papers_of
from lightning_align.models.language_model import logits_of
from lightning_align.models.palm import PaLM as PaLMClass
from lightning_align.scoring.losses import LOSSES
from tests.toys import tiny_palm

TOKENS = torch.arange(3, 15)[None]
QUIET: dict[str, Any] = {
    **{name: False for name in ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")},
    "accelerator": "cpu",
    "max_steps": 2,
    "log_every_n_steps": 1,
}
SGD = partial(torch.optim.SGD, lr=0.05)
PEFT = {"r": 2, "target_modules": ["q_proj"], "use_dora": True}
LORA = LoRAConfig(rank=2, targets=["q_proj", "in_proj"])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}?", "response": "yes", "chosen": "yes", "rejected": "no"} for i in range(8)]
    for name, keys in {"rows": ("prompt", "response"), "pairs": ("prompt", "chosen", "rejected")}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in rows))
    return tmp_path


def make_base(**changes: Any) -> str:
    pytest.importorskip("transformers", reason="needs the extra hf")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 259}
    PretrainedLM(config={"model_type": "llama", **sizes, **changes}).model.save_pretrained("base")
    return "./base"


def make_palm() -> str:
    """Train a PaLM for a step, and return its export, from which adapters train."""
    model = PaLM(num_tokens=259, dim=16, depth=1, heads=2, dim_head=8)
    fit(SFTModule(model, optimizer=SGD), "first")
    return "first"


def fit(module: Any, out: str, *, adapter_only: bool = False) -> L.Trainer:
    data = DPODataModule if isinstance(module, DPOModule) else SFTDataModule
    rows = str(Path("pairs.jsonl" if isinstance(module, DPOModule) else "rows.jsonl").resolve())
    trainer = L.Trainer(**QUIET, callbacks=[ExportModel(out, adapter_only=adapter_only)])
    trainer.fit(module, data(rows, validation=rows, batch_size=4, max_length=32))
    return trainer


def merged() -> Any:
    return DPOModule(PretrainedLM(make_base(), adapter=dict(PEFT)), optimizer=SGD), False


def whole() -> Any:
    return DPOModule(PretrainedLM(make_base()), optimizer=SGD), False


def palm() -> Any:
    return SFTModule(PaLM(num_tokens=259, dim=16, depth=1, heads=2, dim_head=8), optimizer=SGD), False


def alone() -> Any:
    return DPOModule(PretrainedLM(make_base(), adapter=dict(PEFT)), optimizer=SGD), True


def own_alone() -> Any:
    return SFTModule(PretrainedLM(make_base()), lora=LORA, optimizer=SGD), True


def own_merged() -> Any:
    return SFTModule(PretrainedLM(make_base()), lora=LORA, optimizer=SGD), False


def palm_alone() -> Any:
    return SFTModule(init_from=make_palm(), lora=LORA, optimizer=SGD), True


def more_tokens_alone() -> Any:
    base = make_base(vocab_size=250)
    return SFTModule(PretrainedLM(base, adapter=dict(PEFT), resize_embeddings=260), optimizer=SGD), True


KINDS: list[Callable[[], Any]] = [whole, merged, palm, alone, own_alone, own_merged, palm_alone, more_tokens_alone]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_code_runs_as_it_is_printed(kind: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if kind in (merged, alone, more_tokens_alone):
        pytest.importorskip("peft", reason="needs the extra hf")
    module, adapter_only = kind()
    fit(module, "deep/out", adapter_only=adapter_only)
    card = Path("deep/out/README.md").read_text()
    blocks = re.findall(r"```(\w*)\n(.*?)```", card, re.DOTALL)
    assert [language for language, _ in blocks] == ["python"]
    monkeypatch.chdir("deep/out")
    scope: dict[str, Any] = {}
    exec(compile(blocks[0][1], "card", "exec"), scope)
    model = scope["model"].eval()
    with torch.no_grad():
        ours = module.policy.eval()(TOKENS)
        theirs = logits_of(model, TOKENS) if isinstance(model, PaLMClass | PretrainedLM) else model(input_ids=TOKENS).logits
    assert float((theirs - ours).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", [palm, whole], ids=lambda kind: kind.__name__)
def test_the_code_runs_in_a_new_process(kind: Callable[[], Any]) -> None:
    module, _ = kind()
    fit(module, "out")
    (code,) = re.findall(r"```python\n(.*?)```", Path("out/README.md").read_text(), re.DOTALL)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd="out", check=True, timeout=120)


def front_matter(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match is not None
    content = yaml.safe_load(match[1])
    assert isinstance(content, dict)
    return content


def test_a_card_says_what_the_run_was(folder: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra hf")
    base = make_base()
    text = "---\nlicense: apache-2.0\nbase_model: some-lab/model\nlanguage: [en]\n---\n# Base\n"
    Path("base/README.md").write_text(text)
    module = DPOModule(PretrainedLM(base, adapter=dict(PEFT)), beta=0.3, loss="ipo", optimizer=SGD)
    trainer = fit(module, "out", adapter_only=True)
    card = Path("out/README.md").read_text()
    found = front_matter(card)
    assert found["license"] == "apache-2.0" and found["language"] == ["en"]
    assert (found["base_model"], found["base_model_relation"]) == ("some-lab/model", "adapter")
    assert found["library_name"] == "peft" and found["pipeline_tag"] == "text-generation"
    assert {"lightning-align", "dpo", "lora"} <= set(found["tags"])
    for number in ("2305.18290", "2310.12036", "2106.09685", "2402.09353"):  # DPO, IPO, LoRA, DoRA
        assert f"https://arxiv.org/abs/{number}" in card
    assert "| train data | pairs.jsonl (8 of 8 rows) |" in card and "| validation data | pairs.jsonl (8 of 8 rows) |" in card
    for name, value in {"beta": 0.3, "loss": "ipo", "learning rate": 0.05, "batch size": 4, "steps": 2}.items():
        assert f"| {name} | `{value}` |" in card
    for name in ("train/loss", "val/loss", "val/rewards/accuracies"):
        if name in trainer.callback_metrics:
            assert f"| {name} | {float(trainer.callback_metrics[name]):.4g} |" in card
    assert str(folder) not in card and "/root" not in card


def test_a_base_that_the_hub_would_reject_is_no_metadata() -> None:
    module, _ = whole()
    found = front_matter(model_card(module.source.backbone, "DPOModule", {}, {}, {}))
    assert "base_model" not in found and found["library_name"] == "transformers"
    policy = module.source.backbone
    policy.init_args["name"] = "some-lab/model-7B"
    assert front_matter(model_card(policy, "DPOModule", {}, {}, {}))["base_model"] == "some-lab/model-7B"
    card = model_card(policy, "DPOModule", {"init_from": str(Path.home() / "very" / "secret.ckpt")}, {}, {})
    assert "secret.ckpt" in card and "very" not in card


def test_values_cannot_break_the_tables() -> None:
    card = model_card(tiny_palm(), "SFTModule", {"loss": "a|b\nc"}, {"train": "x|y.jsonl"}, {"val/loss": 1.0, "step": 3.0})
    assert "`a\\|b c`" in card and "x\\|y.jsonl" in card and "| step |" not in card
    assert shortened("/a/b/rows.jsonl") == "rows.jsonl" and shortened("rows/b.jsonl") == "rows/b.jsonl"


def test_each_method_and_loss_has_its_paper() -> None:
    assert {name: number for name, (_, number) in METHODS.items()} == {
        "SFTModule": None,
        "DPOModule": "2305.18290",
        "SPINModule": "2401.01335",
        "CALMModule": "2401.02412",
        "RETROModule": "2112.04426",
    }
    assert PAPERS.keys() == LOSSES.keys()
    for name, function in LOSSES.items():
        assert PAPERS[name][1] in str(function.__doc__) or "See `aot_loss`" in str(function.__doc__), name
    assert papers_of("SFTModule", {}, {}) == []
    mixed = papers_of("DPOModule", {"loss": {"sigmoid": 0.5, "ipo": 0.5}, "reference": "moving"}, {"rank": 4, "rslora": True})
    assert [number for _, number in mixed] == ["2305.18290", "2310.12036", "2404.09656", "2106.09685", "2312.03732"]
