"""Tests of the file of connections: it is used with the settings and the models that it was trained with, or refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_align.calm import connection_file
from lightning_align.calm.connections import ConnectionConfig
from lightning_align.calm.identity import fingerprint
from lightning_align.calm.model import CALM
from lightning_align.calm.settings import check_settings
from lightning_align.calm.spec import Augment
from tests.calm.toys import SMALL, connect, palms, random_tokens
from tests.toys import gap, tiny_palm

TOKENS = random_tokens()
PAIRS = [[1, 2], [4, 2]]


def build(dtype: torch.dtype = torch.float32, **options: Any) -> CALM:
    anchor, augment = (model.to(dtype) for model in palms(torch.float32))
    given = {name: options.pop(name) for name in list(options) if name in Augment.settings}
    return CALM(anchor, Augment(augment, **{"connections": PAIRS, **given}), **{"connection": config(), **options})


def config(**options: Any) -> ConnectionConfig:
    return ConnectionConfig(**{"heads": 2, "dim_head": 8, "rotary": False, **options})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    connect(build()).save_connections(tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchor_position": "input"}, "`anchor_position` of augment 0 must be output, but is input"),
        ({"position": "input"}, "`position` of augment 0 must be output, but is input"),
        ({"combine": "sum"}, "`combine` must be sequence, but is sum"),
        ({"connection": config(heads=4, dim_head=4)}, "`heads` of `connection` must be 2, but is 4"),
        ({"alignment": "prefix"}, "`alignment` of augment 0 must be aligned, but is prefix"),
        ({"tokens": "own"}, "`tokens` of augment 0 must be shared, but is own"),
        ({"connection": config(rotary=True)}, "`rotary` of `connection` must be False, but is True"),
        ({"connection": config(norm=False)}, "`norm` of `connection` must be True, but is False"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_other_settings_are_refused(change: dict[str, Any], message: str, saved: Path) -> None:
    other = build(**change)
    with pytest.raises(ValueError, match=f"{message}.*Compose the models with the settings of the file"):
        other.load_connections(saved)


def test_the_same_composition_given_in_another_way_is_accepted(tmp_path: Path) -> None:
    first = connect(build(connections=None, num_connections=2, combine="sum"))
    first.save_connections(tmp_path / "c.safetensors")
    # No two connections end at one layer, so `combine` has no effect. The width of a head is the default of these models.
    other = build(connections=[[2, 1], [4, 3]], connection=ConnectionConfig(heads=2, dim_head=8, rotary=False))
    other.load_connections(tmp_path / "c.safetensors")
    assert gap(other(TOKENS), first(TOKENS)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("written", ["the model", "its copy"])
def test_a_copy_of_the_models_in_another_dtype_is_accepted(dtype: torch.dtype, written: str, tmp_path: Path) -> None:
    one, other = (torch.float32, dtype) if written == "the model" else (dtype, torch.float32)
    first = connect(build(one))
    first.save_connections(tmp_path / "c.safetensors")
    second = build(other)
    second.load_connections(tmp_path / "c.safetensors")
    for name, value in second.trainable_state_dict().items():
        assert torch.equal(value, first.trainable_state_dict()[name].to(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_other_models_are_refused_in_any_dtype(dtype: torch.dtype, saved: Path) -> None:
    anchor, augment = palms(torch.float32)
    augment.token_emb.weight.data[0, 0] += 0.01
    other = CALM(anchor.to(dtype), Augment(augment.to(dtype), connections=PAIRS), connection=config())
    with pytest.raises(ValueError, match=r"trained with other weights of augments.0\. Pass the models"):
        other.load_connections(saved)


def test_models_of_one_dtype_are_compared_exactly(saved: Path) -> None:
    anchor, augment = palms(torch.float32)
    before = fingerprint(anchor)
    anchor.token_emb.weight.data[0, 0] *= 1 + 1e-6
    assert fingerprint(anchor) == before, "too small for 16 bits"
    with pytest.raises(ValueError, match="trained with other weights of anchor"):
        CALM(anchor, Augment(augment, connections=PAIRS), connection=config()).load_connections(saved)


def earlier_file(path: Path, model: CALM) -> None:
    """Write the file as release 0.1.0 did."""
    save_file(model.trainable_state_dict(), path, metadata={**model.identity, "spots": json.dumps(model.spots)})


def test_a_file_of_an_earlier_release_is_checked_as_far_as_possible(tmp_path: Path) -> None:
    first, path = connect(build()), tmp_path / "c.safetensors"
    earlier_file(path, first)
    second = build()
    second.load_connections(path)
    assert gap(second(TOKENS), first(TOKENS)) == 0
    with pytest.raises(ValueError, match="must connect"):
        build(connections=[[1, 1], [4, 2]]).load_connections(path)
    with pytest.raises(ValueError, match="trained with other weights of anchor"):
        build(torch.bfloat16).load_connections(path)


def test_a_setting_that_a_file_does_not_have_yet_has_its_default() -> None:
    ours = build().settings
    theirs = copy.deepcopy(ours)
    del theirs["connection"]["gate"]
    check_settings(theirs, ours, "f")
    with pytest.raises(ValueError, match="`gate` of `connection` must be False, but is True"):
        check_settings(theirs, build(connection=config(gate=True)).settings, "f")


def test_a_setting_of_a_later_version_is_refused_unless_it_is_off() -> None:
    ours = build().settings
    theirs = copy.deepcopy(ours)
    theirs["connection"]["sharpened"] = False
    theirs["augments"][0]["position"] = ["output", "output"]  # the same for every connection
    ours["augments"][0]["position"] = "output"
    theirs["augments"][0].pop("position")
    check_settings(theirs, ours, "f")
    theirs["connection"]["sharpened"] = 3
    with pytest.raises(ValueError, match="`sharpened` of `connection` must be 3, but is unknown to this version"):
        check_settings(theirs, ours, "f")


def test_positions_that_are_all_alike_mean_the_same(saved: Path) -> None:
    model = build()
    model.specs[0].position = ["output", "output"]  # type: ignore[assignment]  # a position for each connection
    model.record_settings(config())
    assert model.settings == build().settings


def test_what_is_written_is_read_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def lossy(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file({name: value.bfloat16().to(value.dtype) for name, value in tensors.items()}, path, metadata=metadata)

    monkeypatch.setattr(connection_file, "save_file", lossy)
    with pytest.raises(ValueError, match="what was written is not what was read back"):
        connect(build()).save_connections(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_connections_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    model = connect(build())
    model.connections[1].to_q.weight.data[0, 0] = torch.nan  # type: ignore[union-attr,index]
    with pytest.raises(ValueError, match=r"connections.1.to_q.weight contains NaN or infinity"):
        model.save_connections(tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_file_says_what_it_was_trained_with(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["settings"])
    assert settings["augments"] == [
        {"position": "output", "alignment": "aligned", "tokens": "shared", "anchor_position": "output", "pairs": PAIRS}
    ]
    expected = {"heads": 2, "dim_head": 8, "project": True, "norm": True, "qk_norm": False, "gate": False, "rotary": False}
    assert settings["connection"] == expected
    assert settings["combine"] == "sequence"
    assert json.loads(metadata["fingerprints"])["anchor"] == fingerprint(palms(torch.float32)[0])


def test_the_default_width_of_a_head_is_recorded() -> None:
    model = CALM(tiny_palm(dim=16), Augment(tiny_palm(seed=1), num_connections=1), connection=ConnectionConfig(heads=4))
    assert model.settings["connection"]["dim_head"] == 4
    assert SMALL.dim_head == 8
