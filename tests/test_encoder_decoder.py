"""Models with an encoder: counted by hand, timed as two stacks, and served like any other."""

import numpy as np
import pytest
from typer.testing import CliRunner

from simmoe.cli.main import app
from simmoe.costs.layout import check_layout
from simmoe.costs.memory import kv_bytes_per_token, weights_per_device_bytes
from simmoe.costs.work import parameters
from simmoe.engine.engine import Engine
from simmoe.engine.step import Batch
from simmoe.engine.tabulate import step_table
from simmoe.errors import SpecError
from simmoe.predict import predict
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.variants import dense_equivalent
from simmoe.specs.workload import Lengths, Workload

H100 = load_hardware("h100")
NLLB = load_model("nllb-moe-54b")
EP8 = Deployment(gpus=8, tp=1, dp=8, ep=8, engine="generic")
ONE = Deployment(engine="generic")


def test_switch_base_is_counted_by_hand():
    """12 + 12 layers of 768 in every other of which 128 experts of 2048 stand; cross-attention in the decoder."""
    d, f, heads = 768, 2048, 12 * 64
    attention, ffn = 4 * d * heads, 3 * d * f
    encoder = 12 * (attention + 2 * d) + 6 * ffn + 6 * (128 * ffn + 128 * d) + d
    decoder = 12 * (2 * attention + 3 * d) + 6 * ffn + 6 * (128 * ffn + 128 * d) + d
    assert parameters(load_model("switch-base-128")).total == encoder + decoder + 32128 * d


@pytest.mark.parametrize(
    ("name", "billions"),
    [("switch-base-128", 7.415), ("switch-xxl", 394.543), ("switch-c", 1571.309), ("nllb-moe-54b", 54.483)],
)
def test_totals_and_weights_are_those_of_the_papers(name, billions):
    model = load_model(name)
    count = parameters(model)
    assert count.total / 1e9 == pytest.approx(billions, abs=1e-3)
    assert count.encoder is not None
    assert count.active < 0.1 * count.total
    held = weights_per_device_bytes(model, ONE)
    assert held == pytest.approx(2 * count.total, rel=1e-4)


def test_the_decoder_caches_one_pair_a_token_of_prompt_or_answer():
    assert kv_bytes_per_token(NLLB, ONE) == 24 * 2 * 2048 * 2


def test_a_prompt_passes_the_encoder_and_an_answer_the_decoder():
    engine = Engine(H100, NLLB, EP8)
    alone = Engine(H100, NLLB.vary(encoder=None), EP8)
    decoding, prompts = Batch(64, 64 * 300), Batch(prefill_chunks=((512, 0),) * 8)
    # decoding: the decoder's own layers, and queries and outputs of cross-attention
    extra = engine.step(decoding).parts["projections"] / alone.step(decoding).parts["projections"]
    assert 1.1 < extra < 1.9
    assert engine.step(decoding).parts["routed_experts"] == alone.step(decoding).parts["routed_experts"]
    # a prompt wakes the encoder's experts, and its first token the decoder's
    assert engine.step(prompts).parts["routed_experts"] > 1.2 * alone.step(prompts).parts["routed_experts"]
    taller = Engine(H100, NLLB.vary(encoder=NLLB.encoder.vary(layers=48, moe_layers=12)), EP8)
    assert taller.step(prompts).total_s > 1.4 * engine.step(prompts).total_s
    assert taller.step(decoding).total_s == engine.step(decoding).total_s


def test_attention_both_ways_costs_twice_the_causal_kind():
    engine = Engine(H100, NLLB, ONE)
    both = engine.encode([16384])["attention"]
    causal = float(engine.prefill_attention(np.array([16384.0]), np.zeros(1))[0])
    assert both == pytest.approx(2 * causal, rel=0.05)


def test_the_table_agrees_with_the_steps():
    engine = Engine(H100, NLLB, EP8)
    table = step_table(engine, mean_context=300, prompt_tokens=256)
    for batch in (
        Batch(64, 64 * 300),
        Batch(prefill_chunks=((256, 0),)),
        Batch(64, 64 * 300, ((256, 0),)),
        Batch(64, 64 * 300, ((256, 0),) * 4),
    ):
        exact = engine.step(batch).total_s
        assert table.step_s(batch, len(batch.prefill_chunks)) == pytest.approx(exact, rel=0.08)


def test_it_is_predicted_and_simulated_like_any_other():
    traffic = Workload(concurrency=32, input=Lengths(mean=256), output=Lengths(mean=256))
    ours = predict(H100, NLLB, EP8, traffic).metrics
    dense = predict(H100, dense_equivalent(NLLB), EP8.vary(ep=1), traffic).metrics
    assert 0 < ours.output_tokens_per_s < dense.output_tokens_per_s  # equal FLOPs, far fewer bytes
    result = CliRunner().invoke(app, ["predict", "h100", "--model", "switch-base-128", "--concurrency", "8", "--json"])
    assert result.exit_code == 0, result.exception


def test_pipelines_of_two_stacks_are_refused():
    with pytest.raises(SpecError, match="pp 2: NLLB-MoE-54B has an encoder"):
        check_layout(NLLB, Deployment(gpus=2, tp=1, pp=2, engine="generic"))
    with pytest.raises(ValueError, match="exceeds 2 layers"):
        NLLB.vary(encoder={"layers": 2, "moe_layers": 3})
