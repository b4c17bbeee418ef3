"""Clusters: failures, autoscaling, prefill and decode apart, think times; against twins, theory and conservation."""

import re
from collections import Counter
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.cluster_stepwise import simulate_cluster
from reference.sim_stepwise import TICK
from test_sim import constant_steps
from test_sim_twin import lengths, make_table, tiers

from simmoe.errors import CapacityError, SpecError
from simmoe.sim.arrivals import Streams
from simmoe.sim.cluster import simulate
from simmoe.sim.disaggregated import Handover, Transfer, transfer_of
from simmoe.sim.policies import POLICIES
from simmoe.sim.pool import PoolSetup
from simmoe.sim.request import Request
from simmoe.sim.routers import ROUTERS, router_named
from simmoe.specs.cluster import Autoscaling, Cluster, Disaggregation, Failures, PolicyName, RouterName
from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import EngineParameters
from simmoe.specs.hardware import Link
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.speculative import Speculative
from simmoe.specs.workload import Arrivals, Lengths, Prompts, Workload
from simmoe.steady.front_end import at_client

SMALL = Deployment(gpus=1, tp=1, max_num_seqs=8, max_num_batched_tokens=64)
TABLE = make_table(64, 8)
SPECULATIVE = Speculative(method="ngram", draft_tokens=2, acceptance_length=1.7)


def fixed(tokens):
    return Lengths(mean=tokens)


#: constant, per running request, per prompt token [s]
front_ends = st.sampled_from([(0.0, 0.0, 0.0), (0.02, 0.0, 0.0), (0.0, 3e-3, 0.0), (1e-3, 1e-3, 5e-4)])


def front_end(times):
    constant, per_request, per_token = times
    return EngineParameters(
        engine="generic", front_end_time=constant, front_end_time_per_request=per_request,
        front_end_time_per_token=per_token, source="test",
    )  # fmt: skip


def assert_equal_to_twin(result, jobs):
    served = result.requests.accepted()
    twins = [jobs[i] for i in served.request.tolist()]
    assert len(twins) == len(jobs)
    assert served.first_scheduled_s.tolist() == [j.admitted * TICK for j in twins]
    assert served.first_token_s.tolist() == [j.token_times[0] * TICK for j in twins]
    assert served.finished_s.tolist() == [j.token_times[-1] * TICK for j in twins]
    assert served.preemptions.tolist() == [j.preemptions for j in twins]
    assert result.found_tokens == sum(j.found for j in twins)


@st.composite
def loops(draw, most_in=40, most_out=50):
    load = draw(
        st.one_of(
            st.builds(dict, rate=st.sampled_from([1.0, 10.0, 40.0])),
            st.builds(dict, concurrency=st.integers(1, 20), think_time=st.sampled_from([0.0, 0.05])),
        )
    )
    prompts = draw(
        st.none()
        | st.builds(
            Prompts, distinct=st.integers(2, 9), order=st.just("random"), groups=st.integers(1, 2),
            shared_tokens=st.integers(0, 30),
        )
    )  # fmt: skip
    return Workload(input=draw(lengths(most_in)), output=draw(lengths(most_out)), prompts=prompts, **load)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    loops(),
    st.integers(1, 3),
    st.sampled_from([1, 2]),
    st.integers(100, 400),
    st.integers(0, 2**30),
    st.sampled_from(["vllm", "trtllm", "trtllm_max_utilization", "sglang"]),
    st.sampled_from([0.05, 0.4, 2.0]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0, 1]),
    st.sampled_from([None, SPECULATIVE, SPECULATIVE.vary(sampled=True)]),
    st.sampled_from(["least_outstanding", "prefix_aware"]),
    st.one_of(st.none(), tiers),
    st.sampled_from([4, 16]),
    front_ends,
)
def test_failing_replicas_equal_the_twin(
    workload, replicas, dp, kv_tokens, seed, policy, between, restart, ahead, speculative, router, tier, block, front
):
    deployment = SMALL.vary(gpus=replicas * dp, dp=dp, speculative=speculative, kv_block_size=block)
    table = replace(make_table(64 * dp, 8 * dp, rows=deployment.rows_per_decode), steps_ahead=ahead)
    failures = Failures(mean_time_between=between, restart_time=restart)
    options = {"requests": 25, "seed": seed, "policy": policy, "router": router, "tier": tier}
    jobs = simulate_cluster(table, workload, deployment, kv_tokens * dp, failures=failures, front_end=front, **options)
    result = simulate(
        table, workload, deployment, kv_tokens * dp, keep_load=False, warmup=0.0,
        cluster=Cluster(failures=failures), front_end=front_end(front), **options,
    )  # fmt: skip
    assert_equal_to_twin(result, jobs)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    loops(),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(100, 400),
    st.integers(100, 250),
    st.integers(0, 2**30),
    st.builds(
        Transfer,
        latency_s=st.sampled_from([0.0, 1e-3]),
        seconds_per_token=st.sampled_from([0.0, 1e-5, 2e-3]),
        layers=st.sampled_from([1, 4]),
    ),
    st.sampled_from([0, 1]),
    st.sampled_from([None, SPECULATIVE, SPECULATIVE.vary(sampled=True)]),
    front_ends,
)
def test_prefill_and_decode_apart_equal_the_twin(
    workload, prefill, decode, kv_in, kv_out, seed, transfer, ahead, speculative, front
):
    second = SMALL.vary(gpus=decode, max_num_seqs=4, kv_block_size=4, speculative=speculative)
    pools = (SMALL.vary(gpus=prefill), second)
    table = replace(TABLE, steps_ahead=ahead)
    second = (
        replace(make_table(64, 4, slope=2e-4, rows=second.rows_per_decode), steps_ahead=ahead), pools[1], kv_out
    )  # fmt: skip
    options = {"requests": 25, "seed": seed}
    jobs = simulate_cluster(
        table, workload, pools[0], kv_in, decode=second, transfer=transfer, front_end=front, **options
    )
    setup = PoolSetup(table=second[0], deployment=second[1], kv_tokens=second[2])
    result = simulate(
        table, workload, pools[0], kv_in, keep_load=False, warmup=0.0,
        handover=Handover(decode=setup, transfer=transfer), front_end=front_end(front), **options,
    )  # fmt: skip
    assert_equal_to_twin(result, jobs)
    log = result.steps
    gaps = np.repeat(log.gap_s, log.gap_count.astype(int))
    counted = (log.decodes * log.steps).sum() + len(gaps)
    assert counted == sum(len(j.token_times) - 1 for j in jobs.values())  # every gap between chunks counts once
    assert speculative or counted == sum(j.output - 1 for j in jobs.values())
    total = np.repeat(log.first_s * log.steps + log.growth_s * log.steps * (log.steps - 1) / 2, log.decodes.astype(int))
    assert total.sum() + gaps.sum() == pytest.approx(
        sum((j.token_times[-1] - j.token_times[0]) * TICK for j in jobs.values())
    )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**30),
    st.sampled_from(["round_robin", "least_outstanding", "power_of_two", "prefix_aware"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from([None, SPECULATIVE, SPECULATIVE.vary(sampled=True)]),
    st.sampled_from([None, Prompts(distinct=8, order="random", groups=2, shared_tokens=15)]),
    st.integers(70, 500),
)
def test_everybody_is_served_once_whatever_fails_and_scales(
    seed, router, failing, scaling, policy, speculative, prompts, kv_tokens
):
    rules = Cluster(
        router=router,
        failures=Failures(mean_time_between=1.0, restart_time=0.4) if failing else None,
        autoscaling=Autoscaling(maximum=4, target=4, startup_time=0.3, interval=0.1, down_after=0.3)
        if scaling
        else None,
    )
    workload = Workload(
        rate=30, arrivals=Arrivals(kind="gamma", cv=3), input=fixed(20), output=Lengths(kind="uniform", low=1, high=40),
        prompts=prompts,
    )  # fmt: skip
    deployment = SMALL.vary(gpus=2, speculative=speculative, kv_block_size=4)
    table = make_table(64, 8, rows=deployment.rows_per_decode)
    first, second = (
        simulate(
            table, workload, deployment, kv_tokens, requests=120, seed=seed, cluster=rules, policy=policy,
            keep_load=False,
        )
        for _ in range(2)
    )  # fmt: skip
    served = first.requests.accepted()
    assert Counter(served.request.tolist()) == Counter(range(120))
    assert np.isfinite(served.finished_s).all()
    tokens = (first.steps.decodes * first.steps.steps + first.steps.sampled).sum()
    # a prompt's first token is sampled again after a loss
    assert tokens >= served.output_tokens.sum() - 1e-6
    assert (first.steps.blocks <= np.array(first.kv_blocks)[first.steps.rank.astype(int)] + 1e-9).all()
    assert second.requests.finished_s.tolist() == first.requests.finished_s.tolist()
    assert second.scaling == first.scaling
    assert failing or not first.failures


def test_replicas_follow_the_load_up_and_down():
    """Target 4 in the system per replica: a stage of load brings replicas after their start-up, a pause drains them."""
    stages = [{"rate": 2, "duration": 20}, {"rate": 40, "duration": 20}, {"rate": 1, "duration": 40}]
    workload = Workload(arrivals={"kind": "staged", "stages": stages}, input=fixed(16), output=fixed(20))
    rule = Autoscaling(maximum=6, target=4, startup_time=3, interval=1, down_after=5)
    result = simulate(TABLE, workload, SMALL, 10**4, cluster=Cluster(autoscaling=rule), warmup=0.0)
    on = [count for _, count in result.scaling]
    rising = next(time for time, count in result.scaling if count > 1)
    assert on[0] == 1
    assert max(on) > 2
    assert on[-1] < max(on)
    assert 20 < rising < 25
    assert result.replica_s < max(on) * result.end_s
    alone = simulate(TABLE, workload, SMALL, 10**4, warmup=0.0)
    late = result.requests.arrival_s > 30
    assert result.requests.ttft_s[late].mean() < alone.requests.ttft_s[late].mean()


def test_failures_cost_time_and_recomputation():
    workload = Workload(rate=12, input=fixed(30), output=fixed(20))
    calm = simulate(TABLE, workload, SMALL.vary(gpus=2), 10**4, requests=600)
    rules = Cluster(failures=Failures(mean_time_between=4, restart_time=1))
    hit = simulate(TABLE, workload, SMALL.vary(gpus=2), 10**4, requests=600, cluster=rules)
    assert calm.preemptions == 0
    assert hit.failures > 5
    assert hit.preemptions > 0
    assert hit.metrics.e2e.mean > calm.metrics.e2e.mean


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    loops(),
    st.integers(1, 2),
    st.sampled_from([1, 2]),
    st.integers(0, 2**30),
    st.sampled_from(["vllm", "trtllm", "trtllm_max_utilization", "sglang"]),
    st.sampled_from([0, 1]),
    st.sampled_from([None, SPECULATIVE]),
    front_ends,
)
def test_clients_in_the_front_end_equal_the_twin(workload, replicas, dp, seed, policy, ahead, speculative, front):
    """A replica alone, without an event queue, among them."""
    deployment = SMALL.vary(gpus=replicas * dp, dp=dp, speculative=speculative)
    table = replace(make_table(64 * dp, 8 * dp, rows=deployment.rows_per_decode), steps_ahead=ahead)
    options = {"requests": 40, "seed": seed, "policy": policy}
    jobs = simulate_cluster(table, workload, deployment, 400 * dp, front_end=front, **options)
    result = simulate(
        table, workload, deployment, 400 * dp, keep_load=False, warmup=0.0, front_end=front_end(front), **options
    )
    assert_equal_to_twin(result, jobs)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 12),
    st.sampled_from([0.0, 0.05]),
    lengths(40),
    lengths(50),
    st.integers(1, 2),
    st.sampled_from([1, 2]),
    st.sampled_from(["vllm", "trtllm", "sglang"]),
    st.sampled_from([0, 1]),
    front_ends,
    st.integers(0, 2**30),
)
def test_a_client_sends_its_next_request_when_it_has_the_last_token_and_has_thought(
    clients, think, inputs, outputs, replicas, dp, policy, ahead, front, seed
):
    """Little's law without an error of its own: from one sending to the next is E2E and think time, nothing else."""
    workload = Workload(concurrency=clients, think_time=think, think="fixed", input=inputs, output=outputs)
    deployment = SMALL.vary(gpus=replicas * dp, dp=dp)
    table = replace(make_table(64 * dp, 8 * dp), steps_ahead=ahead)
    result = simulate(
        table, workload, deployment, 4000 * dp, requests=60, seed=seed, policy=policy, keep_load=False, warmup=0.0,
        front_end=front_end(front),
    )  # fmt: skip
    seen = at_client(result.requests, result.steps, front_end(front), dp)
    again = np.sort(seen.finished_s)[: len(seen) - clients] + think
    assert np.sort(seen.arrival_s)[clients:] == pytest.approx(again, rel=1e-9, abs=1e-12)


def test_thinking_clients_are_the_machine_repair_queue():
    """M/M/1//N (mean value analysis): N=5, D=1, Z=4 gives 0.8009/s. Scaled in time; geometric lengths, a batch of one.

    One request's time is (1 + output) steps of constant length but one, close to exponential for long outputs.
    """
    step, mean = 0.001, 200
    demand = step * mean
    rng = np.random.default_rng(5)
    values = tuple(rng.geometric(1 / mean, size=20000).tolist())
    workload = Workload(
        concurrency=5, think_time=4 * demand, input=fixed(1), output=Lengths(kind="empirical", values=values)
    )
    deployment = SMALL.vary(max_num_seqs=1, max_num_batched_tokens=16)
    runs = [
        simulate(constant_steps(step, 16, 1), workload, deployment, 10**5, requests=1500, seed=s).metrics.requests_per_s
        for s in range(8)
    ]
    drawn = np.mean(values) * step
    expected, queue = 0.0, 0.0
    for n in range(1, 6):
        response = drawn * (1 + queue)
        expected = n / (4 * demand + response)
        queue = expected * response
    error = np.std(runs, ddof=1) / np.sqrt(len(runs))
    assert np.mean(runs) == pytest.approx(expected, abs=4 * error)
    assert error < 0.02 * expected


def test_a_scenario_names_the_routers_and_policies_there_are():
    assert get_args(RouterName) == tuple(ROUTERS)
    assert get_args(PolicyName) == tuple(POLICIES)


def test_prompts_go_where_their_head_was_sent_unless_that_rank_is_swamped():
    route = router_named("prefix_aware", Streams.of(0).routing)
    taking = [0, 1, 2]

    def request(*prompt):
        return Request(0, 0, sum(tokens for _, tokens in prompt), 1, prompt)

    assert route(request((7, 100), (1, 20)), [5, 0, 3], taking) == 1
    assert route(request((7, 100), (2, 20)), [5, 4, 3], taking) == 1  # 100 of 120 tokens match
    assert route(request((7, 100), (3, 400)), [5, 4, 3], taking) == 2  # too little of it matches
    assert route(request((7, 100), (1, 20)), [5, 90, 3], taking) == 2  # load first
    assert route(request((8, 50)), [5, 4, 6], taking) == 1
    assert route(request((8, 50)), [0, 1, 6], [0, 2]) == 0  # rank 1 takes nothing new


def test_prefix_aware_routing_finds_more_of_its_prompts_cached():
    """Forty prompts fit one replica's cache a quarter at a time: keeping each at one place saves prompt tokens."""
    workload = Workload(rate=15, input=fixed(48), output=fixed(8), prompts={"distinct": 40, "order": "random"})
    computed = {}
    for router in ("round_robin", "prefix_aware"):
        result = simulate(TABLE, workload, SMALL.vary(gpus=4), 700, requests=800, router=router)
        computed[router] = result.steps.prompt_tokens.sum()
    assert computed["prefix_aware"] < 0.8 * computed["round_robin"]


def test_transfer_of_deepseek_v3_is_70_kb_a_token():
    """4096 tokens over 50 GB/s take 5.8 ms: 61 layers x 576 elements x 2 bytes a token."""
    rule = Disaggregation(decode=Deployment(gpus=8), link=Link(bandwidth=50e9, latency=0.0))
    transfer = transfer_of(load_model("deepseek-v3"), Deployment(gpus=8), rule, load_hardware("h200"))
    assert transfer.seconds_per_token * 4096 == pytest.approx(61 * 576 * 2 * 4096 / 50e9)
    assert transfer.seconds_per_token * 4096 == pytest.approx(5.8e-3, rel=0.02)


def test_traffic_that_ends_is_played_whole_and_endless_needs_a_limit():
    stages = [{"rate": 20, "duration": 2}]
    arrivals = {"kind": "staged", "stages": stages, "exact_counts": True}
    workload = Workload(arrivals=arrivals, input=fixed(8), output=fixed(2))
    result = simulate(TABLE, workload, SMALL, 10**4)
    assert len(result.requests) == 40
    assert result.measured == 40
    with pytest.raises(SpecError, match="exactly one of requests and duration_s: this traffic never ends"):
        simulate(TABLE, Workload(rate=3, input=fixed(8), output=fixed(2)), SMALL, 10**4)


SCALED = """
hardware: h100
model: deepseek-v2-lite
deployment: {{gpus: {gpus}, tp: 1}}
workload: {{rate: 20 request/s, input: 256, output: 32}}
cluster:
  autoscaling: {{minimum: {minimum}, maximum: {maximum}, target: 2, startup_time: 1 s, interval: 0.5 s}}
run: {{requests: 200}}
"""


@pytest.mark.parametrize(
    ("gpus", "minimum", "maximum", "says"),
    [
        (
            1,
            2,
            4,
            "cluster.autoscaling.minimum: 2 exceeds the 1 replica that the deployment's gpus 1 make at the start",
        ),
        (4, 1, 2, "cluster.autoscaling.maximum: 2 is below the 4 replicas that the deployment's gpus 4 make at the"),
    ],
)
def test_autoscaling_that_contradicts_the_start_is_refused(simmoe, tmp_path, gpus, minimum, maximum, says):
    (tmp_path / "scaled.yaml").write_text(SCALED.format(gpus=gpus, minimum=minimum, maximum=maximum))
    status, out, err = simmoe("simulate", "scaled.yaml")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"simmoe: scaled.yaml: {says}")


def test_more_replicas_than_the_deployment_has_are_told_and_used(simmoe, tmp_path):
    (tmp_path / "scaled.yaml").write_text(SCALED.format(gpus=1, minimum=1, maximum=4))
    status, out, _ = simmoe("simulate", "scaled.yaml")
    assert status == 0
    assert "autoscaling: 1 replica at the start, by load 1 to 4, so up to 4 devices" in out
    most = re.search(r"replicas on, mean / most\D+[\d.]+ / (\d)", out)
    assert most and int(most[1]) > 1


def test_a_link_too_slow_to_end_a_run_is_refused():
    """Sending falls behind by as many times as a run that keeps its load up would play the requests it measures."""
    workload = Workload(rate=5.0, input=Lengths(mean=10), output=Lengths(mean=5))
    setup = PoolSetup(table=TABLE, deployment=SMALL, kv_tokens=2000)

    def run(seconds_per_token, **options):
        handover = Handover(decode=setup, transfer=Transfer(latency_s=0.0, seconds_per_token=seconds_per_token))
        return simulate(TABLE, workload, SMALL, 2000, handover=handover, requests=20, **options)

    with pytest.raises(CapacityError, match="link is 500 times too slow"):
        run(10.0)
    run(10.0, keep_load=False)  # which nobody's coming prolongs
    assert run(0.1).metrics.e2e.mean > 4 * run(0.001).metrics.e2e.mean  # a link five times too slow saturates
