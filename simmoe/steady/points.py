"""Fixed points at which distributions are added up: each stands for a request, with what it brings and what it meets.

A Richtmyer sequence, multiples of the roots of primes modulo 1, fills the cube evenly (Niederreiter, "Random Number
Generation and Quasi-Monte Carlo Methods", 1992, ch. 3); of each coordinate only the order is used. The points are the
same for all loads, so that results change smoothly with them and repeat exactly.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simmoe.metrics import Quantiles
from simmoe.specs.traces import read_trace
from simmoe.specs.workload import Lengths, TraceReplay, Workload

Array = NDArray[np.float64]

POINTS = 512
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23)


@lru_cache(maxsize=1)
def shares() -> Array:
    """Even points of the cube, shape (coordinates, POINTS), each coordinate's in equal steps. [-]"""
    sequence = np.sqrt(np.array(_PRIMES, dtype=np.float64))[:, None] * np.arange(1, POINTS + 1) % 1.0
    return (np.argsort(np.argsort(sequence, axis=1), axis=1) + 0.5) / POINTS


@lru_cache(maxsize=16)
def normals(coordinate: int) -> Array:
    """Quantiles of the normal distribution at a coordinate of `shares`, shape (POINTS,). [-]"""
    return _normal(shares()[coordinate])


def _normal(share: Array) -> Array:
    quantile = NormalDist().inv_cdf
    return np.array([quantile(u) for u in share.tolist()])


def prompts_at(workload: Workload, coordinate: int) -> Array:
    """Prompt lengths of requests at a coordinate of `shares`, shape (POINTS,). [tokens]"""
    return lengths_at(workload.input, workload.trace, "input_tokens", coordinate)


def outputs_at(workload: Workload, coordinate: int) -> Array:
    """Output lengths of requests at a coordinate of `shares`, shape (POINTS,). [tokens]"""
    return lengths_at(workload.output, workload.trace, "output_tokens", coordinate)


@lru_cache(maxsize=64)
def lengths_at(lengths: Lengths, trace: TraceReplay | None, column: str, coordinate: int) -> Array:
    """Lengths of requests, those of a trace in one of its columns, at a coordinate of `shares`. [tokens]"""
    share = shares()[coordinate]
    if lengths.kind == "uniform":
        assert lengths.high is not None
        return np.asarray(np.floor(lengths.low + share * (lengths.high - lengths.low + 1)))
    if lengths.kind == "lognormal":
        variance = math.log1p(lengths.cv**2)
        values = np.exp(math.log(lengths.mean) - variance / 2 + math.sqrt(variance) * normals(coordinate))
        return np.asarray(np.clip(values, lengths.low, lengths.high))
    if lengths.kind == "empirical":
        assert lengths.values is not None
        return _inverse(lengths.values, share)
    if lengths.kind == "trace":
        assert trace is not None
        return _inverse(getattr(read_trace(trace), column), share)
    return np.full(POINTS, max(1.0, lengths.mean))


def _inverse(values: ArrayLike, share: Array) -> Array:
    return np.asarray(np.quantile(np.asarray(values, np.float64), share, method="inverted_cdf"))


@lru_cache(maxsize=16)
def places(coordinate: int) -> NDArray[np.int64]:
    """Where each point stands among a coordinate's shares, shape (POINTS,)."""
    return np.asarray(shares()[coordinate] * POINTS, dtype=np.int64)


def drawn(weights: Array, coordinate: int) -> NDArray[np.int64]:
    """What each point draws from distributions over 0, 1, ..., one a row: (rows, n) -> (rows, POINTS)."""
    return drawn_in_order(weights).take(places(coordinate), axis=1)


def drawn_in_order(weights: Array) -> NDArray[np.int64]:
    """As `drawn`, for points in the order of their share."""
    upto = np.cumsum(weights, axis=1)
    # in equal steps: how many lie below needs no search
    below = (upto[:, :-1] * (POINTS / upto[:, -1:]) + 0.5).astype(np.int64)
    below += np.arange(0, len(weights) * (POINTS + 1), POINTS + 1)[:, None]
    passed = np.bincount(below.ravel(), minlength=len(weights) * (POINTS + 1))
    return passed.reshape(-1, POINTS + 1)[:, :-1].cumsum(axis=1)


def quantiles(values: Array, means: Array | None = None) -> list[Quantiles]:
    """Mean (or the one given) and percentiles of equally likely values, a distribution a row, shape (rows, n)."""
    n = values.shape[1]
    at = np.array([0.5, 0.9, 0.99]) * n - 0.5
    lower = np.floor(at).astype(np.int64)
    ordered = np.sort(values, axis=1)  # vectorised, which selecting a few is not
    picked = ordered[:, lower] + (ordered[:, lower + 1] - ordered[:, lower]) * (at - lower)
    means = values.mean(axis=1) if means is None else means
    return [
        Quantiles(mean=mean, p50=p50, p90=p90, p99=p99)
        for mean, (p50, p90, p99) in zip(means.tolist(), picked.tolist(), strict=True)
    ]
