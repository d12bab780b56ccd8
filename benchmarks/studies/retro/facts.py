"""RETRO on facts that only the database contains (configs/retro/facts.yaml), with facts then edited and deleted.

Reports bits per value by arm (log2(10^8) = 26.6 without any knowledge), the same for a database with edited facts, and the
answer of the model after a fact is deleted.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import common
from lightning_align.cli import run
from lightning_align.data.tasks.facts import VALUE_DIGITS, Facts
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.retro.datamodule import RETRODataModule
from lightning_align.retro.decoding import RetrievalDecoder
from lightning_align.retro.indexing import build_database, delete_documents, open_retriever
from lightning_align.retro.module import RETROModule

CONFIG = common.CONFIGS / "retro" / "facts.yaml"


@torch.no_grad()
def value_bits(module: RETROModule, folder: Path) -> dict[str, float]:
    """Bits per held-out value, averaged over the questions, by arm."""
    data = RETRODataModule(str(folder), num_neighbors=module.num_neighbors, num_chunks=2, eval_batch_size=100)
    size = data.database.chunks.chunk_size
    totals: dict[str, float] = {}
    count = 0
    for batch in data.val_dataloader():
        before = batch["targets"].clone()
        # The value follows the first chunk. The end of the document follows the value.
        columns = torch.arange(before.shape[1])
        batch["targets"] = before & (columns >= size) & (columns < size + VALUE_DIGITS)
        count += len(batch["tokens"])
        arms = {"on": batch["neighbors"], "off": None, **batch["controls"]}
        for name, neighbors in arms.items():
            totals[name] = totals.get(name, 0.0) - float(module.logprobs(batch, neighbors).sum()) / math.log(2)
    return {name: total / count for name, total in totals.items()}


def answer(module: RETROModule, folder: Path, task: Facts, key: str) -> tuple[str, list[str]]:
    """The answer for a key, and the documents that were retrieved."""
    data = RETRODataModule(str(folder))
    tokenizer = data.tokenizer
    decoder = RetrievalDecoder(module._retro, open_retriever(folder), num_neighbors=module.num_neighbors)
    (encoding,) = tokenizer.encode_batch([task.prompt(key)])
    prompt = [tokenizer.bos_id or 0, *encoding.ids]
    config = GenerationConfig(max_new_tokens=VALUE_DIGITS, temperature=0.0)
    ((result,),) = generate(decoder, [prompt], config, eos_id=tokenizer.eos_id)
    chunks = data.database.chunks
    numbers = [int(n) for found in decoder.found.values() for n in found.ids[0][found.mask[0]]]
    return tokenizer.decode(result.tokens), [chunks.document_ids[int(chunks.document_of(n))] for n in numbers]


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
        config["seed_everything"] = arguments.seed
        folder = root / "facts"
        config["data"]["init_args"]["database"] = config["trainer"]["callbacks"][0]["init_args"]["database"] = str(folder)
        config["trainer"]["logger"]["init_args"]["save_dir"] = str(root / "runs")
        config["trainer"]["limit_val_batches"] = 0
        (root / "facts.yaml").write_text(yaml.safe_dump(config))
        start = time.perf_counter()
        cli = run(["fit", "--config", str(root / "facts.yaml"), "--trainer.enable_progress_bar", "false"])
        seconds = time.perf_counter() - start
        assert cli is not None and isinstance(cli.model, RETROModule)
        module = cli.model.eval()
        bits = value_bits(module, folder)

        edited, task, changed = root / "edited", Facts(), Facts(edition=1)
        questions = {"validation": Facts("validation", edition=1)}
        build_database(edited, changed, encoder="bm25", queries=questions, chunk_size=changed.chunk_size, k=2)
        after = value_bits(module, edited)

        key, value = task.facts()[-1]
        other = dict(changed.facts())[key]
        said, found = answer(module, folder, task, key)
        said_after, _ = answer(module, edited, task, key)
        delete_documents(folder, [f"fact/{key}"])
        said_without, found_without = answer(module, folder, task, key)

    common.heading(
        "RETRO: facts that only the database contains",
        f"configs/retro/facts.yaml, seed {arguments.seed}: database and training took {seconds:.0f} s on "
        f"{torch.get_num_threads()} threads. A value has {VALUE_DIGITS} digits.",
    )
    rows = [
        {"database": name, **{arm: f"{value:.2f}" for arm, value in row.items()}}
        for name, row in (("as in training", bits), ("held-out facts edited", after))
    ]
    print("Bits per held-out value:\n")
    print(common.table(rows))
    off = bits["off"]
    print(
        common.table(
            [
                common.claim("bits ON", "< 1", f"{bits['on']:.2f}", bits["on"] < 1),
                common.claim("bits ON, database edited", "< 1", f"{after['on']:.2f}", after["on"] < 1),
                common.claim(
                    "bits RANDOM minus bits OFF", "within 1", f"{bits['random'] - off:+.2f}", abs(bits["random"] - off) < 1
                ),
                common.claim(f"answer for {key}", value, said, said == value),
                common.claim("answer, database edited", other, said_after, said_after == other),
                common.claim(
                    "answer, fact deleted", "a different one", said_without, said_without != value and found_without != found
                ),
            ]
        )
    )


if __name__ == "__main__":
    main()
