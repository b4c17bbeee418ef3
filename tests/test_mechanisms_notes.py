"""Every effect that simmoe/routing/NOTES.md tells is what the library computes today."""

import re
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import yaml

from simmoe.predict import predict
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Fabric
from simmoe.specs.load import load_hardware, load_model
from simmoe.specs.mechanisms import Dispatch, Exchange, Offload
from simmoe.specs.routing import Routing
from simmoe.specs.workload import Lengths, Workload

NOTES = Path(__file__).parents[1] / "simmoe" / "routing" / "NOTES.md"
BASES = {
    "A": ("h100", "qwen3-30b-a3b", {"engine": "sglang"}, 16),
    "B": ("h200", "deepseek-v3", {"gpus": 16, "tp": 1, "dp": 16, "ep": 16, "engine": "sglang"}, 1024),
    "C": ("h100", "mixtral-8x7b", {"offload": {"cached_experts": 4}}, 1),
    "D": ("h200", "deepseek-v3", {"gpus": 8, "engine": "sglang"}, 16),
    "E": ("h200", "deepseek-v3", {"gpus": 8, "engine": "sglang"}, 64),
    "F": ("h200", "deepseek-v3", {"gpus": 8, "engine": "sglang"}, 1),
}
ROWS = re.findall(r"^\| ([A-F]) \| `(.+?)` \| ([+-]\d+) % \|", NOTES.read_text(), flags=re.MULTILINE)


@cache
def rate(base, text):
    """Output tokens/s; ``fabric`` belongs to the hardware, ``experts`` to the model, all else to the deployment."""
    hardware_name, model_name, layout, concurrency = BASES[base]
    given = yaml.safe_load(text) if text else {}
    hardware, model = load_hardware(hardware_name), load_model(model_name)
    if fabric := given.pop("fabric", None):
        hardware = hardware.vary(fabric=Fabric(**fabric))
    if experts := given.pop("experts", None):
        model = model.vary(experts=model.experts.vary(**experts))
    deployment = Deployment.model_validate({**layout, **given})
    traffic = Workload(concurrency=concurrency, input=Lengths(mean=1000), output=Lengths(mean=500))
    return predict(hardware, model, deployment, traffic).metrics.output_tokens_per_s


#: Settings without a row: what only goes with another that has one, and what changes no time.
WITHOUT_ROW = {
    "layers_drawn", "orders", "seed", "counts", "counts_file", "logit_spread", "keep_min",  # go with another
    "overflow", "launch_time", "low_latency_tokens", "source",
}  # fmt: skip


@pytest.mark.parametrize("part", [Routing, Dispatch, Exchange, Offload, Fabric])
def test_the_notes_have_a_row_for_every_switch(part):
    told = " ".join(text for _, text, _ in ROWS)
    missing = {name for name in part.model_fields if name not in WITHOUT_ROW and f"{name}:" not in told}
    assert not missing
    assert "speculative:" in told
    assert "pp: 4" in told


@pytest.mark.parametrize("choice", [*get_args(Offload.model_fields["policy"].annotation),
                                    *get_args(Exchange.model_fields["algorithm"].annotation),
                                    *get_args(Routing.model_fields["popularity"].annotation),
                                    *get_args(Dispatch.model_fields["kind"].annotation)])  # fmt: skip
def test_the_notes_have_a_row_for_every_choice(choice):
    bases = {"auto", "deepep_low_latency", "uniform", "dynamic", "lru", "counts"}  # what the bases have, or take a file
    assert choice in bases or any(re.search(rf"\b{choice}\b", text) for _, text, _ in ROWS)


@pytest.mark.parametrize(("base", "text", "points"), ROWS, ids=[f"{base} {text[:60]}" for base, text, _ in ROWS])
def test_a_switch_changes_throughput_as_told(base, text, points):
    assert 100 * (rate(base, text) / rate(base, "") - 1) == pytest.approx(float(points), abs=3.0)
