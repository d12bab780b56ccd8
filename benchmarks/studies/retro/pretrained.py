"""RETROfit of a pretrained model on source files that are newer than its training, beside the same neighbors in its prompt.

The decoder stays frozen: only the encoder of neighbors and the cross-attention learn. With ``--reuse-decoder`` the decoder
encodes the neighbors, and copies of its attention learn to read them. All arms score the same held-out tokens. Each arm is
saved when it is done, and one that is saved is not computed again.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks import common
from lightning_align import RETRO, build_database
from lightning_align.models.checkpoint import load_policy
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.retro.arms import interval
from lightning_align.retro.batch import RetrievalBatch
from lightning_align.retro.datamodule import RETRODataModule
from lightning_align.retro.model import NeighborTokens
from lightning_align.scoring.head import target_logprobs

PACKAGES = ("transformers", "peft", "huggingface_hub")
NEW = re.compile(r"Copyright (?:\(c\) )?2026\b")
GENERATED = "automatically generated from"  # transformers writes some files out of others
LONGEST, HELD_OUT_LENGTH = 12_000, 1_600  # characters of a document
CHUNK, NUM_NEIGHBORS, NUM_FOUND, NUM_CHUNKS, LEARNING_RATE, LOW = 64, 2, 10, 8, 1e-3, 0.125
LAYERS = [21, 24, 27, 30]
TITLES = {
    "plain": "the model alone",
    "off": "OFF: RETRO without neighbors",
    "on": "ON: RETRO with the neighbors",
    "random": "RANDOM: RETRO with random chunks",
    "shuffled": "SHUFFLED: RETRO with neighbors of another chunk",
    "planted": "PLANTED: RETRO, held-out files in the database",
    "rag_first": "RAG: neighbors of the first chunk in the prompt",
    "rag_first_random": "RAG: random chunks in the prompt",
    "rag_each": "RAG: neighbors of each chunk in the prompt",
}
OF_SEED = ("on", "random", "shuffled", "planted", "off")
ALONE = ("plain", "rag_first", "rag_first_random")
Arm = dict[str, Any]


# -- the texts


def body(text: str) -> str:
    """A source file without the comment at its beginning, which is a license."""
    lines = text.splitlines(keepends=True)
    first = next((place for place, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    return "".join(lines[first:])


def code(text: str) -> str:
    """The part from the first class or function on, without the imports, cut at the end of a line."""
    found = re.search(r"^(?:class |def |@)", text, re.MULTILINE)
    return text[found.start() if found else 0 :][:HELD_OUT_LENGTH].rpartition("\n")[0] + "\n"


def new_files(packages: list[str]) -> dict[str, str]:
    """The files of 2026 of some packages by their path, without their licenses, in the order of the hash of their path."""
    found = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            for path in Path(place).rglob("*.py"):
                text = path.read_text(encoding="utf-8", errors="replace")
                if NEW.search(text[:3000]) and GENERATED not in text[:3000] and len(body(text)) >= HELD_OUT_LENGTH:
                    found[str(Path(package) / path.relative_to(place))] = body(text)[:LONGEST]
    return dict(sorted(found.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest()))


def write(folder: Path, texts: dict[str, str]) -> str:
    """Write documents into a folder, which holds no others."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


def prepare(folder: Path, model: str, packages: list[str], held_out: int) -> dict[str, Any]:
    """Build the database, and leave out the held-out files that its leak audit flags."""
    files = new_files(packages)
    candidates = {name: code(text) for name, text in list(files.items())[: 2 * held_out]}
    documents = write(folder / "texts" / "database", {name: text for name, text in files.items() if name not in candidates})
    build = functools.partial(build_database, encoder="bm25", tokenizer=model, chunk_size=CHUNK, k=NUM_FOUND)
    queries = {"candidates": write(folder / "texts" / "candidates", candidates)}
    flagged = sorted(
        {leak["document"] for leak in build(folder / "database", documents, queries=queries).queries("candidates").leaks}
    )
    clean = {name: text for name, text in candidates.items() if name not in flagged}
    kept = write(folder / "texts" / "held_out", dict(list(clean.items())[:held_out]))
    database = build(folder / "database", documents, queries={"validation": kept})
    leaky = build(folder / "leaky", kept, queries={"validation": kept}, hide_copies=False)
    return {
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "files": len(files),
        "documents": database.chunks.num_documents,
        "chunks": len(database.chunks),
        "candidates": len(candidates),
        "flagged": flagged,
        "flagged when planted": len(leaky.queries("validation").leaks),
    }


# -- the arms


def fit(folder: Path, model: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Train, or go on with training, and return the checkpoint."""
    from lightning_align.cli import run

    config: dict[str, Any] = yaml.safe_load((common.CONFIGS / "retro" / "huggingface.yaml").read_text(encoding="utf-8"))
    place, steps, schedule = folder / f"seed_{seed}", arguments.steps, arguments.schedule
    last, settings, data, trainer = (
        place / "last.ckpt",
        config["model"]["init_args"],
        config["data"]["init_args"],
        config["trainer"],
    )
    config["seed_everything"] = seed
    backbone = settings["backbone"]["init_args"]
    backbone["decoder"]["init_args"]["name"] = data["tokenizer"] = model
    depth = int(json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])
    layers = None if arguments.reuse_decoder else [layer for layer in LAYERS if layer <= depth] or [depth]
    backbone.update(cross_layers=layers, encoder_depth=1, ff_mult=2, reuse_decoder=arguments.reuse_decoder)
    settings.update(num_neighbors=NUM_NEIGHBORS, vary_neighbors=False)
    settings["optimizer"]["init_args"]["lr"] = arguments.learning_rate
    settings["lr_scheduler"]["init_args"].update(total_steps=schedule, warmup_steps=max(1, schedule // 10))
    data.update(database=str(folder / "database"), num_neighbors=NUM_NEIGHBORS, num_chunks=NUM_CHUNKS, batch_size=1, seed=seed)
    checkpoints = {"dirpath": str(place), "every_n_train_steps": min(50, steps), "save_last": True}
    trainer.update(
        accelerator="cpu",
        precision=arguments.precision,
        max_steps=steps,
        limit_val_batches=0,
        enable_progress_bar=False,
        callbacks=[{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints}],
    )
    trainer["logger"]["init_args"]["save_dir"] = str(place)
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    resume = ["--ckpt_path", str(last)] if last.exists() else []
    run(["fit", "--config", str(place / "config.yaml"), *resume])
    return last


def held_out_batches(database: Path, model: str) -> Iterator[RetrievalBatch]:
    """The held-out files, one window each."""
    options: dict[str, Any] = {"num_chunks": 4 * NUM_CHUNKS, "num_neighbors": NUM_NEIGHBORS, "eval_batch_size": 1}
    data = RETRODataModule(str(database), tokenizer=model, on_leak="warn" if database.name == "leaky" else "fail", **options)
    loader: Any = data.val_dataloader()
    return iter(sorted(loader, key=lambda batch: int(batch["documents"])))


def per_chunk(nats: Tensor, first: int, count: int) -> list[float]:
    """Sum the nats of consecutive tokens, of which the first is at a place of the text, by chunk."""
    places = torch.arange(first, first + len(nats)) // CHUNK
    return [round(value, 5) for value in torch.zeros(count, dtype=torch.float64).index_add_(0, places, nats.double()).tolist()]


def prompt(neighbors: NeighborTokens, chunk: int, separator: list[int]) -> list[int]:
    """The tokens of the neighbors of a chunk, the nearest last, each followed by a separator."""
    found: list[int] = []
    for tokens, mask in reversed(list(zip(neighbors.tokens[0, chunk], neighbors.mask[0, chunk], strict=True))):
        found += [*tokens[mask].tolist(), *separator]
    return found


def score(model: PretrainedLM, context: list[int], text: Tensor, first: int) -> Tensor:
    """-log p of the tokens of a text from a place on, after a context."""
    tokens = torch.cat((text.new_tensor(context), text))
    head: Any = model.head
    hidden = model.hidden(tokens[None, :-1])[0, len(context) + first - 1 :]
    return -target_logprobs(hidden, head, text[first:])


def with_prompts(model: PretrainedLM, batch: RetrievalBatch, name: str, separator: list[int]) -> list[float]:
    """The nats of the chunks of a file under an arm of the model alone. With neighbors, those of the first chunk stay 0."""
    text, count = batch["tokens"][0], len(batch["chunk_bytes"][0])
    if name == "plain":
        return per_chunk(score(model, [], text, 1), 1, count)
    neighbors = batch["controls"]["random"] if name.endswith("random") else batch["neighbors"]
    if name.startswith("rag_first"):
        return per_chunk(score(model, prompt(neighbors, 0, separator), text, CHUNK), CHUNK, count)
    parts = []
    for chunk in range(1, -(-len(text) // CHUNK)):
        seen = text[: (chunk + 1) * CHUNK]
        parts.append(score(model, prompt(neighbors, chunk - 1, separator), seen, chunk * CHUNK))
    return per_chunk(torch.cat(parts), CHUNK, count)


def with_retro(model: RETRO, batch: RetrievalBatch, name: str) -> list[float]:
    """The nats of the chunks of a file under an arm of RETRO."""
    text, controls = batch["tokens"], batch["controls"]
    neighbors = None if name == "off" else controls.get(name, batch["neighbors"])
    hidden = model.hidden(text[:, :-1], neighbors=neighbors)[0]
    return per_chunk(-target_logprobs(hidden, model.head, text[0, 1:]), 1, len(batch["chunk_bytes"][0]))


@torch.no_grad()
def measure(batches: Iterator[RetrievalBatch], nats: Callable[[RetrievalBatch], list[float]], precision: str) -> Arm:
    """An arm: the nats of each chunk of each file, and the CPU seconds."""
    found, start = [], time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision.startswith("bf16")):
        for batch in batches:
            found.append(nats(batch))
    return {"seconds": time.process_time() - start, "nats": found}


def compute(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Compute what is missing."""
    folder, model = arguments.folder.resolve(), str(Path(arguments.model).resolve())

    def once(place: dict[str, Any], name: str, value: Callable[[], Any]) -> None:
        if name not in place:
            place[name] = value()
            common.save(arguments.output, found)
            print(f"{name} is done", file=sys.stderr, flush=True)

    once(found, "reading", lambda: {name: getattr(arguments, name) for name in ("reuse_decoder", "learning_rate", "precision")})
    once(found, "selection", lambda: prepare(folder, model, arguments.packages, arguments.held_out))
    files = list(held_out_batches(folder / "database", model))
    columns = ("chunk_bytes", "overlap")
    once(found, "files", lambda: {name: [batch[name][0].tolist() for batch in files] for name in columns})  # type: ignore[literal-required]
    for seed in arguments.seeds:
        arms = found.setdefault("seeds", {}).setdefault(str(seed), {})
        if all(name in arms for name in OF_SEED):
            continue
        arms.update(steps=arguments.steps, schedule=arguments.schedule)
        checkpoint = fit(folder, model, seed, arguments)
        retro: Any = load_policy(checkpoint).eval()
        for name in OF_SEED:
            read = held_out_batches(folder / "leaky", model) if name == "planted" else iter(files)
            once(arms, name, lambda: measure(read, functools.partial(with_retro, retro, name=name), arguments.precision))  # noqa: B023
    alone = found.setdefault("model", {})
    names = [*ALONE, "rag_each"] if arguments.each else ALONE
    if any(name not in alone for name in names):
        language = PretrainedLM(model).eval()
        separator = empty_line(model)
        for name in names:
            score_file = functools.partial(with_prompts, language, name=name, separator=separator)
            once(alone, name, lambda: measure(iter(files), score_file, arguments.precision))  # noqa: B023


def empty_line(model: str) -> list[int]:
    """The tokens of an empty line, between the parts of a prompt."""
    from lightning_align.data.tokenizer import load_tokenizer

    return list(load_tokenizer(model).encode_batch(["\n\n"])[0].ids)


# -- the report


def totals(arm: Arm, files: dict[str, Any], keep: Callable[[float], bool] = lambda _: True) -> tuple[Tensor, Tensor]:
    """Bits and bytes of each file, over the chunks after its first whose overlap with the database is kept."""
    rows = []
    for nats, num_bytes, overlaps in zip(arm["nats"], files["chunk_bytes"], files["overlap"], strict=True):
        chosen = [place for place in range(1, len(num_bytes)) if num_bytes[place] and keep(overlaps[place])]
        rows.append((sum(nats[place] for place in chosen) / math.log(2), sum(num_bytes[place] for place in chosen)))
    bits, sizes = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return bits, sizes


def rate(arm: Arm, files: dict[str, Any], keep: Callable[[float], bool] = lambda _: True) -> float:
    """Bits per byte."""
    bits, sizes = totals(arm, files, keep)
    return float(bits.sum() / sizes.sum())


def gain(arm: Arm, other: Arm, files: dict[str, Any], keep: Callable[[float], bool]) -> tuple[float, float, float]:
    """The bits per byte that an arm saves over another, and the 95 % interval over files that have chunks that are kept."""
    (bits, sizes), (others, _) = totals(arm, files, keep), totals(other, files, keep)
    bits, others, sizes = (part[sizes > 0] for part in (bits, others, sizes))
    low, high = interval(others - bits, sizes)
    return float((others - bits).sum() / sizes.sum()), low, high


def saved(arm: Arm, other: Arm, files: dict[str, Any], keep: Callable[[float], bool] = lambda _: True) -> tuple[str, float]:
    """What an arm saves over another with the interval, as a cell of a table, and the lower end."""
    value, low, high = gain(arm, other, files, keep)
    return f"{value:+.4f} ({low:+.4f} to {high:+.4f})", low


def report(found: dict[str, Any]) -> None:
    """Print the section."""
    files, chosen, alone = found["files"], found["selection"], found["model"]
    low = {"overlap ≤ 1/8": lambda value: value <= LOW, "overlap > 1/8": lambda value: value > LOW}
    sizes = totals(alone["plain"], files)[1]
    share = totals(alone["plain"], files, low["overlap ≤ 1/8"])[1].sum() / sizes.sum()
    packages = ", ".join(" ".join(pair) for pair in chosen["packages"].items())
    runs = [(seed, arms) for seed, arms in found["seeds"].items() if all(name in arms for name in OF_SEED)]
    reading = found.get("reading", {"reuse_decoder": False, "learning_rate": LEARNING_RATE, "precision": "32-true"})
    reused = ", reading with copies of its own attention" if reading["reuse_decoder"] else ""
    common.heading(
        f"RETRO around SmolLM2-135M-Instruct, on source files of 2026{reused}",
        "The decoder is frozen"
        + (" and encodes the neighbors" if reused else "")
        + f". Trained on one core in {reading['precision']}, one window of {NUM_CHUNKS * CHUNK} tokens per step: "
        + "; ".join(f"seed {seed}, {arms['steps']} steps of a schedule of {arms['schedule']}" for seed, arms in runs)
        + f". Database: {chosen['documents']} files, {chosen['chunks']:,} chunks of {CHUNK} tokens, BM25, {NUM_NEIGHBORS} "
        f"neighbors. The files say Copyright 2026 and come from {packages}. "
        f"Held out: the first code of {len(sizes)} files, {sizes.sum() / 1e3:.0f} kB without the first chunk of each, "
        f"which has no neighbors; {share:.0%} of it has an overlap of at most 1/8 with its neighbors. The leak audit removed "
        f"{len(chosen['flagged'])} of {chosen['candidates']} candidates. Time: CPU seconds over those of the model alone.",
    )
    for seed, arms in runs:
        rows = []
        for name in (name for name in TITLES if name in {**alone, **arms}):
            arm = {**alone, **arms}[name]
            told = "" if name == "plain" else saved(arm, alone["plain"], files)[0]
            rows.append(
                {
                    f"arm, seed {seed}": TITLES[name],
                    "bits per byte": f"{rate(arm, files):.4f}",
                    "saved over the model alone (95 % interval over files)": told,
                    **{what: f"{rate(arm, files, keep):.4f}" for what, keep in low.items()},
                    "time": f"{arm['seconds'] / alone['plain']['seconds']:.1f}",
                }
            )
        print(common.table(rows))
    claims = []
    for seed, arms in runs:
        pairs = [("ON", arms["on"], other.upper(), arms[other]) for other in ("off", "random", "shuffled")]
        pairs += [("PLANTED", arms["planted"], "ON", arms["on"])]
        pairs += [("RAG (first chunk)", alone["rag_first"], "RAG (random)", alone["rag_first_random"])]
        pairs += [("ON", arms["on"], "RAG (first chunk)", alone["rag_first"])]
        if "rag_each" in alone:
            pairs += [("ON", arms["on"], "RAG (each chunk)", alone["rag_each"])]
        for first, arm, second, other in pairs:
            for what, keep in {"": lambda _: True, ", overlap ≤ 1/8": low["overlap ≤ 1/8"]}.items():
                if not what or first == "ON":
                    told, least = saved(arm, other, files, keep)
                    what = f"seed {seed}: {first} saves over {second}{what}"
                    claims.append(common.claim(what, "interval > 0", told, least > 0))
        off, plain = (torch.tensor(list(chain(*arm["nats"]))) for arm in (arms["off"], alone["plain"]))
        apart = float((off - plain).abs().max())
        what = f"seed {seed}: OFF and the model alone, largest difference of a chunk"
        claims.append(common.claim(what, "≤ 1e-3 nats", f"{apart:.1e}", apart <= 1e-3))
    planted = chosen["flagged when planted"]
    claims.append(
        common.claim("held-out files in the database", "all flagged", f"{planted} of {len(sizes)}", planted >= len(sizes))
    )
    print(common.table(claims))


def main() -> None:
    """Parse the command line, compute what is missing, print the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder of transformers; needed unless the results are complete")
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), help="installed packages whose files of 2026 are used")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--schedule", type=int, default=150, help="the step at which the learning rate would be 0")
    parser.add_argument("--reuse-decoder", action="store_true", help="read with copies of the decoder's attention")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--precision", default="32-true", help="of the training, and of what is measured")
    parser.add_argument(
        "--each", action="store_true", help="also put the neighbors of each chunk in a prompt, which takes long"
    )
    parser.add_argument("--held-out", type=int, default=24, help="the most files that are held out")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/retro_pretrained"), help="for texts, databases and checkpoints"
    )
    parser.add_argument("--output", type=Path, help="default: beside this script")
    arguments = parser.parse_args()
    here = Path(__file__).with_suffix(".json")
    arguments.output = arguments.output or (here.with_stem(f"{here.stem}_reuse_decoder") if arguments.reuse_decoder else here)
    sys.argv = sys.argv[:1]  # the command parses its own arguments
    found = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    if arguments.model:
        compute(arguments, found)
    elif any(name not in found.get("model", {}) for name in ALONE):
        parser.error(f"{arguments.output} lacks results, and --model is needed to compute them")
    report(found)


if __name__ == "__main__":
    main()
