"""Dense and batched matrix products: laws, a slow twin, and unseen measured shapes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmoe.calibrate import fit as calibrate
from simmoe.costs.operators import bmm, gemm, matmul
from simmoe.specs.load import load_hardware
from simmoe.specs.measurement import read_table
from tests.reference import matmul_twin

PROFILES = Path(__file__).parents[1] / "profiles"
H100 = load_hardware("h100")
DEFAULTS = gemm.OPERATOR.defaults
COLD, HOT = True, False

parameter_sets = st.fixed_dictionaries(
    {p.name: st.floats(np.log(p.lower), np.log(p.upper)).map(lambda x: float(np.exp(x))) for p in matmul.PARAMETERS}
)
sizes = st.integers(1, 70_000)
widths = st.sampled_from([(2.0, 2.0, 16.0, 0.0), (1.0, 1.0, 8.0, 1.0), (1.0, 1.0, 8.0, 0.0)])


def product(m, n, k, width=(2.0, 2.0, 16.0, 0.0), batch=1.0, copies=1.0):
    w, a, bits, quantise = width
    return matmul.build(
        batch=batch, m=m, n=n, k=k, weight_bytes=w, activation_bytes=a, compute_bits=bits, quantise=quantise,
        copies=copies, fills_cache=0.0,
    )  # fmt: skip


@given(parameter_sets, sizes, sizes, sizes, widths, st.sampled_from("mnk"), st.floats(1.0, 50.0), st.booleans())
def test_more_rows_columns_or_depth_are_never_faster(q, m, n, k, width, which, factor, cold):
    shape = {"m": m, "n": n, "k": k}
    larger = {**shape, which: np.ceil(shape[which] * factor)}
    small = matmul.seconds(product(**shape, width=width), q, H100, cold)
    large = matmul.seconds(product(**larger, width=width), q, H100, cold)
    assert large >= small * (1 - 1e-9)


@given(parameter_sets, sizes, sizes, sizes, widths)
def test_a_cold_product_never_beats_the_roofline_nor_a_hot_one(q, m, n, k, width):
    f = product(m, n, k, width)
    cold = matmul.seconds(f, q, H100, COLD)
    assert cold >= matmul.roofline(f, H100)
    assert cold >= matmul.seconds(f, q, H100, HOT) * (1 - 1e-9)


@given(parameter_sets, sizes, sizes, sizes, widths, st.floats(1.0, 8.0))
def test_scaling_every_rate_scales_the_time_and_more_of_any_rate_is_never_slower(q, m, n, k, width, c):
    f = product(m, n, k, width)
    device = H100.device
    peak = device.peak.vary(bfloat16=device.peak.bfloat16 * c, fp8=device.peak.fp8 * c)
    faster = H100.vary(device=device.vary(peak=peak, memory_bandwidth=device.memory_bandwidth * c))
    latencies = {name: value / c if name.endswith("_s") else value for name, value in q.items()}
    base = matmul.seconds(f, q, H100, COLD)
    np.testing.assert_allclose(matmul.seconds(f, latencies, faster, COLD), base / c, rtol=1e-9)
    assert matmul.seconds(f, q, H100.vary(device=device.vary(peak=peak)), COLD) <= base * (1 + 1e-9)
    more = H100.vary(device=device.vary(memory_bandwidth=device.memory_bandwidth * c))
    assert matmul.seconds(f, q, more, COLD) <= base * (1 + 1e-9)


@given(parameter_sets, sizes, sizes, sizes, widths, st.integers(1, 128))
def test_the_vectorised_model_equals_its_slow_twin(q, m, n, k, width, batch):
    f = product(m, n, k, width, batch=batch)
    row = {name: float(value) for name, value in f.items()}
    np.testing.assert_allclose(matmul.seconds(f, q, H100, COLD), matmul_twin.cold_seconds(row, q, H100), rtol=1e-9)


def test_one_tile_more_than_a_wave_costs_a_wave_when_nothing_balances(monkeypatch):
    monkeypatch.setattr(matmul, "TILES", ((128, 256),))
    whole = {**DEFAULTS, "wave": 1.0, "power": 12.0, "compute_efficiency": 0.1}
    sms = H100.device.sms
    # 8-bit products are not split along k, so the grid is what the shape says
    columns = np.array([sms, sms + 1, 2 * sms]) * 256
    times = matmul.seconds(product(128, columns, 8192, (1.0, 1.0, 8.0, 0.0)), whole, H100, COLD)
    assert times[1] > 1.9 * times[0]
    assert times[2] == pytest.approx(times[1], rel=0.02)


def test_quantising_the_input_costs_its_bytes():
    with_pass, without = (gemm.features_of(4096, 7168, 7168, weight_bytes=1, activation_bytes=1, compute_bits=8,
                                           quantise=flag) for flag in (1, 0))  # fmt: skip
    extra = matmul.seconds(with_pass, DEFAULTS, H100, COLD) - matmul.seconds(without, DEFAULTS, H100, COLD)
    passed = 4096 * 7168 * 3 / H100.device.memory_bandwidth
    assert passed / DEFAULTS["memory_efficiency"] <= extra <= passed / DEFAULTS["quantise_efficiency"] * 1.001


def test_only_weights_that_fit_l2_together_are_read_from_it():
    q = {**DEFAULTS, "cache_gain": 4.0}
    small, large = (product(8, n, 1024, copies=6) for n in (2048, 16384))  # 6 x 4 MB and 6 x 34 MB of 50 MiB
    assert matmul.seconds(small, q, H100, HOT) < matmul.seconds(small, q, H100, COLD) * 0.95
    np.testing.assert_allclose(matmul.seconds(large, q, H100, HOT), matmul.seconds(large, q, H100, COLD), rtol=1e-3)


def test_one_head_is_a_dense_product():
    one = bmm.features_of(256, 1, 512, 128)
    np.testing.assert_array_equal(
        bmm.OPERATOR.seconds(one, DEFAULTS, H100, COLD),
        gemm.OPERATOR.seconds(gemm.features_of(256, 512, 128), DEFAULTS, H100, COLD),
    )


def test_a_device_without_an_l2_size_or_fp8_units_still_has_a_time():
    a100 = load_hardware("a100")
    unknown = a100.vary(device=a100.device.vary(l2_cache=0.0))
    f = product(64, 4096, 4096, (1.0, 1.0, 8.0, 1.0))
    assert np.isfinite(matmul.seconds(f, DEFAULTS, unknown, HOT)).all()


def unseen_mape(operator, path, hardware, fraction, **variant):
    """Mean absolute percentage error on the shape groups a fit on ``fraction`` of the groups never saw."""
    sample = next(
        s for s in calibrate.samples(operator, read_table(path)) if variant.items() <= dict(s.variant).items()
    )
    groups = np.random.default_rng(1).permutation(sample.groups.max() + 1)
    seen = np.isin(sample.groups, groups[: max(4, int(len(groups) * fraction))])
    q = calibrate.fit(operator, sample.take(np.flatnonzero(seen)), hardware)
    rest = sample.take(np.flatnonzero(~seen))
    return 100 * np.abs(operator.seconds(rest.features, q, hardware, HOT) / rest.seconds - 1).mean()


@pytest.mark.parametrize(("gpu", "name", "dtype"), [
    ("h100_sxm", "h100", "fp8_block"), ("h200_sxm", "h200", "bfloat16"), ("a100_sxm", "a100", "bfloat16"),
])  # fmt: skip
def test_unseen_measured_gemm_shapes_are_within_eight_percent(gpu, name, dtype):
    path = PROFILES / gpu / f"gemm_{gpu}.csv.gz"
    assert unseen_mape(gemm.OPERATOR, path, load_hardware(name), 0.1, dtype=dtype) < 8.0


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_unseen_measured_mla_products_are_within_eight_percent(dtype):
    path = PROFILES / "h100_sxm" / "mla_bmm_h100_sxm.csv"
    assert unseen_mape(bmm.OPERATOR, path, H100, 0.7, framework="sglang", dtype=dtype) < 8.0


def test_defaults_reach_the_published_efficiency_of_large_products():
    # DeepGEMM on H800 reaches 0.70-0.75 of peak at m >= 4096, cuBLAS bf16 about as much
    f = product(8192, 8192, 8192)
    assert 0.6 < float(matmul.roofline(f, H100) / matmul.seconds(f, DEFAULTS, H100, COLD)) < 0.8
