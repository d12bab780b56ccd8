"""No damaged file is used: it is named in an error, or what it holds is made again."""

from pathlib import Path

import pytest

from tests.artifacts.damage import KINDS, WAYS, outcomes, table

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


@pytest.mark.study
@pytest.mark.parametrize("name", KINDS)
def test_no_damaged_file_is_used(name: str, tmp_path: Path, full_studies: bool) -> None:
    found = outcomes(name, tmp_path, 200 if full_studies else len(WAYS))
    print(table([(name, found)]))
    wrong = [outcome for outcome in found if outcome.result not in ("noticed", "made again", "harmless")]
    assert not wrong, wrong[:5]
    assert any(outcome.result in ("noticed", "made again") for outcome in found)
