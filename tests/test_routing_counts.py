"""The normal approximation of count distributions, and expected maxima, against scipy and exact sums."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from simmoe.routing.counts import count_cdf, expected_maximum, expected_tiles_of_maximum


@given(st.integers(1, 5000), st.floats(1e-4, 0.9))
def test_binomial_cdf_is_within_what_the_module_states(trials, chance):
    counts = np.arange(min(trials, 300) + 1.0)
    mean = trials * chance
    exact = stats.binom.cdf(counts, trials, chance)
    assert np.max(np.abs(count_cdf(counts, np.array(mean), np.array(mean * (1 - chance))) - exact)) < (
        3e-4 if chance < 0.2 else 5e-3
    )


@given(st.floats(0.01, 500), st.floats(0.05, 3.0))
def test_overdispersed_counts_are_negative_binomial(mean, excess):
    counts = np.arange(0, 300.0)
    size = mean / excess
    exact = stats.nbinom.cdf(counts, size, 1 / (1 + excess))
    off = np.abs(count_cdf(counts, np.array(mean), np.array(mean * (1 + excess))) - exact)
    assert off.max() < (0.04 if size < 2 else 0.008)  # below size 2 it is the far tail of a near-empty count


@pytest.mark.parametrize("mean", [30.0, 300.0, 2e4])
def test_poisson_cdf_is_close_for_large_means(mean):
    counts = np.round(mean + np.sqrt(mean) * np.linspace(-4, 5, 41))
    assert count_cdf(counts, np.array(mean), np.array(mean)) == pytest.approx(stats.poisson.cdf(counts, mean), abs=1e-5)


@pytest.mark.parametrize("mean", [0.03, 0.5, 4.0, 60.0, 5000.0, 3e5])
@pytest.mark.parametrize("copies", [2, 32, 256])
def test_maximum_of_poisson_counts_is_the_exact_sum(mean, copies):
    counts = np.arange(int(mean + 12 * mean**0.5 + 30))
    exact = np.sum(1 - stats.poisson.cdf(counts, mean) ** copies)
    got = expected_maximum(np.array([[mean]]), np.array([[mean]]), np.array([float(copies)]))[0]
    assert got == pytest.approx(exact, rel=5e-3)


def test_classes_of_equal_counts_are_the_same_as_counts_told_one_by_one():
    mean = np.array([[3.0, 3.0, 7.0], [300.0, 300.0, 310.0]])
    pooled = expected_maximum(mean[:, 1:], mean[:, 1:], np.array([2.0, 1.0]))
    assert expected_maximum(mean, mean) == pytest.approx(pooled, rel=1e-12)


@given(st.floats(0.01, 1e5), st.floats(0.01, 1.5), st.integers(2, 256))
def test_a_maximum_is_at_least_the_mean_and_grows_with_the_number_of_counts(mean, ratio, copies):
    moments = np.array([[mean]]), np.array([[mean * ratio]])
    fewer = expected_maximum(*moments, np.array([float(copies)]))[0]
    more = expected_maximum(*moments, np.array([2.0 * copies]))[0]
    assert mean <= fewer <= more * (1 + 2e-3)


def test_most_tiles_of_unlike_ranks_equal_the_sum_over_all_outcomes():
    """Two ranks, of counts 1 and 2 and of count 3, in tiles of 4: every outcome of three binomials, one by one."""
    trials, chance, tile = 12, np.array([0.2, 0.45, 0.6]), 4
    law = stats.binom(trials, chance[:, None]).pmf(np.arange(trials + 1))
    tiles = np.ceil(np.arange(trials + 1) / tile)
    first = tiles[:, None, None] + tiles[None, :, None]
    outcome = np.maximum(first, tiles[None, None, :])
    exact = float((law[0][:, None, None] * law[1][None, :, None] * law[2][None, None, :] * outcome).sum())
    held = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    mean, variance = (trials * chance)[None], (trials * chance * (1 - chance))[None]
    most = expected_tiles_of_maximum(mean, variance, np.array([4.0]), held, np.array([1, 1]))
    assert most[0] == pytest.approx(exact, rel=2e-3)
