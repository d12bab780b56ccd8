"""The boundary between iterations: checkpoints there, and runs resumed on a machine that rounds differently."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file

from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.lora import LoRAConfig
from lightning_align.spin import boundary
from lightning_align.spin.boundary import Boundary
from lightning_align.spin.stored import differ_by_rounding, relative_distance
from tests.portable import CAPS
from tests.spin.runs import (
    GENERATION,
    ROWS,
    InterruptAfter,
    Interrupted,
    Keep,
    Noise,
    finish,
    interrupt_writes,
    set_rows,
    start,
)
from tests.toys import largest_difference, state_of, tiny_palm

BOUNDARIES = {1: 3, 2: 13}
"""The optimizer step at which each iteration begins."""


class Seen(Callback):
    """Records the weights that each iteration begins with."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.states.setdefault(pl_module.iteration, {k: v.clone() for k, v in state_of(pl_module.policy).items()})


@pytest.mark.parametrize("case", [{}, {"opponent": "ema", "ema_decay": 0.7}], ids=["iterate", "ema"])
def test_a_run_with_other_rounding_goes_on_with_the_stored_weights_and_answers(
    case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = interrupt_writes(monkeypatch, 8)  # six parts in iteration 0, two in iteration 1
    with pytest.raises(Interrupted):
        finish(tmp_path, Keep(tmp_path), **case)
    root = tmp_path / "sets" / "iteration_1"
    before = {path: path.read_bytes() for path in root.rglob("*.*") if path.suffix in (".safetensors", ".jsonl")}
    trainer, module, data = start(tmp_path, seen := Seen(), Noise(), **case)
    trainer.fit(module, data, ckpt_path=tmp_path / "within.ckpt")
    assert trainer.global_step == 18
    # What was stored is used, and nothing was generated twice.
    assert {path: path.read_bytes() for path in before} == before
    assert len(written) == len(set(written)) == 18 + 1
    stored = load_file(root / "policy.safetensors")
    assert largest_difference(seen.states[1], stored) == 0
    # The missing responses come from the stored opponent.
    opponent = tiny_palm(num_tokens=259)
    source = root / ("average.safetensors" if case else "policy.safetensors")
    opponent.load_state_dict({name.removeprefix("model."): value for name, value in load_file(source).items()})
    for row in set_rows(tmp_path, 1):
        prompt = [1, *data.tokenizer.encode_batch([row["prompt"]])[0].ids]
        (answer,) = generate(opponent, [prompt], GENERATION, eos_id=2, ids=[row["row"]], iteration=1)[0]
        assert row["generated"][0]["tokens"] == answer.tokens


def base_file(folder: Path, rate: float = 1e-2) -> str:
    """A checkpoint of a model without adapters."""
    optimizer = functools.partial(torch.optim.AdamW, lr=rate)
    trainer, _ = finish(folder, loop={"iterations": 1, "epochs": 1}, optimizer=optimizer)
    trainer.save_checkpoint(folder / "base.ckpt")
    return str(folder / "base.ckpt")


@pytest.mark.parametrize("earlier", [False, True])
def test_an_iteration_of_lora_stores_only_what_trains(
    earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lora = {"lora": LoRAConfig(rank=2), "init_from": base_file(tmp_path / "base")}
    _, whole = finish(tmp_path / "whole", **lora)
    interrupt_writes(monkeypatch, 8)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        if earlier:  # versions that stored all weights
            patch.setattr(boundary, "base_names", lambda model: set[str]())
        finish(tmp_path, Keep(tmp_path), **lora)
    for number in (0, 1):
        names = load_file(tmp_path / "sets" / f"iteration_{number}" / "policy.safetensors")
        assert names and all(".lora." in name for name in names) != earlier
    # A run that rounds differently goes on with what was stored, on the base that it has read again.
    stored = load_file(tmp_path / "sets" / "iteration_1" / "policy.safetensors")
    trainer, module, data = start(tmp_path, seen := Seen(), **lora)
    resumed = torch.load(tmp_path / "within.ckpt", weights_only=True)
    for value in resumed["state_dict"].values():
        value.mul_(1 + 1e-7)
    torch.save(resumed, tmp_path / "within.ckpt")
    caplog.set_level("INFO")
    trainer.fit(module, data, ckpt_path=tmp_path / "within.ckpt")
    assert trainer.global_step == 18
    assert "Iteration 1 uses the weights in" in caplog.text, "the weights of this run were not the same"
    assert largest_difference({name: seen.states[1][name] for name in stored}, stored) == 0
    rest = {name: value for name, value in state_of(module.policy).items() if ".lora." not in name}
    assert largest_difference(rest, {name: state_of(whole.policy)[name] for name in rest}) == 0


def test_an_iteration_of_lora_on_another_base_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = {"lora": LoRAConfig(rank=2), "init_from": base_file(tmp_path / "base")}
    interrupt_writes(monkeypatch, 8)
    with pytest.raises(Interrupted):
        finish(tmp_path, Keep(tmp_path), **lora)
    trainer, module, data = start(tmp_path, **{**lora, "init_from": base_file(tmp_path / "other", rate=2e-2)})
    with pytest.raises(ValueError, match=r"began with adapters of another base model .* Give the `init_from`"):
        trainer.fit(module, data, ckpt_path=tmp_path / "within.ckpt")


def test_weights_of_other_settings_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_writes(monkeypatch, 8)
    with pytest.raises(Interrupted):
        finish(tmp_path, Keep(tmp_path))
    trainer, module, data = start(tmp_path, Noise(0.01))
    with pytest.warns(UserWarning, match=r"iteration_1/policy.safetensors, .* That is more than rounding"):
        trainer.fit(module, data, ckpt_path=tmp_path / "within.ckpt")


@pytest.mark.parametrize("saves", [True, False])
def test_a_checkpoint_exists_at_every_boundary(saves: bool, tmp_path: Path) -> None:
    def run(path: Path | None = None) -> Any:
        trainer, module, data = start(tmp_path)
        trainer.callbacks.pop()
        if saves:  # settings that save nothing before the end of the run
            trainer.callbacks.append(ModelCheckpoint(tmp_path, every_n_train_steps=1000, save_last=True))
        trainer.fit(module, data, ckpt_path=path)
        return trainer, state_of(module.policy)

    trainer, whole = run()
    for iteration, step in BOUNDARIES.items():
        path = tmp_path / "sets" / f"iteration_{iteration}" / "start.ckpt"
        saved = torch.load(path, weights_only=True)
        assert saved["global_step"] == step
        # The optimizer restarts at the boundary, so the checkpoint does not hold its moments.
        assert saved["optimizer_states"][0]["state"] == {}
        resumed, weights = run(path)
        assert resumed.global_step == trainer.global_step == 18
        assert largest_difference(weights, whole) == 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_last_checkpoint_is_saved_before_an_iteration_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for link in (False, "link"):
        folder = tmp_path / str(link)
        with monkeypatch.context() as patch:
            interrupt_writes(patch, 7)
            trainer, module, data = start(folder)
            trainer.callbacks.pop()
            trainer.callbacks.append(ModelCheckpoint(folder, every_n_train_steps=2, save_last=link or True, save_top_k=-1))
            with pytest.raises(Interrupted):
                trainer.fit(module, data)
        assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 3
        (numbered,) = folder.glob("*step=2.ckpt")
        assert torch.load(numbered, weights_only=True)["global_step"] == 2  # not overwritten through the link


def test_a_checkpoint_of_any_moment_at_the_boundary_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals save checkpoints at any moment. These are taken before and after the weights of iteration 1 are stored."""
    _, whole = finish(tmp_path / "whole")
    for moment in ("__init__", "settle"):
        folder = tmp_path / moment
        method = getattr(Boundary, moment)

        def signaled(self: Boundary, *args: Any, method: Any = method, folder: Path = folder, **kwargs: Any) -> None:
            method(self, *args, **kwargs)
            if self.root.name == "iteration_1":
                self.trainer.save_checkpoint(folder / "signal.ckpt")
                raise Interrupted

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(Boundary, moment, signaled)
            finish(folder)
        trainer, module, data = start(folder)
        trainer.fit(module, data, ckpt_path=folder / "signal.ckpt")
        assert trainer.global_step == 18
        assert largest_difference(state_of(module.policy), state_of(whole.policy)) == 0


def test_another_engine_gets_the_weights_again_after_a_resume(tmp_path: Path) -> None:
    """An engine that keeps weights in memory, and that was stopped in iteration 1."""

    class Memory:
        whole = False

        def __init__(self, fails: bool) -> None:
            self.fails, self.weights, self.synced = fails, {}, []

        def sync_weights(self, weights: Any, *, iteration: int) -> None:
            self.weights = weights
            self.synced.append(iteration)

        def generate(self, model: Any, *args: Any, iteration: int, **options: Any) -> Any:
            if self.fails and iteration == 1:
                raise Interrupted
            served = tiny_palm(num_tokens=259)
            served.load_state_dict(self.weights)
            return generate(served, *args, iteration=iteration, **options)

    with pytest.raises(Interrupted):
        finish(tmp_path, loop={"backend": Memory(True)})
    backend = Memory(False)
    finish(tmp_path, resume=True, loop={"backend": backend})
    assert backend.synced == [1, 2]
    assert all(
        abs(row["generated"][0]["sampled_logprob"] - row["generated"][0]["logprob"]) < 1e-4 for row in set_rows(tmp_path, 1)
    )


def test_initial_weights_with_other_rounding_are_those_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        finish(tmp_path, InterruptAfter(0), opponent="base", monitor_kl=True)
    stored = load_file(tmp_path / "sets" / "iteration_0" / "policy.safetensors")
    for size, fits in ((1e-7, True), (1e-3, False)):
        near = tiny_palm(num_tokens=259)
        with torch.no_grad():
            near.token_emb.weight.mul_(1 + size * torch.randn(near.token_emb.weight.shape))
        trainer, module, data = start(
            tmp_path, seen := Seen(), InterruptAfter(1), opponent="base", monitor_kl=True, backbone=near
        )
        with pytest.raises(Interrupted if fits else ValueError, match=None if fits else "began with other weights"):
            trainer.fit(module, data)
        if fits:
            assert largest_difference(seen.states[0], stored) == 0
            assert largest_difference(state_of(module.opponent.base(module.policy)), stored) == 0


def test_distances_by_hand() -> None:
    ones, zeros = {"a": torch.ones(4)}, {"a": torch.zeros(4)}
    assert relative_distance({"a": torch.full((4,), 1.5)}, ones, zeros) == pytest.approx(0.5)
    assert relative_distance(ones, ones, ones) == float("inf")
    eps = torch.finfo(torch.float32).eps
    assert differ_by_rounding({"a": torch.tensor([1.0 + 8 * eps, 0.0])}, {"a": torch.tensor([1.0, eps])})
    narrow = [{"a": torch.tensor([1.0, value], dtype=torch.bfloat16)} for value in (0.01, 0.01 * (1 + 2**-7), 0.0105)]
    assert differ_by_rounding(narrow[0], narrow[1]) and not differ_by_rounding(narrow[0], narrow[2])
    assert not differ_by_rounding({"a": torch.tensor([1.0, 1e-4])}, {"a": torch.tensor([1.0, 0.0])})
    assert not differ_by_rounding({"a": torch.tensor([1.0, torch.nan])}, {"a": torch.tensor([1.0, 0.0])})
    assert not differ_by_rounding({"a": torch.tensor([1])}, {"a": torch.tensor([2])})
    assert not differ_by_rounding({"b": torch.ones(4)}, ones)


def test_missing_responses_may_be_generated_in_other_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_writes(patch, 8)
        with pytest.raises(Interrupted):
            finish(tmp_path)
    config = GenerationConfig(**{**vars(GENERATION), "batch_size": 3})
    trainer, _ = finish(tmp_path, resume=True, generation=config)
    assert trainer.global_step == 18
    # The parts of iteration 1 keep their size. Iteration 2 has parts of the new size and replays the responses of iteration 1.
    sizes = {t: sum(1 for _ in (tmp_path / "sets" / f"iteration_{t}" / "train").glob("part-*")) for t in (1, 2)}
    assert sizes == {1: 3, 2: 4}
    assert all([answer["iteration"] for answer in row["generated"]] == [2, 1] for row in set_rows(tmp_path, 2))
    assert sorted(row["row"] for row in set_rows(tmp_path, 2)) == list(range(ROWS))


CONFIG = """
seed_everything: 0
model:
  class_path: SPINModule
  init_args:
    backbone: {class_path: PaLM, init_args: {num_tokens: 259, dim: 32, depth: 2, heads: 2, dim_head: 16}}
    generation: {max_new_tokens: 40, batch_size: 1}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data: {class_path: SPINDataModule, init_args: {train: rows.jsonl, batch_size: 4, max_length: 64}}
trainer:
  accelerator: cpu
  max_epochs: -1
  enable_progress_bar: false
  enable_model_summary: false
  logger: false
  callbacks:
    - {class_path: SelfPlayGeneration, init_args: {iterations: 2, epochs: 1, folder: sets}}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: checkpoints, filename: "{step}", every_n_train_steps: 3, save_last: true, save_top_k: -1}
"""


@pytest.mark.portable
def test_a_killed_run_resumes_over_a_boundary_with_other_kernels(tmp_path: Path) -> None:
    """Five steps per iteration and a checkpoint after the third. The run is killed while it generates iteration 1."""
    rows = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(CONFIG)
    root = tmp_path / "sets" / "iteration_1"

    def launch(*more: str, **environment: str) -> tuple[subprocess.Popen[bytes], Path]:
        log = tmp_path / f"log_{len(list(tmp_path.glob('log_*')))}"
        command = [sys.executable, "-m", "lightning_align", "fit", "--config", "config.yaml", *more]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=tmp_path, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT
            )
        return process, log

    process, log = launch()
    while process.poll() is None and len(list((root / "train").glob("part-*"))) < 3:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, log.read_text()
    before = {path: path.read_bytes() for path in root.rglob("*.*") if path.suffix in (".safetensors", ".jsonl")}
    assert 3 <= len(before) < 21
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5
    # From within iteration 0, two steps are trained again, with the oldest kernels.
    process, log = launch("--ckpt_path", "checkpoints/step=3.ckpt", **CAPS["default"])
    assert process.wait() == 0, log.read_text()
    assert {path: path.read_bytes() for path in before} == before
    final = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert final["global_step"] == 5 + 10
    rounded = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    assert (f"the weights in {root}/policy.safetensors" in log.read_text()) == rounded, log.read_text()
    assert "more than rounding" not in log.read_text()
    # From the boundary, nothing is trained again, so the weights agree.
    process, log = launch("--ckpt_path", str(root / "start.ckpt"), **CAPS["default"])
    assert process.wait() == 0, log.read_text()
    assert "the weights in" not in log.read_text()
    assert {path: path.read_bytes() for path in before} == before
