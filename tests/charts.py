"""The charts that a run lays out in TensorBoard, and whether they have lines."""

import re
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2


def lines_of(folder: str | Path | None) -> dict[str, list[str]]:
    """The logged names that each chart of a run shows, by title."""
    events = EventAccumulator(str(folder)).Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    scalars = events.Tags()["scalars"]
    found = {}
    for category in layout.category:
        for chart in category.chart:
            bands = [name for series in chart.margin.series for name in (series.value, series.lower, series.upper)]
            patterns = [*chart.multiline.tag, *map(re.escape, bands)]
            found[chart.title] = [name for name in scalars if any(re.match(f"{pattern}$", name) for pattern in patterns)]
    return found
