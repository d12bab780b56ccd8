"""Sides that step in turns, each in its own process. One run gives interleaved times, peak memory per side, and losses."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

from benchmarks import common


class Run(NamedTuple):
    """What a side measured."""

    timings: list[common.Timing]
    """Of all steps but the first."""
    losses: list[float]
    """Of all steps."""
    bytes: int
    """Peak memory above the interpreter and its imports, setup included."""


def serve(make: Callable[[], Callable[[int], float]], *, cpu: bool = False) -> None:
    """Act as a side: run one step per line of standard input.

    Args:
        make: returns a function that runs the step with a given number and returns its loss.
        cpu: whether to count the CPU seconds of this process, which other processes hardly change, and not the time of a clock.
    """
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # output of libraries must not get in between
    with contextlib.redirect_stdout(sys.stderr):
        common.reset_peak()
        before = common.resident()
        step = make()
        print("{}", file=output, flush=True)
        for line in sys.stdin:
            begun = time.process_time()
            with common.Meter() as meter:
                loss = step(int(line))
            seconds = time.process_time() - begun if cpu else meter.seconds
            used = common.peak() - before
            answer = {"seconds": seconds, "others": meter.others, "loss": loss, "bytes": used}
            print(json.dumps(answer), file=output, flush=True)


def take_turns(script: str, sides: Sequence[str], *arguments: str, rounds: int, thp: bool = False) -> dict[str, Run]:
    """Start the sides and let them step in turns: once to warm up, then ``rounds`` times.

    Args:
        script: a script that calls `serve` when it gets ``--side NAME``.
        sides: their names.
        *arguments: further arguments for every side.
        rounds: number of timed steps.
        thp: whether malloc asks for huge pages.
    """
    environment = {**os.environ, **(common.THP if thp else {})}
    runs = {side: Run([], [], 0) for side in sides}
    with contextlib.ExitStack() as stack:
        workers: dict[str, tuple[IO[str], IO[str]]] = {}
        for side in sides:
            command = [sys.executable, script, "--side", side, *arguments]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdin is not None and process.stdout is not None
            workers[side] = process.stdin, process.stdout
        for side, (_, reply) in workers.items():
            _answer(side, reply)
        order = list(sides)
        for number in range(1 + rounds):
            for side in order:
                ask, reply = workers[side]
                print(number, file=ask, flush=True)
                answer = _answer(side, reply)
                timing = common.Timing(answer["seconds"], answer["others"])
                timings, losses, _ = runs[side]
                runs[side] = Run([*timings, timing] if number else timings, [*losses, answer["loss"]], answer["bytes"])
            order = order[1:] + order[:1]
    return runs


def _answer(side: str, reply: IO[str]) -> dict[str, Any]:
    line = reply.readline()
    if not line:
        raise RuntimeError(f"the side {side!r} ended early; see its messages above")
    answer: dict[str, Any] = json.loads(line)
    return answer
