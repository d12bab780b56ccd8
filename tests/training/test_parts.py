"""The parts of the base module, each without a Trainer."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_align.generation.sampler import Generation
from lightning_align.models.lora import LoRAConfig
from lightning_align.models.palm import PaLM
from lightning_align.training import optimizers
from lightning_align.training.checkpoints import drop_frozen, frozen_names, number_parameters, restore_frozen
from lightning_align.training.gradient import BatchMean, gradients_of, total_norm
from lightning_align.training.optimizers import build_optimizer, parameter_groups, schedule_config
from lightning_align.training.policy import PolicySource
from lightning_align.training.prediction import prediction_rows
from lightning_align.training.schedules import WarmupDecay
from lightning_align.training.throughput import Throughput
from tests.toys import tiny_palm

CPU = torch.device("cpu")


def source(backbone: object = None, *, init_from: str | None = None, lora: LoRAConfig | None = None) -> PolicySource:
    return PolicySource("SFTModule", backbone, init_from=init_from, lora=lora)  # type: ignore[arg-type]


def saved(model: PaLM, path: Path) -> str:
    torch.save(model.state_dict(), path)
    return str(path)


# -- the policy's source


def test_a_policy_is_built_from_a_module_a_factory_or_a_description() -> None:
    model = tiny_palm()
    assert source(model).build() is model
    assert isinstance(source(tiny_palm).build(), PaLM)
    described = source(model).described()
    assert described is not None and described["class_path"] == "lightning_align.models.palm.PaLM"
    again = source(described).build()
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert source(tiny_palm).described() is None


def test_a_policy_needs_a_source() -> None:
    with pytest.raises(ValueError, match="SFTModule needs `backbone`"):
        source()


def test_weights_come_from_the_file(tmp_path: Path) -> None:
    model = tiny_palm(seed=3)
    policy = source(tiny_palm, init_from=saved(model, tmp_path / "a.pt"))
    built = policy.build()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in built.state_dict().items())
    policy.check_weights()


def test_a_missing_file_is_an_error_unless_a_checkpoint_brings_the_weights(tmp_path: Path) -> None:
    policy = source(tiny_palm, init_from=str(tmp_path / "gone.pt"))
    policy.build()
    assert policy.awaits_weights
    with pytest.raises(ValueError, match=r"gone\.pt"):
        policy.check_weights()
    policy.awaits_weights = False
    policy.check_weights()


def test_adapters_train_alone() -> None:
    policy = source(tiny_palm(), lora=LoRAConfig(rank=2))
    model = policy.build()
    policy.add_adapters(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".lora." in name for name in trained)
    plain = source(tiny_palm())
    plain.add_adapters(model := plain.build())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_on_random_weights_are_an_error() -> None:
    policy = source(tiny_palm, lora=LoRAConfig(rank=2))
    with pytest.raises(ValueError, match="frozen base model"):
        policy.add_adapters(policy.build())


# -- one gradient per optimizer batch


@pytest.mark.parametrize("splits", [[8], [4, 4], [1, 2, 5], [1] * 8])
def test_the_gradient_is_the_mean_however_the_batch_is_split(splits: list[int]) -> None:
    """Of a linear loss the gradient is the mean of the rows, known exactly."""
    rows = torch.arange(16, dtype=torch.float64).reshape(8, 2)
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    mean = BatchMean()
    for part in rows.split(splits):
        ((part @ weight).sum() / len(splits)).backward()  # Lightning divides by the number of micro-batches
        mean.add(len(part))
    optimizer = torch.optim.SGD([weight])
    gradients = gradients_of(optimizer)
    mean.average(gradients, accumulated=len(splits), world_size=1, total=lambda count: count, device=CPU)
    torch.testing.assert_close(weight.grad, rows.mean(dim=0), rtol=1e-6, atol=0)
    assert mean.count == 0
    torch.testing.assert_close(total_norm(gradients), rows.mean(dim=0).norm(), rtol=1e-6, atol=0)


def test_ranks_with_different_counts_share_one_mean() -> None:
    """Rank 0 has one row and rank 1 three; DDP has averaged their gradients of sums."""
    rows = torch.tensor([1.0, 3.0, 5.0, 7.0])
    gradient = (rows[:1].sum() + rows[1:].sum()) / 2
    results = []
    for count in (1, 3):
        mean, own = BatchMean(), gradient.clone()
        mean.add(torch.tensor(count))
        mean.average([own], accumulated=1, world_size=2, total=lambda _: torch.tensor(4.0), device=CPU)
        results.append(float(own))
    assert results == [4.0, 4.0]


def test_an_empty_optimizer_batch_divides_by_one() -> None:
    gradient = torch.ones(2)
    BatchMean().average([gradient], accumulated=1, world_size=1, total=lambda count: count, device=CPU)
    assert gradient.tolist() == [1.0, 1.0]


# -- checkpoints


def test_frozen_weights_leave_a_checkpoint_and_come_back() -> None:
    module = nn.Module()
    module.policy = policy = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    policy[0].requires_grad_(False)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    checkpoint = {"state_dict": dict(state)}
    assert frozen_names(policy) == ["policy.0.weight", "policy.0.bias"]
    drop_frozen(checkpoint, policy)
    assert sorted(checkpoint["state_dict"]) == ["policy.1.bias", "policy.1.weight"]
    restore_frozen(checkpoint, policy, state)
    assert all(torch.equal(checkpoint["state_dict"][name], value) for name, value in state.items())


def test_frozen_tied_weights_leave_a_checkpoint_under_all_their_names() -> None:
    module = nn.Module()
    module.policy = policy = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 2), nn.Linear(2, 5, bias=False))
    policy[2].weight = policy[0].weight.requires_grad_(False)
    state = module.state_dict()
    checkpoint = {"state_dict": dict(state)}
    drop_frozen(checkpoint, policy)
    assert sorted(checkpoint["state_dict"]) == ["policy.1.bias", "policy.1.weight"]
    restore_frozen(checkpoint, policy, state)
    module.load_state_dict(checkpoint["state_dict"])


def test_optimizer_states_are_numbered_by_position() -> None:
    """The optimizer has matrices first; the module has them in the order of its layers."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups = parameter_groups(model.parameters())
    optimizer = torch.optim.AdamW(groups)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    before = {number: entry["exp_avg"].clone() for number, entry in state["state"].items()}
    number_parameters(state, optimizer, model.parameters())
    assert [group["params"] for group in state["param_groups"]] == [[0, 2], [1, 3]]
    for old, new in ((0, 0), (1, 2), (2, 1), (3, 3)):
        assert torch.equal(state["state"][new]["exp_avg"], before[old])
        assert state["state"][new]["exp_avg"].shape == list(model.parameters())[new].shape


# -- optimizers, throughput, prediction


def test_vectors_have_no_weight_decay_and_frozen_parameters_no_group() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1, bias=False))
    model[2].requires_grad_(False)
    matrices, vectors = parameter_groups(model.parameters())
    assert [id(p) for p in matrices["params"]] == [id(model[0].weight)] and "weight_decay" not in matrices
    assert len(vectors["params"]) == 3 and vectors["weight_decay"] == 0.0
    assert len(parameter_groups(model[2].parameters())) == 1


@pytest.mark.parametrize(("cuda", "scaled", "fused"), [(True, False, True), (True, True, None), (False, False, None)])
def test_the_default_optimizer_is_fused_on_cuda(
    cuda: bool, scaled: bool, fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "on_cuda", lambda groups: cuda)
    optimizer: Any = build_optimizer(nn.Linear(2, 2).parameters(), None, None, lr=0.1, scaled=scaled)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["fused"] for group in optimizer.param_groups} == {fused}
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_only_parameters_on_cuda_are_on_cuda() -> None:
    class Placed:
        def __init__(self, kind: str) -> None:
            self.device = torch.device(kind)

    places = [[], ["cuda"], ["cuda", "cuda:1"], ["cuda", "cpu"], ["cpu"], ["xpu"]]
    found = [optimizers.on_cuda([{"params": [Placed(kind) for kind in kinds]}]) for kinds in places]
    assert found == [False, True, True, False, False, False]


def test_a_scheduler_steps_with_the_optimizer_unless_it_waits_for_a_metric() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    assert schedule_config(WarmupDecay(optimizer, total_steps=2))["interval"] == "step"
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    plateau.monitor = "val/loss"  # type: ignore[attr-defined]  # as LightningCLI's subclass has it
    assert schedule_config(plateau) == {"scheduler": plateau, "monitor": "val/loss"}


def test_throughput_counts_real_tokens_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    throughput = Throughput()
    throughput.count(mask)
    assert throughput.report(1, world_size=2, device=CPU) == {}  # nothing was timed before the first report
    for _ in range(3):
        throughput.count(mask)
    now[0] += 2.0
    values = throughput.report(2, world_size=2, device=CPU)
    assert float(values["train/tokens_per_second"]) == 3 * 4 * 2 / 2.0
    assert float(values["train/padding_share"]) == pytest.approx(1 / 3)
    assert throughput.report(2, world_size=2, device=CPU) == {}  # each step is reported once
    throughput.count(mask)
    now[0] += 50.0  # a validation
    throughput.restart(CPU)
    throughput.count(mask)
    now[0] += 1.0
    assert float(throughput.report(3, world_size=1, device=CPU)["train/tokens_per_second"]) == 4.0
    throughput.stop()
    assert throughput.report(4, world_size=1, device=CPU) == {}


class Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


def test_predictions_are_text_where_there_is_a_tokenizer() -> None:
    batch = {"prompts": [[0, 1], [2]], "rows": torch.tensor([7, 3])}
    results = [[Generation([3], True)], [Generation([4, 5], False)]]
    rows = prediction_rows(batch, results, Letters())  # type: ignore[arg-type]
    assert rows[0] == {"row": 7, "prompt": "ab", "responses": ["d"], "finished": [True]}
    assert rows[1] == {"row": 3, "prompt": "c", "responses": ["ef"], "finished": [False]}
    assert prediction_rows(batch, results, None)[1]["responses"] == [[4, 5]]  # type: ignore[arg-type]


def test_shapes_are_kept() -> None:
    """`source` builds nothing twice: the module that was given is the policy."""
    model = tiny_palm()
    tokens: Tensor = torch.ones(1, 3, dtype=torch.long)
    assert torch.equal(source(model).build()(tokens), model(tokens))
