"""What the scripts share: meters, preference pairs, printed tables. Linux only."""

from benchmarks.common.measure import (
    MIB,
    THP,
    Clock,
    Memory,
    Meter,
    Timing,
    alternate,
    in_subprocess,
    load,
    median,
    peak,
    ratio,
    reset_peak,
    resident,
)
from benchmarks.common.pairs import EOS, Pair, batches, file_pairs, shares, synthetic_pairs
from benchmarks.common.report import CONFIGS, T_95, claim, heading, read_rows, save, spread, table
from benchmarks.common.unshifted import unshifted_means

__all__ = [
    "CONFIGS",
    "EOS",
    "MIB",
    "THP",
    "T_95",
    "Clock",
    "Memory",
    "Meter",
    "Pair",
    "Timing",
    "alternate",
    "batches",
    "claim",
    "file_pairs",
    "heading",
    "in_subprocess",
    "load",
    "median",
    "peak",
    "ratio",
    "read_rows",
    "reset_peak",
    "resident",
    "save",
    "shares",
    "spread",
    "synthetic_pairs",
    "table",
    "unshifted_means",
]
