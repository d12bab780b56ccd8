"""Texts, tables and pictures reach every logger that can show them, as they are."""

import html
import re
import warnings
from typing import Any

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from lightning_align import Arithmetic, PaLM, SampleLogger, SFTDataModule, SFTModule
from lightning_align.training.markdown import cell, table
from lightning_align.training.panels import show_picture, show_table, shows
from lightning_align.training.pictures import heatmap, visible

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of a package within tensorboard
    from tensorboard import plugin_util

TEXTS = [
    "<<20*3=60>>60",
    "<b>bold</b> & <script>x</script>",
    "a | b | c",
    "*one* _two_ `three` **four** ~~five~~",
    "# title\n- item\n1. number",
    "  two  spaces\n\n\tand a tab",
    "[link](http://x.y) ![i](z) \\* &amp; &#65;",
    "你好 🙂 é",
    "$x^2$ --- === '\"",
]


NAMES = ("MLFlowLogger", "CometLogger", "TensorBoardLogger")


class Calls:
    """Remembers the calls of any method."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


class Wandbish:
    """Has the methods of Lightning's WandbLogger."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []

    def log_table(self, key: str, columns: Any = None, data: Any = None, dataframe: Any = None, step: Any = None) -> None:
        self.got.append({"key": key, "columns": columns, "data": data, "step": step})

    def log_image(self, key: str, images: Any, step: Any = None) -> None:
        self.got.append({"key": key, "images": images, "step": step})


class TextOnly:
    """Has Lightning's `log_text` and no tables."""

    def __init__(self) -> None:
        self.got: list[str] = []

    def log_text(self, key: str, columns: Any = None, data: Any = None, dataframe: Any = None, step: Any = None) -> None:
        self.got.append(key)


def named(name: str) -> Any:
    """Make a logger that is named as one of Lightning's, with a client that remembers what it is told."""
    return type(name, (), {"experiment": Calls(), "run_id": "run"})()


@pytest.mark.parametrize("text", TEXTS)
def test_a_cell_shows_the_text_as_it_is(text: str) -> None:
    shown = plugin_util.markdown_to_safe_html(table(["text"], [[cell(text)]]))
    assert shown.count("<td") == 1, "the table is not broken"
    inside = re.search(r"<td[^>]*><code>(.*)</code></td>", shown, re.DOTALL)
    assert inside is not None, shown
    without_breaks = re.sub(r"<br\s*/?>", "\n", inside[1])
    assert "<" not in without_breaks
    assert html.unescape(without_breaks).replace("\N{NO-BREAK SPACE}", " ") == text


def test_each_logger_gets_the_table_in_its_own_form() -> None:
    wandb, text = Wandbish(), TextOnly()
    mlflow, comet, board = (named(name) for name in NAMES)
    loggers = [wandb, text, mlflow, comet, board, CSVLogger("unused")]
    rows = [["p", "r"], ["q", "s"]]
    show_table(loggers, "val/samples", ["prompt", "real"], rows, step=7, markdown={"val/samples/0": "**p**"})
    assert wandb.got == [{"key": "val/samples", "columns": ["prompt", "real"], "data": rows, "step": 7}]
    assert text.got == ["val/samples"]
    ((name, _, given),) = mlflow.experiment.calls
    assert (name, given["artifact_file"]) == ("log_table", "val/samples.json")
    assert given["data"] == {"step": [7, 7], "prompt": ["p", "q"], "real": ["r", "s"]}
    ((name, _, given),) = comet.experiment.calls
    assert (name, given["headers"], given["tabular_data"]) == ("log_table", ["prompt", "real"], rows)
    assert board.experiment.calls == [("add_text", ("val/samples/0", "**p**", 7), {})]
    assert shows(loggers) == loggers[:-1]


def test_each_logger_gets_the_picture() -> None:
    wandb = Wandbish()
    mlflow, comet, board = (named(name) for name in NAMES)
    picture = Image.new("RGB", (3, 2))
    show_picture([wandb, TextOnly(), mlflow, comet, board], "val/attention/a", picture, step=7)
    assert wandb.got == [{"key": "val/attention/a", "images": [picture], "step": 7}]
    assert mlflow.experiment.calls[0][0] == comet.experiment.calls[0][0] == "log_image"
    assert board.experiment.calls[0][1][1].shape == (2, 3, 3)


def test_the_samples_of_a_run_reach_a_logger_with_tables(tmp_path: Any) -> None:
    class Logger(CSVLogger, Wandbish):
        def __init__(self, folder: str) -> None:
            CSVLogger.__init__(self, folder)
            self.got = []

    logger = Logger(str(tmp_path))
    rows = SFTDataModule(Arithmetic(8), validation=Arithmetic(4), batch_size=4, cache_dir=str(tmp_path / "cache"))
    callback = SampleLogger(num_samples=2, max_new_tokens=3)
    off = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    quiet: dict[str, Any] = {"accelerator": "cpu", "num_sanity_val_steps": 0, "log_every_n_steps": 1, **off}
    trainer = L.Trainer(max_epochs=1, logger=logger, callbacks=[callback], **quiet)
    trainer.fit(SFTModule(PaLM(num_tokens=259, dim=16, depth=1, heads=2, dim_head=8)), rows)
    assert [got["key"] for got in logger.got] == ["val/samples"]
    assert logger.got[0]["columns"] == ["prompt", "chosen", "generated"]
    assert len(logger.got[0]["data"]) == 2


def test_a_heatmap_has_labels_and_the_colors_of_its_values() -> None:
    values = np.array([[1.0, 0.0], [0.5, 0.25], [0.0, 0.0]])
    labels = {"rows": ["<bos>", "a b", "\n"], "columns": ["x", "y"]}
    plain = heatmap(values, **labels, row_axis="reads", column_axis="is read", title="title")
    pixels = np.asarray(plain)
    assert plain.width >= 100
    assert plain.height >= 100
    dark = (pixels == np.array((8, 48, 107))).all(-1)
    light = (pixels == np.array((247, 251, 255))).all(-1)
    assert dark.sum() > 300, "the cell of the largest value"
    assert light.sum() > 900, "the three cells of 0"
    other = heatmap(values, rows=["q", "q", "q"], columns=["x", "y"], row_axis="reads", column_axis="is read", title="title")
    assert other.tobytes() != plain.tobytes()
    assert [visible(text) for text in ("a b", "\n", "x" * 40)] == ["a·b", "\\n", "x" * 15 + "…"]
    assert (
        heatmap(np.zeros((200, 200)), **{n: ["i"] * 200 for n in labels}, row_axis="r", column_axis="c", title="t").width < 2500
    )
