"""Made-up rows with the columns of public data sets, the settings that read them, and what is trained on them.

``python -m tests.cli.public_rows`` trains on each by the command line and prints the table.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_align.cli import AlignCLI, run
from lightning_align.data.tokenizer import ByteTokenizer
from tests.cli.runs import config

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Public:
    """Rows of a public data set."""

    name: str
    """Its name on the Hugging Face hub, or what writes such rows."""
    rows: Rows
    trained: list[tuple[str, ...]]
    """The prompt and the response, or the prompt and the chosen and the rejected response, of each trained row."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The arguments of the data module. Empty if the rows are found on their own."""
    kind: str = "jsonl"
    dropped: dict[str, int] = field(default_factory=dict)
    """The rows that the ledger counts as dropped, by reason."""

    @property
    def method(self) -> str:
        """The method that trains on the rows."""
        return "dpo" if len(self.trained[0]) == 3 else "sft"


def chat(*turns: str, system: str = "") -> str:
    """Write the prompt of a chat with the built-in template, of turns that begin with the user."""
    text = f"<|system|>\n{system}\n" if system else ""
    for number, turn in enumerate(turns):
        text += f"<|assistant|>\n{turn}<eos>" if number % 2 else f"<|user|>\n{turn}\n"
    return f"{text}<|assistant|>\n"


def said(*turns: str, role: str = "role", content: str = "content", names: Sequence[str] = ("user", "assistant")) -> Rows:
    """Return turns as messages."""
    return [{role: names[number % 2], content: turn} for number, turn in enumerate(turns)]


def sharegpt(*turns: str) -> Rows:
    """Return turns as ShareGPT names them."""
    return said(*turns, role="from", content="value", names=("human", "gpt"))


def _fields(names: str, value: Any = None) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


TLDR = "SUBREDDIT: r/cats\n\nTITLE: Cat\n\nPOST: My cat sleeps all day.\n\nTL;DR:"
HUMAN = "\n\nHuman: Name a fruit\n\nAssistant:"

# fmt: off
DEMONSTRATIONS = [
    Public("anon8231489123/ShareGPT_Vicuna", [{"id": "a_0", "conversations": sharegpt("Hi", "Yo", "Bye", "Ciao")}],
           [(chat("Hi", "Yo", "Bye"), "Ciao")]),
    Public("tatsu-lab/alpaca", [
        {"instruction": "Add", "input": "1 2", "output": "3", "text": "Below is an instruction. ### Response: 3"},
        {"instruction": "Name a fruit", "input": "", "output": "Fig", "text": "Below is an instruction. ### Response: Fig"},
    ], [("Add\n1 2", "3"), ("Name a fruit", "Fig")], kind="parquet"),
    Public("sahil2801/CodeAlpaca-20k", [{"output": "print(1)", "instruction": "Print 1", "input": ""}],
           [("Print 1", "print(1)")]),
    Public("LLaMA-Factory alpaca", [
        {"instruction": "And?", "input": "", "output": "No", "system": "Be brief", "history": [["Is it?", "Yes"]]},
    ], [(chat("Is it?", "Yes", "And?", system="Be brief"), "No")]),
    Public("databricks/databricks-dolly-15k", [
        {"instruction": "Where is it?", "context": "Rome is in Italy.", "response": "Italy", "category": "closed_qa"},
        {"instruction": "Say hi", "context": "", "response": "Hi", "category": "open_qa"},
    ], [("Where is it?\nRome is in Italy.", "Italy"), ("Say hi", "Hi")]),
    Public("HuggingFaceH4/no_robots", [
        {"prompt": "Rhyme", "prompt_id": "f0", "messages": said("Rhyme", "Time"), "category": "Generation"},
    ], [(chat("Rhyme"), "Time")], kind="parquet"),
    Public("HuggingFaceH4/ultrachat_200k", [
        {"prompt": "Hi", "prompt_id": "f0", "messages": said("Hi", "Yo", "More", "Fine")},
    ], [(chat("Hi", "Yo", "More"), "Fine")], kind="parquet"),
    Public("GAIR/lima", [
        {"conversations": ["Why?", "Because."], "source": "stackexchange"},
        {"conversations": ["Why?", "Because.", "And?", "So."], "source": "multi_turn"},
    ], [(chat("Why?"), "Because."), (chat("Why?", "Because.", "And?"), "So.")]),
    Public("teknium/OpenHermes-2.5", [
        {
            **_fields("custom_instruction topic model_name model skip_prompt_formatting idx id avatarUrl title views hash"),
            "conversations": [{**turn, "weight": None} for turn in sharegpt("Add 1 and 2", "3")],
            "system_prompt": None,
            "source": "airoboros2.2",
            "category": "orca",
            "language": None,
        },
    ], [(chat("Add 1 and 2"), "3")]),
    Public("allenai/tulu-3-sft-mixture", [{"id": "p_0", "messages": said("Hi", "Yo"), "source": "ai2-adapt"}],
           [(chat("Hi"), "Yo")], kind="parquet"),
    Public("allenai/WildChat-1M", [
        {
            "conversation_hash": "9f", "model": "gpt-4", "timestamp": "2023-04-09T00:00:00", "turn": 1, "language": "English",
            "conversation": [
                {**turn, "country": "US", "hashed_ip": "22", "header": {"user-agent": "x"}, "language": "English",
                 "redacted": False, "state": None, "timestamp": None, "toxic": False, "turn_identifier": 1}
                for turn in said("Hi", "Yo")
            ],
            "openai_moderation": [{"flagged": False, "categories": {"hate": False}}], "toxic": False, "redacted": False,
        },
    ], [(chat("Hi"), "Yo")], kind="parquet"),
    Public("lmsys/lmsys-chat-1m", [
        {"conversation_id": "9f", "model": "vicuna-13b", "conversation": said("Hi", "Yo"), "turn": 1, "language": "English",
         "openai_moderation": [{"flagged": False}], "redacted": False},
    ], [(chat("Hi"), "Yo")]),
    Public("LDJnr/Capybara", [
        {"source": "Airoboros", "conversation": [{"input": "Hi", "output": "Yo"}, {"input": "Bye", "output": "Ciao"}]},
    ], [(chat("Hi", "Yo", "Bye"), "Ciao")]),
    Public("trl-lib/Capybara", [
        {"source": "Airoboros", "messages": said("Hi", "Yo"), "num_turns": 2},
    ], [(chat("Hi"), "Yo")]),
    Public("openai/gsm8k", [{"question": "1+2?", "answer": "1+2=<<1+2=3>>3\n#### 3"}],
           [("1+2?", "1+2=<<1+2=3>>3\n#### 3")], {"columns": {"prompt": "question", "response": "answer"}}, kind="parquet"),
    Public("meta-math/MetaMathQA", [
        {"type": "GSM_Rephrased", "query": "What is 1+2?", "original_question": "1+2?", "response": "3"},
    ], [("What is 1+2?", "3")], {"columns": {"prompt": "query"}}),
    Public("Magpie-Align/Magpie-Pro-300K-Filtered", [
        {"uuid": "1", "model": "llama", "gen_input_configs": {"temperature": 1.0, "top_p": 1.0}, "instruction": "Hi",
         "response": "Yo", "conversations": sharegpt("Hi", "Yo"), "task_category": "Chat", "difficulty": "easy",
         "input_quality": "good", "instruct_reward": 1.5, "min_neighbor_distance": 0.1},
    ], [(chat("Hi"), "Yo")], kind="parquet"),
    Public("Open-Orca/OpenOrca", [
        {"id": "flan.1", "system_prompt": "Be kind", "question": "Add 1 2", "response": "3"},
        {"id": "flan.2", "system_prompt": "", "question": "Add 1 3", "response": "4"},
    ], [(chat("Add 1 2", system="Be kind"), "3"), (chat("Add 1 3"), "4")], kind="parquet"),
    Public("timdettmers/openassistant-guanaco", [{"text": "### Human: Hi### Assistant: Yo"}],
           [("", "### Human: Hi### Assistant: Yo")]),
    Public("OpenAssistant/oasst1, joined", [
        {"message_tree_id": "t", "lang": "en", "thread": said("Hi", "Yo", role="role", content="text",
                                                             names=("prompter", "assistant"))},
    ], [(chat("Hi"), "Yo")], {"columns": {"conversations": "thread"}, "roles": {"prompter": "user"}}),
    Public("open-thoughts/OpenThoughts-114k", [
        {"system": "Think.", "conversations": said("Hi", "Yo", role="from", content="value")},
    ], [(chat("Hi", system="Think."), "Yo")], kind="parquet"),
    Public("trl-lib/tldr", [{"prompt": TLDR, "completion": " A lazy cat."}], [(TLDR, " A lazy cat.")]),
    Public("nvidia/HelpSteer", [
        {"prompt": "Hi", "response": "Yo", **_fields("helpfulness correctness coherence complexity verbosity", 3)},
    ], [("Hi", "Yo")]),
    Public("OpenAI fine-tuning", [{"messages": [{"role": "system", "content": "Be brief"}, *said("Hi", "Yo", "Bye", "Ciao")]}],
           [(chat("Hi", "Yo", "Bye", system="Be brief"), "Ciao")]),
    Public("allenai/soda", [
        {"head": "x", "dialogue": ["Hi", "Yo"], "speakers": ["Ann", "Bob"]},
    ], [(chat("Hi"), "Yo")], {"columns": {"conversations": "dialogue"}}),
    Public("ise-uiuc/Magicoder-OSS-Instruct-75K", [
        {"lang": "python", "raw_index": 1, "seed": "x", "problem": "Print 1", "solution": "print(1)"},
    ], [("Print 1", "print(1)")], {"columns": {"prompt": "problem", "response": "solution"}}),
]

_HELPSTEER = "correctness coherence complexity verbosity"
PREFERENCES = [
    Public("Anthropic/hh-rlhf", [{"chosen": f"{HUMAN} Fig", "rejected": f"{HUMAN} Car"}], [(HUMAN, " Fig", " Car")]),
    Public("openai/summarize_from_feedback", [
        {"info": {"id": "t3", "post": "My cat sleeps.", "title": "Cat", "subreddit": "cats", "site": None, "article": None},
         "split": "train", "summaries": [{"text": " Car", "policy": "sup1", "note": None}, {"text": " Cat", "policy": "ref",
                                                                                        "note": None}],
         "choice": 1, "worker": "w", "batch": "b", "extra": {"confidence": None}},
    ], [("My cat sleeps.", " Cat", " Car")], kind="parquet"),
    Public("CarperAI/openai_summarize_comparisons", [
        {"prompt": TLDR.removesuffix("\n\nTL;DR:"), "chosen": "TL;DR: Lazy cat.", "rejected": "TL;DR: A car."},
    ], [(TLDR.removesuffix("\n\nTL;DR:"), "TL;DR: Lazy cat.", "TL;DR: A car.")]),
    Public("trl-lib/tldr-preference", [{"prompt": TLDR, "chosen": " Lazy cat.", "rejected": " A car."}],
           [(TLDR, " Lazy cat.", " A car.")]),
    Public("TL;DR without a prompt", [{"chosen": f"{TLDR} Lazy cat.", "rejected": f"{TLDR} A car."}],
           [(TLDR, " Lazy cat.", " A car.")]),
    Public("stanfordnlp/SHP", [
        {"post_id": "p", "domain": "askbaking_train", "upvote_ratio": 0.98, "history": "How long?", "c_root_id_A": "a",
         "c_root_id_B": "b", "created_at_utc_A": 1, "created_at_utc_B": 2, "score_A": 2, "score_B": 9,
         "human_ref_A": "Dunno", "human_ref_B": "An hour", "labels": 0, "seconds_difference": 1.0, "score_ratio": 4.5},
    ], [("How long?", "An hour", "Dunno")]),
    Public("berkeley-nest/Nectar", [
        {"prompt": f"{HUMAN} ", "turns": 1, "num_responses": 3, "source": ["sharegpt"], "good_natured": True,
         "answers": [{"answer": text, "model": "m", "rank": rank}
                     for text, rank in (("Fig", 1.0), ("Car", 3.0), ("Nut", 2.0))]},
    ], [(f"{HUMAN} ", "Fig", "Car")], kind="parquet"),
    Public("nvidia/HelpSteer, ratings", [
        {"prompt": prompt, "response": text, "helpfulness": grade, **_fields(_HELPSTEER, 2)}
        for prompt, text, grade in (("Hi", "Yo", 4), ("Hi", "No", 1), ("Bye", "Ciao", 3), ("Bye", "Go", 3))
    ], [("Hi", "Yo", "No")], {"shape": "labelled", "columns": {"label": "helpfulness"}}, dropped={"unpaired": 2}),
    Public("nvidia/HelpSteer2, preference", [
        {"split": "train", "prompt": "Hi", "response_1": "Yo", "response_2": "No", "preference_strength": -2,
         "preference_statement": "Response 1 is better.", "preference_elaboration": "x", "three_most_similar_preferences": [],
         "all_preferences_unprocessed": []},
        {"split": "train", "prompt": "Hi", "response_1": "Yo", "response_2": "No", "preference_strength": 0,
         "preference_statement": None, "preference_elaboration": None, "three_most_similar_preferences": [],
         "all_preferences_unprocessed": []},
    ], [("Hi", "Yo", "No")], dropped={"tied": 1}),
    Public("nvidia/HelpSteer3, preference", [
        {"domain": "general", "language": "english", "context": said("Hi", "Yo", "Bye"), "response1": "Go", "response2": "Ciao",
         "overall_preference": 2,
         "individual_preference": [{"score": 2, "reasoning": "x", "feedback1": "y", "feedback2": "z"}]},
    ], [(chat("Hi", "Yo", "Bye"), "Ciao", "Go")], kind="parquet"),
    Public("Intel/orca_dpo_pairs", [
        {"system": "Be kind", "question": "Add 1 2", "chosen": "3", "rejected": "4"},
        {"system": "", "question": "Add 1 3", "chosen": "4", "rejected": "5"},
    ], [(chat("Add 1 2", system="Be kind"), "3", "4"), (chat("Add 1 3"), "4", "5")]),
    Public("argilla/distilabel-intel-orca-dpo-pairs", [
        {"system": "Be kind", "input": "Add 1 2", "chosen": "3", "rejected": "4", "generations": ["3", "4"],
         "order": ["chosen", "rejected"], "rating": [9.0, 2.0], "status": "unchanged", "original_chosen": "3",
         "original_rejected": "4", "chosen_score": 9.0, "in_gsm8k_train": False},
    ], [(chat("Add 1 2", system="Be kind"), "3", "4")], kind="parquet"),
    Public("jondurbin/truthy-dpo-v0.1", [
        {"id": "1", "source": "truthy", "system": "Be kind", "prompt": "Add 1 2", "chosen": "3", "rejected": "4"},
    ], [(chat("Add 1 2", system="Be kind"), "3", "4")]),
    Public("HuggingFaceH4/ultrafeedback_binarized", [
        {"prompt": "Hi", "prompt_id": "f0", "chosen": said("Hi", "Yo"), "rejected": said("Hi", "No"),
         "messages": said("Hi", "Yo"),
         "score_chosen": 8.5, "score_rejected": 2.0},
    ], [(chat("Hi"), "Yo", "No")], kind="parquet"),
    Public("openbmb/UltraFeedback", [
        {"source": "evol_instruct", "instruction": "Hi", "models": ["a", "b"], "correct_answers": ["None"],
         "incorrect_answers": ["None"], "completions": [
             {"annotations": {"helpfulness": {"Rating": "5", "Rationale": "x"}}, "critique": "x", "custom_system_prompt": "s",
              "fine-grained_score": score, "model": "a", "overall_score": score, "principle": "helpfulness", "response": text}
             for text, score in (("No", 2.0), ("Yo", 8.5))]},
    ], [("Hi", "Yo", "No")]),
    Public("argilla/ultrafeedback-binarized-preferences-cleaned", [
        {"source": "evol", "prompt": "Hi", "chosen": said("Hi", "Yo"), "chosen-rating": 5.0, "chosen-model": "a",
         "rejected": said("Hi", "No"), "rejected-rating": 1.0, "rejected-model": "b"},
    ], [(chat("Hi"), "Yo", "No")]),
    Public("argilla/dpo-mix-7k", [
        {"dataset": "x", "chosen": said("Hi", "Yo", "Bye", "Ciao"), "rejected": said("Hi", "Yo", "Bye", "Go"),
         "chosen_rating": 5.0, "rejected_rating": 1.0},
    ], [(chat("Hi", "Yo", "Bye"), "Ciao", "Go")], kind="parquet"),
    Public("allenai/llama-3.1-tulu-3-8b-preference-mixture", [
        {"id": "1", "source": "x", "prompt": "Hi", "chosen": said("Hi", "Yo"), "rejected": said("Hi", "No"),
         "chosen_model": "a", "rejected_model": "b"},
    ], [(chat("Hi"), "Yo", "No")]),
    Public("trl-lib/kto-mix-14k", [
        {"prompt": said("Hi"), "completion": said("No", names=("assistant",)), "label": False},
        {"prompt": said("Hi"), "completion": said("Yo", names=("assistant",)), "label": True},
    ], [(chat("Hi"), "Yo", "No")], kind="parquet"),
    Public("PKU-Alignment/PKU-SafeRLHF", [
        {"prompt": "Hi", "response_0": "No", "response_1": "Yo", "prompt_source": "x", "is_response_0_safe": True,
         "is_response_1_safe": True, "better_response_id": 1, "safer_response_id": 0},
    ], [("Hi", "Yo", "No")]),
    Public("lmsys/chatbot_arena_conversations", [
        {"question_id": "1", "model_a": "x", "model_b": "y", "winner": winner, "judge": "j", "conversation_a": said("Hi", "Yo"),
         "conversation_b": said("Hi", "No"), "turn": 1, "anony": True, "language": "English", "tstamp": 1.0}
        for winner in ("model_a", "tie")
    ], [(chat("Hi"), "Yo", "No")], kind="parquet", dropped={"tied": 1}),
    Public("tatsu-lab/alpaca_farm", [
        {"instruction": "Add", "input": "1 2", "output_1": "4", "output_2": "3", "preference": 2, "raw_preference": 4},
    ], [("Add\n1 2", "3", "4")]),
    Public("LLaMA-Factory preferences", [
        {"conversations": sharegpt("Hi"), "chosen": {"from": "gpt", "value": "Yo"}, "rejected": {"from": "gpt", "value": "No"}},
    ], [(chat("Hi"), "Yo", "No")]),
    Public("OpenAI preferences", [
        {"input": {"messages": said("Hi"), "tools": [], "parallel_tool_calls": True},
         "preferred_output": said("Yo", names=("assistant",)), "non_preferred_output": said("No", names=("assistant",))},
    ], [(chat("Hi"), "Yo", "No")],
           {"columns": {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"}}),
]
# fmt: on
PUBLIC = [*DEMONSTRATIONS, *PREFERENCES]


def write(public: Public, folder: Path) -> str:
    """Write the rows to a file, and return its path."""
    path = folder / f"rows.{public.kind}"
    if public.kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in public.rows), encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(public.rows), path)
    return str(path)


def train(public: Public, folder: Path) -> AlignCLI:
    """Train one step on the rows by the command line."""
    settings = {"max_length": 512, "batch_size": 2, "cache_dir": str(folder / "cache"), **public.settings}
    (folder / "data.yaml").write_text(yaml.safe_dump({"data": {"init_args": settings}}))
    trainer = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_checkpointing": False}
    shown = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder)}
    files = ["--config", config(public.method, folder, trainer={**trainer, **shown}), "--config", str(folder / "data.yaml")]
    cli = run(["fit", *files, "--data.train", write(public, folder)])
    assert cli is not None and cli.trainer.global_step == 1
    return cli


def trained_texts(cli: AlignCLI) -> list[tuple[str, ...]]:
    """Decode what was trained: the prompts without the first token, and the targets without the last."""
    data: Any = cli.datamodule
    tokenizer = ByteTokenizer()
    store = data._store("train")
    texts = []
    for index in range(len(store)):
        row = store[index]
        sides = [side.tokens[side.targets].tolist() for side in row.sides]
        assert all(side[-1] == tokenizer.eos_id for side in sides), "a response without its end"
        prompt = tokenizer.decode(row.sides[0].tokens[: row.num_prompt].tolist()[1:], skip_special=False)
        texts.append((prompt, *(tokenizer.decode(side[:-1], skip_special=False) for side in sides)))
    return texts


def main() -> None:
    """Print the table."""
    for public in PUBLIC:
        with tempfile.TemporaryDirectory() as folder:
            cli = train(public, Path(folder))
            ledger = cli.datamodule.ledgers["train"]  # type: ignore[union-attr]
            shape = next((note.removeprefix("shape_") for note in ledger.notes if note.startswith("shape_")), "as it is")
            settings = json.dumps(public.settings) if public.settings else "none"
            right = trained_texts(cli) == public.trained
            print(f"| {public.name} | {public.kind} | {public.method} | {shape} | {settings} | {'yes' if right else 'NO'} |")


if __name__ == "__main__":
    main()
