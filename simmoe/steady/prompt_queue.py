"""Prompts between arrival and first token, step by step, under arrivals that come whatever the engine does.

Model: the prompt tokens that wait when a step begins are a Markov chain. A step computes what fits its room, takes the
longer for it, and who came meanwhile waits for the next: a queue with batch service whose batches set their own time.
Arrivals are compound Poisson over the prompts' lengths; the chain runs on a grid of tokens, its stationary distribution
and the first two moments of the time between two tokens (which spans steps of prompts where these go first) are linear
systems. How many requests decode is held at its mean meanwhile.
Rows are loads: numpy's cost per call is paid once for all.
Left out: with steps decided ahead, that a step's prompts came during the one before the last; data-parallel ranks have
one queue here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from simmoe.specs.workload import Lengths, TraceReplay, Workload
from simmoe.steady.load_curve import Curve
from simmoe.steady.points import POINTS, drawn_in_order, lengths_at, places
from simmoe.steady.step_times import StepTimes

Array = NDArray[np.float64]

#: Cells of the grid of waiting tokens; lengths of steps whose arrivals, token counts whose steps are tabulated.
_CELLS, _DURATIONS, _SIZES = 48, 8, 24
_CELL, _ONE = np.arange(_CELLS, dtype=np.float64), np.eye(_CELLS)
#: Share of time idle below which no prompt starts an idle engine.
_NEVER = 1e-6
_DURATION, _SIZE = np.linspace(0.0, 1.0, _DURATIONS), np.linspace(0.0, 1.0, _SIZES)
#: How far the grid reaches: standard deviations of what comes in a step, means of what waits beyond its room.
_DEVIATIONS, _BACKLOGS = 4.0, 5.0


class _Sizes:
    """A step by its prompt tokens up to ``room``, evenly spaced in their logarithm, and without room left.

    ``by_size_s``: beside decodes and without, shape (2, loads, sizes + 1), the last without room left. [s]
    """

    def __init__(self, room: Array, by_size_s: Array) -> None:
        rising_s = np.maximum.accumulate(by_size_s[:, :, :-1], axis=2)
        self.full_s = by_size_s[0, :, -1]
        self._scale = ((_SIZES - 1) / np.log(room))[:, None]
        self._row = np.arange(0, room.size * _SIZES, _SIZES)[:, None]
        slope_s = np.zeros_like(rising_s)
        np.subtract(rising_s[:, :, 1:], rising_s[:, :, :-1], out=slope_s[:, :, :-1])
        self._slope_s = slope_s.ravel()
        rising_s[:, :, -1] = by_size_s[:, :, -1]
        self._base_s = rising_s.ravel()

    def read(self, tokens: Array, alone: NDArray[np.bool_] | None = None) -> Array:
        """Time of steps with ``tokens``, shape (loads, ...). [s]"""
        at = np.log(np.maximum(tokens, 1.0)) * self._scale
        lower = np.minimum((at + 1e-9).astype(np.int64), _SIZES - 1)
        at -= lower
        lower += self._row
        if alone is not None:
            lower += alone * (self._base_s.size // 2)
        return self._base_s.take(lower) + self._slope_s.take(lower) * at


@dataclass(frozen=True)
class PromptQueue:
    """Steps of one replica, at several loads.

    Attributes
    ----------
    room : tokens that a step has for prompts, shape (loads,). [tokens]
    decode_s : a step without prompts, shape (loads,). [s]
    typical : length of a prompt that a token belongs to. [tokens]
    ranks : data-parallel ranks.
    sizes : a step by its prompt tokens, beside decodes and without.
    waiting : prompt tokens waiting when a step begins, shape (loads, n). [tokens]
    served : those it computes, shape (loads, n). [tokens]
    step_s : its time, shape (loads, n). [s]
    met : chance that who comes to a busy engine meets such a step, shape (loads, n). [-]
    durations_s : lengths of step for which ``came`` is tabulated, shape (loads, d). [s]
    came : distribution of the tokens that come meanwhile, over ``waiting``'s cells, shape (loads, d, n). [-]
    come : the same during a step, whatever its length, shape (loads, n). [-]
    at_first : gaps of a request in excess of as many others, by what waits: it begins among prompts that came with its
        own or after it, shape (loads, n). [gaps]
    after_token, after_prompt : of gaps between two tokens, and of those after a first token, the ones whose first step
        has so many waiting, shape (loads, n). [-]
    gap_s, gap_square : mean gap and mean squared gap given that, shape (loads, n). [s], [s^2]
    paused : chance that who decodes has no token from such a step, shape (loads, n). [-]
    no_more : chance that no prompt waits after it, shape (loads, n). [-]
    gap_variance : of a gap, shape (loads,). [s^2]
    lasting_variance : of the time of many gaps over their number; long ones follow each other, shape (loads,). [s^2]
    """

    room: Array
    decode_s: Array
    typical: float
    ranks: int
    sizes: _Sizes
    waiting: Array
    served: Array
    step_s: Array
    met: Array
    durations_s: Array
    came: Array
    come: Array
    after_token: Array
    after_prompt: Array
    at_first: Array
    gap_s: Array
    gap_square: Array
    paused: Array
    no_more: Array
    gap_variance: Array
    lasting_variance: Array

    @cached_property
    def stretch(self) -> Array:
        """Mean time between two tokens over a decode step, shape (loads,). [-]"""
        return np.asarray((self.after_token * self.gap_s).sum(axis=1) / self.decode_s)

    @cached_property
    def first_s(self) -> Array:
        """What the gaps after a first token take beyond as many others, shape (loads,). [s]"""
        return np.asarray((self.at_first * self.gap_s).sum(axis=1))

    @cached_property
    def first_variance(self) -> Array:
        """Variance of the time from a first to the second token, shape (loads,). [s^2]"""
        square = (self.after_prompt * self.gap_square).sum(axis=1)
        return np.asarray(np.maximum(square - (self.after_prompt * self.gap_s).sum(axis=1) ** 2, 0.0))

    def came_during(self, step_s: Array, coordinate: int) -> Array:
        """Prompt tokens that come during a step, at a coordinate of `points.shares`, shape (loads, points). [tokens]"""
        durations, cells = self.came.shape[1:]
        low, high = self.durations_s[:, :1], self.durations_s[:, -1:]
        place = (step_s - low) / np.maximum(high - low, 1e-300) * (durations - 1)
        wanted = (place + 0.5).astype(np.int64)
        wanted += np.arange(0, durations * len(low), durations)[:, None]
        drawn = drawn_in_order(self.came.reshape(-1, cells)).ravel()
        return self.of_step(self.waiting, drawn.take(wanted * POINTS + places(coordinate)))

    @staticmethod
    def of_step(column: Array, step: NDArray[np.int64]) -> Array:
        """What a column, shape (loads, n), has at the grid's places ``step``, shape (loads, points)."""
        return column.take(step + np.arange(0, column.size, column.shape[1])[:, None])

    def computed(self, waiting: Array) -> Array:
        """Prompt tokens that a step computes of those waiting, shape (loads, ...). [tokens]"""
        return _computed(waiting, self.room, self.typical, self.ranks)

    def gaps_s(self, start: NDArray[np.int64], share: Array, normal: Array) -> Array:
        """Times between two tokens that begin with a step of the grid's place ``start``, shape (loads, points). [s]

        A token comes from that step, or from a step of decodes right after it, or after more prompts: then lognormal
        with the mean and the variance that are left for it.

        Parameters
        ----------
        share, normal : where in these cases' chances, and in the lognormal distribution, a point stands, (points,).
        """
        if not self.paused.any():
            return self.of_step(self.step_s, start)
        rows = np.arange(len(start))[:, None]
        first_s, second_s = self.step_s, self.step_s + self.decode_s[:, None]
        once, twice = 1.0 - self.paused, self.paused * self.no_more
        more = np.maximum(1.0 - once - twice, 1e-12)
        mean = np.maximum((self.gap_s - once * first_s - twice * second_s) / more, second_s)
        square = (self.gap_square - once * first_s**2 - twice * second_s**2) / more
        spread = np.sqrt(np.log(np.maximum(square / mean**2, 1.0)))
        longer_s = mean[rows, start] * np.exp(spread[rows, start] * normal - spread[rows, start] ** 2 / 2)
        late = share >= (once + twice)[rows, start]
        return np.where(
            late, longer_s, np.where(share < once[rows, start], first_s[rows, start], second_s[rows, start])
        )

    def prompt_step_s(self, tokens: Array, alone: NDArray[np.bool_] | None = None) -> Array:
        """A step with so many prompt tokens, beside decodes or, where ``alone``, without, shape (loads, ...). [s]"""
        return self.sizes.read(tokens, alone)


@dataclass(frozen=True)
class _Prompts:
    """What prompts bring: their work, shape (m,), how likely it is, its mean, mean square, and nearly its most."""

    work: Array
    chance: Array
    mean: float
    square: float
    longest: float


def prompt_queue(curve: Curve, workload: Workload, rates: Array, in_flight: Array, idle: Array) -> PromptQueue:
    """Solve for each of ``rates`` [1/s], with ``in_flight`` requests while any is there, ``idle`` else.

    All of shape (loads,).
    """
    times, dp = curve.times, curve.times.dp
    at = curve.at(in_flight, ("decode_step_s", "room", "decoding", "beside", "mixed_step_s"))
    prompts = _prompts(times, workload.input, workload.trace, curve.token_budget)
    room, decode_s = at["room"], at["decode_step_s"]
    sizes = room[:, None] ** _SIZE
    fullest = times.fullest(at["decoding"])[:, None]
    beside = at["beside"] if curve.prompts_first else at["decoding"]
    # the last column is a step that is full, whose prompts may have begun before and go on after
    tokens, full_at = np.empty((2, rates.size, _SIZES + 1))
    tokens[:, :-1], tokens[:, -1] = sizes, room
    full_at[:, :-1], full_at[:, -1] = np.inf, room
    decoding = np.zeros((2, rates.size, 1))
    decoding[0, :, 0] = beside
    by_size = times.prompt_step_s(decoding, tokens, full_at, fullest)
    table = _Sizes(room, by_size)
    cell = _cell(rates, room, prompts, at["mixed_step_s"], table.full_s)
    waiting, jumps = _on_grid(prompts, cell)
    # as many ranks work on prompts as have one
    typical, mean = prompts.square / prompts.mean, prompts.mean
    served = _computed(waiting, room, typical, dp)
    step_s = table.read(served)
    step_s[:, 0] = decode_s
    shortest_s, longest_s = step_s.min(axis=1, keepdims=True), step_s.max(axis=1, keepdims=True)
    durations_s = shortest_s + (longest_s - shortest_s) * _DURATION
    came = _compound_poisson(rates[:, None] * durations_s, jumps)
    arrivals = _arrivals(durations_s, came, step_s)
    moves = _moves(arrivals, (waiting - served) / waiting[:, 1:2])
    # who decodes does not meet the prompts that start an idle engine
    idling = np.flatnonzero(idle > _NEVER)
    anew = (rates * idle / np.maximum(1.0 - idle, 1e-12))[idling, None] * step_s[idling]
    started = moves[idling] + np.minimum(anew, 1.0)[:, :, None] * (jumps[idling, None] - moves[idling])
    solved = _stationary(np.concatenate([moves, started]))
    share, met = solved[: rates.size], solved[: rates.size].copy()
    met[idling] = solved[rates.size :]
    met *= step_s
    paused = np.zeros_like(waiting)
    if curve.prompts_first:  # of the ranks, those that have a prompt
        paused[:, 1:] = 1.0 - (1.0 - 1.0 / dp) ** np.maximum(served[:, 1:] / mean, 1.0) if dp > 1 else 1.0
    going_on = np.matmul((share * (1.0 - paused))[:, None], moves)[:, 0]
    # of prompts of mean length the first waiting has come as far as the others leave it, to a cell
    before = np.maximum(np.rint(waiting / mean), 1.0) - 1.0
    first = np.maximum(waiting - before * mean - waiting[:, 1:2], 0.0)
    ended = np.where(served < first, 0.0, np.floor((served - first) / mean) + 1.0)
    ended[:, 0] = 0.0
    beginning = np.matmul((share * ended)[:, None], moves)[:, 0]
    gap_s, gap_square = _gaps(moves, step_s, paused)
    after_token = going_on / going_on.sum(axis=1, keepdims=True)
    variance = (after_token * gap_square).sum(axis=1) - (after_token * gap_s).sum(axis=1) ** 2
    after_prompt = beginning / np.maximum(beginning.sum(axis=1, keepdims=True), 1e-300)
    # where decodes wait for all prompts gaps begin anew after each decode step
    at_first, lasting = after_prompt - after_token, variance
    if not curve.prompts_first:
        at_first, lasting = _settling(moves, share, step_s, at_first)
    return PromptQueue(
        room=room, decode_s=decode_s, typical=typical, ranks=dp, sizes=table, waiting=waiting, served=served,
        step_s=step_s,
        met=met / met.sum(axis=1, keepdims=True), durations_s=durations_s, came=came,
        come=np.matmul(share[:, None], arrivals)[:, 0],
        after_token=after_token,
        after_prompt=after_prompt, at_first=at_first,
        gap_s=gap_s, gap_square=gap_square, paused=paused, no_more=moves[:, :, 0],
        gap_variance=variance, lasting_variance=lasting,
    )  # fmt: skip


@lru_cache(maxsize=16)
def _prompts(times: StepTimes, lengths: Lengths, trace: TraceReplay | None, token_budget: float) -> _Prompts:
    """Prompts in tokens of mean cost: those of long prompts attend to more."""
    one, room = np.ones(1), np.full(1, token_budget)
    token_s = float(times.prompt_step_s(0.0 * one, room, room, one)[0]) / token_budget
    length, count = np.unique(lengths_at(lengths, trace, "input_tokens", 0), return_counts=True)
    each = token_budget / times.dp
    full = np.ceil(length / each - 1e-9) - 1.0
    beyond_s = times.own_prompt_s(length, full, length - full * each, room)
    work, chance = np.maximum(length + beyond_s / token_s, 1.0), count / count.sum()
    longest = float(np.quantile(np.repeat(work, count), 1.0 - 2.0 / POINTS))
    return _Prompts(work, chance, float(work @ chance), float(work**2 @ chance), longest)


def _computed(waiting: Array, room: Array, typical: float, ranks: int) -> Array:
    room = room[:, None]
    return np.minimum(waiting, room if ranks == 1 else room / ranks * np.clip(waiting / typical, 1.0, ranks))


def _cell(rates: Array, room: Array, prompts: _Prompts, step_s: Array, full_step_s: Array) -> Array:
    """Width of the grid's cells: it holds nearly all that may wait. [tokens]"""
    mean, square = prompts.mean, prompts.square
    come = prompts.longest + rates * step_s * mean + _DEVIATIONS * np.sqrt(rates * step_s * square)
    # Pollaczek and Khinchine's mean work, beyond what a step holds
    load = np.minimum(rates * mean * full_step_s / room, 0.98)
    backlog = rates * square * full_step_s / room / (2.0 * (1.0 - load))
    reach = come + _BACKLOGS * backlog * np.minimum(come / room, 1.0)
    wanted = reach / (_CELLS - 2)
    # whole cells in what a step holds, where that matters
    return np.asarray(np.where(reach > room, room / np.maximum(np.floor(room / wanted), 1.0), wanted))


def _on_grid(prompts: _Prompts, cell: Array) -> tuple[Array, Array]:
    """The grid, shape (loads, cells), and the distribution of a prompt's length over it, each keeping the mean."""
    position = prompts.work / cell[:, None]
    # a prompt is at least a cell: none would be a step without prompts; where many come in a step none matters
    position = np.where(prompts.mean < 2.0 * cell[:, None], position, np.maximum(position, 1.0))
    position = np.minimum(position, _CELLS - 1.0)
    lower = np.minimum(position.astype(np.int64), _CELLS - 2)
    part = position - lower
    row = np.arange(len(cell))[:, None] * _CELLS
    size = len(cell) * _CELLS
    place, above = (row + lower).ravel(), part * prompts.chance
    begins = np.bincount(place, weights=(prompts.chance - above).ravel(), minlength=size)
    ends = np.bincount(place + 1, weights=above.ravel(), minlength=size)
    jumps = np.asarray((begins + ends).reshape(-1, _CELLS), dtype=np.float64)
    return _CELL * (prompts.mean / (jumps @ _CELL))[:, None], jumps


def _compound_poisson(counts: Array, jumps: Array) -> Array:
    """Distribution over cells of a sum of a Poisson number of ``jumps``, what lies beyond in the last cell.

    Parameters
    ----------
    counts : mean numbers, evenly spaced, shape (loads, d). [-]
    jumps : distribution over cells, shape (loads, n). [-]
    """
    spectrum = np.fft.rfft(jumps, 2 * _CELLS, axis=1)[:, None] - 1.0
    # evenly spaced numbers are a geometric series
    series = np.empty((*counts.shape, spectrum.shape[2]), np.complex128)
    np.exp(counts[:, :1, None] * spectrum, out=series[:, :1])
    series[:, 1:] = np.exp((counts[:, 1:2, None] - counts[:, :1, None]) * spectrum)
    whole = np.fft.irfft(np.multiply.accumulate(series, axis=1), 2 * _CELLS, axis=2)
    found = np.maximum(whole[:, :, :_CELLS], 0.0)
    found[:, :, -1] += np.maximum(1.0 - found.sum(axis=2), 0.0)
    return np.asarray(found / found.sum(axis=2, keepdims=True))


def _arrivals(durations_s: Array, came: Array, step_s: Array) -> Array:
    """Distributions of the tokens that come during steps, between those tabulated, shape (loads, n, n). [-]"""
    width = np.maximum(durations_s[:, 1] - durations_s[:, 0], 1e-300)[:, None]
    at = np.clip((step_s - durations_s[:, :1]) / width, 0.0, _DURATIONS - 1.0)
    part = np.maximum(1.0 - np.abs(at[:, :, None] - np.arange(_DURATIONS)), 0.0)
    return np.asarray(np.matmul(part, came))


def _moves(arrivals: Array, left: Array) -> Array:
    """Chances to go from one number of waiting tokens to another in a step, shape (loads, n, n). [-]

    ``left``: what a step leaves, shape (loads, n). [cells]
    """
    if not left.any():
        return arrivals
    whole = np.floor(left + 1e-9).astype(np.int64)
    part = np.maximum(left - whole, 0.0)[:, :, None]
    moved = (1.0 - part) * _shifted(arrivals, whole) + part * _shifted(arrivals, whole + 1)
    moved[:, :, -1] += np.maximum(1.0 - moved.sum(axis=2), 0.0)
    return np.asarray(moved)


def _shifted(rows: Array, by: NDArray[np.int64]) -> Array:
    """Distributions (loads, n, n) moved up by a number of cells each, (loads, n); what goes beyond is lost."""
    source = np.arange(_CELLS) - by[:, :, None]
    return np.where(source >= 0, np.take_along_axis(rows, np.maximum(source, 0), axis=2), 0.0)


def _stationary(moves: Array) -> Array:
    """Stationary distributions of Markov chains, (loads, n, n) -> (loads, n). [-]"""
    system = moves - _ONE
    system[:, :, -1] = 1.0
    right = np.zeros((len(moves), _CELLS, 1))
    right[:, -1] = 1.0
    share = np.maximum(np.linalg.solve(np.swapaxes(system, 1, 2), right)[:, :, 0], 0.0)
    return np.asarray(share / share.sum(axis=1, keepdims=True))


def _settling(moves: Array, share: Array, step_s: Array, begin: Array) -> tuple[Array, Array]:
    """Steps met in excess before a chain is stationary that begins ``begin`` off it; variance of many steps' time.

    By the chain's fundamental matrix (Kemeny and Snell, "Finite Markov Chains", 1960, ch. 4): shapes (loads, n), and
    (loads,), of the time over the steps' number. [steps], [s^2]
    """
    off = step_s - (share * step_s).sum(axis=1, keepdims=True)
    weighted = share * off
    inverse = _ONE - moves + share[:, None]
    begun = np.empty((*begin.shape, 2))
    begun[:, :, 0], begun[:, :, 1] = begin, weighted
    solved = np.linalg.solve(np.swapaxes(inverse, 1, 2), begun)
    met, ahead = np.asarray(solved[:, :, 0], np.float64), np.asarray(solved[:, :, 1], np.float64)
    return met, (2.0 * ahead * off - weighted * off).sum(axis=1)


def _gaps(moves: Array, step_s: Array, paused: Array) -> tuple[Array, Array]:
    """Mean and mean square of the time from the begin of a step to the next token of who decodes, each (loads, n).

    A decoding request has a token from a step unless it is ``paused`` there.
    """
    if not paused.any():
        return step_s, step_s**2
    on = paused[:, :, None] * moves
    system = _ONE - on
    mean = np.linalg.solve(system, step_s[:, :, None])
    square = np.linalg.solve(system, step_s[:, :, None] ** 2 + 2.0 * step_s[:, :, None] * np.matmul(on, mean))
    return np.asarray(mean[:, :, 0]), np.asarray(square[:, :, 0])
