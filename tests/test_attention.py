"""Attention operators: exact counts, laws of the time models, unseen head counts of the measured tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmoe.calibrate import fit as calibrate
from simmoe.costs.operators import gqa, mla
from simmoe.costs.operators.base import Operator
from simmoe.costs.operators.mla_projections import projection_work
from simmoe.specs.hardware import Hardware
from simmoe.specs.load import load_hardware
from simmoe.specs.measurement import Table, read_table
from tests.reference.attention_twin import exact_prefill_pairs, mla_block_parameters, tiled_prefill_pairs

PROFILES = Path(__file__).parents[1] / "profiles"
H100 = load_hardware("h100")
A100 = load_hardware("a100")
COLD, HOT = True, False
OPERATORS = (gqa.ATTENTION_DECODE, gqa.ATTENTION_PREFILL, mla.MLA_DECODE, mla.MLA_PREFILL)

heads_and_kv = st.sampled_from([(4, 1), (8, 8), (12, 4), (16, 1), (32, 8), (40, 8), (64, 4), (128, 8)])
mla_heads = st.integers(1, 128)
batches = st.integers(1, 2048)
tokens = st.integers(1, 200_000)
prompts = st.integers(2, 32_768)
gpus = st.sampled_from([load_hardware(name) for name in ("h100", "a100", "l40s", "b200")])


@st.composite
def parameters(draw, operator: Operator):
    """Any parameters within the bounds of a fit, drawn in log space."""
    return {
        p.name: float(np.exp(np.log(p.lower) + draw(st.floats(0, 1)) * (np.log(p.upper) - np.log(p.lower))))
        for p in operator.parameters
    }


def faster(hardware: Hardware, *, bandwidth: float = 1.0, peak: float = 1.0) -> Hardware:
    device = hardware.device
    peaks = {k: None if v is None else v * peak for k, v in device.peak.model_dump().items()}
    changed = device.vary(memory_bandwidth=device.memory_bandwidth * bandwidth, peak=peaks)
    return hardware.vary(device=changed)


# ---- counts --------------------------------------------------------------------------------------------------------


def test_mla_decode_of_v3_reads_1152_bytes_and_works_278528_flop_per_cached_token():
    # DeepSeek-V3: 2 * 128 heads * (2 * 512 + 64) FLOP and (512 + 64) * 2 B per query and cached token
    work = mla.decode_work(mla.decode_features(1, 1000, 128))
    assert work.flop == 278_528 * 1000
    assert work.kv_bytes == 1152 * 1000


def test_mla_pads_16_heads_to_the_tile_of_64():
    sixteen, sixty_four = (mla.decode_work(mla.decode_features(8, 4096, h)) for h in (16, 64))
    assert sixteen.flop == sixty_four.flop
    assert sixteen.io_bytes == sixty_four.io_bytes / 4


def test_gqa_decode_reads_keys_and_values_once_per_kv_head():
    work = gqa.decode_work(gqa.decode_features(3, 100, 32, 8, 128))
    assert work.kv_bytes == 3 * 100 * 2 * 8 * 128 * 2
    assert work.items == 3 * 8


@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_gqa_counts_scale_with_any_head_size(head_dim):
    wide = gqa.decode_work(gqa.decode_features(3, 100, 32, 8, head_dim, v_head_dim=128))
    assert wide.kv_bytes == 3 * 100 * 8 * (head_dim + 128) * 2


@given(st.integers(1, 40), st.integers(0, 20), st.sampled_from([64, 128]))
def test_expanded_prefill_flop_equals_the_blockwise_count_on_whole_tiles(tiles, prefix_blocks, rows):
    new, cached = tiles * rows, prefix_blocks * 64
    hardware = load_hardware("a100" if rows == 64 else "h100")
    work = mla.prefill_work(mla.prefill_features(2, new, 3, cached_tokens=cached), hardware)
    assert work.flop == pytest.approx(2 * 2 * 3 * 320 * tiled_prefill_pairs(new, cached, rows, 64))


@given(st.integers(1, 3000), st.integers(0, 3000), heads_and_kv, st.sampled_from([H100, A100]))
def test_prefill_never_counts_less_than_the_causal_pairs(new, cached, shape, gpu):
    heads, kv_heads = shape
    f = gqa.prefill_features(1, new, heads, kv_heads, 128, cached_tokens=cached)
    exact = 4 * heads * 128 * exact_prefill_pairs(new, cached)
    work = gqa.prefill_work(f, gpu)
    assert work.flop >= exact * (1 - 1e-12)
    if new >= 2048:
        assert work.flop <= 1.2 * exact


def test_absorbed_prefill_works_three_times_as_much_as_expanded():
    absorbed, expanded = (
        mla.prefill_work(mla.prefill_features(1, 16_384, 128, absorbed=flag), H100).flop for flag in (1.0, 0.0)
    )
    assert absorbed / expanded == pytest.approx(1088 / 320, rel=0.02)


@pytest.mark.parametrize(("heads", "bits"), [(128, 16.0), (16, 16.0), (128, 8.0)])
def test_projections_weigh_as_much_as_the_block_has_parameters(heads, bits):
    f = mla.prefill_features(1, 7, heads, hidden=7168, gemm_bits=bits)
    work = projection_work(f, np.array(7.0), np.array(7.0))
    count = mla_block_parameters(7168, 1536, 512, 64, 128, 128, heads)
    assert work.weight_bytes == count * bits / 8
    assert work.flop == 2 * 7 * count


def test_kernel_alone_has_no_projection_time():
    f = mla.decode_features(64, 1000, 16)
    p = mla.MLA_DECODE.defaults
    changed = {**p, "projection_growth": 1e-5, "projection_memory_efficiency": 0.1}
    assert mla.MLA_DECODE.seconds(f, p, H100, COLD) == mla.MLA_DECODE.seconds(f, changed, H100, COLD)
    block = mla.decode_features(64, 1000, 16, hidden=7168)
    assert mla.MLA_DECODE.seconds(block, p, H100, COLD) > mla.MLA_DECODE.seconds(f, p, H100, COLD)


# ---- laws ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data(), batches, tokens, heads_and_kv, mla_heads, gpus, st.booleans())
def test_decode_is_never_faster_for_more_requests_or_context(data, batch, context, shape, heads, gpu, cold):
    b, c = np.array([batch, batch + 1, batch, 2 * batch]), np.array([context, context, context + 1, 2 * context])
    for operator, f in (
        (gqa.ATTENTION_DECODE, gqa.decode_features(b, c, *shape, 128)),
        (mla.MLA_DECODE, mla.decode_features(b, c, heads)),
        (mla.MLA_DECODE, mla.decode_features(b, c, heads, hidden=7168)),
    ):
        t = operator.seconds(f, data.draw(parameters(operator)), gpu, cold)
        assert (t >= t[0] * (1 - 1e-9)).all()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 64), prompts, st.integers(0, 50_000), heads_and_kv, mla_heads, gpus)
def test_prefill_is_never_faster_for_more_requests_tokens_or_prefix(data, batch, new, cached, shape, heads, gpu):
    b = np.array([batch, batch + 1, batch, batch])
    n, c = np.array([new, new, new + 1, new]), np.array([cached, cached, cached, cached + 1])
    for operator, f in (
        (gqa.ATTENTION_PREFILL, gqa.prefill_features(b, n, *shape, 128, cached_tokens=c)),
        (mla.MLA_PREFILL, mla.prefill_features(b, n, heads, cached_tokens=c)),
        (mla.MLA_PREFILL, mla.prefill_features(b, n, heads, cached_tokens=c, absorbed=1.0, hidden=7168)),
    ):
        t = operator.seconds(f, data.draw(parameters(operator)), gpu, COLD)
        assert (t >= t[0] * (1 - 1e-9)).all()


@settings(max_examples=60, deadline=None)
@given(st.data(), batches, tokens, mla_heads, gpus, st.floats(1.0, 10.0))
def test_faster_hardware_is_never_slower(data, batch, context, heads, gpu, factor):
    new = min(context, 32_768)
    for operator, f in (
        (gqa.ATTENTION_DECODE, gqa.decode_features(batch, context, heads, 1, 128)),
        (gqa.ATTENTION_PREFILL, gqa.prefill_features(1, new, heads, 1, 128)),
        (mla.MLA_DECODE, mla.decode_features(batch, context, heads, hidden=7168)),
        (mla.MLA_PREFILL, mla.prefill_features(1, new, heads, hidden=7168)),
    ):
        p = data.draw(parameters(operator))
        before = operator.seconds(f, p, gpu, HOT)
        for other in (faster(gpu, bandwidth=factor), faster(gpu, peak=factor)):
            assert operator.seconds(f, p, other, HOT) <= before * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(st.data(), batches, tokens, mla_heads, st.floats(0.1, 10.0))
def test_all_rates_times_c_makes_all_times_over_c(data, batch, context, heads, c):
    for operator, f in (
        (gqa.ATTENTION_DECODE, gqa.decode_features(batch, context, heads, 1, 128)),
        (mla.MLA_DECODE, mla.decode_features(batch, context, heads, hidden=7168)),
        (mla.MLA_PREFILL, mla.prefill_features(1, min(context, 32_768), heads, hidden=7168)),
    ):
        p = data.draw(parameters(operator))
        units = {parameter.name: parameter.unit for parameter in operator.parameters}
        scaled = {name: value / c if units[name] == "s" else value for name, value in p.items()}
        slow = operator.seconds(f, p, H100, HOT)
        assert operator.seconds(f, scaled, faster(H100, bandwidth=c, peak=c), HOT) == pytest.approx(slow / c)


@given(st.data(), batches, tokens, mla_heads)
@settings(max_examples=40, deadline=None)
def test_cold_caches_are_never_faster_and_equal_far_beyond_l2(data, batch, context, heads):
    p = data.draw(parameters(mla.MLA_DECODE))
    f = mla.decode_features(batch, context, heads, hidden=7168)
    hot, cold = (mla.MLA_DECODE.seconds(f, p, H100, flag) for flag in (False, True))
    assert hot <= cold * (1 + 1e-12)
    sharp = {**p, "l2_sharpness": 4.0, "l2_share": 1.0}
    big = mla.decode_features(1024, 1_000_000, heads)  # 1.2 TB of cache against 50 MB of L2
    hot, cold = (mla.MLA_DECODE.seconds(big, sharp, H100, flag) for flag in (False, True))
    assert hot == pytest.approx(cold, rel=1e-6)


def test_long_context_decode_is_linear_in_batch_times_context():
    for operator, make in (
        (mla.MLA_DECODE, lambda b, c: mla.decode_features(b, c, 128)),
        (gqa.ATTENTION_DECODE, lambda b, c: gqa.decode_features(b, c, 64, 8, 128)),
    ):
        t = operator.seconds(make(64, 65_536 * np.array([1.0, 2.0, 3.0])), operator.defaults, H100, COLD)
        assert t[2] - t[1] == pytest.approx(t[1] - t[0], rel=0.02)


def test_a_prefix_costs_what_its_pairs_cost():
    # 512 new tokens after 15 x 512 cached ones see 31 times the pairs of 512 alone; a full prompt has 256 times
    p = gqa.ATTENTION_PREFILL.defaults
    n, c = np.array([8192.0, 512.0]), np.array([0.0, 7680.0])
    whole, last = gqa.ATTENTION_PREFILL.seconds(gqa.prefill_features(8, n, 64, 8, 128, cached_tokens=c), p, H100, COLD)
    assert last / whole == pytest.approx(31 / 256, rel=0.25)


# ---- measurements --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [gqa.ATTENTION_PREFILL, mla.MLA_PREFILL])
def test_hopper_splits_a_long_prefix_over_idle_multiprocessors(operator):
    features = gqa.prefill_features if operator is gqa.ATTENTION_PREFILL else mla.prefill_features
    shape = (8.0, 1.0, 128.0) if operator is gqa.ATTENTION_PREFILL else (16.0,)
    few = features(1.0, 64.0, *shape, cached_tokens=32768.0)
    alone = features(1.0, 64.0, *shape, cached_tokens=0.0)
    ideal = operator.roofline(few, H100)
    seconds = operator.seconds(few, operator.defaults, H100, COLD) - operator.seconds(
        alone, operator.defaults, H100, COLD
    )
    assert ideal / 2 < seconds < 5 * ideal
    # FlashAttention 2 walks over all of it in one item
    early = operator.seconds(few, operator.defaults, A100, COLD)
    assert early > 4 * operator.roofline(few, A100)


def measured(name: str, device: str = "h100_sxm") -> Table:
    folder = PROFILES / device
    return read_table(next(path for path in folder.iterdir() if path.name.startswith(f"{name}_{device}.csv")))


def unseen_error(operator: Operator, device: str, heads: int, **variant: str) -> float:
    """Mean absolute percentage error on a head count that the fit did not see. [%]"""
    hardware = load_hardware(device)
    for sample in calibrate.samples(operator, measured(operator.name, device)):
        if all(sample.variant[key] == value for key, value in variant.items()):
            held = sample.features["heads"] == heads
            assert held.any()
            values = calibrate.fit(operator, sample.take(np.flatnonzero(~held)), hardware)
            unseen = sample.take(np.flatnonzero(held))
            return float(
                100 * np.mean(np.abs(operator.seconds(unseen.features, values, hardware, HOT) / unseen.seconds - 1))
            )
    raise AssertionError(variant)


@pytest.mark.parametrize(
    ("operator", "device", "heads", "variant", "accepted_percent"),
    [
        (mla.MLA_DECODE, "h100_sxm", 16, {"framework": "sglang", "kv_cache_dtype": "bfloat16"}, 8),
        (mla.MLA_DECODE, "h100_sxm", 16, {"framework": "vllm", "gemm_dtype": "fp8_block"}, 8),
        (mla.MLA_PREFILL, "h100_sxm", 16, {"framework": "trtllm", "kv_cache_dtype": "bfloat16"}, 8),
        (mla.MLA_PREFILL, "h100_sxm", 64, {"framework": "vllm", "gemm_dtype": "bfloat16"}, 8),
        (gqa.ATTENTION_DECODE, "h100_sxm", 32, {}, 12),
        (gqa.ATTENTION_PREFILL, "a100_sxm", 64, {}, 12),
    ],
)
def test_unseen_head_counts_are_within_the_accepted_error(operator, device, heads, variant, accepted_percent):
    assert unseen_error(operator, device, heads, **variant) <= accepted_percent


@pytest.mark.parametrize("device", ["h100_sxm", "h200_sxm"])
def test_long_reads_reach_the_share_of_the_bandwidth_that_unseen_heads_measure(device):
    operator, hardware = gqa.ATTENTION_DECODE, load_hardware(device.removesuffix("_sxm"))
    (sample,) = calibrate.samples(operator, measured(operator.name, device))
    long = (gqa.decode_work(sample.features).kv_bytes > 0.5e9) & (sample.features["batch"] <= 512)
    values = calibrate.fit(operator, sample.take(np.flatnonzero(sample.features["heads"] != 8)), hardware)
    unseen = sample.take(np.flatnonzero(long & (sample.features["heads"] == 8)))
    assert len(unseen.seconds) > 15
    error = operator.seconds(unseen.features, values, hardware, HOT) / unseen.seconds - 1
    assert abs(np.median(error)) < 0.025


def test_an_l2_hit_does_not_wait_for_device_memory():
    f = gqa.decode_features(1, np.array([2048.0, 2e6]), 32, 8, 128)  # 8 MB in an L2 of 50; 8 GB beside it
    sharp = {**gqa.ATTENTION_DECODE.defaults, "l2_sharpness": 16.0, "overlap_power": 1.0}
    for cold, filled in ((HOT, [0, 1]), (COLD, [1, 1])):
        slow, quick = (gqa.ATTENTION_DECODE.seconds(f, {**sharp, "fill": s}, H100, cold) for s in (2e-5, 1e-5))
        assert (slow - quick) / 1e-5 == pytest.approx(filled, abs=0.02)


@pytest.mark.parametrize(("name", "device"), [("mla_decode", "h800"), ("mla_decode", "h20"), ("mla_prefill", "h800")])
def test_small_tables_without_a_framework_are_read_as_bf16_kernels(name, device):
    operator = {"mla_decode": mla.MLA_DECODE, "mla_prefill": mla.MLA_PREFILL}[name]
    table = measured(name, device)
    (sample,) = calibrate.samples(operator, table)
    assert len(sample.seconds) == table.rows
    assert (sample.features["hidden"] == 0).all()
    # uncalibrated, from data sheets and documented defaults: right within a factor of two
    ratio = operator.seconds(sample.features, operator.defaults, load_hardware(device), HOT) / sample.seconds
    assert 0.5 < np.median(ratio) < 2


def test_a_fit_recovers_the_parameters_that_made_the_times():
    operator, rng = gqa.ATTENTION_DECODE, np.random.default_rng(3)
    (sample,) = calibrate.samples(operator, measured("attention_decode"))
    truth = {**operator.defaults, "memory_efficiency": 0.7, "launch": 1.2e-5, "item": 4e-6}
    noisy = operator.seconds(sample.features, truth, H100, HOT) * np.exp(rng.normal(0, 0.03, len(sample.seconds)))
    synthetic = calibrate.Sample(sample.variant, sample.features, noisy, sample.groups, sample.rows)
    fit = calibrate.calibrate_operator(operator, synthetic, H100, "synthetic")
    for name in ("memory_efficiency", "launch", "item"):
        found = fit.parameters[name]
        assert found.standard_error is not None
        assert abs(found.value - truth[name]) < 4 * found.standard_error + 0.01 * truth[name]
    assert fit.held_out_mape_percent < 4


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_every_measured_row_has_features_and_defaults_lie_within_their_bounds(operator):
    table = measured(operator.name)
    assert all(np.isfinite(value).all() for value in operator.features(table).values())
    assert all(p.lower <= p.default <= p.upper for p in operator.parameters)
