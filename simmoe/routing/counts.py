"""Largest of many token counts, or of sums of their row tiles: closed-form law of one, expected maximum of independent.

Model: a count is described by mean and variance alone and taken as binomial, Poisson or negative binomial, whichever
has that variance. Its distribution function is exact at 0 and 1 and the Peizer-Pratt normal approximation above: within
0.0003 of the binomial for chances below 0.2, 0.005 at any chance, 1e-5 from a mean of 30 on.
Left out: dependence between counts. A fixed total is honoured by the caller, which widens the variances (see
`expected_maximum`). Checked against scipy and against drawn routings in tests/test_routing_counts.py.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Points at which the distribution of a maximum is evaluated, at most; it spans about ten standard deviations.
_POINTS = 32
_NORMAL_GRID = np.linspace(-8.5, 8.5, 3401)
_NORMAL_CDF = np.array([0.5 * math.erfc(-z / math.sqrt(2.0)) for z in _NORMAL_GRID])


def expected_tiles_of_maximum(
    mean: Array, variance: Array, tile: Array, ranks: Array, alike: NDArray[np.intp]
) -> Array:
    r"""Mean of the most tiles any rank fills, the sum of :math:`\lceil c / m \rceil` over the counts it holds.

    The distribution of each count's tiles is read off its own, that of a rank's sum is their convolution, and ranks are
    independent. Sums of few counts need this: their law leans on where the counts stand in their tiles, which mean and
    variance do not tell. Exact where the counts' distribution is, hence it grows with the counts.

    Parameters
    ----------
    mean, variance : ndarray, shape (B, G)
        Per batch and class of counts. [tokens], [tokens**2]
    tile : ndarray, shape (B,)
        m, tile height. [tokens]
    ranks : ndarray, shape (G, R)
        Counts of each class on each kind of rank.
    alike : ndarray, shape (R,)
        Ranks of each kind.

    Returns
    -------
    ndarray, shape (B,). [tiles]
    """
    if not len(mean):
        return np.zeros(0)
    deviation, height = np.sqrt(variance), tile[:, None]
    reach = math.sqrt(2.0 * math.log(1e5 * float(ranks.sum(axis=0) @ alike)))
    low = np.floor(np.maximum(mean - 4.5 * deviation, 0.0) / height)
    high = np.ceil((mean + reach * deviation + 6.0) / height)
    width = int((high - low).max()) + 1
    count = np.floor((low[:, :, None] + np.arange(width)) * height[:, :, None])
    cdf = count_cdf(count, mean[:, :, None], variance[:, :, None])
    cdf[:, :, -1] = 1.0
    length = 1 << (int(ranks.sum(axis=0).max()) * (width - 1)).bit_length()  # a power of two, quick to transform
    transform = np.fft.rfft(np.diff(cdf, axis=2, prepend=0.0), n=length, axis=2)
    least = low @ ranks
    start = least.max(axis=1)
    place = start.astype(np.intp)[:, None] + np.arange(length)
    log_at_most = np.zeros((len(mean), length))
    rows = np.arange(len(mean))[:, None]
    for rank, copies in enumerate(alike):
        members = np.repeat(np.arange(len(ranks)), ranks[:, rank].astype(np.intp))
        law = np.cumsum(np.fft.irfft(transform[:, members].prod(axis=1), n=length, axis=1), axis=1)
        law = np.where(law > 1.0 - 1e-12, 1.0, law)  # what the transform rounds is no chance
        at = np.minimum(place - least[:, rank].astype(np.intp)[:, None], length - 1)
        log_at_most += copies * np.log(np.clip(law[rows, at], 1e-300, 1.0))
    return np.asarray(start + (1.0 - np.exp(log_at_most)).sum(axis=1), dtype=np.float64)


def expected_maximum(mean: Array, variance: Array, multiplicity: Array | None = None) -> Array:
    r"""Mean of the largest of independent counts.

    .. math:: E[\max] = \sum_{m \ge 0} \Bigl(1 - \prod_g F_g(m)^{n_g}\Bigr)

    Counts of one batch add up to a fixed total, so they are not independent. For D exchangeable counts of variance v
    the maximum is, in the normal limit, exactly that of independent ones of variance v D/(D-1): subtracting their
    average from independent counts fixes the total and moves the maximum by zero in the mean. Pass that variance.

    Parameters
    ----------
    mean, variance : ndarray, shape (B, G)
        Per batch and per class of counts. [tokens], [tokens**2]
    multiplicity : ndarray, shape (G,), optional
        Counts in each class; default one.

    Returns
    -------
    ndarray, shape (B,)
        Not below the largest mean. [tokens]
    """
    copies = np.ones(mean.shape[1]) if multiplicity is None else multiplicity
    deviation = np.sqrt(variance)
    low = np.floor(np.maximum((mean - 4.5 * deviation).max(axis=1), 0.0))
    spread = math.sqrt(2.0 * math.log(1e5 * copies.sum()))
    high = np.ceil((mean + spread * deviation).max(axis=1) + 6.0)
    # sums over runs of integers are taken at their midpoints: exact while a run is one integer, and the
    # distribution is smooth on the scale of a run otherwise
    run = np.ceil((high - low) / _POINTS)
    grid = low[:, None] + run[:, None] * np.arange(_POINTS) + (run[:, None] - 1.0) / 2.0
    cdf = count_cdf(grid[:, None, :], mean[:, :, None], variance[:, :, None])
    log_cdf = np.log(np.maximum(cdf, 1e-300))
    at_most = np.exp(np.einsum("bgm,g->bm", log_cdf, copies))
    return np.asarray(np.maximum(low + run * (1.0 - at_most).sum(axis=1), mean.max(axis=1)), dtype=np.float64)


def count_cdf(count: Array, mean: Array, variance: Array) -> Array:
    """P(X <= count) for the binomial, Poisson or negative binomial X of this mean and variance; arrays broadcast.

    References
    ----------
    .. [1] D. B. Peizer, J. W. Pratt, "A normal approximation for binomial, F, beta, and other common, related tail
       probabilities, I", J. Amer. Statist. Assoc. 63 (1968) 1416-1456: the binomial case; the negative binomial
       follows from P(NB(r) <= x) = P(Bin(x + r) >= r).
    """
    mu = np.maximum(mean, 1e-12)
    dispersion = np.clip(variance / mu - 1.0, -1.0 + 1e-9, 1e6)
    # Poisson is the limit of both sides; stepping 1e-6 away from it changes nothing that shows
    excess = np.where(np.abs(dispersion) < 1e-6, -1e-6, dispersion)
    binomial = excess < 0
    size = mu / np.abs(excess)
    chance = np.where(binomial, -excess, excess / (1.0 + excess))
    trials = np.where(binomial, size, count + size)
    hits = count + 0.5
    misses = np.where(binomial, size - count, size) - 0.5
    inside = np.maximum(misses, 1e-9)
    fail = 1.0 - chance
    distance = hits + 1.0 / 6.0 - (trials + 1.0 / 3.0) * chance
    distance = distance + 0.02 * (fail / (hits + 0.5) - chance / (inside + 0.5) + (fail - 0.5) / (trials + 1.0))
    shape = 1.0 + fail * _peizer_pratt(hits / (trials * chance)) + chance * _peizer_pratt(inside / (trials * fail))
    z = distance * np.sqrt(np.maximum(shape, 0.0) / ((trials + 1.0 / 6.0) * chance * fail))
    cdf = np.interp(z, _NORMAL_GRID, _NORMAL_CDF)
    # zero and one are exact, and carry most of the weight when the mean is small
    zero = np.exp(-mu / excess * np.log1p(excess))
    cdf = np.where(count < 0.5, zero, np.where(count == 1.0, zero * (1.0 + mu / (1.0 + excess)), cdf))
    # a size between two whole numbers: the chance of the last count grows with the fraction, exact at both ends
    fraction = size - count
    last = 1.0 - np.clip(fraction, 0.0, 1.0) * chance**size
    return np.asarray(np.where(binomial & (count > 0.5) & (fraction <= 1.0), last, cdf), dtype=np.float64)


def _peizer_pratt(x: Array) -> Array:
    """g(x) = (1 - x^2 + 2 x ln x) / (1 - x)^2, with its series near the removable singularity at 1."""
    h = x - 1.0
    near = np.abs(h) < 0.01
    safe = np.where(near, 2.0, x)
    far = (1.0 - safe * safe + 2.0 * safe * np.log(safe)) / (1.0 - safe) ** 2
    return np.asarray(np.where(near, h * (-1.0 / 3.0 + h * (1.0 / 6.0 - h / 10.0)), far), dtype=np.float64)
