"""The check of the first batch: it names each planted fault and is silent in correct runs."""

import functools
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_align.data.tasks.arithmetic import Arithmetic
from lightning_align.dpo.identity import batch_faults
from lightning_align.dpo.module import DPOModule
from lightning_align.models.lora import LoRAConfig, lora_parameters
from lightning_align.references.update import ReferenceUpdate
from lightning_align.types import PreferenceBatch, TokenBatch
from tests.toys import Plain, preference_batch, tiny_palm

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

SGD = functools.partial(torch.optim.SGD, lr=0.05)


def found(module: DPOModule, folder: Path, batch: PreferenceBatch | None = None, **arguments: Any) -> list[str]:
    """Return the warnings of the check in one step of training."""
    data: Any = DataLoader([batch or preference_batch(6)], batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(**{"accelerator": "cpu", "max_epochs": 1, "default_root_dir": folder, **quiet, **arguments})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, data)
    texts = [str(warning.message) for warning in caught]
    return [text.partition("still equal its reference: ")[2] for text in texts if "still equal its reference" in text]


def sides(change: Any, batch: PreferenceBatch) -> PreferenceBatch:
    return {"chosen": change(batch["chosen"]), "rejected": change(batch["rejected"])}


def shifted(by: int) -> Any:
    def change(side: TokenBatch) -> TokenBatch:
        wide: dict[str, Tensor] = {n: nn.functional.pad(side[n], (0, 1)) for n in ("tokens", "mask", "targets")}  # type: ignore[literal-required]
        return {**wide, "targets": wide["targets"].roll(by, dims=1)}  # type: ignore[typeddict-item]

    return change


def doubled(side: TokenBatch) -> TokenBatch:
    rows = len(side["tokens"])
    begin = {"tokens": torch.full((rows, 2), 7), "mask": torch.ones(rows, 2, dtype=torch.bool)}
    begin["targets"] = torch.zeros(rows, 2, dtype=torch.bool)
    return {name: torch.cat([value, side[name]], dim=1) for name, value in begin.items()}  # type: ignore[literal-required,return-value]


class OtherDtype(DPOModule):
    def configure_reference(self, policy: nn.Module) -> None:
        super().configure_reference(policy)
        self.reference.model.bfloat16()  # type: ignore[attr-defined]


class WarmAdapters(DPOModule):
    def configure_reference(self, policy: nn.Module) -> None:
        super().configure_reference(policy)
        with torch.no_grad():
            for parameter in lora_parameters(policy, "default"):
                parameter.normal_()


class OtherWeights(DPOModule):
    def configure_reference(self, policy: nn.Module) -> None:
        super().configure_reference(tiny_palm(seed=5))


FAULTS: list[tuple[str, Any, Any]] = [
    ("dropout: ", lambda: DPOModule(tiny_palm(ff_dropout=0.3), dropout=True, optimizer=SGD), None),
    ("dtype: ", lambda: OtherDtype(tiny_palm(), optimizer=SGD), None),
    ("adapter: ", lambda: WarmAdapters(tiny_palm(), lora=LoRAConfig(rank=2), optimizer=SGD), None),
    ("reference file: ", lambda: OtherWeights(tiny_palm(), optimizer=SGD), None),
    ("mask: Padding tokens are targets", lambda: DPOModule(tiny_palm(), optimizer=SGD), shifted(1)),
    ("mask: The last token of every response", lambda: DPOModule(tiny_palm(), optimizer=SGD), shifted(-1)),
    ("BOS: Every row starts with token 7 twice", lambda: DPOModule(tiny_palm(), optimizer=SGD), doubled),
]


@pytest.mark.parametrize(("message", "module", "change"), FAULTS, ids=[fault[0].partition(":")[0] for fault in FAULTS])
def test_planted_faults_are_named(message: str, module: Any, change: Any, tmp_path: Path) -> None:
    batch = preference_batch(6) if change is None else sides(change, preference_batch(6))
    (fault,) = found(module(), tmp_path, batch)
    assert fault.startswith(message)


def test_targets_that_are_too_late_are_named() -> None:
    def later(side: TokenBatch) -> TokenBatch:
        targets = side["targets"].roll(1, dims=1) & side["targets"]  # drops the first target of each response
        return {**side, "targets": targets}

    batch = preference_batch(6)
    assert batch_faults(batch) == []
    (fault,) = batch_faults(sides(later, batch))
    assert fault.startswith("mask: The first tokens in which chosen and rejected differ")


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ({}, {}),
        ({"loss": "ipo"}, {}),
        ({"loss": "sigmoid_norm", "sft_weight": 1.0}, {"accumulate_grad_batches": 2}),
        ({"ld_alpha": 0.5}, {}),
        ({"loss": "simpo"}, {}),
        ({"loss": "orpo"}, {}),
        ({"divergence": "js"}, {}),
        ({"reference": "stored"}, {}),
        ({"reference": "stored"}, {"precision": "bf16-mixed"}),
        ({"reference": "moving"}, {"callbacks": [ReferenceUpdate()]}),
        ({"lora": LoRAConfig(rank=2)}, {}),
        ({"lora": LoRAConfig(rank=2, dropout=0.5)}, {}),
        ({"lora": LoRAConfig(rank=2), "reference": "moving"}, {"callbacks": [ReferenceUpdate()]}),
        ({"lora": LoRAConfig(rank=2), "reference": "stored"}, {}),
        ({}, {"precision": "bf16-mixed"}),
        ({}, {"precision": "bf16-true"}),
        ({}, {"precision": "64-true"}),
        ({"backbone": Plain(tiny_palm())}, {}),
        ({"backbone": tiny_palm(qk_rmsnorm=True)}, {}),
        ({"confidence_weighting": True}, {}),
    ],
)
def test_correct_runs_have_no_warning(given: dict[str, Any], arguments: dict[str, Any], tmp_path: Path) -> None:
    given = {"backbone": tiny_palm(), "reference_cache": str(tmp_path / "cache"), **given}
    assert found(DPOModule(optimizer=SGD, **given), tmp_path, **arguments) == []


def test_rows_of_the_data_module_have_no_faults(tmp_path: Path) -> None:
    from lightning_align.dpo.datamodule import DPODataModule

    source = Arithmetic(num_rows=40)
    lines = [{"prompt": row["prompt"], "chosen": "1", "rejected": "12"} for row in source.rows()]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{line["prompt"]}", "chosen": "1", "rejected": "12"}}\n' for line in lines))
    data = DPODataModule(str(path), cache_dir=str(tmp_path), batch_size=8)
    data.prepare_data()
    data.setup("fit")
    assert all(batch_faults(batch, bos_id=data.tokenizer.bos_id) == [] for batch in data.train_dataloader())
