"""Policies are read back from checkpoints as they were written, and errors name what does not fit."""

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_align.models.building import backbone_spec, build_backbone
from lightning_align.models.checkpoint import load_policy, read_checkpoint
from lightning_align.models.lora import LoRAConfig, add_lora, lora_layers, lora_parameters
from lightning_align.models.palm import PaLM
from lightning_align.models.weights import policy_state, weights_hash
from tests.toys import VOCABULARY, gap, tiny_palm


def tokens_of() -> Tensor:
    return torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(4))


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"policy.{name}": value for name, value in state.items()}


def save(model: nn.Module, path: Path, **hparams: Any) -> Path:
    torch.save({"state_dict": prefixed(model.state_dict()), "hyper_parameters": hparams}, path)
    return path


@pytest.mark.parametrize("given", ["nothing", "module", "factory", "spec"])
def test_a_checkpoint_of_a_module_is_read_back(given: str, tmp_path: Path) -> None:
    model = tiny_palm(qk_rmsnorm=True)
    path = save(model, tmp_path / "a.ckpt", backbone=backbone_spec(model))
    other = {
        "nothing": None,
        "module": tiny_palm(qk_rmsnorm=True, seed=7),
        "factory": functools.partial(tiny_palm, qk_rmsnorm=True, seed=7),
        "spec": backbone_spec(model),
    }
    loaded = load_policy(path, other[given])
    torch.testing.assert_close(loaded(tokens_of()), model(tokens_of()), rtol=0, atol=0)
    assert weights_hash(loaded) == weights_hash(model)


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.safetensors"])
def test_a_bare_state_dict_is_read_back(name: str, tmp_path: Path) -> None:
    model = tiny_palm()
    save_file(model.state_dict(), tmp_path / name) if name.endswith("tensors") else torch.save(
        model.state_dict(), tmp_path / name
    )
    loaded = load_policy(tmp_path / name, lambda: tiny_palm(seed=7))
    torch.testing.assert_close(loaded(tokens_of()), model(tokens_of()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="does not describe its backbone"):
        load_policy(tmp_path / name)


def test_only_the_policy_is_taken() -> None:
    one, two = torch.ones(1), torch.zeros(1)
    assert policy_state({"policy.weight": one, "metric.sum": two}) == {"weight": one}
    assert policy_state({"weight": one}) == {"weight": one}


def test_the_hash_sees_every_change() -> None:
    model = tiny_palm()
    first = weights_hash(model)
    assert weights_hash(tiny_palm()) == first
    with torch.no_grad():
        model.norm.weight[3] += 1e-6
    assert weights_hash(model) != first
    assert weights_hash(tiny_palm().bfloat16()) != first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dim": 8}, r"token_emb.weight is \(23, 16\) in the file and \(23, 8\) in the model"),
        ({"depth": 3}, "4 weights are not in the file, such as blocks.2.norm.weight"),
        ({"depth": 1}, "4 weights of the file are not in the model, such as blocks.1.norm.weight"),
    ],
)
def test_a_checkpoint_of_another_model_is_named(overrides: dict[str, int], message: str, tmp_path: Path) -> None:
    path = save(tiny_palm(), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=f"a.ckpt is of another model than PaLM: .*{message}"):
        load_policy(path, tiny_palm(**overrides))


def test_a_missing_file_is_named_with_what_is_there(tmp_path: Path) -> None:
    save(tiny_palm(), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"best\.ckpt: there is no such file .*last\.ckpt"):
        load_policy(tmp_path / "best.ckpt")


def test_errors_name_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.ckpt cannot be read"):
        read_checkpoint(tmp_path / "text.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="must contain a dictionary, but contains a list"):
        read_checkpoint(tmp_path / "list.ckpt")


def test_a_file_of_the_old_format_is_read(tmp_path: Path) -> None:
    model = tiny_palm()
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert weights_hash(load_policy(tmp_path / "old.pt", tiny_palm(seed=1))) == weights_hash(model)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"state_dict": {}, "x": Bomb()}, tmp_path / "bomb.ckpt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(tmp_path / "bomb.ckpt")
    assert not (tmp_path / "ran").exists()


def test_adapters_are_merged_into_their_base_model(tmp_path: Path) -> None:
    base = tiny_palm()
    base_path = save(base, tmp_path / "base.ckpt", backbone=backbone_spec(base))
    config: dict[str, Any] = {"rank": 2, "targets": ["in_proj"], "scope": "task"}
    add_lora(base, LoRAConfig(**config))
    with torch.no_grad():
        for parameter in lora_parameters(base, "task"):
            parameter.normal_()
    adapters = {f"policy.{n}": v for n, v in base.state_dict().items() if ".lora." in n}
    hparams = {"lora": config, "init_from": str(base_path)}
    torch.save({"state_dict": adapters, "hyper_parameters": hparams}, tmp_path / "lora.ckpt")
    loaded = load_policy(tmp_path / "lora.ckpt")
    assert gap(loaded(tokens_of()), tiny_palm()(tokens_of())) > 0.01
    torch.testing.assert_close(loaded(tokens_of()), base(tokens_of()), rtol=0, atol=1e-4)
    assert lora_layers(loaded) == []

    adapters.popitem()
    torch.save({"state_dict": adapters, "hyper_parameters": hparams}, tmp_path / "half.ckpt")
    with pytest.raises(
        ValueError, match=r"half.ckpt is of another model .*1 weights are not in the file, such as blocks\.1\.in_proj\.lora"
    ):
        load_policy(tmp_path / "half.ckpt")
    torch.save({"state_dict": adapters, "hyper_parameters": {"lora": config}}, tmp_path / "lost.ckpt")
    with pytest.raises(ValueError, match="does not name the weights that they were trained on"):
        load_policy(tmp_path / "lost.ckpt")


def test_a_spec_builds_the_model_again() -> None:
    model = tiny_palm(variant="paper")
    spec = backbone_spec(model)
    assert spec is not None and spec["class_path"] == "lightning_align.models.palm.PaLM"
    again = build_backbone(spec)
    assert isinstance(again, PaLM) and again.init_args == model.init_args
    assert isinstance(build_backbone({**spec, "class_path": "PaLM"}), PaLM)
    assert build_backbone(model) is model
    assert backbone_spec(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("path", ["os.path.join", "no.such.Thing", "PaLMs", "torch.optim.Adam", "lightning_align.generate"])
def test_a_class_path_that_is_no_module_is_named(path: str) -> None:
    with pytest.raises(ValueError, match=f"`class_path` of `backbone` must be an importable nn.Module, but got '{path}'"):
        build_backbone({"class_path": path})


def test_a_factory_that_returns_no_module_is_named() -> None:
    with pytest.raises(ValueError, match=r"must return an nn.Module, but returned a dict"):
        build_backbone(dict)  # type: ignore[arg-type]


def test_a_sharded_model_is_described_by_its_own_class() -> None:
    model = tiny_palm()
    model.__class__ = type("FSDPPaLM", (FSDPModule, PaLM), {})  # as FSDP2 does
    described = backbone_spec(model)
    assert described is not None and described["class_path"] == "lightning_align.models.palm.PaLM"


@pytest.mark.parametrize("kind", ["module", "bare"])
def test_a_changed_byte_never_gives_other_weights(kind: str, tmp_path: Path) -> None:
    """A flipped bit at 60 places, 20 cuts: the file is refused, or has the weights that were saved."""
    model = tiny_palm()
    path = tmp_path / "a.ckpt"
    if kind == "module":
        save(model, path, backbone=backbone_spec(model))
    else:
        torch.save(model.state_dict(), path)
    content, draw = path.read_bytes(), random.Random(0)
    refused = 0
    for number in range(80):
        place = draw.randrange(len(content))
        damaged = content[:place] if number >= 60 else bytearray(content)
        if isinstance(damaged, bytearray):
            damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_policy(path, tiny_palm(seed=1))
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert weights_hash(loaded) == weights_hash(model)
    assert refused > 60
