"""Contenders of a benchmark timed by turns: what makes a group of them, compilation, and the rounds.

A device at its limit of power changes its clock by several per cent with what it has just done. In each round of a
group every program gives one sample, in an order drawn anew: samples of one round see the same device, and over the
rounds no program always follows the same other one. So what is compared should be of one group, round by round.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import NamedTuple

from launch.device_state import watched
from launch.timing import Program, copy, copy_tb_s, matmul, matmul_tflop_s


class Case(NamedTuple):
    """One contender of a group.

    key: what tells it from the others in the JSON.
    prepare: compiles, running nothing, and returns the function that draws inputs and gives the programs, by part.
    figures: what the row in the JSON says, from the milliseconds of each part and of the yardstick, round by round.
    """

    key: dict
    prepare: Callable[[], Callable[[], dict[str, Program]]]
    figures: Callable[[dict[str, list[float]], list[float]], dict]


class Group(NamedTuple):
    """What is timed by turns: where its rows go in the JSON, the yardstick in `YARDSTICKS`, and the contenders."""

    kind: str
    yardstick: str
    cases: list[Case]


# what makes the program, what its rate is called in the JSON, and the rate from its milliseconds
YARDSTICKS = {"matmul": (matmul, "matmul_tflop_s", matmul_tflop_s), "copy": (copy, "copy_tb_s", copy_tb_s)}
BUDGET_SPENT = "not begun within the budget"


def by_turns(
    programs: Mapping[Hashable, Program], rounds: int, end: float = math.inf
) -> tuple[dict[Hashable, list[float] | Exception], dict[str, list[float]]]:
    """Times programs against each other: in each round one sample of each, in an order drawn anew.

    Args:
      rounds: samples of each program.
      end: `time.perf_counter()` after which no further round begins.

    Returns:
      for each program its milliseconds, round by round, or the error that it ended with; and the device's clock and
      power during the rounds (`watched`).
    """
    found: dict[Hashable, list[float] | Exception] = {name: [] for name in programs}
    calls, draw = {}, random.Random(0)

    def attempt(name, action):
        try:
            return action()
        except Exception as error:  # one that breaks must not take the others with it
            found[name] = error.with_traceback(None)  # whose frames would hold the device's memory

    for name, program in programs.items():
        calls[name] = attempt(name, program.warmed)
    with watched() as state:
        for _ in range(rounds):
            running = [name for name in programs if not isinstance(found[name], Exception)]
            if time.perf_counter() > end:
                break
            for name in draw.sample(running, len(running)):
                seconds = attempt(name, functools.partial(programs[name].seconds, calls[name]))
                if seconds is not None:
                    found[name].append(seconds * 1e3)
    return found, state


def first_line(error: Exception) -> str:
    """An error in a table's cell."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def compiled(groups: list[Group], threads: int) -> list[list[Callable | Exception]]:
    """Compiles all cases, in `threads` threads, those of the same key once: what `prepare` returns, or its error."""

    def attempt(case: Case) -> Callable | Exception:
        try:
            return case.prepare()
        except Exception as error:  # one that breaks must not take the others with it
            return error.with_traceback(None)

    begin, waiting = time.perf_counter(), {}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for case in (case for group in groups for case in group.cases):
            name = tuple(case.key.items())
            waiting[name] = waiting.get(name) or pool.submit(attempt, case)
        prepared = [[waiting[tuple(case.key.items())].result() for case in group.cases] for group in groups]
    print(f"compiled {len(waiting)} cases in {time.perf_counter() - begin:.0f} s", flush=True)
    return prepared


def timed(group: Group, prepared: list[Callable | Exception], rounds: int, end: float) -> tuple[list[dict], dict]:
    """Times a group by turns, until time `end`: a row for each case, and what the device did meanwhile."""
    begin, programs, errors = time.perf_counter(), {}, {}
    for i, make in enumerate(prepared):
        try:
            if isinstance(make, Exception):
                raise make
            programs |= {(i, part): program for part, program in make().items()}
        except Exception as error:
            errors[i] = error.with_traceback(None)
    make_yardstick, rate_name, rate = YARDSTICKS[group.yardstick]
    samples, state = by_turns(programs | {group.yardstick: make_yardstick()}, rounds, end)
    measure, rows = samples.pop(group.yardstick), []
    if isinstance(measure, Exception):
        raise measure
    for i, case in enumerate(group.cases):
        parts = {part: times for (j, part), times in samples.items() if j == i}
        broken = [x for x in (errors.get(i), *parts.values()) if isinstance(x, Exception)]
        if broken or not measure:
            row = {"reason": first_line(broken[0]) if broken else BUDGET_SPENT}
        else:
            row = case.figures(parts, measure) | {"samples": parts}
        rows.append(case.key | row)
    state |= {"rounds": len(measure), "seconds": round(time.perf_counter() - begin, 1)}
    return rows, state | ({rate_name: rate(statistics.median(measure))} if measure else {})


def measured(
    groups: list[Group], prepared: list[list], rounds: int, end: float
) -> Iterator[tuple[Group, list[dict], dict]]:
    """Times one group after another, none from time `end` on: the group, its rows and what the device did."""
    for group, made in zip(groups, prepared, strict=True):
        reason, state = BUDGET_SPENT, {}
        if time.perf_counter() < end:
            try:
                rows, state = timed(group, made, rounds, end)
            except Exception as error:
                reason = first_line(error)
        if not state:
            rows = [case.key | {"reason": reason} for case in group.cases]
        made.clear()  # inputs and programs hold memory
        yield group, rows, state
