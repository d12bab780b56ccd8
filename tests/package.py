"""Builds wheel and sdist, installs the wheel outside of the checkout, and runs the README's first commands there.

    python tests/package.py [FOLDER]

Both packages are written to dist/. The environment and the runs are in FOLDER, by default a temporary one. What the package
requires is that of the environment that runs this, which `pip check` compares with the wheel's metadata. Needs an index of
packages for the tool that builds. The commands are as printed, with a configuration that makes them small.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.test_readme import BLOCKS, commands, small, write_rows  # noqa: E402


def call(*words: str | Path, cwd: Path) -> str:
    """Run a command and return what it printed. What it needs must be installed, so nothing of the checkout is on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def build(python: Path, folder: Path) -> Path:
    """Build both packages, compare a wheel made of the sdist with the wheel, and return the wheel."""
    dist = ROOT / "dist"
    call(python, "-m", "pip", "install", "-q", "hatchling", cwd=folder)
    call(python, "-m", "hatchling", "build", "-d", dist, cwd=ROOT)
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (source,) = (folder / "sdist").iterdir()
    call(python, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "again", cwd=source)
    contents = [sorted(zipfile.ZipFile(path).namelist()) for path in (wheel, folder / "again" / wheel.name)]
    assert contents[0] == contents[1], "the sdist builds another wheel"
    print(f"{wheel.name}: {len(contents[0])} files; the sdist builds the same", flush=True)
    return wheel


def main() -> None:
    """Build, install, and run what a reader of the README runs first."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        call(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
        python, script = folder / "venv" / "bin" / "python", folder / "venv" / "bin" / "lightning-align"
        wheel = build(python, folder)
        call(python, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=folder)
        # After what is installed here, so that the package of the wheel is found before the one of the checkout.
        (mine,) = (folder / "venv" / "lib").glob("python*/site-packages")
        (mine / "required.pth").write_text(sysconfig.get_path("purelib") + "\n")
        checked = subprocess.run([python, "-m", "pip", "check"], cwd=folder, capture_output=True, text=True, check=False)
        # Peers of the benchmarks are installed without what they require.
        if missing := [line for line in checked.stdout.splitlines() if line.startswith("lightning-align ")]:
            sys.exit("\n".join(missing))
        where = call(python, "-c", "import lightning_align; print(lightning_align.__file__)", cwd=folder)
        assert str(folder / "venv") in where, where
        work = folder / "work"
        work.mkdir()
        rows = [{"prompt": f"{n} + 2 =", "response": f" {n + 2}"} for n in range(40)]
        pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": " 0"} for row in rows]
        for name, written in {"train": rows, "valid": rows, "pairs": pairs, "pairs_valid": pairs}.items():
            write_rows(str(work / f"{name}.jsonl"), written)
        start = next(block for language, block in BLOCKS if language == "bash" and "lightning-align tokenizer" in block)
        ran = [words for words in commands(start) if words[0] == "lightning-align"]
        for words in ran:
            extra: list[str | Path] = ["--vocab_size", "300"]
            if words[1] == "fit":
                (work / "small.yaml").write_text(yaml.safe_dump(small(words[1:])))
                extra = ["--config", "small.yaml"]
            said = call(script, *words[1:], *extra, cwd=work)
            print(f"$ {' '.join(words)}\n{said.splitlines()[-1]}", flush=True)
        assert len(ran) >= 3, "the test does not find the commands"
        assert (work / "runs" / "dpo" / "last.ckpt").exists()
        print(json.dumps(call(script, "--version", cwd=work).strip()))


if __name__ == "__main__":
    main()
