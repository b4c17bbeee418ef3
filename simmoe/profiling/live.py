"""A real server on this device: a small DeepSeek-style model under continuous batching and real load.

Poisson arrivals by wall time, whatever the server does, or a closed loop in which a client sends its next request
when its last one ends. Lengths and arrival times are drawn as the simulator draws them, so a simulation with the
same seed faces the same traffic; metrics are computed by the same code. Every step's batch and wall time is kept, to
be laid beside a predicted step. The server itself: `simmoe.profiling.live_server`. Checked in
tests/test_profiling_live.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from simmoe import metrics
from simmoe.errors import SpecError
from simmoe.profiling.bench import DTYPES
from simmoe.profiling.live_server import LiveConfig, LiveStep, Server
from simmoe.profiling.served_model import ServedModel
from simmoe.specs.workload import Workload

__all__ = ["LiveConfig", "LiveRun", "LiveStep", "build", "serve"]


@dataclass(frozen=True, kw_only=True)
class LiveRun:
    """A served run: requests, steps, and the same metrics as a simulated one."""

    workload: Workload
    active_experts: int
    requests: metrics.RequestTable
    steps: tuple[LiveStep, ...]
    log: metrics.StepLog
    metrics: metrics.ServingMetrics
    threads: int

    @property
    def host_s_per_step(self) -> float:
        """Median time of a step outside the model: scheduling and bookkeeping. [s]"""
        return float(np.median([step.wall_s - step.model_s for step in self.steps]))


def serve(
    config: LiveConfig,
    workload: Workload,
    *,
    duration_s: float,
    active_experts: int | None = None,
    warmup: float = 0.1,
    served: ServedModel | None = None,
) -> LiveRun:
    """Serve ``workload`` for ``duration_s`` of wall time and measure it.

    Parameters
    ----------
    active_experts : int or None
        Cap on routed experts per token; None: the model's top-k.
    warmup : float
        Share of the measured requests left out at the start.
    served : ServedModel or None
        A model built before with the same configuration, to save its set-up; it takes the cap given here.

    Raises
    ------
    CapacityError
        If a request of this workload may be longer than a cache line.
    SpecError
        If the workload has think times or repeated prompts, which this server does not serve, or no request
        finished in the time given.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.timer == "cpu" and (config.device != "cpu" or torch.get_num_threads() != 1):
        raise SpecError("timer cpu counts one thread's run time; serve on a CPU with threads 1")
    model = served if served is not None else build(config, active_experts)
    model.cap(active_experts)
    server = Server(config, workload, model)
    server.warm_up()
    server.run(duration_s)
    return _result(config, workload, server, active_experts, warmup)


def build(config: LiveConfig, active_experts: int | None = None) -> ServedModel:
    """The model `serve` serves."""
    return ServedModel(
        config.model,
        slots=config.max_num_seqs,
        longest=config.longest,
        dtype=DTYPES[config.dtype],
        device=torch.device(config.device),
        active_experts=active_experts,
        backend=config.backend,
        seed=config.seed,
    )


def _result(
    config: LiveConfig, workload: Workload, server: Server, active_experts: int | None, warmup: float
) -> LiveRun:
    everyone = sorted([*server.done, *server.running, *server.waiting], key=lambda request: request.number)
    requests = metrics.RequestTable(
        request=np.array([r.number for r in everyone]),
        rank=np.zeros(len(everyone), dtype=np.int64),
        arrival_s=_column(r.arrival_s for r in everyone),
        first_scheduled_s=_column(r.first_scheduled_s for r in everyone),
        first_token_s=_column(r.first_token_s for r in everyone),
        finished_s=_column(r.finished_s for r in everyone),
        input_tokens=_column(len(r.prompt) for r in everyone),
        output_tokens=_column(r.output_tokens for r in everyone),
        preemptions=np.zeros(len(everyone)),
    )
    unfinished = np.flatnonzero(np.isnan(requests.finished_s))
    measured = int(unfinished[0]) if len(unfinished) else len(everyone)
    if not measured:
        raise SpecError("no request finished in the time given; serve longer or shorter requests")
    steps = server.steps
    zeros = np.zeros(len(steps))
    log = metrics.StepLog(
        rank=zeros,
        start_s=_column(s.start_s for s in steps),
        steps=np.ones(len(steps)),
        first_s=_column(s.wall_s for s in steps),
        growth_s=zeros,
        decodes=_column(s.batch.decode_requests for s in steps),
        prompt_tokens=_column(s.batch.prompt_tokens for s in steps),
        sampled=_column(s.finishing for s in steps),
        running=_column(s.running for s in steps),
        blocks=_column(s.running for s in steps),
        # pauses longer than a step: there are none without preemption
        gap_end_s=np.zeros(0),
        gap_s=np.zeros(0),
        gap_count=np.zeros(0),
    )
    end_s = steps[-1].start_s + steps[-1].wall_s
    measurement = metrics.from_records(
        requests, log, end_s=end_s, measured=measured, warmup=warmup, kv_blocks_per_rank=config.max_num_seqs
    )
    experts = config.model.experts
    return LiveRun(
        workload=workload,
        active_experts=active_experts or (experts.top_k if experts is not None else 0),
        requests=requests,
        steps=tuple(steps),
        log=log,
        metrics=measurement,
        threads=torch.get_num_threads(),
    )


def _column(values: Iterator[float]) -> NDArray[np.float64]:
    return np.fromiter(values, dtype=np.float64)
