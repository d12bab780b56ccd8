import random

import pytest

from lightning_align.data.forms import common_prefix
from lightning_align.data.ledger import Ledger
from lightning_align.data.packing import encode_blocks
from lightning_align.data.rows import Row
from lightning_align.data.tokenizer import ByteTokenizer
from tests.data.helpers import WORDS, encode, small_bpe, spell

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return small_bpe(tmp_path_factory.mktemp("bpe"))


def test_a_row_worked_by_hand():
    (row,), ledger = encode({"prompt": "ab", "response": "c"})
    assert row.num_prompt == 3
    assert row.sides[0].tokens == [1, 100, 101, 102, 2]
    assert row.sides[0].targets == [False, False, False, True, True]
    assert row.sides[0].num_bytes == 1
    assert ledger.counts == {"kept": 1}


def test_num_bytes_are_those_of_the_trained_text():
    (row,), _ = encode({"prompt": "ü", "response": "東京 é"})
    assert row.sides[0].num_bytes == len("東京 é".encode())
    assert sum(row.sides[0].targets) == row.sides[0].num_bytes + 1


def _random_text(random_numbers: random.Random) -> str:
    pieces = [*WORDS, " ", "  ", "\n", "\n\n", ":", "é", "東京", "🙂", "."]
    return "".join(random_numbers.choice(pieces) for _ in range(random_numbers.randint(1, 12)))


def test_no_token_crosses_the_boundary_and_training_sees_what_generation_sees(bpe):
    random_numbers = random.Random(0)
    rows = [{"prompt": _random_text(random_numbers), "response": _random_text(random_numbers)} for _ in range(200)]
    rows = [row for row in rows if row["response"].strip()]
    encoded, ledger = encode(*rows, tokenizer=bpe)
    prompts = bpe.encode_batch([row["prompt"] for row in rows])
    for fields, alone, row in zip(rows, prompts, encoded, strict=True):
        tokens, targets, num_bytes = row.sides[0]
        assert tokens[: row.num_prompt] == [bpe.bos_id, *alone.ids]
        assert bpe.decode(tokens[row.num_prompt :]) == fields["response"]
        assert targets == [i >= row.num_prompt for i in range(len(tokens))]
        assert tokens[-1] == bpe.eos_id
        assert tokens.count(bpe.eos_id) == 1
        assert num_bytes == len(fields["response"].encode())
    # The corpus has boundaries that the tokenizer merges over and boundaries that it does not.
    assert 10 < ledger.notes["merged_boundary"] < len(rows) - 10


def test_a_merge_over_the_boundary_is_undone_and_noted(bpe):
    (row,), ledger = encode({"prompt": "the quick br", "response": "own fox"}, tokenizer=bpe)
    assert ledger.notes["merged_boundary"] == 1
    assert spell(bpe, row) == ("<bos>the quick brown fox<eos>", "own fox<eos>")


def test_sides_of_a_pair_share_their_prompt(bpe):
    (row,), _ = encode({"prompt": "the quick br", "chosen": "own fox", "rejected": " dog"}, tokenizer=bpe)
    chosen, rejected = row.sides
    assert chosen.tokens[: row.num_prompt] == rejected.tokens[: row.num_prompt]
    assert spell(bpe, row, 0)[1] == "own fox<eos>"
    assert spell(bpe, row, 1)[1] == " dog<eos>"


def test_special_tokens_in_the_text_are_not_doubled(bpe):
    (row, second), ledger = encode(
        {"prompt": "<bos>the dog", "response": "a fox<eos>"}, {"prompt": "the", "response": "<bos> fox"}, tokenizer=bpe
    )
    assert spell(bpe, row)[0] == "<bos>the doga fox<eos>"
    assert row.sides[0].num_bytes == 5
    assert spell(bpe, second)[0] == "<bos>the fox<eos>"
    assert ledger.notes["double_bos"] == 2


@pytest.mark.parametrize(
    ("max_length", "truncation", "outcome", "text", "trained"),
    [
        (9, "keep_start", "kept", "<bos>abcdxyz<eos>", "xyz<eos>"),
        (8, "keep_start", "response_trimmed", "<bos>abcdxyz", "xyz"),
        (6, "keep_start", "response_trimmed", "<bos>abcdx", "x"),
        (8, "keep_end", "prompt_trimmed", "<bos>bcdxyz<eos>", "xyz<eos>"),
        (6, "keep_end", "prompt_trimmed", "<bos>dxyz<eos>", "xyz<eos>"),
    ],
)
def test_truncation(max_length, truncation, outcome, text, trained):
    fields = {"prompt": "abcd", "response": "xyz"}
    (row,), ledger = encode(fields, max_length=max_length, truncation=truncation)
    assert ledger.counts == {outcome: 1}
    assert spell(BYTES, row) == (text, trained)
    assert row.sides[0].num_bytes == len(trained.removesuffix("<eos>"))


@pytest.mark.parametrize(
    ("max_length", "truncation", "reason"),
    [(5, "keep_start", "prompt_too_long"), (5, "keep_end", "response_too_long"), (8, "drop", "too_long")],
)
def test_rows_over_the_limit_are_counted_and_never_an_error(max_length, truncation, reason):
    rows, ledger = encode({"prompt": "abcd", "response": "xyz"}, max_length=max_length, truncation=truncation)
    assert rows == []
    assert ledger.counts == {f"dropped/{reason}": 1}


def test_keep_end_trims_both_sides_of_a_pair_alike():
    fields = {"prompt": "abcdef", "chosen": "x", "rejected": "yyyy"}
    (row,), ledger = encode(fields, max_length=9, truncation="keep_end")
    assert (spell(BYTES, row, 0)[0], spell(BYTES, row, 1)[0]) == ("<bos>defx<eos>", "<bos>defyyyy<eos>")
    assert row.num_prompt == 4
    assert ledger.counts == {"prompt_trimmed": 1}


def test_pairs_that_truncation_makes_identical_are_dropped_and_never_an_error():
    fields = {"prompt": "ab", "chosen": "xyA", "rejected": "xyB"}
    rows, ledger = encode(fields, max_length=5)
    assert rows == []
    assert ledger.counts == {"dropped/response_too_long": 1}
    (line,) = ledger.examples["response_too_long"]
    assert "max_length is 5, and its chosen and rejected responses are identical up to there" in line
    # If the prompt is trimmed instead, the responses stay different.
    assert encode(fields, max_length=6, truncation="keep_end")[1].counts == {"prompt_trimmed": 1}


def test_weights_and_margins_of_pairs_are_numbers_or_strings_of_numbers():
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    given = [({}, 1.0, 0.0), ({"weight": 2, "margin": -0.5}, 2.0, -0.5), ({"weight": "2.5", "margin": ""}, 2.5, 0.0)]
    rows, _ = encode(*(pair | fields for fields, _, _ in given))
    assert [(row.weight, row.margin) for row in rows] == [(weight, margin) for _, weight, margin in given]
    for wrong in ("two", "nan", "-1", "inf", True, [1], 10**400):
        _, ledger = encode(pair, pair | {"weight": wrong}, on_bad_row="skip")
        assert ledger.counts == {"kept": 1, "dropped/wrong_type": 1}, wrong


CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "tool", "content": "T"},
    {"role": "assistant", "content": "A2"},
]
RENDERED = "<bos><|system|>\nS\n<|user|>\nU1\n<|assistant|>\nA1<eos><|tool|>\nT\n<|assistant|>\nA2<eos>"


@pytest.mark.parametrize(
    ("mask_turns", "trained"),
    [("last_turn", "A2<eos>"), ("assistant_only", "A1<eos>A2<eos>"), ("all", RENDERED.removeprefix("<bos>"))],
)
def test_masks_of_messages(mask_turns, trained):
    (row,), _ = encode({"messages": CHAT}, mask_turns=mask_turns)
    assert spell(BYTES, row) == (RENDERED, trained)
    assert row.sides[0].num_bytes == len(trained.replace("<eos>", "").encode())


def test_masks_of_answers_in_messages():
    fields = {"prompt": CHAT[:2], "chosen": CHAT[2:], "rejected": "no"}
    for mask_turns, trained in (
        ("last_turn", "A2<eos>"),
        ("assistant_only", "A1<eos>A2<eos>"),
        ("all", "A1<eos><|tool|>\nT\n<|assistant|>\nA2<eos>"),
    ):
        (row,), _ = encode(fields, mask_turns=mask_turns)
        assert spell(BYTES, row, 0) == (RENDERED, trained)
        assert spell(BYTES, row, 1)[1] == "no<eos>"
        assert BYTES.decode(row.sides[0].tokens[: row.num_prompt]).endswith("U1\n<|assistant|>\n")


def test_a_prompt_repeated_in_its_response_is_used_once():
    turns = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    (twice, once), ledger = encode({"prompt": "U", "response": turns}, {"prompt": turns[:1], "response": turns[1:]})
    assert twice.sides == once.sides and spell(BYTES, twice)[1] == "A<eos>"
    assert ledger.counts == {"kept": 2}
    assert encode({"prompt": "U", "response": turns[:1]}, on_bad_row="skip")[1].counts == {"dropped/wrong_role": 1}


def test_the_prompt_of_messages_is_the_prompt_of_generation():
    for fields in ({"messages": CHAT}, {"messages": CHAT[:4]}, {"prompt": CHAT[:4]}):
        (prompt,), _ = encode(fields, prompts_only=True)
        (row,), _ = encode({"messages": CHAT})
        assert prompt.sides[0].tokens == row.sides[0].tokens[: row.num_prompt]


def test_messages_after_the_last_response_are_left_out_and_noted():
    (row,), ledger = encode({"messages": [*CHAT, {"role": "user", "content": "thanks"}]})
    assert spell(BYTES, row)[0] == RENDERED
    assert ledger.notes == {"trailing_turns": 1}


def test_implicit_prompts():
    users = [{"role": "user", "content": "Q"}]
    for fields in (
        {"chosen": "Human: hi\n\nAssistant: yes", "rejected": "Human: hi\n\nAssistant: no"},
        {
            "chosen": [*users, {"role": "assistant", "content": "a"}],
            "rejected": [*users, {"role": "assistant", "content": "b"}],
        },
        {
            "prompt": "Q",
            "chosen": [*users, {"role": "assistant", "content": "a"}],
            "rejected": [*users, {"role": "assistant", "content": "b"}],
        },
    ):
        (row,), _ = encode(fields)
        chosen, rejected = spell(BYTES, row, 0), spell(BYTES, row, 1)
        assert chosen[0].removesuffix(chosen[1]) == rejected[0].removesuffix(rejected[1])
        assert chosen[1] in (" yes<eos>", "a<eos>")


@pytest.mark.parametrize(
    ("first", "second", "prefix"),
    [
        ("a cat", "a car", "a"),
        ("Q: 1\nA: 12", "Q: 1\nA: 13", "Q: 1\nA:"),
        ("Q\n2", "Q\n3", "Q\n"),
        ("東京", "東北", "東"),
        ("x e\u0301", "x e\u0300", "x"),
        ("a b", "a b c", "a b"),
        ("cat", "dog", ""),
    ],
)
def test_common_prefix_ends_at_a_word(first, second, prefix):
    assert common_prefix(first, second) == prefix
    assert common_prefix(second, first) == prefix


def test_planted_defects_are_all_found_and_none_invented():
    good = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(500)]
    planted = {
        3: ({"prompt": "x"}, "missing_field"),
        50: ({"prompt": "x", "response": None}, "missing_field"),
        77: ({"prompt": 7, "response": "y"}, "wrong_type"),
        78: ({"prompt": "x", "response": {"a": 1}}, "wrong_type"),
        130: ({"prompt": "x", "response": " \n"}, "empty_response"),
        256: ({"prompt": "x", "chosen": "y", "rejected": "y"}, "identical_pair"),
        300: ({"messages": [{"role": "user", "content": "u"}]}, "no_assistant_turn"),
        301: ({"messages": [{"content": "u"}]}, "wrong_type"),
        400: ({"prompt": [{"role": "user", "content": None}], "response": "x"}, "chat_template"),
        450: ({"prompt": "p" * 99, "response": "x"}, "prompt_too_long"),
        499: ({"chosen": "cat", "rejected": "dog"}, "no_prompt"),
    }
    rows = [planted[i][0] if i in planted else row for i, row in enumerate(good)]
    rows[10] = rows[9]
    encoded, ledger = encode(*rows, max_length=60, on_bad_row="skip")
    assert [row.row for row in encoded] == [i for i in range(500) if i not in planted]
    found = {int(line.split(":")[1].split()[0]) - 1: reason for reason, lines in ledger.examples.items() for line in lines}
    assert found == {i: reason for i, (_, reason) in planted.items()}
    assert ledger.num_rows == len(rows) == ledger.num_kept + len(planted)
    assert ledger.notes == {"duplicate": 1}


def test_plain_text_is_packed_without_loss(bpe):
    texts = ["the quick brown fox", "über 東京", "a lazy dog " * 9]
    for tokenizer in (BYTES, bpe):
        ledger = Ledger("test")
        rows = [Row({"text": text}, "") for text in texts]
        blocks = list(encode_blocks(rows, tokenizer=tokenizer, ledger=ledger, max_length=16))
        tokens = [token for block in blocks for token in block.sides[0].tokens]
        assert tokenizer.decode(tokens, skip_special=False) == "".join(f"<bos>{text}<eos>" for text in texts)
        assert [len(block.sides[0].tokens) for block in blocks[:-1]] == [16] * (len(blocks) - 1)
        assert all(block.sides[0].targets == [False] + [True] * (len(block.sides[0].tokens) - 1) for block in blocks)
        assert ledger.counts == {"kept": 3}
        assert blocks[0].row == 0
        assert blocks[-1].row == 2
    (block,) = encode_blocks(rows, tokenizer=bpe, ledger=ledger, max_length=1000)
    assert block.sides[0].num_bytes == sum(len(text.encode()) for text in texts)
