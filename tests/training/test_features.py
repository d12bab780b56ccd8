"""Features of Lightning's Trainer with each method: each works, or is refused with the remedy."""

import re
from pathlib import Path

import pytest

from tests.training.features import FEATURES, REFUSED, Job
from tests.training.places import METHODS

ROOT = Path(__file__).parent.parent.parent
pytestmark = [
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:(?s).*barebones"),
    pytest.mark.filterwarnings("ignore:You have turned on `Trainer.detect_anomaly"),
    pytest.mark.filterwarnings("ignore:You requested to overfit"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:.*was called without a model"),  # the Tuner calls it so
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    # The Tuner removes the callbacks, trains on with the weights of its trials, and restores what it began with.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:the first batch, where the policy should still equal its reference"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
]
SLOW = ("torch.compile(module)",)
"""Tracing takes ten seconds per method."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the caches, so that rows are tokenized once."""
    return tmp_path_factory.mktemp("features")


@pytest.mark.study
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_of_the_trainer(feature: str, method: str, folders: Path, full_studies: bool) -> None:
    turn = METHODS[list(FEATURES).index(feature) % len(METHODS)]
    if not full_studies and (feature in SLOW or method != turn):
        pytest.skip("another feature or method runs; FULL_STUDIES=1 runs all")
    FEATURES[feature](Job(method, folders / method))


def test_the_table_of_the_documentation_is_that_of_the_tests() -> None:
    table = re.search(
        r"^\| feature of the Trainer .*?\n\n", (ROOT / "docs" / "your-project.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert table is not None
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table[0].strip().splitlines()]
    assert [name.lower() for name in rows[0][1:]] == list(METHODS)
    found = {(row[0], method): cell for row in rows[2:] for method, cell in zip(METHODS, row[1:], strict=True)}
    expected = {(name, method): "refused" if (name, method) in REFUSED else "yes" for name in FEATURES for method in METHODS}
    assert found == expected
