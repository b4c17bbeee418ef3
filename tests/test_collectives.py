"""Collectives: closed forms, fitted protocols, expert-parallel exchanges."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmoe.calibrate import fit as calibrate
from simmoe.costs import collectives
from simmoe.costs.operators import allreduce, alltoall, nccl
from simmoe.errors import CoverageError
from simmoe.routing.sampling import sample_choices
from simmoe.specs.load import load_hardware
from simmoe.specs.measurement import read_table

PROFILES = Path(__file__).parents[1] / "profiles"
H100 = load_hardware("h100")
LINK = H100.scale_up
COLD = True
CLOSED_FORMS = (
    collectives.ring_all_reduce_s,
    collectives.one_shot_all_reduce_s,
    collectives.two_shot_all_reduce_s,
    collectives.ring_all_gather_s,
)
BENCHMARK = False
message_sizes = st.floats(1.0, 1e9)
rank_counts = st.integers(2, 8)


def exchange(kernel="deepep_normal", phase="dispatch", **changes):
    shape = {"tokens_per_rank": 128, "hidden": 7168, "top_k": 8, "num_experts": 256, "ranks": 8, "nodes": 1}
    return alltoall.features_of(kernel=kernel, phase=phase, **{**shape, **changes})


def timed(operator, features, hardware=H100, **parameters):
    return operator.seconds(features, {**operator.defaults, **parameters}, hardware, COLD)


@given(message_sizes)
def test_one_rank_sends_nothing(n):
    for form in CLOSED_FORMS:
        assert form(n, 1, LINK) == 0.0
    assert collectives.all_reduce_s(n, 1, H100) == 0.0
    assert timed(allreduce.OPERATOR, allreduce.features_of(n, 1)) == 0.0
    assert timed(nccl.OPERATOR, nccl.features_of("all_reduce", n, 1)) == 0.0
    assert timed(alltoall.OPERATOR, exchange(ranks=1)) == 0.0
    assert timed(alltoall.OPERATOR, exchange("deepep_low_latency", ranks=1)) == 0.0


@given(message_sizes, rank_counts, st.floats(1.0, 10.0))
def test_a_link_c_times_better_in_bandwidth_and_latency_takes_a_cth_of_the_time(n, p, c):
    better = LINK.vary(bandwidth=LINK.bandwidth * c, latency=LINK.latency / c)
    for form in CLOSED_FORMS:
        np.testing.assert_allclose(form(n, p, better), form(n, p, LINK) / c)


def test_closed_forms_by_hand():
    link = LINK.vary(bandwidth=1e9, latency=1e-6)
    # 4 ranks, 4 MB, 1 GB/s, 1 us: ring 6 (1 us + 1 ms); one-shot 1 us + 12 ms; two-shot 2 us + 6 ms
    assert collectives.ring_all_reduce_s(4e6, 4, link) == pytest.approx(6.006e-3)
    assert collectives.one_shot_all_reduce_s(4e6, 4, link) == pytest.approx(12.001e-3)
    assert collectives.two_shot_all_reduce_s(4e6, 4, link) == pytest.approx(6.002e-3)
    assert collectives.ring_all_gather_s(4e6, 4, link) == pytest.approx(3.003e-3)


@given(message_sizes, rank_counts, st.floats(1.0, 100.0))
def test_more_bytes_are_never_faster_and_the_best_all_reduce_is_the_best(n, p, factor):
    for form in CLOSED_FORMS:
        assert form(n * factor, p, LINK) >= form(n, p, LINK)
    best = collectives.all_reduce_s(n, p, H100)
    assert all(best <= form(n, p, LINK) for form in CLOSED_FORMS[:3])


@given(message_sizes, rank_counts)
def test_on_one_node_the_network_does_not_matter(n, p):
    alone = H100.vary(scale_out=None)
    assert collectives.all_reduce_s(n, p, alone) == collectives.all_reduce_s(n, p, H100)
    assert timed(allreduce.OPERATOR, allreduce.features_of(n, p), alone) == timed(
        allreduce.OPERATOR, allreduce.features_of(n, p)
    )


@pytest.mark.parametrize(("name", "pod_bytes_per_s"), [("tpu-v3", 340e12), ("tpu-v4", 1.1e15)])
def test_a_whole_torus_reduces_at_the_rate_its_vendor_prints(name, pod_bytes_per_s):
    """The documentation's all-reduce bandwidth of a pod is the sum of its links: 2 n (p - 1) bytes go over them."""
    pod = load_hardware(name)
    n, p = 1e12, pod.devices_per_node
    seconds = float(collectives.torus_all_reduce_s(n, p, pod))
    assert 2 * n * (p - 1) / seconds == pytest.approx(pod_bytes_per_s, rel=0.13)


def test_an_all_reduce_takes_the_links_of_its_block_of_the_torus():
    v5e = load_hardware("tpu-v5e")
    link = v5e.scale_up
    # 2 x 4 of 16 x 16: no ring closes, a link for either axis; 16 x 16: both close, four links; hops 3 and 16
    for ranks, links, hops in ((8, 2, 3), (256, 4, 16)):
        expected = 2 * (hops * link.latency + (ranks - 1) / ranks * 1e6 / (links * link.bandwidth))
        assert collectives.torus_all_reduce_s(1e6, ranks, v5e) == pytest.approx(expected)
        assert timed(allreduce.OPERATOR, allreduce.features_of(1e6, ranks), v5e) == pytest.approx(expected)
    beyond = collectives.torus_all_reduce_s(1e6, 512, v5e) - collectives.torus_all_reduce_s(1e6, 256, v5e)
    assert beyond == pytest.approx(2 * (v5e.scale_out.latency + 1e6 / 256 / 2 / v5e.scale_out.bandwidth))


def test_several_nodes_pay_for_the_network_and_need_one():
    assert collectives.all_reduce_s(1e6, 16, H100) > collectives.all_reduce_s(1e6, 8, H100)
    # 16 ranks on 2 nodes: ring of 2 over n/8 bytes each
    expected = 2 * (H100.scale_out.latency + 1e6 / 8 / 2 / H100.scale_out.bandwidth)
    assert collectives.between_nodes_all_reduce_s(1e6, 16, H100) == pytest.approx(expected)
    alone = H100.vary(scale_out=None)
    with pytest.raises(CoverageError, match="no scale_out link"):
        collectives.all_reduce_s(1e6, 16, alone)
    with pytest.raises(CoverageError, match="scale_out"):
        timed(alltoall.OPERATOR, exchange(ranks=16, nodes=2), alone)


def test_small_messages_cost_latency_and_large_ones_bandwidth():
    sizes = np.array([256.0, 1e9])
    small, large = timed(allreduce.OPERATOR, allreduce.features_of(sizes, 8))
    assert small == pytest.approx(4e-6 * 1.2, rel=0.01)
    wire = allreduce.roofline(allreduce.features_of(1e9, 8), H100)
    assert large == pytest.approx(float(wire) / (0.7 * 1.2), rel=0.05)


def test_four_ranks_lie_between_two_and_eight():
    for n in (1e3, 1e6, 1e8):
        for make in (lambda n, p: timed(allreduce.OPERATOR, allreduce.features_of(n, p)),
                     lambda n, p: timed(nccl.OPERATOR, nccl.features_of("all_gather", n, p))):  # fmt: skip
            assert make(n, 2) < make(n, 4) < make(n, 8)


def test_without_a_cuda_graph_the_launch_is_a_floor():
    sizes = np.array([256.0, 1e6])
    eager = timed(allreduce.OPERATOR, allreduce.features_of(sizes, 2, cuda_graph=0.0), eager_s=5e-5)
    np.testing.assert_allclose(eager, 5e-5, rtol=1e-3)


@pytest.mark.parametrize(("experts", "ranks", "top_k"), [(8, 4, 2), (8, 2, 3), (6, 3, 2), (8, 8, 1), (9, 3, 4)])
def test_copies_per_token_equal_enumeration(experts, ranks, top_k):
    home = np.arange(experts) * ranks // experts
    remote = [len({home[e] for e in chosen} - {0}) for chosen in combinations(range(experts), top_k)]
    inside, outside = alltoall.copies_per_token(exchange(num_experts=experts, ranks=ranks, top_k=top_k))
    assert inside == pytest.approx(np.mean(remote))
    assert outside == 0.0


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (8, 3), (12, 4)])
def test_copies_that_leave_the_node_equal_enumeration(experts, top_k):
    ranks, nodes = 4, 2
    home = np.arange(experts) * ranks // experts
    other_node = [int(any(home[e] >= 2 for e in chosen)) for chosen in combinations(range(experts), top_k)]
    _, outside = alltoall.copies_per_token(exchange(num_experts=experts, ranks=ranks, nodes=nodes, top_k=top_k))
    assert outside == pytest.approx(np.mean(other_node))


@given(st.integers(1, 8), st.sampled_from([8, 16, 32, 64]))
def test_sending_once_per_rank_never_sends_more_than_once_per_expert(top_k, ranks):
    nodes = max(1, ranks // 8)
    shape = {"top_k": top_k, "num_experts": 64, "ranks": ranks, "nodes": nodes}
    once_in, once_out = alltoall.copies_per_token(exchange("deepep_normal", **shape))
    each_in, each_out = alltoall.copies_per_token(exchange("deepep_low_latency", **shape))
    assert once_out <= each_out + 1e-12
    if nodes == 1:
        assert once_in <= each_in + 1e-12
    assert each_in + each_out == pytest.approx(top_k * (ranks - 1) / ranks)


@given(st.sampled_from(["deepep_normal", "deepep_low_latency"]), st.integers(1, 8192), st.integers(1, 7),
       st.sampled_from([(8, 1), (16, 2), (64, 8)]), st.floats(1.0, 8.0))  # fmt: skip
def test_fewer_tokens_or_experts_per_token_are_never_slower(kernel, tokens, top_k, group, factor):
    ranks, nodes = group
    base = exchange(kernel, tokens_per_rank=tokens, top_k=top_k, ranks=ranks, nodes=nodes)
    more_tokens = exchange(kernel, tokens_per_rank=tokens * factor, top_k=top_k, ranks=ranks, nodes=nodes)
    more_experts = exchange(kernel, tokens_per_rank=tokens, top_k=top_k + 1, ranks=ranks, nodes=nodes)
    time = timed(alltoall.OPERATOR, base)
    assert time <= timed(alltoall.OPERATOR, more_tokens)
    assert time <= timed(alltoall.OPERATOR, more_experts)


@given(st.integers(1, 8192), st.sampled_from([(8, 1), (16, 2), (64, 8)]))
def test_an_exchange_at_full_efficiency_is_no_faster_than_its_wire(tokens, group):
    ranks, nodes = group
    for kernel in ("deepep_normal", "deepep_low_latency"):
        f = exchange(kernel, tokens_per_rank=tokens, ranks=ranks, nodes=nodes)
        perfect = {"link_efficiency": 1.0, "network_efficiency": 1.0, "network_gain": 1.0}
        assert timed(alltoall.OPERATOR, f, **perfect) >= alltoall.roofline(f, H100)


def test_measured_exchanges_include_the_notification():
    table = read_table(PROFILES / "h100_sxm" / "moe_alltoall_h100_sxm.csv")
    several = (table.number("num_nodes") > 1) & (table.text("kernel") == "deepep_normal")
    total = alltoall.measured(table)
    latency_s = table.number("latency_us") * 1e-6
    assert (total[several] > latency_s[several]).all()
    np.testing.assert_array_equal(total[~several], latency_s[~several])


def held_out_mape(operator, path, hardware, folds=3, **variant):
    sample = next(
        s for s in calibrate.samples(operator, read_table(path)) if variant.items() <= dict(s.variant).items()
    )
    predicted = calibrate.held_out(operator, sample, hardware, operator.defaults, folds)
    return 100 * np.abs(predicted / sample.seconds - 1).mean()


@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_message_sizes_left_out_of_the_fit_are_within_fifteen_percent(gpu):
    folder, hardware = PROFILES / f"{gpu}_sxm", load_hardware(gpu)
    assert held_out_mape(allreduce.OPERATOR, folder / f"allreduce_{gpu}_sxm.csv", hardware, framework="vllm") < 15.0
    for operation in ("all_reduce", "all_gather", "alltoall"):
        path = folder / f"nccl_{gpu}_sxm.csv"
        assert held_out_mape(nccl.OPERATOR, path, hardware, operation=operation, version="2.27.3") < 15.0


def test_tokens_held_to_their_best_groups_reach_fewer_ranks():
    """Four of eight groups, one a rank: at most four ranks, and as many as drawn routings reach."""
    share = alltoall.group_rank_share(256, 8, 8, 8, 4)
    free, _ = alltoall.copies_per_token(exchange(num_experts=256, ranks=8, top_k=8))
    held, _ = alltoall.copies_per_token(exchange(num_experts=256, ranks=8, top_k=8, rank_share=share))
    drawn = sample_choices(np.random.default_rng(1), 4000, np.ones(256), 8, num_groups=8, top_groups=4) // 32
    assert held == pytest.approx(np.mean([len(set(row) - {0}) for row in drawn.tolist()]), rel=0.02)
    assert held < 0.8 * free


def test_an_exchange_issued_from_python_hides_under_the_issuing():
    """Below the issuing time nothing else shows; of a low-latency kernel replayed from a graph only its own time."""
    small, large = (exchange("deepep_low_latency", tokens_per_rank=t) for t in (1, 16384))
    slow = {**alltoall.OPERATOR.defaults, "host_s": 5e-4}
    assert alltoall.seconds(small, slow, H100, BENCHMARK) == pytest.approx(5e-4, rel=0.01)
    assert alltoall.seconds(small, slow, H100, COLD) < 1e-4
    assert alltoall.seconds(large, slow, H100, BENCHMARK) > 1e-3
    assert alltoall.seconds(exchange(tokens_per_rank=1), slow, H100, COLD) == pytest.approx(5e-4, rel=0.01)


def test_a_call_issued_while_the_device_copies_shows_only_what_outlasts_the_copy():
    slow = {**alltoall.OPERATOR.defaults, "host_s": 5e-4}
    rate = alltoall.COPY_EFFICIENCY * H100.device.memory_bandwidth
    behind = {share: exchange(tokens_per_rank=8, copied_per_token=share * 5e-4 * rate / 8) for share in (0.0, 0.5, 2.0)}
    times = {share: float(alltoall.seconds(features, slow, H100, BENCHMARK)) for share, features in behind.items()}
    assert times[0.0] == pytest.approx(5e-4, rel=0.01)
    assert times[0.5] == pytest.approx(2.5e-4, rel=0.01)
    assert times[2.0] < 1e-4


def test_low_latency_combines_of_vllm_follow_a_copy_of_the_whole_buffer():
    """All its local experts' room for all ranks' tokens, read and written in 16 bits; nobody else's do."""
    table = read_table(PROFILES / "h200_sxm" / "moe_alltoall_h200_sxm.csv")
    copied = alltoall.features(table)["copied_per_token"]
    quick = (table.text("kernel") == "deepep_ll") & (table.text("phase") == "combine")
    whole = 4.0 * table.number("num_experts") * table.number("hidden_size")
    assert copied[quick] == pytest.approx(whole[quick])
    assert not copied[(table.text("framework") != "vllm") | (table.text("phase") == "dispatch")].any()


@pytest.mark.parametrize("phase", ["dispatch", "combine"])
@pytest.mark.parametrize("kernel", ["trtllm_deepep_ht", "trtllm_deepep_ll"])
def test_rows_of_tensorrt_llm_need_its_benchmark_to_be_read(kernel, phase):
    """With free routing, narrow combines and all multiprocessors lent, bulk combine misses by 19 %."""
    path = PROFILES / "h100_sxm" / "moe_alltoall_h100_sxm.csv"
    assert held_out_mape(alltoall.OPERATOR, path, H100, framework="trtllm", kernel=kernel, phase=phase) < 9.0


@pytest.mark.parametrize("kernel", ["deepep_normal", "deepep_low_latency"])
@pytest.mark.parametrize("phase", ["dispatch", "combine"])
def test_expert_exchanges_of_unseen_models_are_within_twelve_percent(kernel, phase):
    path = PROFILES / "h100_sxm" / "moe_alltoall_h100_sxm.csv"
    assert held_out_mape(alltoall.OPERATOR, path, H100, framework="sglang", kernel=kernel, phase=phase) < 12.0
