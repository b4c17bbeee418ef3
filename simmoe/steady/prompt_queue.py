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

import numpy as np
from numpy.typing import NDArray

from simmoe.specs.workload import Workload
from simmoe.steady.load_curve import Curve
from simmoe.steady.points import POINTS, prompts_at, read_rows

Array = NDArray[np.float64]

#: Cells of the grid of waiting tokens, lengths of steps whose arrivals are tabulated, points of a step's time by tokens.
_CELLS, _DURATIONS, _SIZES = 64, 10, 24
_CELL = np.arange(_CELLS, dtype=np.float64)
#: How far the grid reaches, in standard deviations of what comes during a step, and means of what waits beyond its room.
_DEVIATIONS, _BACKLOGS = 4.0, 5.0


@dataclass(frozen=True)
class PromptQueue:
    """Steps of one replica, at several loads.

    Attributes
    ----------
    room : tokens that a step has for prompts, shape (loads,). [tokens]
    decode_s : a step without prompts, shape (loads,). [s]
    sizes, sizes_s : prompt tokens of a step and its time, shape (loads, m). [tokens], [s]
    alone_s : the same of a step without decodes, at ``sizes``. [s]
    waiting : prompt tokens waiting when a step begins, shape (loads, n). [tokens]
    served : those it computes, shape (loads, n). [tokens]
    step_s : its time, shape (loads, n). [s]
    share : of steps, shape (loads, n). [-]
    durations_s : lengths of step for which ``came`` is tabulated, shape (loads, d). [s]
    came : distribution of the tokens that come meanwhile, over ``waiting``'s cells, shape (loads, d, n). [-]
    after_token : of gaps between two tokens, those whose first step has so many waiting, shape (loads, n). [-]
    gap_s, gap_square : mean gap and mean squared gap given that, shape (loads, n). [s], [s^2]
    echo : what a longer step adds to the next, by the prompts that come meanwhile, shape (loads,). [s/s]
    """

    room: Array
    decode_s: Array
    sizes: Array
    sizes_s: Array
    alone_s: Array
    waiting: Array
    served: Array
    step_s: Array
    share: Array
    durations_s: Array
    came: Array
    after_token: Array
    gap_s: Array
    gap_square: Array
    echo: Array


def prompt_queue(curve: Curve, workload: Workload, rates: Array, in_flight: Array, idle: Array) -> PromptQueue:
    """Solve for each of ``rates`` [1/s], ``in_flight`` requests being there while any is, and ``idle`` the rest of time.

    All of shape (loads,).
    """
    times, dp = curve.times, curve.times.dp
    at = curve.at(in_flight, ("decode_step_s", "room", "decoding", "beside", "mixed_step_s"))
    lengths = prompts_at(workload, 0)
    room, decode_s = at["room"], at["decode_step_s"]
    sizes = np.exp(np.log(room)[:, None] * np.linspace(0.0, 1.0, _SIZES))
    beside = at["beside"] if curve.prompts_first else at["decoding"]
    beside = np.stack([beside, np.zeros_like(beside)])[:, :, None] + np.zeros_like(sizes)
    fullest = np.broadcast_to(times.fullest(at["decoding"])[:, None], beside.shape)
    both = (np.broadcast_to(sizes, beside.shape), np.broadcast_to(room[:, None], beside.shape))
    flat = times.prompt_step_s(beside.ravel(), *(each.ravel() for each in both), fullest.ravel())
    sizes_s, alone_s = np.maximum.accumulate(flat.reshape(beside.shape), axis=2)
    cell = _cell(rates, room, lengths, at["mixed_step_s"], sizes_s[:, -1])
    waiting, jumps = _on_grid(lengths, cell)
    # as many ranks work on prompts as have one
    typical = float((lengths**2).mean() / lengths.mean())
    served = np.minimum(waiting, room[:, None] / dp * np.clip(waiting / typical, 1.0, dp))
    step_s = read_rows(served, sizes, sizes_s)
    step_s[:, 0] = decode_s
    durations_s = np.linspace(step_s.min(axis=1), step_s.max(axis=1), _DURATIONS, axis=1)
    came = _compound_poisson(rates[:, None] * durations_s, jumps)
    moves = _moves(durations_s, came, step_s, (waiting - served) / waiting[:, 1:2])
    share = _stationary(moves, jumps, rates * idle / np.maximum(1.0 - idle, 1e-12), step_s)
    paused = np.zeros_like(waiting)
    if curve.prompts_first:  # of the ranks, those that have a prompt
        paused[:, 1:] = 1.0 - (1.0 - 1.0 / dp) ** np.maximum(served[:, 1:] / lengths.mean(), 1.0) if dp > 1 else 1.0
    after_token = np.matmul((share * (1.0 - paused))[:, None], moves)[:, 0]
    gap_s, gap_square = _gaps(moves, step_s, paused)
    return PromptQueue(
        room=room, decode_s=decode_s, sizes=sizes, sizes_s=sizes_s, alone_s=alone_s, waiting=waiting, served=served,
        step_s=step_s, share=share, durations_s=durations_s, came=came,
        after_token=after_token / after_token.sum(axis=1, keepdims=True), gap_s=gap_s, gap_square=gap_square,
        echo=np.clip(rates * lengths.mean() * (sizes_s[:, -1] - decode_s) / room, 0.0, 0.95),
    )  # fmt: skip


def _cell(rates: Array, room: Array, lengths: Array, step_s: Array, full_step_s: Array) -> Array:
    """Width of the grid's cells: it holds nearly all that may wait. [tokens]"""
    mean, square = lengths.mean(), (lengths**2).mean()
    longest = float(np.quantile(lengths, 1.0 - 2.0 / POINTS))
    come = longest + rates * step_s * mean + _DEVIATIONS * np.sqrt(rates * step_s * square)
    # Pollaczek and Khinchine's mean work, beyond what a step holds
    load = np.minimum(rates * mean * full_step_s / room, 0.98)
    backlog = rates * square * full_step_s / room / (2.0 * (1.0 - load))
    reach = come + _BACKLOGS * backlog * np.minimum(come / room, 1.0)
    wanted = reach / (_CELLS - 2)
    # whole cells in what a step holds, where that matters
    return np.where(reach > room, room / np.maximum(np.floor(room / wanted), 1.0), wanted)


def _on_grid(lengths: Array, cell: Array) -> tuple[Array, Array]:
    """The grid, shape (loads, cells), and the distribution of a prompt's length over it, each keeping the mean."""
    position = lengths / cell[:, None]
    # a prompt is at least a cell: none would be a step without prompts; where many come in a step none matters
    position = np.where(lengths.mean() < 2.0 * cell[:, None], position, np.maximum(position, 1.0))
    position = np.minimum(position, _CELLS - 1.0)
    lower = np.minimum(position.astype(np.int64), _CELLS - 2)
    part = position - lower
    row = np.arange(len(cell))[:, None] * _CELLS
    size = len(cell) * _CELLS
    jumps = np.bincount((row + lower).ravel(), weights=(1.0 - part).ravel(), minlength=size)
    jumps += np.bincount((row + lower + 1).ravel(), weights=part.ravel(), minlength=size)
    jumps = jumps.reshape(-1, _CELLS) / lengths.size
    return _CELL * (lengths.mean() / (jumps @ _CELL))[:, None], jumps


def _compound_poisson(counts: Array, jumps: Array) -> Array:
    """Distribution over cells of a sum of a Poisson number of ``jumps``, what lies beyond in the last cell.

    Parameters
    ----------
    counts : mean numbers, shape (loads, d). [-]
    jumps : distribution over cells, shape (loads, n). [-]
    """
    spectrum = np.fft.rfft(jumps, 2 * _CELLS, axis=1)[:, None]
    whole = np.fft.irfft(np.exp(counts[:, :, None] * (spectrum - 1.0)), 2 * _CELLS, axis=2)
    found = np.maximum(whole[:, :, :_CELLS], 0.0)
    found[:, :, -1] += np.maximum(1.0 - found.sum(axis=2), 0.0)
    return found / found.sum(axis=2, keepdims=True)


def _moves(durations_s: Array, came: Array, step_s: Array, left: Array) -> Array:
    """Chances to go from one number of waiting tokens to another in a step, shape (loads, n, n). [-]

    ``left``: what a step leaves. [cells]
    """
    loads = np.arange(len(step_s))[:, None]
    width = np.maximum(durations_s[:, 1] - durations_s[:, 0], 1e-300)[:, None]
    at = np.clip((step_s - durations_s[:, :1]) / width, 0.0, _DURATIONS - 1.0)
    lower = np.minimum(at.astype(np.int64), _DURATIONS - 2)
    part = (at - lower)[:, :, None]
    arrivals = came[loads, lower] * (1.0 - part) + came[loads, lower + 1] * part
    if not left.any():
        return arrivals
    whole = np.floor(left + 1e-9).astype(np.int64)
    part = np.maximum(left - whole, 0.0)[:, :, None]
    moved = (1.0 - part) * _shifted(arrivals, whole) + part * _shifted(arrivals, whole + 1)
    moved[:, :, -1] += np.maximum(1.0 - moved.sum(axis=2), 0.0)
    return moved


def _shifted(rows: Array, by: NDArray[np.int64]) -> Array:
    """Distributions (loads, n, n) moved up by a number of cells each, (loads, n); what goes beyond is lost."""
    source = np.arange(_CELLS) - by[:, :, None]
    return np.where(source >= 0, np.take_along_axis(rows, np.maximum(source, 0), axis=2), 0.0)


def _stationary(moves: Array, jumps: Array, restarts: Array, step_s: Array) -> Array:
    """Share of steps by waiting tokens, (loads, n). ``restarts``: how often one comes to an idle engine. [1/s busy]"""
    anew = np.minimum(restarts[:, None] * step_s, 1.0)[:, :, None]
    moves = moves * (1.0 - anew) + anew * jumps[:, None]
    system = np.swapaxes(moves, 1, 2) - np.eye(_CELLS)
    system[:, -1] = 1.0
    right = np.zeros((len(moves), _CELLS, 1))
    right[:, -1] = 1.0
    share = np.maximum(np.linalg.solve(system, right)[:, :, 0], 0.0)
    return np.asarray(share / share.sum(axis=1, keepdims=True))


def _gaps(moves: Array, step_s: Array, paused: Array) -> tuple[Array, Array]:
    """Mean and mean square of the time from the begin of a step to the next token of who decodes, each (loads, n).

    A decoding request has a token from a step unless it is ``paused`` there.
    """
    if not paused.any():
        return step_s, step_s**2
    on = paused[:, :, None] * moves
    system = np.eye(_CELLS) - on
    mean = np.linalg.solve(system, step_s[:, :, None])
    square = np.linalg.solve(system, step_s[:, :, None] ** 2 + 2.0 * step_s[:, :, None] * np.matmul(on, mean))
    return mean[:, :, 0], square[:, :, 0]
