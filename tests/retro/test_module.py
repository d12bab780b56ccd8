"""Tests of RETROModule and RETRODataModule with a plain Trainer."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_align import RETRO, NeighborPanel, RetrievalIndexing, RETRODataModule, RETROModule, SFTModule
from lightning_align.data.mixture import SourcePart
from lightning_align.data.tokenizer import ByteTokenizer
from lightning_align.generation.sampler import GenerationConfig
from lightning_align.models.palm import PaLM
from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.retro.batch import RetrievalBatch
from lightning_align.retro.indexing import build_database
from lightning_align.retro.model import NeighborTokens
from lightning_align.training.callbacks import PredictionWriter
from tests.distributed.index import checkpoint
from tests.retro.conftest import SIZE
from tests.retro.toys import tiny_retro
from tests.toys import gap, state_of, tiny_palm

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def decoder() -> PaLM:
    return tiny_palm(num_tokens=259, depth=3)


def module(**options: Any) -> RETROModule:
    torch.manual_seed(0)
    model = options.pop("backbone", None) or tiny_retro(decoder=decoder(), chunk_size=SIZE)
    return RETROModule(model, optimizer=SGD, **options)


def data(database: RetrievalDatabase, **options: Any) -> RETRODataModule:
    return RETRODataModule(str(database.folder), **{"num_chunks": 3, "batch_size": 4, "eval_num_neighbors": 3, **options})


def trainer(folder: Path, **options: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            **options,
        }
    )


@torch.no_grad()
def slow_nats(model: RETRO, batch: RetrievalBatch, neighbors: NeighborTokens | None) -> Tensor:
    """Compute the nats of each row, one row and one target at a time, without padding."""
    sums = []
    for row in range(len(batch["tokens"])):
        length, total = int(batch["mask"][row].sum()), 0.0
        one = None if neighbors is None else NeighborTokens(*(part[row : row + 1] for part in neighbors))
        # Include one position more than is scored, so that a short row has at least one chunk.
        logits = model(batch["tokens"][row : row + 1, : max(length, SIZE)], neighbors=one)[0].double()
        for place in range(1, length):
            total -= float(logits[place - 1].log_softmax(0)[batch["tokens"][row, place]])
        sums.append(total)
    return torch.tensor(sums, dtype=torch.float64)


def test_each_arm_uses_its_neighbors(database: RetrievalDatabase, tmp_path: Path) -> None:
    tuned = module(by_k=[1, 3])
    run = trainer(tmp_path)
    (values,) = run.validate(tuned, data(database, eval_batch_size=2), verbose=False)
    (again,) = trainer(tmp_path).validate(module(by_k=[1, 3]), data(database, eval_batch_size=1), verbose=False)
    assert values.keys() == again.keys() and all(values[name] == pytest.approx(again[name], abs=1e-5) for name in values)
    loader = data(database).val_dataloader()
    batch = loader.dataset[range(len(loader.dataset))]  # type: ignore[arg-type]
    num_bytes = sum(len(text.encode()) for text in ("the quick brown dog jumps at noon", "é warm sun"))
    arms = {
        "on": batch["neighbors"].first(2),
        "off": None,
        "random": batch["controls"]["random"].first(2),
        "shuffled": batch["controls"]["shuffled"].first(2),
        "k_1": batch["neighbors"].first(1),
        "k_3": batch["neighbors"],
    }
    for name, neighbors in arms.items():
        want = float(slow_nats(tuned._retro, batch, neighbors).sum()) / math.log(2) / num_bytes
        assert values[f"val/{name}/bits_per_byte"] == pytest.approx(want, rel=1e-4)
    assert values["val/bits_per_byte"] == values["val/on/bits_per_byte"]
    assert len({round(values[f"val/{name}/bits_per_byte"], 4) for name in arms}) == len(arms)
    off = values["val/off/bits_per_byte"] - values["val/on/bits_per_byte"]
    assert values["val/off/gain"] == pytest.approx(off, abs=1e-5)


def test_a_step_follows_the_gradient_of_the_mean_over_targets(database: RetrievalDatabase, tmp_path: Path) -> None:
    source = data(database, batch_size=100, num_neighbors=2)
    tuned = module(vary_neighbors=False)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(tuned, source)
    expected = module().policy or tiny_retro(decoder=decoder(), chunk_size=SIZE)
    rows = source.train_dataloader().dataset
    batch = rows[range(len(rows))]  # type: ignore[arg-type]
    logits = expected(batch["tokens"][:, :-1], neighbors=batch["neighbors"])
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["tokens"][:, 1:], reduction="none")
    (nats * batch["targets"][:, 1:]).sum().div(batch["targets"].sum()).backward()
    for parameter, new in zip(expected.parameters(), tuned.policy.parameters(), strict=True):
        assert parameter.grad is not None
        assert gap(parameter - 0.1 * parameter.grad, new) < 1e-5


def test_training_on_a_query_set(database: RetrievalDatabase, tmp_path: Path) -> None:
    source = data(database, train="validation", random_neighbors=1.0)
    trainer(tmp_path, limit_val_batches=0).fit(module(), source)
    rows: Any = source.train_dataloader().dataset
    assert rows.table.document_ids == ["v.txt", "w.txt"] and rows.database is not rows.table
    with pytest.raises(ValueError, match="no query set 'other'"):
        data(database, train="other").train_dataloader()
    with pytest.raises(ValueError, match="`random_neighbors` must be a share from 0 to 1, but got 2"):
        data(database, random_neighbors=2.0)


def test_the_number_of_neighbors_depends_on_the_step_only(
    database: RetrievalDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, int]] = []
    draw = RETROModule._draw

    def recorded(one: RETROModule, most: int, step: int) -> int:
        drawn.append((one.trainer.global_step, draw(one, most, step)))
        return drawn[-1][1]

    monkeypatch.setattr(RETROModule, "_draw", recorded)
    seen: dict[str, set[int]] = {}
    frozen = tiny_retro(decoder=decoder(), chunk_size=SIZE, train_decoder=False)
    for name, options in (("tuned", {}), ("frozen", {"backbone": frozen})):
        for _ in range(2):
            settings = {"max_steps": 20, "limit_val_batches": 0, "accumulate_grad_batches": 2}
            trainer(tmp_path, **settings).fit(module(**options), data(database, batch_size=2))
        # Each of 20 steps has two micro-batches (or one at the end of an epoch). It draws one number, the same in both runs.
        assert len(drawn) > 60 and len(set(drawn)) == 20
        seen[name] = {number for _, number in drawn}
        drawn.clear()
    assert seen == {"tuned": {0, 1, 2}, "frozen": {1, 2}}


def test_retrofitting_keeps_the_language_model_bit_for_bit(database: RetrievalDatabase, tmp_path: Path) -> None:
    base = SFTModule(tiny_palm(num_tokens=259, depth=3, seed=5))
    base.configure_model()
    run = trainer(tmp_path)
    run.strategy.connect(base)
    path = tmp_path / "base.pt"
    torch.save({f"policy.{name}": value for name, value in base.policy.state_dict().items()}, path)
    fitted = module(
        backbone=tiny_retro(decoder=decoder(), chunk_size=SIZE, train_decoder=False), retrofit_from=str(path), num_neighbors=2
    )
    before = trainer(tmp_path)
    before.fit(fitted, data(database))
    after = state_of(fitted._retro.decoder)
    assert all(torch.equal(after[name], value) for name, value in base.policy.state_dict().items())
    assert any(gap(p, q) > 0 for p, q in zip(fitted._retro.cross.parameters(), tiny_retro().cross.parameters(), strict=False))
    tokens = torch.randint(3, 259, (2, 20))
    assert torch.equal(fitted(tokens), base.policy(tokens))


def test_a_checkpoint_loads_without_the_file_of_retrofit_from(database: RetrievalDatabase, tmp_path: Path) -> None:
    path = tmp_path / "base.pt"
    torch.save(decoder().state_dict(), path)
    tuned = module(retrofit_from=str(path))
    run = trainer(tmp_path, max_steps=3)  # one epoch, with a validation at its end
    run.fit(tuned, data(database))
    run.save_checkpoint(tmp_path / "retro.ckpt", weights_only=True)
    path.unlink()
    again = RETROModule.load_from_checkpoint(tmp_path / "retro.ckpt", weights_only=True)
    again.configure_model()
    (values,) = trainer(tmp_path).validate(again, data(database), ckpt_path=tmp_path / "retro.ckpt", verbose=False)
    assert values["val/bits_per_byte"] == pytest.approx(float(run.callback_metrics["val/bits_per_byte"]), abs=1e-6)
    fresh = module(retrofit_from=str(path))
    with pytest.raises(ValueError, match="there is no such file"):
        trainer(tmp_path).validate(fresh, data(database), verbose=False)


def test_resuming_within_an_epoch_is_bit_identical(database: RetrievalDatabase, tmp_path: Path) -> None:
    whole = module()
    trainer(tmp_path, max_steps=6, limit_val_batches=0).fit(whole, data(database, batch_size=1))

    def keeping(steps: int) -> L.Trainer:
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        return trainer(tmp_path, max_steps=steps, limit_val_batches=0, enable_checkpointing=True, callbacks=[keep])

    keeping(3).fit(module(), data(database, batch_size=1))
    rest = module()
    keeping(6).fit(rest, data(database, batch_size=1), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    want, got = state_of(whole.policy), state_of(rest.policy)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_predictions_contain_the_neighbors(database: RetrievalDatabase, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the quick brown fox"}\n{"prompt": "a"}\n')
    tuned = module(generation=GenerationConfig(max_new_tokens=10, temperature=0.0))
    writer = PredictionWriter(tmp_path / "out.jsonl")
    trainer(tmp_path, callbacks=[writer]).predict(tuned, data(database, predict=str(prompts)), return_predictions=False)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the quick brown fox", "a"]
    first = rows[0]["neighbors"][0][0]
    assert first["chunk"] == "the qui"  # 8 tokens with the beginning-of-sequence token
    assert {read["document"] for read in first["read"]} <= {"a.txt", "b.txt", "d.txt"} and len(first["read"]) == 2
    assert first["read"][0]["text"] == "the qui" and first["read"][0]["continuation"] == "ck brown"


def test_prompts_of_mixtures_and_mapped_columns(database: RetrievalDatabase, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "the quick"}\n{"question": "a", "answer": "b"}\n')
    (tmp_path / "b.jsonl").write_text('{"instruction": "add", "input": "1 2", "output": "3"}\n')
    (tmp_path / "c.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    (tmp_path / "d.jsonl").write_text('{"text": "hi"}\n')
    mapped = SourcePart(str(tmp_path / "a.jsonl"), columns={"prompt": "question"})
    source = data(database, predict=[mapped, SourcePart([str(tmp_path / "b.jsonl"), str(tmp_path / "c.jsonl")])])
    batches = list(source.predict_dataloader())
    texts = [ByteTokenizer().decode(prompt, skip_special=False) for batch in batches for prompt in batch["prompts"]]
    assert texts == ["<bos>the quick", "<bos>a", "<bos>add\n1 2", "<bos><|user|>\nhi\n<|assistant|>\n"]
    assert [row for batch in batches for row in batch["rows"].tolist()] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"d\.jsonl:1 has no field 'prompt'"):
        data(database, predict=str(tmp_path / "d.jsonl")).predict_dataloader()


def test_a_planted_leak_raises_or_warns(tmp_path: Path) -> None:
    for name in ("documents", "held_out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.txt").write_text("a text that stands on both sides of the split is no evidence")
    (tmp_path / "documents" / "other.txt").write_text("quite another one, of which nothing can be copied word for word")
    sources = str(tmp_path / "documents"), {"validation": str(tmp_path / "held_out")}

    def build(folder: str, **options: Any) -> RetrievalDatabase:
        return build_database(
            tmp_path / folder, sources[0], encoder="bm25", queries=sources[1], chunk_size=SIZE, k=3, **options
        )

    with pytest.warns(UserWarning, match="are without neighbors"):  # the copy is hidden, and the other one shares few words
        leaky = build("database")
    with pytest.raises(ValueError, match=r"1 documents of validation have near-duplicates in the database, such as same\.txt"):
        trainer(tmp_path).validate(module(), data(leaky), verbose=False)
    overlap = {}
    for name, database in (("hidden", leaky), ("shown", build("shown", hide_copies=False))):
        with pytest.warns(UserWarning, match="can copy from them as neighbors"):
            rows = data(database, on_leak="warn").val_dataloader().dataset
        batch = rows[range(len(rows))]  # type: ignore[arg-type]
        overlap[name] = batch["overlap"][batch["chunk_bytes"] > 0]
    assert bool((overlap["shown"] == 1).all())  # all of the text could be copied
    assert float(overlap["hidden"].max()) <= 0.5


def test_panel_columns(database: RetrievalDatabase) -> None:
    lines = NeighborPanel(num_chunks=3).table(data(database), database).splitlines()
    assert lines[0] == "| query | neighbor | continuation | document | distance |"
    assert "<code>the qui</code> | <code>the qui</code> | <code>ck brown</code> |" in lines[2]
    assert all(line.count("|") == 6 for line in lines)


def test_invalid_arguments_raise(database: RetrievalDatabase, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a RETRO, but got a PaLM"):
        trainer(tmp_path).validate(RETROModule(decoder()), data(database), verbose=False)
    with pytest.raises(ValueError, match="chunks of 8 tokens and the model has chunks of 4 tokens"):
        trainer(tmp_path).validate(RETROModule(tiny_retro(decoder=decoder())), data(database), verbose=False)
    with pytest.raises(ValueError, match="batches have 1"):
        trainer(tmp_path).validate(module(), data(database, eval_num_neighbors=1), verbose=False)
    with pytest.raises(ValueError, match="initializes the decoder of `backbone`"):
        RETROModule(init_from="a.ckpt", retrofit_from="b.ckpt")
    with pytest.raises(ValueError, match=r"must be at least 1, but got 2 and \[0\]"):
        module(by_k=[0])
    with pytest.raises(ValueError, match=r"no database\.json"):
        trainer(tmp_path).fit(module(), RETRODataModule(str(tmp_path)))
    with pytest.raises(ValueError, match="must name rows with a `prompt`"):
        trainer(tmp_path).predict(module(), data(database))
    with pytest.raises(ValueError, match="`on_leak` must be fail or warn, but got 'no'"):
        data(database, on_leak="no")


def test_evaluation_and_prediction_with_a_refreshed_database(tmp_path: Path) -> None:
    for name in ("documents", "held_out"):
        (tmp_path / name).mkdir()
        for number, text in enumerate(("the quick brown fox", "a lazy dog sleeps", "they meet at noon")):
            (tmp_path / name / f"{number}.txt").write_text(f"{text} {name}", encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "the quick brown"}) + "\n", encoding="utf-8")
    folder = tmp_path / "db"
    encoder = checkpoint(tmp_path / "encoder.ckpt")

    def run(action: str, path: Path | None = None) -> Any:
        indexing = RetrievalIndexing(
            str(folder),
            documents=str(tmp_path / "documents"),
            queries={"validation": str(tmp_path / "held_out")},
            encoder=encoder,
            tokenizer="bytes",
            chunk_size=SIZE,
            k=3,
            refresh_every_n_epochs=1,
        )
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        options = {"max_steps": -1, "max_epochs": 2, "reload_dataloaders_every_n_epochs": 1, "enable_checkpointing": True}
        one = trainer(tmp_path, callbacks=[indexing, saving], **options)
        source = RETRODataModule(str(folder), num_chunks=3, eval_num_neighbors=3, predict=str(tmp_path / "prompts.jsonl"))
        tuned = module(generation=GenerationConfig(max_new_tokens=SIZE, temperature=0.0))
        return getattr(one, action)(tuned, source, ckpt_path=path, **({"weights_only": False} if path else {}))

    run("fit")
    refreshed = RetrievalDatabase.open(folder).manifest
    assert refreshed["made_with"]["encoder"] is None
    last = tmp_path / "epoch=1.ckpt"
    run("validate", last)
    assert RetrievalDatabase.open(folder).manifest == refreshed
    [[row]] = run("predict", last)
    assert row["neighbors"][0][0]["read"], "the policy of the checkpoint should encode the queries"
    run("validate", last)
    assert RetrievalDatabase.open(folder).manifest == refreshed, (
        "evaluation should restore the database that the checkpoint was trained on"
    )
