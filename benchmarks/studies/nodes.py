"""Two imitated nodes: host names and network namespaces of their own, joined by a virtual cable, with shared and own folders.

It needs root on Linux, for ``unshare``, ``nsenter`` and ``ip``. No packet leaves the namespaces.
"""

import argparse
import functools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from benchmarks import common
from lightning_align import (
    RETRO,
    DPODataModule,
    DPOModule,
    PaLM,
    RetrievalIndexing,
    RETRODataModule,
    RETROModule,
    SFTDataModule,
    SFTModule,
)
from lightning_align.data.build import Build
from lightning_align.references.stored import StoredLogProbs
from lightning_align.retrieval.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
ADDRESS, PORT, ROWS = "10.97.31.{}", 29731, 24
CASES = {
    "rows, one cache for both nodes": ("sft", "shared"),
    "rows, a cache and a copy of the rows on each node": ("sft", "own"),
    "RETRO database, one folder for both nodes": ("retro", "shared"),
    "stored reference, one cache for both nodes": ("dpo", "shared"),
    "stored reference, a cache on each node": ("dpo", "own"),
}


class Work:
    """Counts what this process writes: prepared files, blocks of a database, and files of scores."""

    def __init__(self) -> None:
        """Watch the functions that write."""
        self.counts = dict.fromkeys(("sft", "retro", "dpo"), 0)
        for name, owner, function in (
            ("sft", Build, "_publish"),
            ("retro", Stage, "write_block"),
            ("dpo", StoredLogProbs, "_keep"),
        ):
            self._watch(name, owner, function)

    def _watch(self, name: str, owner: Any, function: str) -> None:
        real = getattr(owner, function)

        def counted(*args: Any, **options: Any) -> Any:
            self.counts[name] += 1
            return real(*args, **options)

        setattr(owner, function, counted)


def write_sources(folder: Path) -> None:
    """Write rows, pairs and documents."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = [
        {"prompt": f"{i}+{i}=", "response": str(2 * i), "chosen": str(2 * i), "rejected": str(i)} for i in range(1, 1 + ROWS)
    ]
    for name, columns in (("sft", ("prompt", "response")), ("dpo", ("prompt", "chosen", "rejected"))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({c: row[c] for c in columns}) + "\n" for row in sums))
    for name, seed in (("train", 0), ("held_out", 1)):
        draw = random.Random(seed)
        (folder / name).mkdir(exist_ok=True)
        for number in range(12):
            (folder / name / f"{number}.txt").write_text(" ".join(f"{draw.randrange(10**4):04}" for _ in range(20)))


def job(method: str, sources: Path, cache: Path, size: int) -> tuple[Any, Any, list[Callback]]:
    """Return the module, its data and its callbacks, all in float64, so that the order of sums hardly matters."""
    L.seed_everything(0, verbose=False)
    palm = functools.partial(PaLM, num_tokens=259, dim=16, depth=2, heads=2, dim_head=8)
    options: dict[str, Any] = {"batch_size": size, "max_length": 24, "cache_dir": str(cache)}
    adam: Any = functools.partial(torch.optim.AdamW, lr=1e-2)
    if method == "sft":
        path = str(sources / "sft.jsonl")
        return SFTModule(palm().double(), optimizer=adam), SFTDataModule(path, validation=path, **options), []
    if method == "dpo":
        path = str(sources / "dpo.jsonl")
        module = DPOModule(palm().double(), reference="stored", reference_cache=str(cache / "scores"), optimizer=adam)
        return module, DPODataModule(path, validation=path, **options), []
    database = str(cache / "database")
    index = RetrievalIndexing(
        database,
        documents=str(sources / "train"),
        queries={"validation": str(sources / "held_out")},
        encoder="bm25",
        tokenizer="bytes",
        chunk_size=8,
        k=2,
    )
    module = RETROModule(RETRO(palm(), chunk_size=8, encoder_depth=1, heads=2).double(), optimizer=adam)
    return module, RETRODataModule(database, validation="validation", num_chunks=2, batch_size=2 * size), [index]


def train(method: str, sources: Path, cache: Path, folder: Path, nodes: int) -> dict[str, torch.Tensor]:
    """Train two epochs, and return the weights."""
    module, data, callbacks = job(method, sources, cache, 4 // nodes)
    several: dict[str, Any] = {"num_nodes": nodes, "strategy": DDPStrategy(process_group_backend="gloo")} if nodes > 1 else {}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=8,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
        **several,
    )
    trainer.fit(module, data)
    assert trainer.global_step == 8
    return {name: value.clone() for name, value in module.policy.state_dict().items()}


def be_node(number: int, shared: Path, own: Path) -> None:
    """Train each case as one of the nodes, in a working directory of the node."""
    work = Work()
    for index, (method, place) in enumerate(CASES.values()):
        sources = shared if place == "shared" else own / "sources"
        before = dict(work.counts)
        weights = train(method, sources, (shared if place == "shared" else own) / f"cache-{index}", own, 2)
        made = {name: count - before[name] for name, count in work.counts.items()}
        torch.save({"weights": weights, "made": made[method], "host": socket.gethostname()}, own / f"{index}.pt")
    torch.distributed.destroy_process_group()


def holder() -> "subprocess.Popen[bytes]":
    """Start a process that holds a host name and a network of its own."""
    return subprocess.Popen(["unshare", "--uts", "--net", "sleep", "3600"])


def inside(node: int, *command: str) -> list[str]:
    """Return a command that runs in the namespaces of a process."""
    return ["nsenter", "--target", str(node), "--uts", "--net", *command]


def connect(nodes: list[int]) -> None:
    """Name the hosts, and join their networks by a virtual cable."""
    names = [f"node{number}" for number in range(len(nodes))]
    own = os.readlink("/proc/self/ns/net")
    while any(os.readlink(f"/proc/{node}/ns/net") == own for node in nodes):
        time.sleep(0.05)
    create = [
        "ip",
        "link",
        "add",
        names[0],
        "netns",
        str(nodes[0]),
        "type",
        "veth",
        "peer",
        "name",
        names[1],
        "netns",
        str(nodes[1]),
    ]
    subprocess.run(create, check=True)
    for number, (node, name) in enumerate(zip(nodes, names, strict=True)):
        subprocess.run(inside(node, "hostname", name), check=True)
        subprocess.run(inside(node, "ip", "address", "add", f"{ADDRESS.format(number + 1)}/24", "dev", name), check=True)
        for device in (name, "lo"):
            subprocess.run(inside(node, "ip", "link", "set", device, "up"), check=True)


def main() -> None:
    """Start the nodes, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--node", type=int, help="be a node of this number")
    parser.add_argument("--folder", type=Path, help="the folder of the run, for a node")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.node is not None:
        be_node(arguments.node, arguments.folder / "shared", arguments.folder / f"node{arguments.node}")
        return
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        write_sources(folder / "shared")
        holders, processes = [holder() for _ in range(2)], list[subprocess.Popen[bytes]]()
        try:
            connect([each.pid for each in holders])
            for number, each in enumerate(holders):
                own = folder / f"node{number}"
                write_sources(own / "sources")
                (own / "tmp").mkdir()
                environment = {
                    "NODE_RANK": str(number),
                    "MASTER_ADDR": ADDRESS.format(1),
                    "MASTER_PORT": str(PORT),
                    "GLOO_SOCKET_IFNAME": f"node{number}",
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1",
                    "TMPDIR": str(own / "tmp"),
                }
                command = inside(each.pid, sys.executable, __file__, "--node", str(number), "--folder", str(folder))
                with (own / "output.txt").open("w") as output:
                    processes.append(
                        subprocess.Popen(command, env={**os.environ, **environment}, cwd=own, stdout=output, stderr=output)
                    )
            alone = [
                train(method, folder / "shared", folder / f"alone-{index}", folder, 1)
                for index, (method, _) in enumerate(CASES.values())
            ]
            codes = [process.wait(timeout=3000) for process in processes]
        finally:
            for each in (*holders, *processes):
                each.kill()
                each.wait()
        if any(codes):
            raise SystemExit("\n".join((folder / f"node{number}" / "output.txt").read_text() for number in range(2)))
        rows = []
        for index, name in enumerate(CASES):
            first, second = (torch.load(folder / f"node{number}" / f"{index}.pt", weights_only=True) for number in range(2))
            assert (first["host"], second["host"]) == ("node0", "node1")
            equal = all(torch.equal(value, second["weights"][key]) for key, value in first["weights"].items())
            gap = max(float((value - alone[index][key]).abs().max()) for key, value in first["weights"].items())
            made = f"{first['made']} and {second['made']} files written"
            rows.append(
                common.claim(
                    name, "equal, < 1e-6", f"{'equal' if equal else 'different'}, {gap:.0e}; {made}", equal and gap < 1e-6
                )
            )
    common.heading(
        "Two imitated nodes",
        "Two processes with host names, network namespaces and working directories of their own, joined by a virtual cable; "
        "DDP with `num_nodes=2`, 8 steps of 4 rows. Weights of the first node against those of the second, and against those "
        "of one process with batches of 4.",
    )
    print(common.table(rows))
    raise SystemExit(any(row[""] != "met" for row in rows))


if __name__ == "__main__":
    main()
