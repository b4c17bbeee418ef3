"""Alternatives to a MoE: sizes by count, and what follows for speed."""

import json

import pytest
from typer.testing import CliRunner

from simmoe.cli.main import app
from simmoe.costs.work import parameters
from simmoe.errors import SaturationError, SpecError
from simmoe.planning.alternatives import compare, split_service
from simmoe.predict import predict
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.variants import dense_equivalent, task_submodel
from simmoe.specs.workload import Lengths, Workload

H100, H200 = load_hardware("h100"), load_hardware("h200")
QWEN = load_model("qwen3-30b-a3b")


def traffic(**load):
    return Workload(**load, input=Lengths(mean=512), output=Lengths(mean=128))


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "deepseek-v2-lite", "mixtral-8x7b", "deepseek-v3"])
def test_dense_twins_have_the_parameters_they_are_named_for(name):
    model = load_model(name)
    count = parameters(model)
    router = model.moe_layers * model.experts.num_experts * model.hidden
    active, total = (parameters(dense_equivalent(model, equal)).total for equal in ("active", "total"))
    assert active == pytest.approx(count.active - router, rel=1e-3)
    assert total == pytest.approx(count.total - router, rel=1e-3)


def test_a_moe_lies_between_its_dense_twins():
    moe, active, total, task, alone = compare(H100, QWEN, Deployment(gpus=2, tp=2), traffic(concurrency=32))
    rates = [a.output_tokens_per_s_per_device for a in (active, moe, total)]
    assert rates[0] > rates[1] > rates[2]
    assert task.output_tokens_per_s_per_device > moe.output_tokens_per_s_per_device
    assert alone.output_tokens_per_s_per_device < 0.3 * moe.output_tokens_per_s_per_device


def test_what_does_not_fit_is_placed_on_the_fewest_devices_that_hold_it():
    found = {
        a.name: a for a in compare(H100, load_model("mixtral-8x7b"), Deployment(gpus=2, tp=2), traffic(concurrency=8))
    }
    assert found["dense, equal total"].prediction is not None
    (alone,) = (a for a in compare(H100, load_model("mixtral-8x22b"), Deployment(gpus=1), traffic(concurrency=8))[:1])
    assert alone.why.startswith("on 4 devices")


def test_alternatives_are_not_held_to_a_layout_that_only_suits_the_moe():
    """A dense model of 37 B over two nodes' tensor parallelism is a straw man; replicas of one H200 each hold it."""
    wide = Deployment(gpus=16, tp=1, dp=16, ep=16, engine="sglang")
    found = {a.name: a for a in compare(H200, load_model("deepseek-v3"), wide, traffic(concurrency=256))}
    dense = found["dense, equal active"].prediction
    assert dense.deployment.tp_size <= 8
    assert dense.deployment.gpus == 16
    for tp in (2, 8, 16):
        other = predict(H200, dense.model, dense.deployment.vary(tp=tp), traffic(concurrency=256)).metrics
        assert dense.metrics.output_tokens_per_s >= 0.995 * other.output_tokens_per_s


def test_a_distilled_model_takes_the_interactive_part_in_one_call(tmp_path):
    small = load_model("qwen3-8b")
    *_, first, second = compare(H100, QWEN, Deployment(gpus=4, tp=1), traffic(rate=10.0), small, 0.3)
    assert first.prediction.workload.rate == pytest.approx(3.0)
    assert second.prediction.workload.rate == pytest.approx(7.0)
    assert first.prediction.deployment.gpus + second.prediction.deployment.gpus <= 4
    assert first.prediction.metrics.tpot.p50 < second.prediction.metrics.tpot.p50
    assert (first.prediction.model.name, second.prediction.model.name) == (small.name, QWEN.name)
    (refused,) = (
        a for a in compare(H100, QWEN, Deployment(gpus=2), traffic(rate=10.0), small, 0.3) if not a.prediction
    )
    assert "2 to a replica" in refused.why
    for share, asked, distilled in (
        (0.3, {"rate": 1.0}, None),
        (0.3, {"concurrency": 4}, small),
        (1.5, {"rate": 1.0}, small),
    ):
        with pytest.raises(SpecError, match="share of the requests"):
            compare(H100, QWEN, Deployment(gpus=4), traffic(**asked), distilled, share)


def test_the_command_compares_in_one_call():
    words = (
        "alternatives h100 --model qwen3-30b-a3b --gpus 4 --tp 1 --small qwen3-8b --rate 10 --interactive 0.3 --json"
    )
    result = CliRunner().invoke(app, words.split())
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert len(rows) == 8
    assert rows["dense, equal total"]["tpot_p50_s"] > rows["dense, equal active"]["tpot_p50_s"]
    assert rows["Qwen3-8B for 30% of them,"]["gpus"] < 4


def test_a_task_needs_at_least_the_experts_of_a_token():
    assert task_submodel(QWEN).experts.num_experts == 8
    with pytest.raises(SpecError, match="8 to 128"):
        task_submodel(QWEN, 4)
    with pytest.raises(SpecError, match="no experts"):
        dense_equivalent(load_model("llama-3.1-8b"))


def test_devices_are_split_between_a_small_model_and_the_moe():
    small = load_model("qwen3-8b")
    layout = Deployment(gpus=8, tp=2)
    first, second, given = split_service(H100, QWEN, small, layout, traffic(rate=10.0), traffic(rate=5.0))
    assert first.prediction.deployment.gpus == given >= 1
    assert second.prediction.deployment.gpus <= 8 - given
    with pytest.raises(SaturationError, match="do not carry"):
        split_service(H100, QWEN, small, layout, traffic(rate=1e5), traffic(rate=5.0))
