"""Imports go down the layers: a file imports from lower layers or from its own room, never up and never sideways.

A room is a folder of the package, or a file that stands beside the folders. The package's own ``__init__.py`` (here the
room ``""``, the front) names everything below it and is exempt: it imports nothing until a name is asked for.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "lightning_align"
ROOT = Path(__file__).parent.parent / PACKAGE
MAX_LINES = 400
LAYERS = (
    ("types", "runtime"),
    ("models", "data", "retrieval"),
    ("scoring", "generation"),
    ("references", "training", "export"),
    ("sft", "dpo", "spin", "calm", "retro"),
    ("",),  # the front: only the command line, which offers all of it, may come in that way
    ("console",),
    ("cli",),
    ("__main__",),
)
LAYER_OF = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))


def imported_modules(source: str, path: str) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of everything imported anywhere in a file: in functions and under TYPE_CHECKING too.

    ``from a import b`` yields ``a.b``, for ``b`` may be a module.
    """
    package = [PACKAGE, *Path(path).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the file's own package, each further dot its parent.
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            literal = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if name in ("import_module", "__import__") and isinstance(literal, str):
                yield node.lineno, literal


def breaches(source: str, path: str) -> list[str]:
    """Says what is wrong with the imports of one file; ``path`` is relative to the package."""
    room = Path(path).parts[0].removesuffix(".py")
    if room not in LAYER_OF:
        return [f"{path}: {room} stands in no layer: add it to LAYERS"]
    found = []
    for line, module in imported_modules(source, path):
        top, *rest = module.split(".")
        if top != PACKAGE:
            continue
        target = rest[0] if rest and rest[0] in LAYER_OF else ""
        if target != room and LAYER_OF[target] >= LAYER_OF[room]:
            found.append(
                f"{path}:{line} ({room}, layer {LAYER_OF[room]}) imports {module}"
                f" ({target or 'the front'}, layer {LAYER_OF[target]})"
            )
    return found


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", [file for file in FILES if relative(file) != "__init__.py"], ids=relative)
def test_imports_go_down(file: Path) -> None:
    assert breaches(file.read_text(encoding="utf-8"), relative(file)) == []


def circles(sources: dict[str, str]) -> list[list[str]]:
    """Files that import each other, directly or through others; ``sources`` maps a path within the package to its text."""
    names = {
        ".".join([PACKAGE, *Path(path).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in sources
        if path != "__init__.py"
    }
    imports: dict[str, set[str]] = {path: set() for path in sources}
    for path, source in sources.items():
        for _, module in imported_modules(source, path):
            # `from a.b import c` names a.b.c, which is a file or a name in the file a.b.
            target = names.get(module) or names.get(module.rpartition(".")[0])
            if target is not None and target != path and not target.endswith("__init__.py"):
                imports[path].add(target)

    found = []
    open_paths: list[str] = []
    done: set[str] = set()

    def visit(path: str) -> None:
        if path in open_paths:
            found.append(open_paths[open_paths.index(path) :])
        elif path not in done:
            open_paths.append(path)
            for target in sorted(imports[path]):
                visit(target)
            done.add(open_paths.pop())

    for path in sorted(sources):
        visit(path)
    return found


def test_no_files_import_each_other() -> None:
    assert circles({relative(file): file.read_text(encoding="utf-8") for file in FILES}) == []


def test_planted_circle_is_found() -> None:
    sources = {
        "models/a.py": "from lightning_align.models.b import x",
        "models/b.py": "def late():\n    from .c import y",
        "models/c.py": "from lightning_align.models import a",
        "models/d.py": "from lightning_align.models.a import x",
    }
    assert circles(sources) == [["models/a.py", "models/b.py", "models/c.py"]]


REPOSITORY = ROOT.parent
ALL_FILES = sorted(
    path for folder in (ROOT, *(REPOSITORY / n for n in ("tests", "benchmarks", "examples"))) for path in folder.rglob("*.py")
)


@pytest.mark.parametrize("file", ALL_FILES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_file_is_too_long(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/palm.py", "import lightning_align.cli"),
        ("models/palm.py", "from lightning_align.data.rows import Row"),
        ("data/rows.py", "from lightning_align.models import PaLM"),
        ("data/tasks/arithmetic.py", "from ...models.palm import PaLM"),
        ("data/tasks/arithmetic.py", "from ... import cli"),
        ("types.py", "from lightning_align import models"),
        ("runtime/files.py", "from lightning_align.scoring.sums import sum_logprobs"),
        ("scoring/sums.py", "import lightning_align.generation.sampler as sampler"),
        ("references/stored.py", "from lightning_align.training.module import AlignModule"),
        ("dpo/loss.py", "from lightning_align.sft.module import SFTModule"),
        ("dpo/module.py", "def late():\n    from ..spin import loss"),
        ("dpo/module.py", "if TYPE_CHECKING:\n    from lightning_align.calm.model import CALM"),
        ("dpo/module.py", "importlib.import_module('lightning_align.cli')"),
        ("dpo/module.py", "from lightning_align import PaLM"),
        ("cli.py", "from lightning_align import __main__"),
        ("helpers.py", ""),
    ],
)
def test_planted_breach_is_found(path: str, source: str) -> None:
    assert len(breaches(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "dpo/module.py",
            "from lightning_align.scoring.losses import loss\nfrom .loss import dpo\nfrom ..models import palm",
        ),
        ("data/tasks/arithmetic.py", "from lightning_align.data.rows import RowTask\nfrom .. import rows"),
        ("models/palm.py", "import torch\nfrom lightning_align import types\nimport lightning_align_extra.cli"),
        ("cli.py", "import lightning_align\nfrom lightning_align.training.callbacks import PredictionWriter"),
        ("__main__.py", "from lightning_align.cli import main"),
    ],
)
def test_allowed_imports_pass(path: str, source: str) -> None:
    assert breaches(source, path) == []


def test_importing_the_package_does_not_import_torch() -> None:
    code = f"import sys, {PACKAGE}; print(sorted({{'torch', 'lightning', 'numpy'}} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
