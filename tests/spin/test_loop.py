"""The self-play loop: which opponent generates what and when, and runs that are interrupted and resumed."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from lightning_align.data.tokenizer import ByteTokenizer
from lightning_align.generation.sampler import generate
from lightning_align.models.lora import LoRAConfig
from lightning_align.spin.generations import GeneratedSet, answer_ids
from lightning_align.training.schedules import WarmupDecay
from tests.spin.runs import ADAM, GENERATION, ROWS, InterruptAfter, Interrupted, exact_palm, finish, set_rows, start
from tests.toys import largest_difference, slow_logprobs, state_of, tiny_palm


def scored(model: torch.nn.Module, prompt: list[int], response: list[int]) -> float:
    tokens = torch.tensor([prompt + response])
    targets = torch.arange(tokens.shape[1])[None] >= len(prompt)
    return slow_logprobs(model, {"tokens": tokens, "mask": torch.ones_like(targets), "targets": targets})[0][0]


def test_each_iteration_plays_against_its_initial_policy(tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append((pl_module.iteration, trainer.current_epoch, len(batch["opponent"]) // 2))

    trainer, module = finish(tmp_path, Watch(), backbone=exact_palm())
    # Epochs 1, 2, 1. The first iteration has ten pairs, later ones twenty, with replayed pairs.
    pairs = {key: sum(n for i, e, n in seen if (i, e) == key) for key in {(i, e) for i, e, _ in seen}}
    assert pairs == {(0, 0): 10, (1, 1): 20, (1, 2): 20, (2, 3): 20}
    tokenizer, states = ByteTokenizer(), []
    for iteration in range(3):
        weights = load_file(tmp_path / "sets" / f"iteration_{iteration}" / "policy.safetensors")
        states.append(weights)
        opponent = exact_palm()
        opponent.load_state_dict(weights)
        rows = set_rows(tmp_path, iteration)
        assert sorted(row["row"] for row in rows) == list(range(ROWS))
        for row in rows:
            prompt = [1, *tokenizer.encode_batch([row["prompt"]])[0].ids]
            real = [*tokenizer.encode_batch([row["real"]])[0].ids, 2]
            assert row["real_logprob"] == pytest.approx(scored(opponent, prompt, real), abs=1e-4)
            newest, *older = row["generated"]
            (answer,) = generate(opponent, [prompt], GENERATION, eos_id=2, ids=[row["row"]], iteration=iteration)[0]
            assert (newest["tokens"], newest["reason"]) == (answer.tokens, answer.reason)
            assert newest["sampled_logprob"] == pytest.approx(newest["logprob"], abs=1e-4)
            # Responses of the previous iteration, scored by the new opponent.
            assert [old["iteration"] for old in older] == ([iteration - 1] if iteration else [])
            for answered in row["generated"]:
                ids = answer_ids(answered, 2)
                assert answered["logprob"] == pytest.approx(scored(opponent, prompt, ids), abs=1e-4)
                assert (ids[-1:] == [2]) == (answered["reason"] == "eos")
    assert all(largest_difference(a, b) > 1e-4 for a, b in zip(states, [*states[1:], state_of(module.policy)], strict=True))
    assert {"spin/train/tie_rate", "spin/validation/eos_rate", "val/rewards/margins"} <= trainer.callback_metrics.keys()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], int]:
    trainer, module = finish(tmp_path_factory.mktemp("whole"))
    return state_of(module.policy), trainer.global_step


# Iteration 0 takes 3 steps, iteration 1 takes 5 and 5, iteration 2 takes 5.
@pytest.mark.parametrize("steps", [1, 3, 6, 8, 13, 15])
def test_an_interrupted_run_resumes_bit_for_bit(whole: Any, steps: int, tmp_path: Path) -> None:
    expected, total = whole
    assert total == 18
    with pytest.raises(Interrupted):
        finish(tmp_path, InterruptAfter(steps))
    trainer, module = finish(tmp_path, resume=True)
    assert trainer.global_step == total
    assert largest_difference(state_of(module.policy), expected) == 0


def test_a_run_resumes_from_a_moved_folder(whole: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        finish(tmp_path, InterruptAfter(6))
    (tmp_path / "sets").rename(tmp_path / "moved")
    _, module = finish(tmp_path, resume=True, loop={"folder": str(tmp_path / "moved")})
    assert largest_difference(state_of(module.policy), whole[0]) == 0
    assert not (tmp_path / "sets").exists() and (tmp_path / "moved" / "iteration_2").is_dir()


def test_a_run_interrupted_at_two_epoch_ends_repeats_neither_epoch(whole: Any, tmp_path: Path) -> None:
    for resume, steps in ((False, 3), (True, 8), (True, 13)):
        with pytest.raises(Interrupted):
            finish(tmp_path, InterruptAfter(steps), resume=resume)
    trainer, module = finish(tmp_path, resume=True)
    assert trainer.global_step == whole[1]
    assert largest_difference(state_of(module.policy), whole[0]) == 0


@pytest.mark.parametrize("writes", [2, 8, 14])
def test_a_run_interrupted_while_generating_generates_nothing_twice(
    whole: Any, writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    write = GeneratedSet.write

    def counted(self: GeneratedSet, part: int, rows: Any) -> None:
        if len(written) == writes:
            raise Interrupted
        written.append(self.path(part))
        write(self, part, rows)

    monkeypatch.setattr(GeneratedSet, "write", counted)
    with pytest.raises(Interrupted):
        finish(tmp_path)
    writes = -1
    _, module = finish(tmp_path, resume=(tmp_path / "last.ckpt").exists())
    assert len(written) == len(set(written)) == 18  # three parts of two sets in three iterations
    assert largest_difference(state_of(module.policy), whole[0]) == 0


CASES: list[dict[str, Any]] = [
    {"opponent": "ema", "ema_decay": 0.7},
    {"opponent": "mixture"},
    {"opponent": "base", "monitor_kl": True},
    {"generate": "per_step", "opponent": "iterate"},
    {"generate": "per_step", "opponent": "mixture", "lora": LoRAConfig(rank=2)},
    {"generate": "per_step", "opponent": "ema", "lora": LoRAConfig(rank=2)},
    {"opponent": "iterate", "lora": LoRAConfig(rank=2), "monitor_kl": True, "sft_weight": 0.5},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v) for v in case.values() if isinstance(v, str)))
def test_every_opponent_resumes_bit_for_bit(case: dict[str, Any], tmp_path: Path) -> None:
    loop = {"iterations": 2, "epochs": 1}
    _, uncut = finish(tmp_path / "uncut", loop=loop, **case)
    with pytest.raises(Interrupted):
        finish(tmp_path, InterruptAfter(4), loop=loop, **case)
    _, module = finish(tmp_path, resume=True, loop=loop, **case)
    assert largest_difference(state_of(module.policy), state_of(uncut.policy)) == 0
    if "lora" not in case:
        assert largest_difference(state_of(module.policy), state_of(tiny_palm(num_tokens=259))) > 1e-3


def test_beta_learning_rate_and_optimizer_follow_the_iteration(tmp_path: Path) -> None:
    seen: list[tuple[int, float, float, int]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            (optimizer,) = trainer.optimizers
            taken = int(next(iter(optimizer.state.values()))["step"])
            seen.append((pl_module.iteration, pl_module.beta, trainer.lr_scheduler_configs[0].scheduler.base_lrs[0], taken))

    def schedule(optimizer: torch.optim.Optimizer) -> WarmupDecay:
        return WarmupDecay(optimizer, total_steps=10, decay="linear")

    loop = {"lr_factors": [1.0, 0.5, 0.1]}
    finish(tmp_path, Watch(), loop=loop, beta=[0.1, 0.2], lr_scheduler=schedule)
    for iteration, (beta, rate, steps) in enumerate([(0.1, 1e-2, 3), (0.2, 5e-3, 10), (0.2, 1e-3, 5)]):
        mine = [row[1:] for row in seen if row[0] == iteration]
        assert mine == [(beta, pytest.approx(rate), step) for step in range(1, steps + 1)]


def test_lr_factors_with_one_schedule_for_all_iterations_raise(tmp_path: Path) -> None:
    loop = {"lr_factors": [1.0, 0.5, 0.1], "reset_optimizer": False}
    with pytest.raises(ValueError, match=r"`lr_factors` .* is \[1.0, 0.5, 0.1\], but `reset_optimizer` is false and there"):
        finish(tmp_path, loop=loop, lr_scheduler=lambda optimizer: WarmupDecay(optimizer, total_steps=10))


def test_an_iteration_without_improvement_ends_the_run_with_the_best_weights(tmp_path: Path) -> None:
    class Judge(Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.log("val/solved", {0: 0.4, 1: 0.5, 2: 0.3}[pl_module.iteration])

    trainer, module = finish(tmp_path, Judge(), loop={"iterations": 4, "epochs": 1, "monitor": "val/solved"})
    assert trainer.current_epoch == 3  # and not 4
    best = load_file(tmp_path / "sets" / "iteration_2" / "policy.safetensors")
    assert largest_difference(state_of(module.policy), best) == 0
    assert (tmp_path / "sets" / "best.ckpt").is_file()
    trainer, module, data = start(tmp_path / "none", loop={"monitor": "val/absent"})
    with pytest.raises(ValueError, match=r"val/absent.*no such metric was logged.*val/loss"):
        trainer.fit(module, data)


@pytest.mark.parametrize(("patience", "link"), [(0, False), (1, False), (0, True)])
def test_a_last_iteration_without_improvement_restores_the_best_weights(patience: int, link: bool, tmp_path: Path) -> None:
    class Judge(Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.log("val/solved", [0.4, 0.5, 0.3][pl_module.iteration])

    loop = {"iterations": 3, "epochs": 1, "monitor": "val/solved", "patience": patience}
    trainer, module, data = start(tmp_path, Judge(), loop=loop)
    if link:
        trainer.checkpoint_callbacks[-1].save_last = "link"  # type: ignore[attr-defined]
    trainer.fit(module, data)
    best = load_file(tmp_path / "sets" / "iteration_2" / "policy.safetensors")
    assert largest_difference(state_of(module.policy), best) == 0
    for path in (tmp_path / "sets" / "best.ckpt", tmp_path / "last.ckpt"):
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(saved[f"policy.{name}"], value) for name, value in best.items())
    if link:  # the checkpoint behind the link is unchanged
        saved = torch.load(trainer.checkpoint_callbacks[-1].best_model_path, weights_only=True)["state_dict"]  # type: ignore[attr-defined]
        assert not all(torch.equal(saved[f"policy.{name}"], value) for name, value in best.items())


def test_changed_files_raise_before_any_step(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        finish(tmp_path, InterruptAfter(6))
    part = tmp_path / "sets" / "iteration_1" / "train" / "part-00001.jsonl"
    text = part.read_text()
    for altered, message in (
        (text.replace('"logprob": -', '"logprob": -1'), "was changed after it was written"),
        ("".join(text.splitlines(keepends=True)[1:]), "was changed after it was written"),
        (None, "is missing. It cannot be generated again, because the policy has trained since iteration 1"),
    ):
        part.unlink()
        if altered is not None:
            part.write_text(altered)
        with pytest.raises(ValueError, match=rf"part-00001.jsonl {message}"):
            finish(tmp_path, resume=True)
    part.write_text(text)
    (part.parent / "manifest.json").unlink()
    part.write_text("".join(text.splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"has 3 rows, but 4 were expected. Row \d is missing"):
        finish(tmp_path, resume=True)


def test_a_folder_of_other_weights_or_settings_raises(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        finish(tmp_path, InterruptAfter(1))
    with pytest.raises(ValueError, match=r"iteration_0 holds an iteration that began with other weights"):
        finish(tmp_path, backbone=tiny_palm(num_tokens=259, seed=1))
    with pytest.raises(ValueError, match=r"train was generated with other settings: `replay` was 1 and is now 0"):
        finish(tmp_path, loop={"replay": 0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"iterations": 0}, "`iterations` of .* at least 1, but got 0"),
        ({"epochs": [1, 2]}, r"`epochs` .*got \[1, 2\]"),
        ({"epochs": 0}, "`epochs` .*got 0"),
        ({"lr_factors": [1.0]}, r"`lr_factors` .*got \[1.0\]"),
        ({"replay": -1}, "`replay` .*got -1"),
        ({"num_prompts": 0}, "`num_prompts` .*got 0"),
        ({"mode": "best"}, "`mode` .*got 'best'"),
    ],
)
def test_invalid_arguments_of_the_callback_raise(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        start(tmp_path, loop=arguments)


def test_texts_may_have_unicode_line_separators(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}\u2028\x85", "response": "\u2029b"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer, _ = finish(tmp_path, loop={"iterations": 1, "epochs": 1})
    assert trainer.global_step == 1


def test_rows_are_grouped_by_length_only_on_request(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "response": "a" * n} for n in range(1, 13)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spreads = {}
    for grouped in (True, False):
        trainer, module, data = start(tmp_path, loop={"iterations": 1, "epochs": 1, "folder": str(tmp_path / str(grouped))})
        data.group_by_length, data.batch_size, seen = grouped, 4, []

        class Watch(Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                counts = batch["pairs"]["targets"].sum(1)
                seen.append(counts[: len(counts) // 2])  # noqa: B023  # called in this round of the loop

        trainer.callbacks.append(Watch())
        trainer.fit(module, data)
        spreads[grouped] = sum(int(counts.max() - counts.min()) for counts in seen)
    assert spreads[True] < spreads[False]


def test_the_module_adds_the_callback(tmp_path: Path) -> None:
    _, module, data = start(tmp_path, optimizer=ADAM)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    bare = L.Trainer(accelerator="cpu", max_epochs=1, log_every_n_steps=1, default_root_dir=tmp_path / "bare", **quiet)
    bare.fit(module, data)
    assert (tmp_path / "bare" / "generations" / "iteration_0" / "train" / "manifest.json").is_file()
