"""What the studies compute from their runs, by hand on small cases, and the pictures in the notebooks."""

import json
import math
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import word_sums
from benchmarks.common.word_sums import QUESTIONS, Rows
from benchmarks.studies.calm import pretrained as knowing
from benchmarks.studies.dpo import betas
from benchmarks.studies.dpo import pretrained as beside_trl
from benchmarks.studies.retro import pretrained as newer
from benchmarks.studies.spin import crossing, markov
from benchmarks.studies.spin import pretrained as played
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.models.language_model import Head
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.retro.model import NeighborTokens
from tests.toys import save_llama

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def point(validity: float, divergence: float) -> dict[str, float]:
    return {"validity": validity, "divergence": divergence, "length": 10.0}


def test_differences_pair_the_arms_of_a_seed_and_have_students_interval() -> None:
    runs = {str(seed): {"SPIN": point(v, 0.0), "start": point(0.5, 0.0)} for seed, v in enumerate((0.6, 0.7, 0.8))}
    mean, half = crossing.difference(runs, "SPIN", "start", "validity")
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.30 * 0.1 / 3**0.5)  # the standard deviation of 0.1, 0.2 and 0.3 is 0.1
    _, alone = crossing.difference({"0": runs["0"]}, "SPIN", "start", "validity")
    assert alone != alone, "one seed has no interval"


def test_only_seeds_with_every_arm_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    whole = {name: point(0.25, 2.0) for name in ("start", *crossing.ARMS)}
    part = {"start": point(0.9, 9.0)}
    kept = crossing.complete({"120 epochs": {"0": whole, "1": part}, "20 epochs": {"0": part}})
    assert kept == {"120 epochs": {"0": whole}}
    crossing.report(kept)
    told = capsys.readouterr().out
    assert "| 120 epochs | nothing | 1 | 25.0 | 2.00 | 10.0 |" in told
    assert "90.0" not in told and "nan" not in told


@pytest.mark.filterwarnings("ignore")  # as the script does
def test_the_crossing_resumes_and_computes_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossing, "ROWS", 32)
    monkeypatch.setattr(crossing, "STARTS", (24,))  # more steps than the warm-up
    monkeypatch.setattr(markov, "EPOCHS", (1, 2, 3))
    loop = {"iterations": 3, "epochs": 1, "replay": 0}
    monkeypatch.setattr(crossing, "ARMS", {"SFT": ({"lr": 1e-3}, {}), "SPIN": ({"lr": 1e-3, "beta": 0.5}, loop)})
    output = tmp_path / "crossing.json"
    first = crossing.compute([0], tmp_path, output)
    arms = first["24 epochs"]["0"]
    assert arms["SFT"]["steps"] == arms["SPIN"]["steps"] == 3
    before = output.read_bytes()
    assert crossing.compute([0], tmp_path, output) == json.loads(before)
    assert output.read_bytes() == before


def test_answers_of_both_forms_are_numbers() -> None:
    told = ["16 + 2 = 18\n#### 18", "A: 1,800.", "so 20\nA: $5, or\n#### 18.0", "There are 18.", "#### none"]
    assert [played.answer(text) for text in told] == ["18", "1800", "18", None, None]


def test_rows_of_self_play_are_short_turns_of_a_chat() -> None:
    rows = [{"prompt": "a" * length, "response": "b" * other + "\n"} for length, other in ((160, 199), (161, 9), (9, 200))]
    assert played.short(rows, ("response",)) == rows[:1]
    turns = {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}]}
    assert played.conversation({"prompt": "a", "chosen": "b\n"}) == turns


def test_self_play_is_compared_over_the_seeds_that_have_both_arms(capsys: pytest.CaptureFixture[str]) -> None:
    seeds: dict[str, Any] = {
        str(seed): {
            "before": {"loss": 2.0},
            **{
                name: {**dict.fromkeys(played.COLUMNS, 0.5), "loss": loss}
                for name, loss in (("sft", 1.5), ("spin", 1.0 + seed))
            },
        }
        for seed in (0, 1)
    }
    del seeds["1"]["spin"]
    played.report({"sizes": {"rows": 8, "held_out": 4, "pairs": 8, "start": 9, "steps": 3}, "seeds": seeds})
    told = capsys.readouterr().out
    assert "| + 3 steps of SFT on the same rows | 2 | 1.500 (1.500, 1.500) |" in told
    assert "start" not in told.split("\n| policy")[1]
    assert "| spin minus sft | -0.500 |" in told and "nan" not in told  # one seed has no interval


def test_the_batches_beside_trl_are_the_short_pairs_in_order(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    save_llama(tmp_path / "model")
    texts = [("a", "bc", "d"), ("e", "f" * 40, "g"), ("h", "i", "jk")]  # the second has 41 tokens of bytes
    rows = [dict(zip(("prompt", "chosen", "rejected"), each, strict=True)) for each in texts]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = beside_trl.encoded(str(tmp_path / "model"), str(tmp_path / "pairs.jsonl"), 2, 1, longest=10)
    assert [int(batch[side]["targets"].sum()) for batch in found for side in ("chosen", "rejected")] == [3, 2, 2, 3]
    with pytest.raises(SystemExit, match="2 pairs of at most 10 tokens, and 3 are needed"):
        beside_trl.encoded(str(tmp_path / "model"), str(tmp_path / "pairs.jsonl"), 3, 1, longest=10)


def test_the_gap_of_two_curves_is_their_greatest_difference() -> None:
    first, second = ([{"loss": value} for value in values] for values in ((0.7, 0.5, 0.4), (0.7, 0.6, 0.35)))
    assert beside_trl.gap(first, second, "loss") == pytest.approx(0.1)


def test_random_labels_are_exchanged_in_half_of_the_pairs() -> None:
    rows = [{"prompt": str(number), "chosen": "a", "rejected": "b"} for number in range(200)]
    mixed = betas.exchanged(rows, 0)
    assert [row["prompt"] for row in mixed] == [row["prompt"] for row in rows]
    assert sum(row["chosen"] == "b" and row["rejected"] == "a" for row in mixed) == 100
    assert all({row["chosen"], row["rejected"]} == {"a", "b"} for row in mixed)
    assert 35 < sum(row["chosen"] == "b" for row in mixed[:100]) < 65 and betas.exchanged(rows, 1) != mixed


def test_a_changed_calculation_has_another_result_in_both_places() -> None:
    text = "She has 6 * 7 = <<6*7=42>>42 eggs, and sells 42 / 2 = $<<42/2=21>>21 of them.\n#### 21"
    rows = [{"prompt": str(number), "response": text} for number in range(200)]
    pairs = betas.miscalculated([*rows, {"prompt": "none", "response": "No sum, and 1/2 = <<1/2=0.5>>0.5"}])
    assert [pair["prompt"] for pair in pairs] == [row["prompt"] for row in rows]
    assert all(pair["chosen"] == text for pair in pairs)
    changed = set()
    for pair in pairs:
        first, second = betas.CALCULATION.findall(pair["rejected"])
        gaps = (int(first[1]) - 42, int(second[1]) - 21)
        assert sum(gap != 0 for gap in gaps) == 1 and max(map(abs, gaps)) <= 9
        again = text.replace("<<6*7=42>>42", f"<<6*7={first[1]}>>{first[1]}")
        assert pair["rejected"] == again.replace("<<42/2=21>>21", f"<<42/2={second[1]}>>{second[1]}")
        changed.add(gaps)
    assert len(changed) > 20, "both calculations are changed, up and down"
    zero = betas.miscalculated([{"prompt": "", "response": "<<1-1=0>>0"}] * 20)
    assert all(re.search(r"=[1-9]>>", pair["rejected"]) for pair in zero), "no result is negative"


@pytest.mark.filterwarnings("ignore")  # as the script does
def test_a_sweep_of_beta_scores_its_rows_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    save_llama(tmp_path / "model")
    rows = [{"prompt": f"{number} + 1", "chosen": f" {number + 1}", "rejected": " 0"} for number in range(8)]
    for name, part in (("train", rows), ("held_out", rows[:4])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    sweep = betas.Sweep(0, tmp_path, str(tmp_path / "model"), 2, 1e-4)
    seed = {arm: sweep.measure(arm) for arm in ("beta 0.1", "beta 0.3", "recomputed")}
    assert [found["stores"] for found in seed.values()] == [True, False, False]
    assert len(list((tmp_path / "seed_0" / "reference").glob("*"))) == 1, "the reference does not depend on beta"
    assert seed["recomputed"]["curve"] == pytest.approx(seed["beta 0.1"]["curve"], rel=1e-5)
    assert seed["beta 0.3"]["margin"] == pytest.approx(3 * seed["beta 0.1"]["margin"], rel=0.1)  # two small steps
    capsys.readouterr()
    betas.report(betas.TASKS["solutions"], {"sizes": {"steps": 2, "held_out": 4}, "seeds": {"0": seed}})
    told = capsys.readouterr().out
    assert "| beta 0.1, recomputed | 1 |" in told and "random labels" not in told
    assert "seed 0: gap of the losses" in told and told.count("| met |") >= 1


def test_only_new_files_that_no_other_file_makes_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    rest = "import os\n\nVALUE = 1\n\n\ndef f() -> int:\n" + "    # a line\n" * 200
    headers = {
        "new": "# Copyright 2026 Us\n# A license\n\n",
        "old": "# Copyright 2024 Us\n",
        "made": "# Copyright 2026 Us\n# This file was automatically generated from new.py\n",
    }
    (tmp_path / "newer_package").mkdir()
    for name, header in {**headers, "__init__": ""}.items():
        (tmp_path / "newer_package" / f"{name}.py").write_text(header + rest)
    (tmp_path / "newer_package" / "short.py").write_text(headers["new"])
    found = newer.new_files(["newer_package"])
    assert found == {"newer_package/new.py": rest}
    held_out = newer.code(rest)
    assert held_out.startswith("def f()") and held_out.endswith("    # a line\n")
    assert newer.HELD_OUT_LENGTH - len("    # a line\n") <= len(held_out) <= newer.HELD_OUT_LENGTH


def test_neighbors_in_a_prompt_come_nearest_last_and_without_padding() -> None:
    tokens = torch.tensor([[[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [0, 0, 0]]]])  # a row, two chunks, two neighbors each
    mask = torch.tensor([[[[True, True, True], [True, True, False]], [[True, True, True], [False, False, False]]]])
    neighbors = NeighborTokens(tokens, mask)
    assert newer.prompt(neighbors, 0, [99]) == [4, 5, 99, 1, 2, 3, 99]
    assert newer.prompt(neighbors, 1, [99]) == [99, 7, 8, 9, 99]


def test_the_arms_of_the_model_alone_score_the_same_tokens() -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = PretrainedLM(config={"model_type": "llama", "vocab_size": 60, **sizes}).eval()
    text = torch.randint(3, 50, (150,), generator=torch.Generator().manual_seed(0))
    nobody = NeighborTokens(torch.zeros(1, 2, 2, 8, dtype=torch.int64), torch.zeros(1, 2, 2, 8, dtype=torch.bool))
    batch: Any = {"tokens": text[None], "chunk_bytes": torch.ones(1, 3), "neighbors": nobody, "controls": {"random": nobody}}
    with torch.no_grad():
        plain, *others = (newer.with_prompts(model, batch, name, []) for name in ("plain", "rag_first_random", "rag_each"))
        expected = -model(text[None]).log_softmax(-1)[0, :-1].gather(1, text[1:, None])[:, 0]
    assert plain == pytest.approx(
        [float(expected[start:end].sum()) for start, end in ((0, 63), (63, 127), (127, 149))], rel=1e-5
    )
    for found in others:  # without neighbors, the prompt is empty
        assert found == pytest.approx([0.0, *plain[1:]], rel=1e-5)


def test_a_saving_in_bits_per_byte_leaves_out_the_first_chunk() -> None:
    files = {"chunk_bytes": [[10, 20, 0], [10, 30, 50]], "overlap": [[0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]}
    bit = math.log(2)
    one = {"nats": [[9.0, 20 * bit, 0.0], [9.0, 30 * bit, 50 * bit]]}
    other = {"nats": [[0.0, 30 * bit, 0.0], [0.0, 60 * bit, 50 * bit]]}
    assert newer.rate(one, files) == pytest.approx(1.0)
    assert newer.rate(other, files, lambda overlap: overlap <= newer.LOW) == pytest.approx(2.0)
    saved, low, high = newer.gain(one, other, files, lambda _: True)
    assert saved == pytest.approx(0.4)
    assert (low, high) == pytest.approx((30 / 80, 0.5)), "each sample is one of the files, or both"
    assert newer.gain(one, other, files, lambda overlap: overlap <= newer.LOW) == pytest.approx((1.0, 1.0, 1.0)), (
        "one file has chunks of a low overlap"
    )


@pytest.mark.parametrize(("number", "held_in", "one_word"), [(400, 0.25, 0.0), (1000, 0.6, 0.4)])
def test_no_word_of_a_question_is_composed_in_training(number: int, held_in: float, one_word: float) -> None:
    rows = Rows(number, held_in, one_word)
    words = rows.parts
    assert sorted(word for part in words.values() for word in part) == sorted(rows.table), "each word is in one part"
    assert [len(part) / number for part in words.values()] == pytest.approx([held_in, 0.1, 0.9 - held_in])
    assert rows.composed(0) != rows.composed(1)
    numbers = Counter[int]()
    for row in rows.composed(0)[:1000]:
        terms = row["prompt"].removeprefix("Sum: ").removesuffix(" = ").split(" + ")
        of_words = [term for term in terms if not term.isdigit()]
        assert set(of_words) <= set(words["held_in"])
        assert row["response"] == str(sum(rows.table[term] if term in of_words else int(term) for term in terms))
        numbers[len(of_words)] += 1
    shares = [numbers[count] / 1000 for count in range(3)]
    assert shares == pytest.approx([0.2, one_word, 0.8 - one_word], abs=0.05)
    assert len(rows.questions()["held_out"]) == QUESTIONS, "the questions that are reported"


class Successor(torch.nn.Module):
    """A model in which one token follows each token, with a logit of 9 where the others have 0."""

    def __init__(self, follows: dict[int, int], size: int) -> None:
        super().__init__()
        weight = torch.zeros(size, size)
        for token, following in follows.items():
            weight[following, token] = 9.0
        self.head, self.size = Head(weight, None), size

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(tokens, self.size).float()


def test_an_answer_is_right_if_greedy_decoding_writes_its_digits_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    save_llama(tmp_path / "model")
    monkeypatch.setattr(word_sums, "QUESTIONS", 4)
    study = knowing.Study(str(tmp_path / "model"), tmp_path, Rows())
    space, one, two, x = (load_tokenizer(str(tmp_path / "model")).encode_batch([text])[0].ids[0] for text in " 12x")
    answers = ("12", "1", "2", "11", "123")
    (batch,) = study.batches(knowing.write(tmp_path / "rows.jsonl", [word_sums.row(["3", "4"], each) for each in answers]))
    writes_12x = Successor({space: one, one: two, two: x}, 260)
    right, logps = study.answers(writes_12x, batch)
    assert right.tolist() == [True, False, False, False, False]
    likely, unlikely = 9 - math.log(math.exp(9) + 259), -math.log(math.exp(9) + 259)
    assert logps.tolist() == pytest.approx(
        [2 * likely, likely, unlikely, likely + unlikely, 2 * likely - math.log(math.exp(9) + 259)], rel=1e-4
    )


def test_the_aim_is_judged_by_the_seeds_that_have_both_arms(capsys: pytest.CaptureFixture[str]) -> None:
    def run(right: float) -> dict[str, Any]:
        sets = {name: {"right": right, "logp": -1.0} for name in (*knowing.SETS, "table")}
        return {"trained": 10, "steps": 5, "seconds": 60, **sets}

    seeds = {"0": {"calm": run(0.6), "lora": run(0.3)}, "1": {"calm": run(0.4), "lora": run(0.3)}, "2": {"calm": run(0.9)}}
    assert knowing.difference(seeds, "calm", "lora", "right") == (pytest.approx(0.2), pytest.approx(12.71 * 0.1), 2)
    setting = {**asdict(Rows()), "precision": "32-true"}
    knowing.report({"setting": setting, "alone": {"anchor": run(0.0), "augment": run(0.1)}, "seeds": seeds})
    told = capsys.readouterr().out
    assert "| CALM | 3 | 10 | 5 | 63.3 (60.0, 40.0, 90.0) |" in told
    assert "| CALM minus LoRA on the anchor, held-out words | ≥ 10 points | +20.0 (-107.1 to +147.1) points; " in told
    assert "vanilla" not in told and "nan" not in told, "arms without results are left out"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_picture_has_an_alternative_text_and_one_style(path: Path) -> None:
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [("".join(cell["source"]), cell["outputs"]) for cell in cells if cell["cell_type"] == "code"]
    assert any("set_style()" in source for source, _ in code)
    assert not any("rcParams" in source or "plt.show" in source for source, _ in code), "benchmarks.common.plots has the style"
    drawn = 0
    for source, outputs in code:
        for output in outputs:
            kinds = [kind for kind in output.get("data", {}) if kind.startswith("image/")]
            for kind in kinds:
                assert kind == "image/png"
                alt = output["metadata"][kind]["alt"]
                assert len(alt) > 60, f"{path.name}: the picture is not described"
                assert alt[:30] in source, f"{path.name}: the picture is not that of its cell"
                drawn += 1
    assert drawn
