"""The routed-expert block: laws, a slow twin, unseen measured shapes, a cap never seen, another device."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmoe.calibrate import fit as calibrate
from simmoe.costs.operators import experts, experts_deepgemm
from simmoe.costs.operators.experts import MOE, features_of, preferred_kernel
from simmoe.errors import MeasurementError
from simmoe.routing.benchmark import benchmark_load
from simmoe.routing.expert_load import TILES
from simmoe.specs.load import load_hardware
from simmoe.specs.measurement import Table, read_table
from tests.reference import experts_twin

PROFILES = Path(__file__).parents[1] / "profiles"
H100 = load_hardware("h100")
H200 = load_hardware("h200")

parameter_sets = st.fixed_dictionaries(
    {p.name: st.floats(np.log(p.lower), np.log(p.upper)).map(lambda x: float(np.exp(x))) for p in MOE.parameters}
)
tokens_st = st.integers(1, 20_000)
shapes = st.sampled_from(
    [  # hidden, inter, experts, top_k, ep, bytes, bits
        (2048, 1408, 64, 6, 1, 2.0, 16),
        (7168, 2048, 256, 8, 16, 1.0, 8),
        (4096, 192, 128, 8, 1, 2.0, 16),
        (2816, 88, 128, 8, 1, 2.0, 16),
        (4096, 14336, 8, 2, 4, 1.0, 8),
    ]
)


def block(tokens, shape, top_k=None, distribution="balanced", **changes):
    hidden, inter, pool, k, ep, width, bits = shape
    top_k = top_k or k
    arguments = {
        "hidden": hidden,
        "inter": inter,
        "top_k": top_k,
        "num_experts": pool,
        "matrices": 3,
        "weight_bytes": width,
        "activation_bytes": width,
        "compute_bits": bits,
    }
    load = benchmark_load(distribution, np.atleast_1d(tokens), pool, top_k, ep)
    return features_of(load, **{**arguments, **changes})


def sample_of(name, device, **variant):
    """The measured rows of one variant of a table."""
    table = read_table(PROFILES / device / name)
    keep = np.ones(table.rows, dtype=bool)
    for column, value in variant.items():
        keep &= table.text(column) == value
    table = table.take(keep)
    (found,) = calibrate.samples(MOE, table)
    return found, table


@pytest.fixture(scope="module")
def trtllm():
    return sample_of("moe_h100_sxm.csv.gz", "h100_sxm", framework="trtllm", dtype="fp8_block")


@given(parameter_sets, tokens_st, shapes, st.booleans(), st.sampled_from(["balanced", "power_law_1.2"]))
@settings(deadline=None)
def test_every_row_equals_the_plain_python_twin(q, tokens, shape, cold, distribution):
    features = block(tokens, shape, distribution=distribution)
    row = {name: float(values[0]) for name, values in features.items()}
    expected = experts_twin.block_seconds(row, q, H100.device, cold)
    assert experts.seconds(features, q, H100, cold)[0] == pytest.approx(expected, rel=1e-9)


@given(parameter_sets, tokens_st, shapes, st.sampled_from(["memory_bandwidth", "bfloat16", "fp8"]), st.floats(1, 8))
@settings(deadline=None)
def test_more_bandwidth_or_flop_rate_is_never_slower(q, tokens, shape, which, factor):
    device = H100.device
    if which == "memory_bandwidth":
        faster = device.vary(memory_bandwidth=device.memory_bandwidth * factor)
    else:
        faster = device.vary(peak=device.peak.vary(**{which: getattr(device.peak, which) * factor}))
    features = block(tokens, shape)
    now = experts.seconds(features, q, H100, cold=True)
    assert experts.seconds(features, q, H100.vary(device=faster), cold=True) <= now * (1 + 1e-12)


@given(parameter_sets, tokens_st, shapes, st.data())
@settings(deadline=None)
def test_activating_fewer_experts_per_token_is_never_slower(q, tokens, shape, data):
    # experts e, e + s, e + 2s ...: with the stride of the native k, a lower k takes a prefix of each token's experts
    hidden, inter, pool, top_k, ep, width, bits = shape
    fewer = data.draw(st.integers(1, top_k))
    generator = np.random.default_rng(tokens)
    chosen = np.argsort(generator.random((min(tokens, 300), pool)), axis=1)[:, :top_k]

    def time_of(k):
        counts = np.bincount(chosen[:, :k].ravel(), minlength=pool)[: pool // ep]
        load = benchmark_load("balanced", np.array([len(chosen)]), pool, k, ep)
        load = type(load)(
            tokens=load.tokens,
            routed_pairs=np.array([float(counts.sum())]),
            active_experts=np.array([float((counts > 0).sum())]),
            busiest_expert_tokens=np.array([float(counts.max())]),
            row_blocks={tile: np.array([float((-(-counts // tile)).sum())]) for tile in TILES},
            local_experts=pool // ep,
        )
        features = features_of(
            load, hidden=hidden, inter=inter, top_k=k, num_experts=pool, matrices=3,
            weight_bytes=width, activation_bytes=width, compute_bits=bits,
        )  # fmt: skip
        return experts.seconds(features, q, H100, cold=True)[0]

    assert time_of(fewer) <= time_of(top_k) * (1 + 1e-12)


@given(parameter_sets, st.lists(tokens_st, min_size=2, max_size=6), shapes)
@settings(deadline=None)
def test_a_replayed_input_is_never_slower_than_a_cold_one(q, tokens, shape):
    features = block(np.array(tokens), shape)
    cold = experts.seconds(features, q, H100, cold=True)
    assert (experts.seconds(features, q, H100, cold=False) <= cold * (1 + 1e-12)).all()


@given(parameter_sets, tokens_st, shapes, st.floats(0.1, 10))
@settings(deadline=None)
def test_scaling_every_rate_scales_every_time(q, tokens, shape, factor):
    device = H100.device
    peak = device.peak.vary(bfloat16=device.peak.bfloat16 * factor, fp8=device.peak.fp8 * factor)
    faster = H100.vary(device=device.vary(memory_bandwidth=device.memory_bandwidth * factor, peak=peak))
    fixed = {p.name: q[p.name] / factor for p in MOE.parameters if p.unit == "s"}
    features = block(tokens, shape)
    now = experts.seconds(features, q, H100, cold=True)
    assert experts.seconds(features, {**q, **fixed}, faster, cold=True) == pytest.approx(now / factor, rel=1e-9)


def test_weights_of_idle_experts_are_not_read():
    shape = (7168, 2048, 256, 8, 1, 1.0, 8)
    part = experts.breakdown(block(np.array([4, 8]), shape), MOE.defaults, H100, cold=True)
    one_expert = 3 * 7168 * 2048 / (MOE.defaults["bandwidth"] * H100.device.memory_bandwidth)
    assert part["weights"] == pytest.approx([32 * one_expert, 64 * one_expert])


def test_dispatched_tokens_cost_no_passes_over_other_ranks_pairs():
    shape = (7168, 2048, 256, 8, 16, 1.0, 8)
    everywhere = block(4096, shape)
    dispatched = block(4096, shape, dispatched=True)
    assert dispatched["group_pairs"] == dispatched["pairs"] == everywhere["group_pairs"] / 16
    times = [experts.seconds(f, MOE.defaults, H100, cold=True)[0] for f in (everywhere, dispatched)]
    assert times[1] < times[0]


@pytest.mark.parametrize(("ep", "top_k"), [(2, 8), (32, 8), (256, 8), (8, 2)])
def test_a_rank_gets_the_tokens_that_picked_one_of_its_experts(ep, top_k):
    """Against drawn tokens; without replacement their picks spread a little wider than the binomial says."""
    rng = np.random.default_rng(3)
    picks = np.stack([rng.permutation(256)[:top_k] for _ in range(4000)]) % ep
    drawn = np.mean([(picks == rank).any(axis=1).mean() for rank in range(min(ep, 16))])
    dispatched = block(4000, (7168, 2048, 256, top_k, ep, 1.0, 8), dispatched=True)
    assert dispatched["tokens"] / 4000 == pytest.approx(drawn, rel=0.04)


def test_the_context_benchmark_walks_rows_of_the_whole_group_that_a_served_rank_never_gets():
    """SGLang's benchmark scatters and gathers all tokens of the group: at EP256 most of its time, in service none."""
    table = read_table(PROFILES / "h100_sxm" / "moe_wideep_h100_sxm.csv")
    features = experts_deepgemm.MOE_WIDEEP.features(table)
    rows = (table.text("phase") == "context") & (table.text("routing_distribution") == "uniform")
    rows &= (table.number("moe_ep_size") == 256) & (table.number("num_tokens") >= 131072)
    assert (features["tokens"][rows] == table.number("num_tokens")[rows]).all()
    # a token more costs 3 bytes of its 7168 (read in 8 bits, written in 16) at 60 to 100 % of the memory's rate
    grouped = {}
    for version, tokens, seconds in zip(
        table.text("version")[rows], features["tokens"][rows], table.number("latency_us")[rows] * 1e-6, strict=True
    ):
        grouped.setdefault(version, []).append((tokens, seconds))
    for points in grouped.values():
        slope = np.polyfit(*zip(*points, strict=True), 1)[0]
        pairs = 8 / 256 * 6 * 7168 * 2048 / (0.6 * H100.device.peak.fp8)  # the products of its share of pairs
        assert 0.6 < 3 * 7168 / H100.device.memory_bandwidth / (slope - pairs) < 1.0


def test_measured_columns_become_the_features_of_their_shape(trtllm):
    _, table = trtllm
    features = MOE.features(table)
    row = int(np.flatnonzero((table.number("moe_ep_size") == 16) & (table.number("num_tokens") == 64))[0])
    assert features["local_experts"][row] == table.number("num_experts")[row] / 16
    assert features["inter"][row] == table.number("expert_inter_size")[row]
    assert features["sharded"][row] == 1
    assert features["weight_bytes"][row] == 1.0
    sliced = int(np.flatnonzero(table.number("moe_tp_size") == 8)[0])
    assert features["inter"][sliced] == table.number("expert_inter_size")[sliced] / 8
    assert features["sharded"][sliced] == 0


def test_unseen_shapes_are_predicted_within_nine_percent_where_a_roofline_misses_by_half(trtllm):
    sample, _ = trtllm
    fit = calibrate.calibrate_operator(MOE, sample, H100, "test", folds=5)
    assert fit.groups > 40
    assert fit.held_out_mape_percent < 7
    assert fit.roofline_mape_percent > 30


def test_the_gain_of_eight_to_six_experts_is_predicted_by_a_fit_that_saw_eight_alone(trtllm):
    sample, table = trtllm
    model = table.text("model_like")[sample.rows]
    six, eight = model == "DeepSeek-V4-Flash", model == "MiMo-V2-Flash"  # 4096 / 2048 / 256, top 6 and top 8
    values = calibrate.fit(MOE, sample.take(np.flatnonzero(~six)), H100)
    predicted = experts.seconds(sample.features, values, H100, cold=False)
    columns = ("moe_tp_size", "moe_ep_size", "num_tokens", "routing_distribution")
    keys = list(zip(*(table.text(c)[sample.rows] for c in columns), strict=True))
    row_of = {keys[i]: i for i in np.flatnonzero(six)}
    pairs = [(i, row_of[keys[i]]) for i in np.flatnonzero(eight) if keys[i] in row_of and keys[i][3] == "balanced"]
    wide, narrow = np.array(pairs).T
    measured = 100 * (sample.seconds[wide] / sample.seconds[narrow] - 1)
    gain = 100 * (predicted[wide] / predicted[narrow] - 1)
    assert len(pairs) > 150
    assert np.abs(measured).mean() > 9  # what "no effect" would miss, in percentage points
    assert np.abs(gain - measured).mean() < 3


def test_efficiencies_carry_from_one_device_to_another_on_its_own_data_sheet(trtllm):
    sample, _ = trtllm
    other, _ = sample_of("moe_h200_sxm.csv.gz", "h200_sxm", framework="trtllm", dtype="fp8_block")
    values = calibrate.fit(MOE, other, H200)
    borrowed = experts.seconds(sample.features, values, H100, cold=False)
    assert np.abs(borrowed / sample.seconds - 1).mean() < 0.09


def moe_table(**changes):
    row = {
        "framework": "vllm", "version": "0.24.0", "dtype": "bfloat16", "hidden_size": 2048.0,
        "expert_inter_size": 768.0, "num_experts": 128.0, "top_k": 8.0, "gated": 1.0, "moe_tp_size": 1.0,
        "moe_ep_size": 2.0, "routing_distribution": "balanced", "num_tokens": 16.0, "latency_us": 50.0,
    }  # fmt: skip
    return Table(Path("moe_test.csv"), {name: np.array([value]) for name, value in {**row, **changes}.items()}, 1)


def test_expert_parallel_rows_of_an_older_collector_are_left_out():
    assert np.isnan(MOE.features(moe_table(version="0.14.0"))["tokens"]).all()
    assert MOE.features(moe_table(version="0.14.0", moe_ep_size=1.0))["tokens"] == [16]


def test_an_unknown_number_format_names_file_and_value():
    with pytest.raises(MeasurementError, match=r"moe_test.csv: dtype 'fp6' is not known; known are bfloat16"):
        MOE.features(moe_table(dtype="fp6"))


def test_every_preferred_kernel_was_measured():
    table = read_table(PROFILES / "h100_sxm" / "moe_h100_sxm.csv.gz")
    measured = set(zip(*(table.text(c).tolist() for c in ("framework", "dtype", "kernel_source")), strict=True))
    for (framework, dtype), kernel in experts.PREFERRED_KERNEL.items():
        assert (framework, dtype, kernel) in measured
    assert preferred_kernel("vllm", "fp8_block", expert_parallel=True) != preferred_kernel(
        "vllm", "fp8_block", expert_parallel=False
    )
    assert preferred_kernel("vllm", "int4", expert_parallel=False) is None


@pytest.mark.parametrize(
    ("operator", "name", "device", "limit"),
    [
        (experts_deepgemm.MOE_WIDEEP, "moe_wideep_h100_sxm.csv", "h100_sxm", 10),
        (experts_deepgemm.MOE_GROUPED_GEMM, "moe_grouped_gemm_h800.csv", "h800", 9),
        (experts_deepgemm.MLP, "mlp_h100_sxm.csv", "h100_sxm", 7),
    ],
)
def test_deepgemm_kernels_are_predicted_where_a_roofline_misses_by_a_third(operator, name, device, limit):
    hardware = load_hardware(device.removesuffix("_sxm"))
    for sample in calibrate.samples(operator, read_table(PROFILES / device / name)):
        fit = calibrate.calibrate_operator(operator, sample, hardware, "test", folds=5)
        assert fit.held_out_mape_percent < limit
        assert fit.roofline_mape_percent > 30


def test_a_masked_product_of_one_token_per_expert_wakes_half_of_them():
    table = read_table(PROFILES / "h800" / "moe_grouped_gemm_h800.csv")
    features = experts_deepgemm.MOE_GROUPED_GEMM.features(table)
    one = np.flatnonzero((table.number("tokens_per_expert") == 1) & (table.text("phase") == "decode"))
    assert len(one) == 1
    assert features["active_experts"][one] == pytest.approx(0.5 * features["local_experts"][one])
    seconds = experts_deepgemm.MOE_GROUPED_GEMM.measured(table)
    assert seconds[one] * 1e6 == pytest.approx(table.number("up_proj_us")[one] + table.number("down_proj_us")[one])


def test_a_forward_launched_kernel_by_kernel_is_no_quicker_than_its_launches():
    features = experts_deepgemm.MLP.features(read_table(PROFILES / "h100_sxm" / "mlp_h100_sxm.csv"))
    slow_host = {**experts_deepgemm.MLP.defaults, "host": 1e-3}
    times = experts_deepgemm.seconds(features, slow_host, H100, cold=False)
    assert times.min() >= 1e-3
    assert times.max() > 5e-3  # 131072 tokens outlast any host
