"""faiss on the device: import beside torch, training of an IVF index, exact and IVF search, float16 and temporary memory.

Needs faiss-gpu. With faiss-cpu, or in a dry run, only the sides of the CPU run.
"""

from typing import Any

import numpy as np
import torch

from benchmarks.common import gpu

K = 8


def clustered(num: int, dim: int) -> np.ndarray[Any, Any]:
    """Vectors in clusters, float32."""
    draw = np.random.default_rng(0)
    centers = draw.standard_normal((max(8, num // 200), dim), dtype=np.float32)
    return centers[draw.integers(0, len(centers), num)] + 0.3 * draw.standard_normal((num, dim), dtype=np.float32)


def agreement(found: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    """Share of the true neighbors that were found, in any order."""
    return float(np.mean([len(np.intersect1d(a, b)) / truth.shape[1] for a, b in zip(found, truth, strict=True)]))


def resources(faiss: Any, temporary: int | None) -> Any:
    """Resources of the device. Its temporary memory is taken at once and kept, beside that of torch."""
    made = faiss.StandardGpuResources()
    if temporary is not None:
        made.setTempMemory(temporary)
    return made


def options(faiss: Any, *, half: bool) -> Any:
    """Options of a clone. faiss's default for IVF is float32 too, but the lookup tables of product quantizers differ."""
    made = faiss.GpuClonerOptions()
    made.useFloat16 = half
    made.useFloat16CoarseQuantizer = False
    return made


def main() -> None:
    """Measure and print."""
    arguments = gpu.parse(gpu.parser(__doc__))
    session = gpu.Session(
        "faiss_gpu", "faiss on the device", f"Clustered vectors, k {K}. Agreement is with exact search of the CPU.", arguments
    )
    num, dim, asked, lists = (4000, 16, 64, 16) if session.dry else (1_000_000, 384, 8192, 4096)
    with session.part("import"):
        import faiss

        on_gpu = not session.dry and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
        devices = getattr(faiss, "get_num_gpus", lambda: 0)()
        session.add("Package", {"faiss": faiss.__version__, "its devices": devices, "torch": torch.__version__})
    if "import" in session.results["failed"]:
        session.finish()
    data, sample = clustered(num, dim), slice(0, min(asked, 1024))
    queries = np.ascontiguousarray(data[:asked])
    flat = faiss.IndexFlatL2(dim)
    flat.add(data)
    _, truth = flat.search(queries[sample], K)
    trained = faiss.index_factory(dim, f"IVF{lists},Flat")
    training = data[np.sort(np.random.default_rng(1).choice(num, min(num, 64 * lists), replace=False))]

    def train(on_device: bool) -> Any:
        index = faiss.index_factory(dim, f"IVF{lists},Flat")
        if on_device:
            inner = faiss.IndexFlatL2(dim)
            faiss.extract_index_ivf(index).clustering_index = faiss.index_cpu_to_all_gpus(inner)
        index.train(training)
        return index

    for where in ("device", "CPU") if on_gpu else ("CPU",):
        with session.part(f"training on the {where}", needs=60):
            seconds = session.median(lambda: train(where == "device"), rounds=1, warmup=0)  # noqa: B023
            session.add(f"Training of {lists} lists with {len(training):,} vectors", {"where": where, "s": seconds})
    trained = train(on_gpu)
    trained.add(data)
    sides: dict[str, Any] = {}
    if on_gpu:
        for temporary in (None, 256 << 20):
            name = "default" if temporary is None else f"{temporary >> 20} MiB"
            with session.part(f"resources, temporary memory {name}"):
                before = torch.cuda.mem_get_info(session.device)[0]
                kept = resources(faiss, temporary)
                clone = faiss.index_cpu_to_gpu(kept, 0, flat, options(faiss, half=False))
                clone.search(queries[:16], K)
                taken = before - torch.cuda.mem_get_info(session.device)[0]
                own = data.nbytes
                session.add("Memory of the device", {"temporary memory": name, "MiB beyond the vectors": (taken - own) / 2**20})
                del clone, kept
        shared = resources(faiss, 512 << 20)
        for name, index, half in (
            ("flat, device", flat, False),
            ("flat, device, float16", flat, True),
            ("IVF, device", trained, False),
            ("IVF, device, float16", trained, True),
        ):
            with session.part(name):
                sides[name] = faiss.index_cpu_to_gpu(shared, 0, index, options(faiss, half=half))
    sides |= {"flat, CPU": flat, "IVF, CPU": trained}
    for nprobe in (4,) if session.dry else (16, 64):
        faiss.extract_index_ivf(trained).nprobe = nprobe
        _, expected = trained.search(queries[sample], K)
        for name, index in sides.items():
            if "flat" in name and nprobe > 16:
                continue
            with session.part(f"search, {name}, {nprobe} lists", needs=20):
                if "IVF, device" in name:
                    index.nprobe = nprobe
                points = queries if "device" in name else queries[sample]
                seconds = session.median(lambda: index.search(points, K), rounds=3, warmup=1)  # noqa: B023
                _, found = index.search(queries[sample], K)
                row = {"side": name, "lists": nprobe if "IVF" in name else "all", "queries/s": len(points) / seconds}
                base = expected if "IVF" in name else truth
                row |= {"recall": agreement(found, truth), "rows with the ids of the CPU": float((found == base).all(1).mean())}
                session.add(f"Search of {num:,} vectors of {dim} dimensions", row)
    session.finish()


if __name__ == "__main__":
    main()
