"""Rows of public data sets by the command line: what is trained is their question and their answer."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.public_rows import PUBLIC, Public, train, trained_texts

ADVICE = {
    "openai/gsm8k": "columns: {prompt: question, response: answer}",
    "meta-math/MetaMathQA": "columns: {prompt: query}",
    "ise-uiuc/Magicoder-OSS-Instruct-75K": "columns: {prompt: problem, response: solution}",
}


@pytest.mark.parametrize("name", ADVICE)
def test_rows_that_need_a_mapping_are_refused_with_it(name: str, folder: Path) -> None:
    (public,) = (public for public in PUBLIC if public.name == name)
    with pytest.raises(SystemExit, match=re.escape(ADVICE[name])):
        train(replace(public, settings={}), folder)


@pytest.mark.parametrize("public", [pytest.param(public, id=public.name) for public in PUBLIC])
def test_a_public_data_set_is_trained_on_as_meant(public: Public, folder: Path) -> None:
    cli = train(public, folder)
    assert trained_texts(cli) == public.trained
    (ledger,) = cli.datamodule.ledgers.values()
    dropped = {f"dropped/{reason}": count for reason, count in public.dropped.items()}
    assert {name: count for name, count in ledger.counts.items() if name != "kept"} == dropped
