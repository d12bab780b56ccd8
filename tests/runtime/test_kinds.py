"""Arguments of a wrong type are refused in code as on the command line: by name, with what is expected."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from lightning_align import (
    CALMModule,
    DPODataModule,
    DPOModule,
    GenerationConfig,
    LoRAConfig,
    PaLM,
    RETRODataModule,
    RETROModule,
    SFTModule,
    SPINModule,
)
from lightning_align.runtime.kinds import check_kinds, from_fields, hints_of
from tests.toys import tiny_palm


@dataclass
class Fields:
    number: float = 1.0


HINTS: dict[str, Any] = {
    "integer": int,
    "number": float | None,
    "text": str,
    "switch": bool,
    "choice": Literal["a", "b"] | dict[Literal["a", "b"], float],
    "numbers": list[float],
    "factory": Callable[[], int] | None,
    "settings": Fields | None,
    "names": str | list[str] | Path,
    "sizes": tuple[int, ...],
    "any": Any,
}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("integer", 2.0, "an integer, but got 2.0 (float)."),
        ("integer", True, "an integer, but got True (bool)."),
        ("integer", "3", "an integer, but got '3' (str). Leave out the quotes."),
        ("integer", None, "an integer, but got None (NoneType)."),
        ("number", "0.1", "a number or None, but got '0.1' (str). Leave out the quotes."),
        ("number", "x", "a number or None, but got 'x' (str)."),
        ("number", False, "a number or None, but got False (bool)."),
        ("number", [0.1], "a number or None, but got [0.1] (list)."),
        ("number", 1j, "a number or None, but got 1j (complex)."),
        ("number", np.array(0.5), "a number or None, but got array(0.5) (ndarray). Give its `.item()`."),
        ("number", torch.tensor(0.5), "a number or None, but got tensor(0.5000) (Tensor). Give its `.item()`."),
        ("text", 3, "a string, but got 3 (int)."),
        ("text", b"x", "a string, but got b'x' (bytes)."),
        ("switch", 1, "true or false, but got 1 (int)."),
        ("switch", "yes", "true or false, but got 'yes' (str)."),
        ("choice", 1, "one of a, b or a dictionary with values that are each a number, but got 1 (int)."),
        ("choice", {"a": "x"}, "one of a, b or a dictionary with values that are each a number, but got {'a': 'x'} (dict)."),
        ("numbers", 1.0, "a list whose items are each a number, but got 1.0 (float)."),
        ("numbers", ["x"], "a list whose items are each a number, but got ['x'] (list)."),
        ("numbers", np.array(1.0), "a list whose items are each a number, but got array(1.) (ndarray)"),
        ("factory", "adam", "a function, class or module or None, but got 'adam' (str)."),
        ("factory", {"lr": 1}, "a function, class or module or None, but got {'lr': 1} (dict)."),
        ("settings", 4, "a Fields, a dictionary of its fields or None, but got 4 (int)."),
        ("sizes", 3, "a list whose items are each an integer"),
    ],
)
def test_a_wrong_type_is_refused(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        check_kinds("Thing", HINTS, {name: value})
    assert str(error.value).startswith(f"`{name}` of Thing must be {expected}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("integer", np.int64(3)),
        ("number", 1),
        ("number", np.float32(0.5)),
        ("number", float("nan")),
        ("number", None),
        ("text", Path("x")),
        ("switch", np.bool_(True)),
        ("choice", "not one of them"),  # said by who takes it, with the nearest name
        ("choice", {"a": 1}),
        ("numbers", (1, np.float64(2))),
        ("numbers", np.ones(3)),
        ("numbers", iter([1])),
        ("factory", int),
        ("factory", torch.nn.Linear(1, 1)),
        ("factory", {"class_path": "x"}),
        ("settings", Fields()),
        ("settings", {"number": 2.0}),
        ("names", "x"),
        ("sizes", [1, 2]),
        ("any", object()),
        ("unknown", object()),
    ],
)
def test_what_can_be_used_is_accepted(name: str, value: Any) -> None:
    check_kinds("Thing", HINTS, {name: value})


MADE: dict[str, Callable[[], Any]] = {
    "beta` of DPOModule": lambda: DPOModule(tiny_palm(), beta="0.1"),  # type: ignore[arg-type]
    "loss` of DPOModule": lambda: DPOModule(tiny_palm(), loss=None),  # type: ignore[arg-type]
    "beta` of SPINModule": lambda: SPINModule(tiny_palm(), beta=None),  # type: ignore[arg-type]
    "optimizer` of SFTModule": lambda: SFTModule(tiny_palm(), optimizer=torch.optim.SGD(tiny_palm().parameters(), 1.0)),  # type: ignore[arg-type]
    "backbone` of RETROModule": lambda: RETROModule("model"),  # type: ignore[arg-type]
    "anchor` of CALMModule": lambda: CALMModule(3),  # type: ignore[arg-type]
    "lora` of DPOModule": lambda: DPOModule(tiny_palm(), lora=8),  # type: ignore[arg-type]
    "generation` of SPINModule": lambda: SPINModule(tiny_palm(), generation="greedy"),  # type: ignore[arg-type]
    "dim` of PaLM": lambda: PaLM(num_tokens=8, dim=16.0, depth=1),  # type: ignore[arg-type]
    "rank` of LoRAConfig": lambda: LoRAConfig(rank="8"),  # type: ignore[arg-type]
    "max_new_tokens` of GenerationConfig": lambda: GenerationConfig(max_new_tokens=1.5),  # type: ignore[arg-type]
    "batch_size` of DPODataModule": lambda: DPODataModule("x.jsonl", batch_size="4"),  # type: ignore[arg-type]
    "tokenizer` of DPODataModule": lambda: DPODataModule("x.jsonl", tokenizer=object()),  # type: ignore[arg-type]
    "database` of RETRODataModule": lambda: RETRODataModule(None),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", MADE)
def test_every_class_says_which_argument(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name} must be"):
        MADE[name]()


def test_numbers_of_numpy_and_paths_can_be_used(tmp_path: Path) -> None:
    module = SPINModule(tiny_palm(), beta=np.float32(0.5))  # type: ignore[arg-type]
    assert module.beta == 0.5
    (tmp_path / "rows.jsonl").write_text("")
    assert DPODataModule(tmp_path / "rows.jsonl", tokenizer=Path("bytes")).tokenizer.vocab_size > 256  # type: ignore[arg-type]


def test_a_model_that_was_loaded_is_saved_first() -> None:
    class Loaded:
        def save_pretrained(self) -> None: ...

    with pytest.raises(ValueError, match=r"Save it with `save_pretrained`, and give the folder\."):
        DPODataModule("x.jsonl", tokenizer=Loaded())  # type: ignore[arg-type]


def test_the_fields_of_a_dictionary_are_known() -> None:
    assert from_fields(Fields, {"number": 2.0}, "settings") == Fields(2.0)
    with pytest.raises(ValueError, match=r"`lora` must have fields of LoRAConfig, but got 'rnk'\. Did you mean rank\?"):
        DPOModule(tiny_palm(), lora={"rnk": 2})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got 'xyz'\. Its fields are number\."):
        from_fields(Fields, {"xyz": 2}, "settings")


def test_an_anchor_may_be_a_path() -> None:
    assert CALMModule("anchor.ckpt", [tiny_palm()]).hparams["anchor"] == "anchor.ckpt"  # type: ignore[list-item]
    assert "backbone" not in hints_of(CALMModule) and "backbone" in hints_of(RETROModule)


def test_a_subclass_may_take_an_argument_of_another_type() -> None:
    class Scheduled(DPOModule):
        def __init__(self, backbone: Any, beta: str = "auto", **shared: Any) -> None:
            super().__init__(backbone, beta=0.1 if beta == "auto" else float(beta), **shared)

    assert "beta" not in hints_of(Scheduled) and "lora" in hints_of(Scheduled)
    assert Scheduled(tiny_palm()).beta == 0.1
    with pytest.raises(ValueError, match="`lora` of Scheduled must be"):
        Scheduled(tiny_palm(), lora=3)
