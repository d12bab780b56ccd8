import errno

import numpy as np
import pytest

from lightning_align.retrieval.stages import Stage, Team, open_stage, write_rows


def stage_of(root, **inputs):
    return Stage(root, "thing", {"format": 1, **inputs})


def finished(root):
    stage = stage_of(root)
    stage.write_block(0, {"x": np.arange(5)})
    write_rows(stage.folder / "x.npy", [np.arange(3), np.arange(3, 5)], dtype=np.int32, shape=(5,))
    stage.finish(table={"a": 1}, counts={"n": 5}, files=["x.npy"])
    return stage


def test_block_round_trip_and_finished_stage_has_no_blocks(tmp_path):
    stage = stage_of(tmp_path)
    stage.write_block(3, {"x": np.arange(4), "y": np.eye(2)})
    assert stage.has_block(3) and not stage.has_block(0)
    assert stage.read_block(3)["y"].tolist() == [[1, 0], [0, 1]]
    assert stage.manifest() is None
    done = finished(tmp_path)
    assert sorted(path.name for path in done.folder.iterdir()) == ["manifest.json", "x.npy"]
    assert np.load(done.folder / "x.npy").tolist() == [0, 1, 2, 3, 4]
    assert open_stage(done.folder).key == done.key


@pytest.mark.parametrize("damage", ["altered", "cut", "empty"])
def test_damaged_block_warns_and_is_deleted(tmp_path, damage):
    stage = stage_of(tmp_path)
    stage.write_block(0, {"x": np.arange(100)})
    (path,) = stage.folder.rglob("*.npz")
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes({"altered": bytes(content), "cut": bytes(content[:50]), "empty": b""}[damage])
    with pytest.warns(UserWarning, match="damaged"):
        assert not stage.has_block(0)
    assert not path.exists()


@pytest.mark.parametrize("damage", ["cut", "missing", "manifest", "altered"])
def test_damaged_result_is_not_finished(tmp_path, damage):
    stage = finished(tmp_path)
    path = stage.folder / ("manifest.json" if damage == "manifest" else "x.npy")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + b"\x07" if damage == "altered" else content[:-5])
    if damage == "altered":
        assert stage.manifest() is not None  # the size is unchanged: only the content shows the damage
    with pytest.warns(UserWarning, match="damaged and will be rebuilt"):
        assert stage.manifest(verify=True) is None
    assert stage.manifest() is None


def test_folder_depends_on_the_inputs(tmp_path):
    assert stage_of(tmp_path, a=1).folder != stage_of(tmp_path, a=2).folder
    assert stage_of(tmp_path, a=1, b=2).folder == stage_of(tmp_path, b=2, a=1).folder


def test_block_that_is_not_reproduced_raises(tmp_path):
    stage = stage_of(tmp_path)
    stage.write_block(0, {"x": np.arange(5)})
    stage.check_block(0, {"x": np.arange(5)})
    with pytest.raises(ValueError, match="block 0 gives other bytes"):
        stage.check_block(0, {"x": np.arange(5) + 1})


def test_sampled_fraction_is_about_the_requested_one(tmp_path):
    stage = stage_of(tmp_path)
    sampled = sum(stage.is_sampled(number, 0.1) for number in range(2000))
    assert 140 < sampled < 260
    assert stage.is_sampled(0, 0.001) and not stage.is_sampled(0, 0.0)
    assert all(stage.is_sampled(number, 1.0) for number in range(50))


def test_full_disk_leaves_no_files(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    stage = stage_of(tmp_path)
    monkeypatch.setattr("lightning_align.retrieval.stages.os.fsync", full)
    with pytest.raises(ValueError, match="No space left on device"):
        stage.write_block(0, {"x": np.arange(5)})
    monkeypatch.undo()
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    assert not stage.has_block(0)


def test_error_in_a_team_of_one_propagates():
    with pytest.raises(KeyError), Team().together():
        raise KeyError("x")
