"""Nothing that a file says is executed, and no name in a file leads out of its folder."""

import ast
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from lightning_align.models.checkpoint import gather_checkpoint
from lightning_align.models.formats import read_model, whole_weights, write_model
from lightning_align.models.integrity import check_checkpoint
from lightning_align.models.pretrained_shards import _placed
from lightning_align.runtime.checksums import check_sums
from tests.toys import tiny_palm

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted((ROOT / "lightning_align").rglob("*.py"))
# Processes of the same run exchange pickles over a pipe. The other file checks pickles before torch opens them.
PICKLES = {"data/workers.py", "models/integrity.py"}
IMPORTS = {"import_module", "__import__"}
# What names code by design: class paths and functions of configurations, and names of this package.
IMPORTING = {
    *("__init__.py", "cli.py", "runtime/old_paths.py", "generation/filter_function.py", "retrieval/words.py"),
    *("models/building.py", "models/rehearsal.py", "models/auto_hook.py", "console/errors.py", "console/names.py"),
}
REQUIRED: dict[str, tuple[str, bool]] = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
FORBIDDEN = {
    *("eval", "exec", "compile", "os.system", "os.popen", "shutil.unpack_archive", "marshal.loads", "marshal.load"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "dill.load", "joblib.load", "tarfile.open", "torch.hub.load"),
}


def name_of(node: ast.expr) -> str:
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def dangers(source: str, path: str) -> list[str]:
    """Say which calls of a file execute what they read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, given = name_of(node.func), {word.arg: word.value for word in node.keywords}
        last = name.rpartition(".")[2]
        values = {key: value.value for key, value in given.items() if isinstance(value, ast.Constant)}
        wrong = (
            name in FORBIDDEN
            or last in ("extractall", "extract_all")
            or (name.startswith(("pickle.", "cPickle.")) and last != "dumps" and path not in PICKLES)
            or (last in IMPORTS and path not in IMPORTING)
            or (name in REQUIRED and values.get(REQUIRED[name][0]) is not REQUIRED[name][1])
            or values.get("shell", False) is not False
            or values.get("trust_remote_code", False) is not False
            or (name.startswith("Auto") and last == "from_pretrained" and not {"trust_remote_code", None} & given.keys())
        )
        if wrong:
            found.append(f"{path}:{node.lineno} calls {name}")
    return found


def test_the_scan_sees_what_is_dangerous() -> None:
    lines = [
        *("eval(text)", "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)"),
        *("pickle.load(file)", "yaml.load(text)", "zipfile.ZipFile(p).extractall(q)", "subprocess.run(c, shell=True)"),
        *("AutoTokenizer.from_pretrained(name)", "AutoModel.from_pretrained(name, trust_remote_code=True)"),
        "import_module(name)",
    ]
    assert [line for line in lines if not dangers(line, "a.py")] == []
    assert dangers("torch.load(p, weights_only=True); np.load(p, allow_pickle=False); model.eval()", "a.py") == []


def test_the_source_executes_nothing_that_it_reads() -> None:
    root = ROOT / "lightning_align"
    found = [line for path in SOURCES for line in dangers(path.read_text(), path.relative_to(root).as_posix())]
    assert found == []


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "a.ckpt"
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save({"state_dict": {"a": torch.ones(2)}, "optimizer_0": {"lr": 0.1}}, checkpoint_id=folder, no_dist=True)
    torch.save({"epoch": 1}, folder / "meta.pt")
    check_checkpoint(folder)
    return folder


@pytest.mark.parametrize("where", ["metadata", "shard", "meta"])
def test_code_in_a_sharded_checkpoint_is_not_run(where: str, sharded: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    if where == "metadata":
        (sharded / ".metadata").write_bytes(pickle.dumps(Touch(ran)))
    elif where == "meta":
        torch.save({"epoch": Touch(ran)}, sharded / "meta.pt")
    else:
        metadata = pickle.loads((sharded / ".metadata").read_bytes())
        (name,) = {info.relative_path for info in metadata.storage_data.values()}
        (entry,) = (info for index, info in metadata.storage_data.items() if index.fqn.endswith("lr"))
        torch.save(Touch(ran), tmp_path / "code.pt")
        code, content = (tmp_path / "code.pt").read_bytes(), (sharded / name).read_bytes()
        entry.offset, entry.length = len(content), len(code)
        (sharded / name).write_bytes(content + code)
        (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        (ValueError, pickle.UnpicklingError), match=r"names (pathlib|getattr)|would run|Touch|Weights only|weights_only"
    ):
        gather_checkpoint(sharded)
    assert not ran.exists()


def test_code_within_the_values_of_a_shard_is_not_run(sharded: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save(Touch(ran), tmp_path / "code.pt")
    code = (tmp_path / "code.pt").read_bytes()
    torch.save(torch.frombuffer(bytearray(code), dtype=torch.uint8), tmp_path / "values.pt")
    values = (tmp_path / "values.pt").read_bytes()
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    (name,) = {info.relative_path for info in metadata.storage_data.values()}
    (entry,) = (info for index, info in metadata.storage_data.items() if index.fqn.endswith("lr"))
    content = (sharded / name).read_bytes()
    entry.offset, entry.length = len(content) + values.index(code), len(code)
    (sharded / name).write_bytes(content + values)
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"metadata names a part of it that is no file of torch"):
        gather_checkpoint(sharded)
    assert not ran.exists()


def test_shards_outside_of_the_folder_are_refused(sharded: Path) -> None:
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../a.ckpt/" + info.relative_path
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"names the file \.\./a\.ckpt/.*not in the folder"):
        gather_checkpoint(sharded)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..\\x"])
def test_checksums_of_files_outside_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(ValueError, match=r"SHA256SUMS:1 must be .* a file in the folder"):
        check_sums(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", 3])
def test_weights_outside_of_the_folder_are_refused(name: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"index\.json must name a file of its folder"):
        _placed(path)


@pytest.mark.parametrize("path", ["os.system", "builtins.eval", "subprocess.Popen", "pathlib.Path", "torch.load"])
def test_a_folder_names_no_code_but_modules(path: str, tmp_path: Path) -> None:
    model = tiny_palm()
    write_model(model, whole_weights(model), tmp_path / "a")
    (tmp_path / "a" / "SHA256SUMS").unlink()
    (tmp_path / "a" / "config.json").write_text(json.dumps({"class_path": path, "init_args": {}}))
    with pytest.raises(ValueError, match=r"must be an importable nn.Module"):
        read_model(tmp_path / "a")


def test_a_link_in_the_place_of_an_export_is_not_followed(tmp_path: Path) -> None:
    model, other = tiny_palm(), tmp_path / "other.json"
    other.write_text("kept")
    write_model(model, whole_weights(model), tmp_path / "a")
    (tmp_path / "a" / "config.json").unlink()
    (tmp_path / "a" / "config.json").symlink_to(other)
    write_model(model, whole_weights(model), tmp_path / "a")
    assert other.read_text() == "kept"
    assert read_model(tmp_path / "a") is not None
