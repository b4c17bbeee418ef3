"""A flood of chat requests: all sent at once to a server whose API process takes them in side by side.

Model: parsing, chat template and tokenising of all requests take turns in one event loop, so that the first is done
hardly before the last: the scheduler gets them together, when the time of all has passed. What comes after is the
burst as it would be without. Left out: that requests differ, and that some slip through earlier.
"""

from __future__ import annotations

from dataclasses import replace

from simmoe.metrics import Quantiles, ServingMetrics
from simmoe.validation.serving.rows import Run

#: Engine -> what taking in a chat request takes. [s] From the flood of vLLM pull request 18566 (May 2025): 1,000
#: ShareGPT prompts to Llama-3.1-8B through /v1/chat/completions, taken to be on an H100. Its mean, median and 99th
#: percentile of TTFT (9.63, 9.46, 12.67 s) are 6.8, 6.8 and 7.3 s above those of the burst alone as predicted. Of other
#: engines no such flood of a small model was found.
TAKING_IN_S = {"vllm": 6.8e-3}


def before_flood_s(run: Run) -> float:
    """How long the scheduler waits for the requests of such a flood; 0 if the run is none. [s]"""
    if not run.chat or run.requests is None or run.workload.concurrency != run.requests:
        return 0.0
    return run.requests * TAKING_IN_S.get(run.deployment.engine, 0.0)


def later(metrics: ServingMetrics, wait_s: float) -> ServingMetrics:
    """Metrics of a run that lasts from the first request to the last answer, begun so much later."""
    if not wait_s or not metrics.requests:
        return metrics

    def moved(q: Quantiles) -> Quantiles:
        return replace(q, **{name: getattr(q, name) + wait_s for name in ("mean", "p50", "p90", "p99")})

    lasted_s = metrics.requests / metrics.requests_per_s
    slower = lasted_s / (lasted_s + wait_s)
    rates = ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s")
    told = {name: slower * getattr(metrics, name) for name in rates}
    return replace(metrics, ttft=moved(metrics.ttft), e2e=moved(metrics.e2e), **told)
