"""Expert products outside the fused block: SGLang's DeepEP compute, DeepGEMM's grouped product, the shared expert.

Model: that of `simmoe.costs.operators.experts`, with two additions. A forward that is launched kernel by kernel
(no CUDA graph) cannot be quicker than its launches: p-norm with a host time. Rows that hold the two products
alone move activations only as GEMM input and output.
Assumed: what `uniform` layouts of the DeepEP benchmark wake (see `_deepep_load`). Its context rows scatter and gather
all tokens of the group; a served rank only those sent to it. Left out: communication.
Checked against: profiles/*/moe_wideep_*, moe_grouped_gemm_*, mlp_* by `simmoe calibrate --report`.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
from numpy.typing import NDArray

from simmoe.costs.operators import experts
from simmoe.costs.operators.base import Array, Features, Operator, Parameter, Parameters, soft_max
from simmoe.errors import MeasurementError
from simmoe.routing.benchmark import benchmark_load
from simmoe.routing.expert_load import TILES, ExpertLoad
from simmoe.specs.hardware import Hardware
from simmoe.specs.measurement import Table

Rows = NDArray[np.intp]

_HOST_POWER = 4.0  # p of the p-norm of host and device time: nearly a maximum. Assumption.
_fp8_features = partial(
    experts.features_of, matrices=3, weight_bytes=1.0, activation_bytes=1.0, compute_bits=8, dispatched=True
)


#: Parameters of the routed-expert model that one shape, or two bare products, cannot tell apart: left at no effect.
_ABSENT = {
    "expert_map": 0.0,
    "local_expert": 0.0,
    "ragged_row": 0.0,
    "group_hidden": 0.0,
    "group_inner": 0.0,
    "token_hidden": 0.0,
    "pair_inner": 0.0,
}


def seconds(features: Features, parameters: Parameters, hardware: Hardware, cold: bool = True) -> Array:
    """Device time of the experts, or the host's time to launch it where that is longer. [s]"""
    device = experts.seconds(features, {**experts.MOE.defaults, **_ABSENT, **parameters}, hardware, cold)
    if "host" not in parameters:
        return device
    return soft_max(device, np.full_like(device, parameters["host"]), _HOST_POWER)


def _pieces(table: Table, *keys: str) -> list[tuple[dict[str, str], Rows]]:
    """Rows that share the text of some columns."""
    text = {key: table.text(key) for key in keys}
    label = np.array(["\x1f".join(parts) for parts in zip(*text.values(), strict=True)])
    names, inverse = np.unique(label, return_inverse=True)
    return [
        (dict(zip(keys, str(name).split("\x1f"), strict=True)), np.flatnonzero(inverse == number))
        for number, name in enumerate(names)
    ]


def _collect(columns: dict[str, Array], rows: Rows, part: Features, total: int) -> None:
    for name, values in part.items():
        columns.setdefault(name, np.full(total, np.nan))[rows] = values


def _deepep_load(distribution: str, phase: str, tokens: Array, num_experts: int, top_k: int, ep: int) -> ExpertLoad:
    """Load of rank 0 in SGLang's DeepEP benchmark.

    ``uniform`` is ``balanced`` in the generation phase; in the context phase the times are those of even pairs on
    no more than top-k experts a rank (inferred: 0.55 ms where reading all 128 local experts takes 1.7 ms).
    """
    if distribution != "uniform":
        return benchmark_load(distribution, tokens, num_experts, top_k, ep)
    if phase == "generation":
        return benchmark_load("balanced", tokens, num_experts, top_k, ep)
    local = num_experts // ep
    active = np.full(tokens.shape, float(min(top_k, local)))
    return _even_load(tokens, tokens * top_k / ep, active, local)


def _even_load(tokens: Array, pairs: Array, active: Array, local: int) -> ExpertLoad:
    """Pairs spread evenly over the active experts."""
    each = pairs / np.maximum(active, 1e-9)
    blocks = {tile: active * np.maximum(np.ceil(each / tile), 1.0) for tile in TILES}
    return ExpertLoad(tokens, pairs, active, each, blocks, local)


def _wideep_features(table: Table) -> Features:
    columns: dict[str, Array] = {}
    tokens = table.number("num_tokens")
    keys = ("phase", "routing_distribution", "num_experts", "top_k", "moe_ep_size", "hidden_size", "expert_inter_size")
    for key, rows in _pieces(table, *keys):
        num_experts, top_k, ep = (int(float(key[name])) for name in keys[2:5])
        load = _deepep_load(key["routing_distribution"], key["phase"], tokens[rows], num_experts, top_k, ep)
        part = _fp8_features(
            load,
            hidden=float(key["hidden_size"]),
            inter=float(key["expert_inter_size"]),
            top_k=top_k,
            num_experts=num_experts,
        )
        if key["phase"] == "context":
            # scatter and gather walk all rows the benchmark makes, the whole group's, also those without a local expert
            part = {**part, "tokens": tokens[rows]}
        _collect(columns, rows, part, table.rows)
    return columns


def _grouped_features(table: Table) -> Features:
    """DeepGEMM alone: every local expert gets ``tokens_per_expert`` rows; masked ones 0.7 to 1.3 times that."""
    local, each = table.number("num_local_experts"), table.number("tokens_per_expert")
    masked = np.char.find(table.text("kernel"), "masked") >= 0
    # the drawn count is cut to an integer: at one token per expert it is none below 1
    busy = np.where(masked & (each < 1.0 / 0.7), np.clip((1.3 - 1.0 / each) / 0.6, 0.0, 1.0), 1.0)
    columns: dict[str, Array] = {}
    keys = ("hidden_size", "expert_inter_size", "num_experts", "top_k", "num_local_experts")
    for key, rows in _pieces(table, *keys):
        held = int(float(key["num_local_experts"]))
        active = local[rows] * busy[rows]
        part = _fp8_features(
            _even_load(local[rows] * each[rows], local[rows] * each[rows], active, held),
            hidden=float(key["hidden_size"]),
            inter=float(key["expert_inter_size"]),
            top_k=int(float(key["top_k"])),
            num_experts=int(float(key["num_experts"])),
        )
        _collect(columns, rows, part, table.rows)
    return columns


def _grouped_seconds(table: Table) -> Array:
    return (table.number("up_proj_us") + table.number("down_proj_us")) * 1e-6


def _mlp_features(table: Table) -> Features:
    """One expert that takes every token."""
    tokens = table.number("num_tokens")
    columns: dict[str, Array] = {}
    for key, rows in _pieces(table, "hidden_size", "inter_size", "dtype"):
        if key["dtype"] not in experts.DTYPES:
            raise MeasurementError(f"{table.path}: dtype {key['dtype']!r} is not known")
        weight_bytes, activation_bytes, compute_bits = experts.DTYPES[key["dtype"]]
        part = experts.features_of(
            _even_load(tokens[rows], tokens[rows], np.ones(len(rows)), 1),
            hidden=float(key["hidden_size"]),
            inter=float(key["inter_size"]),
            top_k=1,
            num_experts=1,
            matrices=3,
            weight_bytes=weight_bytes,
            activation_bytes=activation_bytes,
            compute_bits=compute_bits,
        )
        _collect(columns, rows, part, table.rows)
    return columns


def _parameters(**defaults: float | None) -> tuple[Parameter, ...]:
    """Parameters of the routed-expert model by name; None keeps its default."""
    known = {parameter.name: parameter for parameter in experts.MOE.parameters}
    return tuple(
        known[name] if default is None else dataclasses.replace(known[name], default=default)
        for name, default in defaults.items()
    )


def _host(default: float) -> Parameter:
    meaning = "launching the forward kernel by kernel"
    return Parameter(name="host", unit="s", default=default, lower=1e-7, upper=5e-3, meaning=meaning)


MOE_WIDEEP = Operator(
    name="moe_wideep",
    parameters=(
        *_parameters(
            launch=1e-5,
            active_expert=None,
            tail=None,
            bandwidth=None,
            l2_share=None,
            flops_16=None,
            flops_64=None,
            flops_128=None,
            overlap=None,
            pair_hidden=None,
            token_hidden=1.0,
        ),
        _host(2e-4),
    ),
    seconds=seconds,
    roofline=experts.roofline,
    features=_wideep_features,
    variant_columns=("framework", "dtype", "version", "phase"),
    group_columns=("hidden_size", "expert_inter_size", "num_experts", "top_k", "moe_ep_size"),
    range_features=experts.MOE.range_features,
)

MOE_GROUPED_GEMM = Operator(
    name="moe_grouped_gemm",
    parameters=_parameters(
        launch=6e-6,
        active_expert=None,
        tail=None,
        bandwidth=None,
        flops_16=None,
        flops_64=None,
        flops_128=None,
        short_k=None,
        overlap=None,
        pair_hidden=None,
    ),
    seconds=seconds,
    roofline=experts.roofline,
    features=_grouped_features,
    measured=_grouped_seconds,
    variant_columns=("kernel",),
    group_columns=("hidden_size", "expert_inter_size", "num_experts", "top_k", "num_gpus"),
    range_features=experts.MOE.range_features,
)

MLP = Operator(
    name="mlp",
    parameters=(
        *_parameters(launch=6e-6, tail=None, flops_64=None, flops_128=None, overlap=None, pair_hidden=None),
        _host(3e-5),
    ),
    seconds=seconds,
    roofline=experts.roofline,
    features=_mlp_features,
    variant_columns=("framework", "dtype", "phase"),
    group_columns=("hidden_size", "inter_size"),
    range_features=("tokens", "hidden", "inter"),
)
