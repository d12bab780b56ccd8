"""Artifacts that other programs read, and rows for augments: how they are made, and read as a run does that goes on."""

import json
from pathlib import Path
from typing import Any

from lightning_align.calm.datamodule import CALMDataModule
from lightning_align.data.tokenizer import ByteTokenizer
from lightning_align.generation.backend import FileBackend
from lightning_align.generation.ends import Ends
from lightning_align.generation.handoff import Served
from lightning_align.generation.sampler import GenerationConfig
from lightning_align.models.formats import read_model, whole_weights, write_model
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.models.weights import state_hash
from tests.data.chats import PLAIN, answer, user
from tests.data.helpers import chat_tokenizer, write_jsonl
from tests.toys import tiny_palm

LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 23, "hidden_size": 16, "intermediate_size": 16}
LLAMA |= {"num_hidden_layers": 1, "num_attention_heads": 2}


def make_transformers(folder: Path) -> None:
    model = PretrainedLM(config=LLAMA).eval()
    write_model(model, whole_weights(model), folder / "export")


def read_transformers(folder: Path) -> Any:
    model: Any = read_model(folder / "export")
    return state_hash(dict(model.state_dict())), model.eos_ids, model.model.config.to_diff_dict()


def read_augments(folder: Path) -> Any:
    """Go on as a run does: rows are converted again if their file is damaged."""
    place = folder.parent / "tokenizer"
    if not place.exists():
        chat_tokenizer(PLAIN, folder.parent)
        write_jsonl(folder.parent / "rows.jsonl", [{"messages": [user(f"{i}"), answer(f"{i * i}")]} for i in range(5)])
    data = CALMDataModule(
        str(folder.parent / "rows.jsonl"), augment_tokenizers=[str(place)], batch_size=8, cache_dir=str(folder), max_length=128
    )
    data.prepare_data()
    data.setup("fit")
    batch: Any = next(iter(data.train_dataloader()))
    (given,) = batch["augments"]
    return batch["tokens"].tolist(), given.tokens.tolist(), given.columns.tolist(), given.mask.tolist()


HANDED = GenerationConfig(max_new_tokens=4, seed=11)


def read_handed(folder: Path) -> Any:
    """Go on as a run does whose engine has answered, and read what the engine reads."""
    model, ends = tiny_palm(), Ends.exactly(5, config=HANDED)
    backend = FileBackend(str(folder / "engine"))
    backend.sync_model(Served(model, whole_weights(model), ByteTokenizer(), ends, HANDED), iteration=0)
    place = folder / "engine" / "iteration_0"
    try:
        backend.generate(model, [[3, 1], [4]], HANDED, ends=ends, ids=[10, 11], iteration=0, limits=[4, 3])
    except ValueError as error:
        if "does not exist yet" not in str(error):
            raise
    read: Any = read_model(place / "model")
    prompts = [path.read_text(encoding="utf-8") for path in place.glob("prompts-*.jsonl")]
    return state_hash(dict(read.state_dict())), json.loads((place / "generation.json").read_text(encoding="utf-8")), prompts
