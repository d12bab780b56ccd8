"""Damages files of each kind that the package reads, and says what became of each damage.

    python -m tests.artifacts.damage --each 200

Damage is noticed if an error names the file or its folder. It is made again if the file is written anew and the content is that
of the undamaged file. It is harmless if the content is read as it was, as after a change in padding or in a file that nothing
reads. It is used if anything else is read.
"""

import argparse
import json
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed import checkpoint as dcp
from torch.utils.data import DataLoader

from lightning_align.calm.states import StateStore
from lightning_align.data.store import Recipe, build_store
from lightning_align.data.tokenizer import ByteTokenizer, load_tokenizer
from lightning_align.models.checkpoint import gather_checkpoint, read_checkpoint
from lightning_align.models.formats import read_adapter, read_model, whole_weights, write_adapter, write_model
from lightning_align.models.lora import LoRAConfig, add_lora, lora_parameters
from lightning_align.models.weights import state_hash
from lightning_align.references.stored import StoredLogProbs
from lightning_align.sft.module import SFTModule
from lightning_align.spin.generations import GeneratedSet
from lightning_align.spin.stored import read_weights, save_weights
from tests.artifacts.handed import make_transformers, read_augments, read_handed, read_transformers
from tests.calm.toys import composed
from tests.toys import rows_of, tiny_palm, token_batch
from tests.training.runs import ADAMW, BATCHES, trainer


class Kind(NamedTuple):
    """A kind of artifact.

    Args:
        make: Writes one into a folder.
        read: Reads it as a run does, and returns its content.
        files: The pattern of the files that are damaged.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: str = "*"


# -- the kinds


def make_checkpoint(folder: Path) -> None:
    run, module = trainer(folder, max_steps=2), SFTModule(tiny_palm(), optimizer=ADAMW)
    run.fit(module, DataLoader([BATCHES["sft"]] * 2, batch_size=None))  # type: ignore[arg-type]  # a list is a dataset
    run.save_checkpoint(folder / "a.ckpt")


def content_of(checkpoint: dict[str, Any]) -> Any:
    (state,) = checkpoint["optimizer_states"]
    moments = {f"{n} {k}": v for n, each in state["state"].items() for k, v in each.items()}
    rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
    return state_hash(checkpoint["state_dict"]), state_hash(moments), repr(state["param_groups"]), repr(rest)


def read_run(folder: Path) -> Any:
    SFTModule.load_from_checkpoint(folder / "a.ckpt", weights_only=True)
    return content_of(read_checkpoint(folder / "a.ckpt"))


def make_sharded(folder: Path) -> None:
    """Write what a sharded strategy writes: torch's folder, and what Lightning puts beside it."""
    model = tiny_palm()
    state = {
        "state_dict": model.state_dict(),
        "optimizer_0": {"state": {"a.step": torch.ones(3)}, "lr": 0.1, "betas": (0.9, 0.99)},
    }
    dcp.save(state, checkpoint_id=folder / "a.ckpt", no_dist=True)
    torch.save({"epoch": 1, "global_step": 7, "loops": {"a": [1, 2]}}, folder / "a.ckpt" / "meta.pt")


def read_sharded(folder: Path) -> Any:
    found = gather_checkpoint(folder / "a.ckpt")
    states = repr([sorted(state.items(), key=str) for state in found["optimizer_states"]])
    return state_hash(found["state_dict"]), states, found["global_step"], found["loops"]


def make_adapter(folder: Path) -> None:
    model = tiny_palm()
    add_lora(model, LoRAConfig(rank=2, targets=["in_proj"]))
    with torch.no_grad():
        for parameter in lora_parameters(model, "default"):
            parameter.normal_()
    write_adapter(model, whole_weights(model), folder / "adapter")


def read_lora(folder: Path) -> str:
    model = tiny_palm()
    read_adapter(model, folder / "adapter")
    return state_hash(dict(model.state_dict()))


def read_connections(folder: Path) -> str:
    model = composed(torch.float32)
    with torch.no_grad():
        for parameter in model.connections.parameters():
            parameter.zero_()
    model.load_connections(folder / "connections.safetensors")
    return state_hash(model.trainable_state_dict())


def make_palm(folder: Path) -> None:
    model = tiny_palm()
    write_model(model, whole_weights(model), folder / "export", tokenizer=ByteTokenizer(), card="# A card")


def read_palm(folder: Path) -> Any:
    model = read_model(folder / "export")
    tokenizer = load_tokenizer(str(folder / "export"))
    return state_hash(dict(model.state_dict())), model.init_args, tokenizer.fingerprint, tokenizer.name


def make_composition(folder: Path) -> None:
    model = composed(torch.float32)
    write_model(model, whole_weights(model), folder / "export")


def read_composition(folder: Path) -> Any:
    model: Any = read_model(folder / "export")
    return state_hash(dict(model.state_dict())), model.settings, model.identity


RECIPE = Recipe(
    kind="sft", accepted=("response",), max_length=64, truncation="keep_start", mask_turns="last_turn", on_bad_row="fail"
)
ROWS = [{"prompt": f"{i}+{i}=", "response": str(2 * i)} for i in range(40)]


def read_store(folder: Path) -> Any:
    source = folder.parent / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arguments = {"source": str(source), "split": "train", "recipe": RECIPE, "tokenizer": ByteTokenizer()}
    store, ledger = build_store(folder / "rows.arrow", **arguments)
    rows = [(row.row, row.num_prompt, row.sides[0].tokens.tolist(), row.sides[0].targets.tolist()) for row in store]
    return rows, ledger.to_dict()


SCORED = token_batch([2, 3, 1, 2, 1, 1], [4, 1, 5, 2, 2, 3])


def read_reference(folder: Path) -> Any:
    from tests.references.test_stored import Counted

    model = tiny_palm()
    found = StoredLogProbs(Counted(model), weights="w", precision="32-true", cache_dir=folder, shard_rows=2)
    found.fill([rows_of(SCORED, row, row + 1) for row in range(6)], model, torch.device("cpu"))
    found.finish()
    scores: Any = found.find(SCORED)
    return scores.sums.tolist(), scores.counts.tolist()


def read_states(folder: Path) -> Any:
    model, store = composed(torch.float32), StateStore(folder, "key")
    found = store.fetch(model.readers[0], SCORED["tokens"], SCORED["mask"])
    store.close()
    return [states.tolist() for states in found]


PARTS = [[0, 1], [2, 3]]


def _answers(part: int) -> list[dict[str, Any]]:
    answer = {"iteration": 0, "sample": 0, "text": "7", "tokens": [58], "reason": "eos", "end": 2, "logprob": -1.25}
    row = {"prompt": "3+4=", "real": "7", "real_logprob": -0.75, "generated": [answer]}
    return [{"row": number, **row} for number in PARTS[part]]


def _open_set(folder: Path) -> GeneratedSet:
    found = GeneratedSet(folder / "train", {"iteration": 0, "seed": 3, "weights": "abc"}, PARTS)
    found.open(write=True)
    return found


def read_set(folder: Path, *, close: bool) -> Any:
    """Go on as a run does: make missing parts, unless the manifest says that there were some."""
    found = _open_set(folder)
    for part in found.missing():
        if (found.folder / "manifest.json").exists():
            raise ValueError(f"{found.path(part)} is missing")
        found.write(part, _answers(part))
    if close:
        found.close()
    return list(found.rows())


def make_weights(folder: Path) -> None:
    save_weights(folder / "policy.safetensors", dict(tiny_palm().state_dict()), digest="0" * 64, run="run")


KINDS: dict[str, Kind] = {
    "checkpoint": Kind(make_checkpoint, read_run, "a.ckpt"),
    "sharded checkpoint": Kind(make_sharded, read_sharded, "a.ckpt/*"),
    "LoRA adapter": Kind(make_adapter, read_lora, "adapter/*"),
    "connections": Kind(
        lambda folder: composed(torch.float32).save_connections(folder / "connections.safetensors"), read_connections
    ),
    "exported PaLM": Kind(make_palm, read_palm, "export/*"),
    "exported composition": Kind(make_composition, read_composition, "export/**/*.*"),
    "exported transformers model": Kind(make_transformers, read_transformers, "export/*"),
    "hand-off to an engine": Kind(lambda folder: (read_handed(folder), None)[1], read_handed, "engine/**/*.*"),
    "rows for augments": Kind(lambda folder: (read_augments(folder), None)[1], read_augments, "calm-augments-*"),
    "token store": Kind(lambda folder: (read_store(folder), None)[1], read_store, "rows.*"),
    "stored reference": Kind(lambda folder: (read_reference(folder), None)[1], read_reference, "*/*.safetensors"),
    "stored hidden states": Kind(lambda folder: (read_states(folder), None)[1], read_states),
    "generated set": Kind(
        lambda folder: (read_set(folder, close=True), None)[1], lambda folder: read_set(folder, close=True), "train/*"
    ),
    "unfinished generated set": Kind(
        lambda folder: (read_set(folder, close=False), None)[1], lambda folder: read_set(folder, close=False), "train/*"
    ),
    "weights of an iteration": Kind(make_weights, lambda folder: state_hash(read_weights(folder / "policy.safetensors"))),
}


# -- damage


def _swap(content: bytes, draw: random.Random) -> bytes:
    size = max(1, min(64, len(content) // 4))
    first = draw.randrange(0, max(1, len(content) - 2 * size))
    second = draw.randrange(first + size, max(first + size + 1, len(content) - size + 1))
    a, b = content[first : first + size], content[second : second + size]
    return content[:first] + b + content[first + size : second] + a + content[second + size :]


def _flip(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]


def damage(path: Path, how: str, draw: random.Random) -> None:
    """Damage a file in one of the ways of `WAYS`."""
    content = path.read_bytes()
    path.unlink()  # another inode, as after a copy
    if how == "remove":
        return
    changed = {
        "cut": lambda: content[: draw.randrange(len(content))],
        "flip": lambda: _flip(content, draw),
        "swap": lambda: _swap(content, draw),
        "empty": lambda: b"",
        "other JSON": lambda: draw.choice([b"[]", b"{}", b"null", b'{"a": 1}', b"3"]),
    }[how]()
    path.write_bytes(changed)


WAYS = ("flip", "cut", "swap", "empty", "other JSON", "remove")


class Outcome(NamedTuple):
    """What became of one damage."""

    result: str
    what: str


def outcomes(name: str, folder: Path, number: int, seed: int = 0) -> list[Outcome]:
    """Damage an artifact a number of times, each time a whole one.

    Args:
        name: The kind, of `KINDS`.
        folder: An empty folder.
        number: How often. Half of the damages flip a bit.
        seed: Of the choices.
    """
    kind, draw = KINDS[name], random.Random(seed)
    kept, work = folder / "kept", folder / "work"
    kept.mkdir()
    kind.make(kept)
    shutil.copytree(kept, work)
    expected = kind.read(work)
    files = sorted(path.relative_to(kept) for path in kept.glob(kind.files) if path.is_file() and path.stat().st_size)
    found = []
    for index in range(number):
        shutil.rmtree(work)
        shutil.copytree(kept, work)
        how = WAYS[index % len(WAYS)] if number <= len(WAYS) or index % 2 else "flip"
        file = draw.choice(files)
        damage(work / file, how, draw)
        after = (work / file).read_bytes() if (work / file).exists() else None
        found.append(Outcome(_result(kind, work, file, after, expected), f"{how} of {file}"))
    return found


def _result(kind: Kind, work: Path, file: Path, after: bytes | None, expected: Any) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = kind.read(work)
    except (ValueError, FileNotFoundError) as error:
        named = str(work) in str(error)
        return "noticed" if named else f"not named: {type(error).__name__}: {error}"
    except Exception as error:
        return f"raw error: {type(error).__name__}: {error}"
    if found != expected:
        return "used"
    now = (work / file).read_bytes() if (work / file).exists() else None
    return "harmless" if now == after else "made again"


def table(rows: Iterable[tuple[str, list[Outcome]]]) -> str:
    """Return the counts of each kind as a table."""
    columns = ("noticed", "made again", "harmless", "used", "other errors")
    lines = [f"{'kind':<26}" + "".join(f"{column:>14}" for column in columns)]
    for name, found in rows:
        counts = Counter(outcome.result if outcome.result in columns else "other errors" for outcome in found)
        lines.append(f"{name:<26}" + "".join(f"{counts[column]:>14}" for column in columns))
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=200, help="damages of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = []
    for name in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            found = outcomes(name, Path(folder), options.each, options.seed)
        rows.append((name, found))
        for outcome in found:
            if outcome.result not in ("noticed", "made again", "harmless"):
                print(name, outcome.what, outcome.result[:300], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
