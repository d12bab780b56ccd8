"""The examples run, as in a project that uses the library."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lightning_align import ExportModel
from lightning_align.models.formats import read_model
from tests.toys import largest_difference, save_llama

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`"),
]


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)  # a class of the command line is looked for by its module's name
    monkeypatch.setattr("sys.argv", ["example"])
    rows = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(12)]
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "no"} for row in rows]
    for name, content in (("rows", rows), ("pairs", pairs)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def test_our_rows_in_a_plain_loop() -> None:
    losses = load("plain_loop").main("rows.jsonl", epochs=4)
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5


def test_a_subclass_with_its_own_optimizer_and_log() -> None:
    trainer = load("subclass").main("pairs.jsonl", steps=20)
    assert {"train/weight_norm", "val/rewards/accuracies"} <= trainer.callback_metrics.keys()
    assert float(trainer.callback_metrics["train/loss"]) < 0.6


@pytest.mark.filterwarnings("ignore:.*is experimental", "ignore:The number of training batches")
def test_trials_of_optuna_are_pruned_and_the_others_go_on() -> None:
    optuna = pytest.importorskip("optuna", reason="pip install optuna optuna-integration")
    example = load("optuna_search")
    study = example.main("pairs.jsonl", trials=1, epochs=2)
    (trial,) = study.trials
    assert trial.state.name == "COMPLETE" and trial.intermediate_values[1] == trial.value == study.best_value
    strict = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=1.5))
    strict.optimize(lambda trial: example.objective(trial, "pairs.jsonl", 2), n_trials=1)
    assert [(trial.state.name, len(trial.intermediate_values)) for trial in strict.trials] == [("PRUNED", 1)]


def test_somebodys_command_line_and_module() -> None:
    quiet = [
        "--seed_everything=0",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.log_every_n_steps=1",
        "--trainer.max_steps=12",
    ]
    words = ["--data", "SFTDataModule", "--data.train", "rows.jsonl", "--data.batch_size", "4", "--trainer.max_epochs=-1"]
    cli = load("own_cli").main(["fit", "--model", "Unigram", *words, *quiet])
    assert float(cli.trainer.callback_metrics["train/loss"]) < 4.5, "log 259 is 5.6"  # the worst of four seeds is 3.9


def test_self_play_of_a_model_of_x_transformers() -> None:
    trainer = load("x_transformers_spin").main("rows.jsonl")
    assert trainer.global_step == 3 + 6  # the second iteration has the answers of both
    assert Path("generations/iteration_1/train/manifest.json").is_file()


def test_our_callbacks_on_a_module_of_somebody_else() -> None:
    trainer = load("own_module").main(steps=4)
    assert {"train/loss", "val/solved"} <= trainer.callback_metrics.keys()
    samples = [json.loads(line) for line in Path("samples.jsonl").read_text().splitlines()]
    assert {"step", "prompt", "chosen", "generated"} == samples[0].keys()
    weights = read_model("export").state_dict()
    assert largest_difference(weights, dict(trainer.lightning_module.policy.state_dict())) == 0  # type: ignore[arg-type]
    module = L.LightningModule()
    with pytest.raises(ValueError, match="LightningModule has no model as `policy`"):
        ExportModel().on_fit_start(trainer, module)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:enable_nested_tensor is True")
def test_a_language_model_that_sees_pictures() -> None:
    example = load("vision_prefix")
    batch = example.batch_of(6, seed=5)
    (given,) = batch["augments"]
    assert given.tokens.shape == (6, 3, 16, 16)
    assert batch["tokens"].shape == batch["targets"].shape
    assert bytes(batch["tokens"][0][batch["targets"][0]].sub(3)[:-1].tolist()).decode() in {*example.COLORS, *example.SHAPES}
    module = example.compose(example.language_model(2), example.vision_model(2))
    module.configure_model()
    model = module.policy
    model.zero_grad()  # the frozen models still have the gradients of their own training
    with torch.no_grad():
        assert torch.equal(model(batch["tokens"], inputs=[given]), model.anchor(batch["tokens"]))
    for connection in model.connections:
        torch.nn.init.normal_(connection.to_out.weight)
    logits = model(batch["tokens"], inputs=[given])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["tokens"][:, 1:].flatten())
    loss.backward()
    assert bool(loss.isfinite())
    trained = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("connections.")}
    other = model(batch["tokens"], inputs=[given._replace(tokens=given.tokens.flip(0))])
    assert (other - logits).abs().amax(dim=(1, 2)).min() > 0, "each row sees its own picture"
    assert set(example.main(steps=2, held_out=2)) == {"color", "shape"}


def test_preferences_of_a_model_of_litgpt() -> None:
    pytest.importorskip("litgpt", reason="its pins exclude those of transformers 5: pip install --no-deps litgpt")
    trainer = load("litgpt_dpo").main("pairs.jsonl")
    assert float(trainer.callback_metrics["train/loss"]) < 0.6


def test_a_pretrained_model_is_aligned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama("base")
    rows = load("pretrained_demo").made_pairs(200)
    for row in rows:
        first, second = (int(word) for word in re.findall(r"holds (\d+)", row["prompt"]))
        assert f"= {first + second} " in row["chosen"] and f"= {first + second} " not in row["rejected"]
    # A prompt that is held out is not trained on in another pair.
    other_prompts = load("pretrained_demo").other_prompts
    several = [{"prompt": prompt} for prompt in ("a", "b", "a", "c", "b")]
    assert other_prompts(several, 1) == [several[1], several[3], several[4]]
    assert other_prompts([{"prompt": "a"}] * 3, 1) == [{"prompt": "a"}] * 2
    for line in ("{", "[]", '{"prompt": "a", "chosen": "b"}'):
        Path("bad.jsonl").write_text(f"\n{line}\n")
        with pytest.raises(SystemExit, match=r"bad\.jsonl, line 2 "):
            load("pretrained_demo").read_pairs("bad.jsonl")
    # A line separator of Unicode inside a text ends no row.
    pairs = Path("pairs.jsonl").read_text().replace("2", "2\u2028")
    assert "\u2028" in pairs
    Path("separated.jsonl").write_text(pairs, encoding="utf-8")
    words = ["example", "--model", "base", "--pairs", "separated.jsonl", "--steps", "2", "--batch_size", "2", "--folder", "out"]
    monkeypatch.setattr("sys.argv", words)
    load("pretrained_demo").main()
    said = capsys.readouterr().out
    assert "Held-out pairs after 2 steps of DPO" in said and "before: " in said and "after: " in said
    assert Path("out/aligned/model.safetensors").is_file()
    stamp = Path("out/fit.json").stat().st_mtime_ns
    monkeypatch.setattr("sys.argv", words)
    load("pretrained_demo").main()  # nothing is computed again
    assert Path("out/fit.json").stat().st_mtime_ns == stamp and "$ lightning-align" not in capsys.readouterr().out
