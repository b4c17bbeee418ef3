"""The busiest rank's factor, mean and tail, against drawn batches."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from simmoe.cli.main import app
from simmoe.routing.imbalance import busiest_rank
from simmoe.routing.layers import layer_kinds
from simmoe.routing.popularity import weights_from_inclusion
from simmoe.routing.sampling import sample_choices
from simmoe.specs.load import load_model
from simmoe.specs.routing import Routing

EXPERTS = load_model("qwen3-30b-a3b").experts


def kind(ep, **routing):
    return layer_kinds(Routing(**routing), EXPERTS, 48, pool=128, top_k=8, ep=ep)[0]


@pytest.mark.parametrize(("exponent", "ep", "tokens"), [(0.0, 8, 128), (0.0, 32, 1024), (0.8, 8, 256), (0.8, 16, 2048)])
def test_mean_and_tail_match_drawn_batches(exponent, ep, tokens):
    rng = np.random.default_rng(7)
    # ids in the order the layer drew: weights come back from its inclusion, to a factor
    layer = kind(ep, popularity="zipf", exponent=exponent)
    weights = weights_from_inclusion(layer.inclusion)
    rank_of = np.repeat(np.arange(ep), 128 // ep)
    factors = []
    for _ in range(400):
        pairs = np.bincount(rank_of[sample_choices(rng, tokens, weights, 8).ravel()], minlength=ep)
        factors.append(pairs.max() * ep / (tokens * 8))
    found = busiest_rank(layer, tokens, quantile=0.95)
    assert found.mean == pytest.approx(np.mean(factors), rel=0.02)
    assert found.tail == pytest.approx(np.quantile(factors, 0.95), rel=0.03)
    assert found.systematic <= found.mean < found.tail


def test_tokens_of_few_tasks_crowd_one_rank_as_drawn():
    rng, tokens, ep, tasks = np.random.default_rng(8), 256, 8, 12
    rank_of = np.repeat(np.arange(ep), 128 // ep)
    factors = []
    for _ in range(400):
        pairs = np.zeros(ep)
        sizes = np.bincount(rng.integers(tasks, size=tokens), minlength=tasks)
        for size in sizes:
            np.add.at(pairs, rank_of[rng.permutation(128)[:8]], size)
        factors.append(pairs.max() * ep / (tokens * 8))
    found = busiest_rank(kind(ep, tasks=tasks), tokens)
    assert found.mean == pytest.approx(np.mean(factors), rel=0.05)
    assert found.mean > 1.2 * busiest_rank(kind(ep), tokens).mean


def test_large_batches_keep_what_is_systematic_alone():
    found = busiest_rank(kind(16, popularity="zipf", exponent=1.0), 1e7)
    assert found.tail == pytest.approx(found.systematic, rel=0.01)


def test_copies_and_packing_lower_mean_and_tail():
    plain, laid = (
        busiest_rank(kind(16, popularity="zipf", exponent=1.0, **how), 4096)
        for how in ({}, {"placement": "eplb", "redundant_experts": 32})
    )
    assert laid.mean - 1 < 0.2 * (plain.mean - 1)
    assert laid.tail - 1 < 0.25 * (plain.tail - 1)


def test_a_prediction_tells_its_busiest_rank_by_the_decode_step():
    words = "predict h200 --model deepseek-v3 --gpus 16 --tp 1 --dp 16 --ep 16 --engine sglang --concurrency 1024"
    even, skewed = (
        CliRunner().invoke(app, [*words.split(), "--routing", law, "--active-experts", "8", "--json"])
        for law in ("uniform", "zipf:0.5")
    )
    even_found, found = (json.loads(r.stdout)["predictions"][0]["busiest_rank_over_mean"] for r in (even, skewed))
    model = load_model("deepseek-v3")
    (layer,) = layer_kinds(
        Routing(popularity="zipf", exponent=0.5), model.experts, 58, pool=256, top_k=8, ep=16, vocab=model.vocab
    )
    # at most 1024 requests decode at a time, some are at their prompts
    assert busiest_rank(layer, 1024).mean <= found["mean"] < busiest_rank(layer, 400).mean
    assert found["systematic"] > 1.1 > even_found["systematic"] == pytest.approx(1.0)
    told = CliRunner().invoke(app, [*words.split(), "--active-experts", "8"]).stdout
    assert "Busiest of 16 expert-parallel ranks" in " ".join(told.split())
    assert "Busiest of" not in CliRunner().invoke(app, ["predict", "h100", "--active-experts", "6"]).stdout
