"""Fixed points at which distributions are added up: each stands for a request, with what it brings and what it meets.

A Richtmyer sequence, multiples of the roots of primes modulo 1, fills the cube evenly (Niederreiter, "Random Number
Generation and Quasi-Monte Carlo Methods", 1992, ch. 3). The points are the same for all loads, so that results change
smoothly with them and repeat exactly.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from simmoe.metrics import Quantiles
from simmoe.specs.traces import read_trace
from simmoe.specs.workload import Lengths, TraceReplay, Workload

Array = NDArray[np.float64]

POINTS = 1024
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23)


@lru_cache(maxsize=1)
def shares() -> Array:
    """Even points of the cube, shape (coordinates, POINTS); the first coordinate has equal steps. [-]"""
    index = np.arange(POINTS) + 0.5
    return np.vstack([index / POINTS, np.sqrt(np.array(_PRIMES, dtype=np.float64))[:, None] * index % 1.0])


@lru_cache(maxsize=16)
def normals(coordinate: int) -> Array:
    """Quantiles of the normal distribution at a coordinate of `shares`, shape (POINTS,). [-]"""
    return _normal(shares()[coordinate])


def _normal(share: Array) -> Array:
    quantile = NormalDist().inv_cdf
    return np.array([quantile(u) for u in share.tolist()])


def prompts_at(workload: Workload, coordinate: int) -> Array:
    """Prompt lengths of requests at a coordinate of `shares`, shape (POINTS,). [tokens]"""
    return _lengths_at(workload.input, workload.trace, "input_tokens", coordinate)


def outputs_at(workload: Workload, coordinate: int) -> Array:
    """Output lengths of requests at a coordinate of `shares`, shape (POINTS,). [tokens]"""
    return _lengths_at(workload.output, workload.trace, "output_tokens", coordinate)


@lru_cache(maxsize=64)
def _lengths_at(lengths: Lengths, trace: TraceReplay | None, column: str, coordinate: int) -> Array:
    share = shares()[coordinate]
    if lengths.kind == "uniform":
        assert lengths.high is not None
        return np.floor(lengths.low + share * (lengths.high - lengths.low + 1))
    if lengths.kind == "lognormal":
        variance = math.log1p(lengths.cv**2)
        values = np.exp(math.log(lengths.mean) - variance / 2 + math.sqrt(variance) * normals(coordinate))
        return np.clip(values, lengths.low, lengths.high)
    if lengths.kind == "empirical":
        assert lengths.values is not None
        return np.quantile(np.array(lengths.values, dtype=np.float64), share, method="inverted_cdf")
    if lengths.kind == "trace":
        assert trace is not None
        return np.quantile(np.asarray(getattr(read_trace(trace), column), np.float64), share, method="inverted_cdf")
    return np.full(POINTS, max(1.0, lengths.mean))


def drawn(upto: Array, share: Array) -> NDArray[np.int64]:
    """Where shares fall in cumulative distributions, one a row: (rows, n), (m,) -> (rows, m)."""
    found = [np.searchsorted(row, share * row[-1]) for row in upto]
    return np.minimum(np.array(found), upto.shape[1] - 1)


def read_rows(x: Array, grid: Array, values: Array) -> Array:
    """Row by row linear interpolation: (rows, m), (rows, n), (rows, n) -> (rows, m)."""
    return np.array([np.interp(each, at, value) for each, at, value in zip(x, grid, values, strict=True)])


def quantiles(values: Array, means: Array | None = None) -> list[Quantiles]:
    """Mean (or the one given) and percentiles of equally likely values, a distribution a row, shape (rows, n)."""
    n = values.shape[1]
    at = [min(n - 1, math.floor(q * n)) for q in (0.5, 0.9, 0.99)]
    picked = np.partition(values, at, axis=1)[:, at]
    means = values.mean(axis=1) if means is None else means
    return [
        Quantiles(mean=mean, p50=p50, p90=p90, p99=p99)
        for mean, (p50, p90, p99) in zip(means.tolist(), picked.tolist(), strict=True)
    ]
