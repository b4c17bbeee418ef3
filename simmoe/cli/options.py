"""Arguments and options that several commands share, each with its help in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Hardware = Annotated[str, typer.Argument(help="Hardware file or shipped name, e.g. hardware/h100.yaml or h100.")]
Model = Annotated[str, typer.Option(help="Preset name, YAML file or Hugging Face config.json.")]
Gpus = Annotated[int | None, typer.Option(help="Devices in total. [default: 1]")]
Tp = Annotated[int | None, typer.Option(help="Tensor-parallel size. [default: all devices of a replica]")]
Ep = Annotated[int | None, typer.Option(help="Expert-parallel size; 1 slices experts by tp. [default: 1]")]
Dp = Annotated[int | None, typer.Option(help="Data-parallel attention ranks in one engine. [default: 1]")]
Pp = Annotated[int | None, typer.Option(help="Pipeline stages. [default: 1]")]
Rate = Annotated[float | None, typer.Option(help="Open loop: requests per second offered.")]
Concurrency = Annotated[int | None, typer.Option(help="Closed loop: requests kept in flight. [default: 64]")]
Input = Annotated[float | None, typer.Option("--input", help="Mean input tokens. [default: 1024]")]
Output = Annotated[float | None, typer.Option("--output", help="Mean output tokens. [default: 256]")]
Pool = Annotated[int | None, typer.Option("--total-experts", help="Pruned expert pool.")]
Routing = Annotated[
    str | None, typer.Option(help="Popularity and more, e.g. zipf:0.8 or zipf:1,independence=0.7,placement=eplb.")
]
Speculative = Annotated[
    str | None,
    typer.Option(help="Drafted tokens and their acceptance: mtp:1,length=1.85, ngram:3,rate=0.4 or none."),
]
Cap = Annotated[int | None, typer.Option(help="Cap on active experts per token; costs quality.")]
Engine = Annotated[str | None, typer.Option(help="vllm, sglang, trtllm or generic.")]
EngineVersion = Annotated[
    str | None,
    typer.Option(
        help="Its release, e.g. 0.11.2: decides times around kernels, some kernels, and whether expert shapes without "
        "tuned tiles run slower (vllm before 0.17). [default: the newest known]"
    ),
]
Precision = Annotated[
    str | None, typer.Option(help="Weights: bfloat16, fp8, fp8_block, int8, int4, int4_g32, mxfp4, mxfp4_mxfp8, nvfp4.")
]
Price = Annotated[float | None, typer.Option(help="USD per device-hour; else the file's.")]
Deployment = Annotated[Path | None, typer.Option(help="Deployment YAML; flags override it.")]
Workload = Annotated[Path | None, typer.Option(help="Workload YAML; flags override it.")]
Processes = Annotated[int | None, typer.Option(min=1, help="Local processes. [default: one per core]")]
Ray = Annotated[str | None, typer.Option(help="Run on a Ray cluster: its address, auto, or local to start one here.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
