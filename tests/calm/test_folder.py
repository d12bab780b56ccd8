"""Tests of the folder of a composition: what is read computes what was written, and other models are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_align import PaLM, PretrainedLM, load_composition, save_composition
from lightning_align.calm import folder as folder_file
from lightning_align.calm.connections import ConnectionConfig
from lightning_align.calm.model import CALM
from lightning_align.calm.spec import Augment
from lightning_align.models.formats import read_model, whole_weights, write_model
from tests.calm.toys import SMALL, composed, connect, gpt2, llama, palms, random_tokens
from tests.toys import VOCABULARY, gap, largest_difference, state_of, tiny_palm

TOKENS = random_tokens()


def families() -> CALM:
    anchor, augment = (PretrainedLM(config=model.config.to_dict()) for model in (llama(), gpt2()))
    specs = [Augment(augment, num_connections=2, layers="model.transformer.h.*"), Augment(tiny_palm(seed=3), tokens="shared")]
    return connect(CALM(anchor, specs, connection=SMALL))


COMPOSITIONS: dict[str, Any] = {
    "palms": lambda: composed(torch.float32),
    "inputs and sum": lambda: composed(
        torch.float32, connections=[[1, 2], [4, 2]], position="input", anchor_position="input", combine="sum"
    ),
    "prefix": lambda: composed(torch.float32, alignment="prefix", num_connections=2),
    "own tokenizer": lambda: composed(torch.float32, tokens="own", num_connections=1),
    "transformers": families,
    "smaller vocabulary": lambda: connect(
        CALM(palms(torch.float32)[0], Augment(tiny_palm(num_tokens=9, seed=2), tokens="shared"), connection=SMALL)
    ),
}


@pytest.mark.parametrize("make", COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_a_folder_is_the_composition(make: Any, tmp_path: Path) -> None:
    model = make()
    save_composition(model, tmp_path / "c")
    read = load_composition(tmp_path / "c")
    assert type(read) is CALM
    assert not read.training
    assert largest_difference(state_of(read.connections), state_of(model.connections)) == 0
    assert [p for p in read.parameters() if p.requires_grad] == list(read.connections.parameters())
    tokens = TOKENS % model.readable_tokens
    with model.proving(), read.proving():
        assert gap(read(tokens), model(tokens)) == 0
    assert read.settings == model.settings
    assert read.identity == model.identity
    assert read.fingerprints == model.fingerprints


class Picture(nn.Sequential):
    """An encoder of vectors of width 7. It reads no tokens."""

    def __init__(self, width: int = 10) -> None:
        super().__init__(nn.Linear(7, width), nn.Tanh())
        self.init_args = {"width": width}


def test_an_augment_need_not_read_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = Augment(Picture(12), layers="", alignment="prefix", dim=12, num_connections=1)
    model = connect(CALM(palms(torch.float32)[0], spec, connection=SMALL))
    save_composition(model, tmp_path / "c")
    read = load_composition(tmp_path / "c")
    assert isinstance(read.augments[0], Picture)
    assert largest_difference(state_of(read), state_of(model)) == 0


def test_a_model_that_cannot_be_rebuilt_is_named(tmp_path: Path) -> None:
    model = CALM(palms(torch.float32)[0], Augment(gpt2(), num_connections=2), connection=SMALL)
    with pytest.raises(ValueError, match=r"augments.0 is a GPT2LMHeadModel without `init_args`.*CALM.save_connections"):
        save_composition(model, tmp_path / "c")
    assert not list(tmp_path.iterdir())


def write_palms() -> tuple[PaLM, PaLM]:
    models = palms(torch.float32)
    for name, model in zip(("anchor", "augment"), models, strict=True):
        write_model(model, whole_weights(model), name)
    return models


def by_paths() -> CALM:
    return connect(CALM("anchor", [Augment("augment", num_connections=2)], connection=SMALL))


def test_references_are_paths_with_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_palms()
    model = by_paths()
    save_composition(model, "c", frozen="references")
    assert sorted(path.name for path in Path("c").iterdir()) == ["SHA256SUMS", "config.json", "connections.safetensors"]
    assert json.loads(Path("c/config.json").read_text())["composition"]["anchor"]["source"] == "anchor"
    assert gap(load_composition("c")(TOKENS), model(TOKENS)) == 0
    monkeypatch.chdir("/")  # the path is found from everywhere
    assert gap(load_composition(tmp_path / "c")(TOKENS), model(TOKENS)) == 0
    save_composition(load_composition(tmp_path / "c"), tmp_path / "whole")
    shutil.rmtree(tmp_path / "augment")
    with pytest.raises(ValueError, match=r"the model .*augment of augment_0 cannot be loaded"):
        load_composition(tmp_path / "c")
    assert gap(load_composition(tmp_path / "whole")(TOKENS), model(TOKENS)) == 0


@pytest.mark.parametrize("frozen", ["whole", "references"])
def test_another_model_in_the_place_of_a_frozen_one_is_refused(
    frozen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, augment = write_palms()
    save_composition(by_paths(), "c", frozen=frozen)
    augment.token_emb.weight.data[0, 0] += 0.01
    place = "c/augment_0" if frozen == "whole" else "augment"
    write_model(augment, whole_weights(augment), place)
    if frozen == "whole":
        with pytest.raises(ValueError, match=r"augment_0/model.safetensors was changed after it was written"):
            load_composition("c")
    Path("c/SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=rf"trained with other weights of augments.0 \({place}\)"):
        load_composition("c")


def test_a_folder_does_not_refer_to_modules_or_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="anchor is a PaLM that was not loaded from a file"):
        save_composition(composed(torch.float32), "c", frozen="references")
    with pytest.raises(ValueError, match="`frozen` must be one of whole, references, but got 'some'"):
        save_composition(composed(torch.float32), "c", frozen="some")  # type: ignore[arg-type]
    save_composition(composed(torch.float32), "c")
    before = Path("c/anchor/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="`folder` must not contain the models that it refers to"):
        save_composition(load_composition("c"), "c", frozen="references")
    assert Path("c/anchor/model.safetensors").read_bytes() == before
    save_composition(load_composition("c"), "c")  # which contains what it needs
    assert load_composition("c") is not None


def test_another_export_in_the_folder_is_replaced(tmp_path: Path) -> None:
    palm, place = tiny_palm(), tmp_path / "c"
    write_model(palm, whole_weights(palm), place, card="a card")
    (place / "notes.txt").write_text("kept")
    model = composed(torch.float32)
    save_composition(model, place)
    assert sorted(path.name for path in place.iterdir()) == [
        *("SHA256SUMS", "anchor", "augment_0", "config.json", "connections.safetensors", "notes.txt"),
    ]
    write_model(palm, whole_weights(palm), place)
    assert sorted(path.name for path in place.iterdir()) == ["SHA256SUMS", "config.json", "model.safetensors", "notes.txt"]
    assert gap(read_model(place)(TOKENS), palm(TOKENS)) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("no export")
    with pytest.raises(ValueError, match="contains other files"):
        save_composition(model, tmp_path / "other")


def test_a_failed_proof_keeps_the_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, place = composed(torch.float32), tmp_path / "c"
    save_composition(first, place)
    write = folder_file.write_connections

    def without_one(path: Any, state: Any, *rest: Any) -> None:
        write(path, {name: 0 * value if "1.to_out" in name else value for name, value in state.items()}, *rest)

    monkeypatch.setattr(folder_file, "write_connections", without_one)
    with pytest.raises(ValueError, match=r"must compute what the trained model computes.*Nothing was exported"):
        save_composition(first, place)
    assert gap(load_composition(place)(TOKENS), first(TOKENS)) == 0
    names = sorted(path.name for path in place.iterdir())
    assert names == ["SHA256SUMS", "anchor", "augment_0", "config.json", "connections.safetensors"]


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    place = tmp_path / "c"
    save_composition(composed(torch.float32), place)
    connections, config = place / "connections.safetensors", place / "config.json"
    content, manifest = connections.read_bytes(), json.loads(config.read_text())
    connections.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"connections.safetensors was changed after it was written"):
        load_composition(place)
    (place / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"connections.safetensors is missing or was changed"):
        load_composition(place)
    connections.write_bytes(content)
    manifest["composition"]["version"] = 2
    config.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="has version 2 of the format of compositions"):
        load_composition(place)
    with pytest.raises(ValueError, match="must contain a composition, but does not"):
        load_composition(place / "anchor")


def test_a_folder_does_not_choose_files_outside_of_itself(tmp_path: Path) -> None:
    place = tmp_path / "c"
    save_composition(composed(torch.float32), place)
    (place / "SHA256SUMS").unlink()
    config = place / "config.json"
    manifest = json.loads(config.read_text())
    manifest["composition"]["anchor"]["folder"] = "../elsewhere"
    config.write_text(json.dumps(manifest))
    assert load_composition(place) is not None, "the name of the folder is not taken from the file"
    manifest["class_path"] = "pathlib.Path"
    config.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"must be an importable nn.Module, but got 'pathlib.Path'"):
        read_model(place)


def test_models_in_bfloat16_are_the_models_of_the_connections(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_tokens": VOCABULARY, "dim": 16, "heads": 2, "dim_head": 8}
    anchor, augment = (PaLM(depth=depth, **sizes).bfloat16() for depth in (2, 4))
    model = CALM(anchor, Augment(augment, num_connections=1), connection=ConnectionConfig(heads=2))
    save_composition(model, tmp_path / "c")
    read = load_composition(tmp_path / "c")
    assert read.anchor.token_emb.weight.dtype is torch.float32, "as other exports are read"
    assert read.identity != model.identity


def test_a_twin_shares_the_frozen_models(tmp_path: Path) -> None:
    model = composed(torch.float32)
    state = torch.random.get_rng_state()
    twin = model.twin()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert twin.anchor is model.anchor
    assert twin.augments[0] is model.augments[0]
    assert gap(twin(TOKENS), model(TOKENS)) == 0
    before = model(TOKENS).detach()
    for parameter in twin.connections.parameters():
        parameter.data += 1
    assert gap(twin(TOKENS), before) > 1e-3
    assert gap(model(TOKENS), before) == 0
