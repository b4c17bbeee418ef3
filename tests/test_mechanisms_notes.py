"""Every effect that simmoe/routing/NOTES.md tells is what the library computes today."""

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from simmoe.predict import predict
from simmoe.specs.deployment import Deployment
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.workload import Lengths, Workload

NOTES = Path(__file__).parents[1] / "simmoe" / "routing" / "NOTES.md"
BASES = {
    "A": ("h100", "qwen3-30b-a3b", {"engine": "sglang"}, 16),
    "B": ("h200", "deepseek-v3", {"gpus": 16, "tp": 1, "dp": 16, "ep": 16, "engine": "sglang"}, 1024),
    "C": ("h100", "mixtral-8x7b", {"offload": {"cached_experts": 4}}, 1),
    "D": ("h200", "deepseek-v3", {"gpus": 8, "engine": "sglang"}, 16),
}
ROWS = re.findall(r"^\| ([ABCD]) \| `(.+?)` \| ([+-]\d+) % \|", NOTES.read_text(), flags=re.MULTILINE)


@cache
def rate(base, text):
    hardware, model, layout, concurrency = BASES[base]
    deployment = Deployment.model_validate({**layout, **(yaml.safe_load(text) if text else {})})
    traffic = Workload(concurrency=concurrency, input=Lengths(mean=1000), output=Lengths(mean=500))
    return predict(load_hardware(hardware), load_model(model), deployment, traffic).metrics.output_tokens_per_s


def test_the_notes_tell_of_every_kind_of_switch():
    told = " ".join(text for _, text, _ in ROWS)
    for switch in (
        "popularity",
        "independence",
        "refill_to",
        "placement",
        "dispatch",
        "exchange",
        "overlap",
        "offload",
        "speculative",
        "pp: 4",
    ):
        assert switch in told


@pytest.mark.parametrize(("base", "text", "points"), ROWS, ids=[f"{base} {text[:60]}" for base, text, _ in ROWS])
def test_a_switch_changes_throughput_as_told(base, text, points):
    assert 100 * (rate(base, text) / rate(base, "") - 1) == pytest.approx(float(points), abs=3.0)
