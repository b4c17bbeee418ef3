"""What a published run was sent: lengths, clients or rate, how many requests, told in a row's columns and words.

What a row leaves unsaid has one default for all. Checked against: tests/test_validation_serving.py and _rows.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmoe.specs.cluster import POLICY_OF_ENGINE
from simmoe.specs.measurement import read_table
from simmoe.specs.workload import Lengths, Prompts, Workload
from simmoe.validation.cells import BESIDE, Row, Unspoken, integer, number, text, why

#: Requests of a closed-loop run per client, where a row gives no number: InferenceX scripts send ten; assumed of all.
ROUNDS = 10
#: Beyond so many requests a run of that default has settled: longer ones are cut here, at two rounds at least.
_MOST_REQUESTS = 12000
#: Answers whose distribution a source does not state: as far from their mean, evenly, on engines that mix prompts with
#: decodes; equal where prompts go first. Equal answers keep requests together, which shows in TTFT: rows of SGLang wait
#: for all clients' prompts, rows of vLLM and TensorRT-LLM do not. Chosen by the TTFT of the rows themselves: of a
#: sample of 207 with at most 128 clients, with the model left out, vLLM's (before 0.14) are told 37 and TensorRT-LLM's
#: 68 % off if equal, 24 and 28 % so; SGLang's 14 % if equal, 68 % so.
_UNSTATED_SPREAD = 0.1
#: Tokens that a ShareGPT prompt, or answer, may have in a benchmark: vLLM's sampling drops longer prompts and, both
#: counted, more than twice as much; and whatever is shorter than four.
SHAREGPT_LONGEST, SHAREGPT_SHORTEST = 1024, 4
#: GPUStack's latency scenario: 100 ShareGPT prompts, never more than four at work (rates times latencies of its rows
#: give 3.8 to 3.9); the "peak concurrency" its rows print is the benchmark's count per second, not the cap.
_FEW_REQUESTS, _FEW_CLIENTS = 100, 4


def traffic(row: Row) -> tuple[Workload, int | None]:
    """What was sent, and how many requests; None: without end. `Unspoken` where the cells make no sense."""
    try:
        return _traffic(row)
    except ValueError as problem:
        raise Unspoken(f"traffic not understood: {why(problem, Workload)}") from None


def _traffic(row: Row) -> tuple[Workload, int | None]:
    input_tokens, output_tokens = number(row, "input_tokens"), number(row, "output_tokens")
    if not input_tokens or not output_tokens:
        raise Unspoken("input or output length unknown")
    words = text(row, "length_distribution")
    values: dict[str, object] = _logged_lengths(row) or {
        "input": _lengths(input_tokens, words, "in"),
        "output": _lengths(output_tokens, words, "out"),
    }
    if words == "not stated" and POLICY_OF_ENGINE.get(text(row, "engine")) != POLICY_OF_ENGINE["sglang"]:
        values["output"] = _around(output_tokens)
    values["prompts"] = _prompts(text(row, "notes"))
    concurrency, sent = integer(row, "concurrency"), integer(row, "num_requests")
    rate = text(row, "request_rate")
    if rate.startswith("inf") and "ShareGPT" in words and sent == _FEW_REQUESTS:
        concurrency = _FEW_CLIENTS
    if concurrency:
        requests = max(sent or max(min(ROUNDS * concurrency, _MOST_REQUESTS), 2 * concurrency), concurrency)
        return Workload.model_validate(values | {"concurrency": concurrency}), requests
    if rate.startswith("inf"):
        if not sent:
            raise Unspoken("all requests at once, but how many is not said")
        return Workload.model_validate(values | {"concurrency": sent}), sent
    found = re.search(r"measured ([\d.]+)", rate) or re.match(r"([\d.]+)", rate)
    if not found:
        raise Unspoken("neither concurrency nor request rate known")
    return Workload.model_validate(values | {"rate": float(found.group(1))}), sent


def _logged_lengths(row: Row) -> dict[str, object]:
    """Lengths of a run whose requests a ``*_per_request`` table beside its file lists; {} if there is none."""
    if "companion file" not in text(row, "length_distribution") or BESIDE not in row:
        return {}
    for path in sorted(Path(text(row, BESIDE)).glob("*_per_request.csv*")):
        table = read_table(path)
        mine = table.text("source_id") == text(row, "source_id")
        if mine.any():
            return {side: _drawn(table.number(f"{side}_tokens")[mine]) for side in ("input", "output")}
    return {}


def _drawn(tokens: NDArray[np.float64]) -> Lengths:
    return Lengths(kind="empirical", mean=float(tokens.mean()), values=tuple(int(count) for count in tokens))


def _lengths(tokens: float, words: str, side: str) -> Lengths:
    """Distribution of a length from its (nominal, or for ShareGPT mean) value and what the row says in words."""
    if "[0.8,1.0]" in words:
        low, high = max(1, round(0.8 * tokens)), max(1, round(tokens))
        return Lengths(kind="uniform", mean=(low + high) / 2, low=low, high=high)
    if stated := re.search(rf"(\d+)\.\.(\d+) {side}\b", words):
        low, high = int(stated.group(1)), int(stated.group(2))
        return Lengths(kind="uniform", mean=(low + high) / 2, low=low, high=high)
    if "mean of actual lengths" in words:  # a random range ratio of zero: anything from one token to nominal
        low, high = 1, max(2, round(2 * tokens) - 1)
        return Lengths(kind="uniform", mean=(low + high) / 2, low=low, high=high)
    if "ShareGPT" in words and tokens < SHAREGPT_LONGEST:
        return _sharegpt(tokens, f"{side}put_tokens")
    return Lengths(mean=tokens)


@lru_cache(maxsize=1)
def sharegpt_lengths() -> Mapping[str, NDArray[np.float64]]:
    """Two columns of 200 counts, each standing for as many of 12,000 first prompts and first answers, sorted. [tokens]

    Sampled as vLLM's benchmark does (``ShareGPTDataset``, ``is_valid_sequence``) from the first 17,400 conversations of
    ShareGPT_V3_unfiltered_cleaned_split, counted with OpenAI's cl100k_base vocabulary: means 219 and 201, where rows of
    GPUStack print 214 to 219 and 187 to 201. Every fifth answer is shorter than 20 tokens, half are shorter than 136.
    """
    with resources.as_file(resources.files("simmoe.validation.serving") / "sharegpt_lengths.csv") as path:
        table = read_table(path)
        return {name: table.number(name) for name in ("input_tokens", "output_tokens")}


def _sharegpt(tokens: float, column: str) -> Lengths:
    """ShareGPT's lengths, stretched to a row's mean."""
    counted = sharegpt_lengths()[column]
    return _drawn(np.maximum(np.rint(counted * (tokens / counted.mean())), SHAREGPT_SHORTEST))


def _around(tokens: float) -> Lengths:
    low, high = max(1, round((1 - _UNSTATED_SPREAD) * tokens)), round((1 + _UNSTATED_SPREAD) * tokens)
    return Lengths(kind="uniform", mean=(low + high) / 2, low=low, high=max(low, high))


def _prompts(notes: str) -> Prompts | None:
    """Prompts that share heads, as sglang.bench_serving generates them ("10 groups x 50 prompts, shared ...")."""
    found = re.search(r"(\d+) groups x (\d+) prompts, shared system prompt (\d+) tokens", notes)
    if not found:
        return None
    groups, each, shared = map(int, found.groups())
    return Prompts(distinct=groups * each, order="random", groups=groups, shared_tokens=shared)
