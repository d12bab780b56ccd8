"""When steps are captured as CUDA graphs, with CUDA replaced by what records the calls."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lightning_align.generation.capture import WARMUPS, Captures
from lightning_align.generation.casting import casts_kept


class Stream:
    def wait_stream(self, other: object) -> None:
        pass


class Graph:
    replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def cuda() -> Iterator[dict[str, Any]]:
    """What `Captures` needs of CUDA. The state says whether a step is being captured, or fails to be."""
    state: dict[str, Any] = {"capturing": False, "graphs": [], "pools": set(), "fails": False, "autocast": False}

    @contextmanager
    def capturing(graph: Graph, pool: object) -> Iterator[None]:
        if state["fails"]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        state["graphs"].append(graph)
        state["pools"].add(pool)
        state["capturing"] = True
        yield
        state["capturing"] = False

    @contextmanager
    def stream(_: object) -> Iterator[None]:
        yield

    fakes: dict[str, Any] = {
        "is_available": lambda: True,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": stream,
        "CUDAGraph": Graph,
        "graph": capturing,
        "graph_pool_handle": object,
    }
    with ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda *_: state["autocast"]))
        yield state


def test_a_step_is_captured_once_per_key_and_then_replayed(cuda: dict[str, Any]) -> None:
    captures = Captures(torch.device("cuda"))
    runs = list[bool]()

    def step() -> Tensor:
        runs.append(cuda["capturing"])
        return torch.zeros(1)

    results = {id(captures.run("a", lambda: step)) for _ in range(5)}
    assert runs == [False] * WARMUPS + [True] and len(results) == 1
    captures.run("b", lambda: step)
    captures.run("a", lambda: step)
    assert len(runs) == 2 * (WARMUPS + 1)
    assert [graph.replays for graph in cuda["graphs"]] == [6, 1] and len(cuda["pools"]) == 1


@pytest.mark.parametrize(("autocast", "captured"), [(True, 2), (False, 1)])
def test_casts_that_were_freed_are_captured_again(cuda: dict[str, Any], autocast: bool, captured: int) -> None:
    """A graph reads the memory of the casts."""
    cuda["autocast"] = autocast
    captures = Captures(torch.device("cuda"))
    model = nn.Linear(2, 2)
    for _ in range(2):
        with casts_kept(model):
            for _ in range(3):
                captures.run("a", lambda: lambda: torch.zeros(1))
    assert len(cuda["graphs"]) == captured


def test_a_step_that_cannot_be_captured_runs_as_it_is(cuda: dict[str, Any]) -> None:
    cuda["fails"] = True
    captures = Captures(torch.device("cuda"))
    runs = [captures.run("a", lambda: lambda: torch.ones(1)) for _ in range(3)]
    assert [float(run) for run in runs] == [1.0] * 3 and not cuda["graphs"]


def test_other_devices_have_no_graphs() -> None:
    made = []
    captures = Captures(torch.device("cpu"))
    for _ in range(3):
        captures.run("a", lambda: made.append(1) or (lambda: torch.zeros(1)))  # type: ignore[func-returns-value]
    assert len(made) == 1
