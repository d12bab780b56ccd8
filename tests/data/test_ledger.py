import json

import pytest

from lightning_align.data.ledger import Ledger, write_ledgers


def test_counts_add_up():
    ledger = Ledger("rows", on_bad_row="skip")
    for outcome in ("kept", "kept", "prompt_trimmed", "response_trimmed"):
        ledger.keep(outcome)
    ledger.drop("missing_field", origin="a:1", problem="has no field")
    ledger.note("duplicate")
    ledger.close()
    assert (ledger.num_rows, ledger.num_kept) == (5, 4)
    assert ledger.metrics() == {
        "rows": 5,
        "kept": 2,
        "prompt_trimmed": 1,
        "response_trimmed": 1,
        "dropped/missing_field": 1,
        "notes/duplicate": 1,
    }
    assert "rows: 5 rows" in ledger.table()
    assert Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))).to_dict() == ledger.to_dict()


def test_fail_names_the_row_and_the_option():
    with pytest.raises(ValueError, match=r"a\.jsonl:17 is not JSON.*on_bad_row.*'skip'.*unreadable"):
        Ledger("a").drop("unreadable", origin="a.jsonl:17", problem="is not JSON")


def test_length_limits_are_not_errors():
    ledger = Ledger("a")
    ledger.keep()
    ledger.drop("too_long", origin="a:1", problem="long")
    ledger.close()
    assert ledger.counts["dropped/too_long"] == 1


def test_warn_once_with_five_examples():
    ledger = Ledger("a", on_bad_row="warn")
    ledger.keep()
    for line in range(9):
        ledger.drop("missing_field", origin=f"a:{line}", problem="has no field")
    with pytest.warns(UserWarning, match="9 of 10 rows of a were dropped") as warned:
        ledger.close()
    assert len(warned) == 1
    assert str(warned[0].message).count("has no field") == 5


def test_no_remaining_row_is_always_an_error():
    for on_bad_row in ("fail", "warn", "skip"):
        ledger = Ledger("a", on_bad_row=on_bad_row)
        ledger.drop("too_long", origin="a:1", problem="is long")
        with pytest.raises(ValueError, match=r"(?s)no row of a is left.*too_long.*a:1 is long"):
            ledger.close()


def test_ledgers_are_written_atomically(tmp_path):
    ledger = Ledger("a")
    ledger.keep()
    write_ledgers(tmp_path / "ledger.json", {"train": ledger})
    assert json.loads((tmp_path / "ledger.json").read_text())["train"]["counts"] == {"kept": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_unknown_policy():
    with pytest.raises(ValueError, match=r"`on_bad_row` must be .* but got 'ignore'"):
        Ledger("a", on_bad_row="ignore")
