"""The fast-forwarded simulation equals the step-by-step twin, to the last bit of every time."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.sim_stepwise import TICK, simulate_stepwise

from simmoe.costs.kv_offload import HostTier
from simmoe.engine.step import StepTable
from simmoe.errors import CapacityError
from simmoe.sim.cluster import simulate
from simmoe.specs.deployment import Deployment
from simmoe.specs.workload import Lengths, Prompts, Workload


def make_table(
    tokens: int, requests: int, *, per_context: float = 2e-6, slope: float = 1e-4, rows: int = 1, stages: int = 1
) -> StepTable:
    """Any increasing table does: nothing here is a prediction."""
    b = np.arange(requests + 1)
    t = np.arange(tokens + 1)
    token_s = 5e-3 + slope * t + 1e-3 * np.sqrt(t)
    batches = np.arange(1, stages + 1)
    return StepTable(
        rows_per_decode=rows,
        prompt_token_s=token_s * (1 + stages / batches)[:, None] / 2,
        prompt_shares=(batches + stages - 1) / (batches * stages),
        token_s=token_s,
        head_s=1e-4 + 1e-5 * np.arange(requests * rows + tokens + 1),
        decode_base_s=1e-4 + 3e-5 * b,
        decode_per_context_s=per_context / np.sqrt(1 + b),
        prefill_base_s=2e-4,
        prefill_per_token_s=1e-5,
        prefill_per_pair_s=3e-8,
        prefill_per_cached_s=4e-6,
        prefill_walk_base_s=1e-4,
        prefill_walk_s=1.5e-5,
        batch_tokens=24,
    )


@st.composite
def lengths(draw, most: int):
    kind = draw(st.sampled_from(["fixed", "uniform", "lognormal"]))
    if kind == "fixed":
        return Lengths(mean=draw(st.integers(1, most)))
    if kind == "uniform":
        low = draw(st.integers(1, most))
        high = draw(st.integers(low, most))
        return Lengths(kind="uniform", mean=(low + high) / 2, low=low, high=high)
    return Lengths(kind="lognormal", mean=draw(st.integers(1, most)), cv=draw(st.floats(0.2, 2.0)), high=most)


ACCEPTED = (1.0, 1.5, 1.85, 2.0, 2.62, 3.5, 4.0)


@st.composite
def scenarios(draw):
    dp = draw(st.sampled_from([1, 1, 1, 2, 3]))
    replicas = draw(st.sampled_from([1, 1, 2, 3]))
    seqs = dp * draw(st.sampled_from([1, 2, 4, 16]))
    drafts = draw(st.sampled_from([0, 0, 1, 3]))
    pp = 1 if drafts else draw(st.sampled_from([1, 1, 3]))
    speculative = {
        "method": "ngram", "draft_tokens": drafts,
        "acceptance_length": draw(st.sampled_from([a for a in ACCEPTED if a <= drafts + 1])),
        "sampled": draw(st.booleans()),
    } if drafts else None  # fmt: skip
    deployment = Deployment(
        gpus=replicas * dp * pp,
        pp=pp,
        speculative=speculative,
        tp=1,
        dp=dp,
        ep=draw(st.sampled_from([1, dp])),
        max_num_seqs=seqs,
        max_num_batched_tokens=(1 + drafts) * seqs + dp * draw(st.sampled_from([0, 1, 13, 64])),
        kv_block_size=draw(st.sampled_from([1, 4, 16])),
    )
    loop = (
        {"concurrency": draw(st.integers(1, 24))}
        if draw(st.booleans())
        else {"rate": draw(st.sampled_from([0.5, 5.0, 20.0, 100.0]))}
    )
    workload = Workload(input=draw(lengths(60)), output=draw(lengths(80)), **loop)
    kv_tokens = dp * draw(st.integers(40, 600))
    return deployment, workload, kv_tokens


@st.composite
def repeated_prompts(draw):
    """Prompts that come again, whole or their heads, with room for all of them or for a few."""
    deployment, workload, kv_tokens = draw(scenarios())
    kv_tokens = draw(st.sampled_from([kv_tokens, kv_tokens, 8000 * deployment.dp]))
    prompts = Prompts(
        distinct=(distinct := draw(st.integers(1, 12))),
        order=draw(st.sampled_from(["round_robin", "random"])),
        groups=draw(st.integers(1, distinct)),
        shared_tokens=draw(st.integers(0, 70)),
    )
    return deployment, workload.vary(prompts=prompts), kv_tokens


tiers = st.builds(
    HostTier,
    tokens=st.integers(0, 600),
    seconds_per_token=st.sampled_from([0.0, 1e-5, 2e-3]),
    latency_s=st.sampled_from([0.0, 1e-3]),
    layerwise=st.booleans(),
    swap=st.booleans(),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.one_of(scenarios(), repeated_prompts()),
    st.one_of(st.none(), tiers),
    st.integers(0, 2**32),
    st.sampled_from(["round_robin", "least_outstanding", "power_of_two", "prefix_aware"]),
    st.sampled_from(["vllm", "vllm", "trtllm", "trtllm_max_utilization", "sglang"]),
    st.sampled_from([0, 1]),
)
def test_fast_forward_equals_stepping_one_at_a_time(scenario, tier, seed, router, policy, steps_ahead):
    deployment, workload, kv_tokens = scenario
    table = make_table(
        deployment.tokens_per_replica, deployment.requests_per_replica, rows=deployment.rows_per_decode,
        stages=deployment.pp,
    )  # fmt: skip
    table = replace(table, steps_ahead=steps_ahead)
    options = {"requests": 40, "seed": seed, "router": router, "policy": policy, "tier": tier}
    jobs, refused, loaded = simulate_stepwise(table, workload, deployment, kv_tokens, **options)
    if not jobs:
        with pytest.raises(CapacityError):
            simulate(table, workload, deployment, kv_tokens, keep_load=False, **options)
        return
    result = simulate(table, workload, deployment, kv_tokens, keep_load=False, warmup=0.0, **options)
    fast = result.requests
    assert fast.request[fast.rank < 0].tolist() == sorted(refused)
    served = fast.accepted()
    assert served.request.tolist() == sorted(jobs)
    twins = [jobs[i] for i in served.request.tolist()]
    for column, expected in (
        (served.arrival_s, [j.arrival for j in twins]),
        (served.first_scheduled_s, [j.admitted for j in twins]),
        (served.first_token_s, [j.token_times[0] for j in twins]),
        (served.finished_s, [j.token_times[-1] for j in twins]),
    ):
        assert column.tolist() == [t * TICK for t in expected]
    assert result.loaded_tokens == loaded
    assert result.found_tokens == sum(j.found for j in twins)
    assert served.preemptions.tolist() == [j.preemptions for j in twins]
    log = result.steps
    assert (log.decodes * log.steps + log.sampled).sum() == pytest.approx(sum(j.output for j in twins), rel=1e-9)
    gaps = [gap for row in zip(log.first_s, log.growth_s, log.steps, log.decodes, strict=True) for gap in expand(*row)]
    expected_gaps = [b - a for j in twins for a, b in zip(j.token_times, j.token_times[1:], strict=False)]
    ours = np.sort([*gaps, *np.repeat(log.gap_s, log.gap_count.astype(int))])
    twin = np.sort(np.array(expected_gaps, dtype=float)) * TICK
    assert len(ours) == len(twin)
    np.testing.assert_allclose(ours, twin, rtol=1e-12)
    if len(twin):
        itl = result.metrics.itl
        expected = [twin.mean(), *np.percentile(twin, (50, 90, 99))]
        np.testing.assert_allclose([itl.mean, itl.p50, itl.p90, itl.p99], expected, rtol=1e-9)


def expand(first, growth, steps, decodes):
    return np.repeat(first + growth * np.arange(int(steps)), int(decodes)).tolist()
