"""The formats people record requests in, each read into a `Trace`.

Formats (`READERS`), told apart by their contents: ``azure`` (Azure LLM inference traces 2023 and 2024, CSV),
``burstgpt`` (BurstGPT, CSV), ``mooncake`` (JSON lines with the hashes of 512-token prefix blocks), ``requests`` (CSV of
stage, arrival_s, prompt_id, input_tokens, output_tokens: a line per request of a measured run), ``vllm`` (``vllm bench
serve --save-result --save-detailed``, JSON) and ``sglang`` (``bench_serving --output-details``, JSON lines).
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

Segments = tuple[tuple[int, int], ...]
"""A prompt as (identity, tokens) from its start on: prompts share as long a head as their segments agree."""

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens per hash (Qin et al., "Mooncake", arXiv 2407.00079, and the trace's README)."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of arrival.

    Attributes
    ----------
    arrival_s : seconds since the first request, shape (n,); None where the file does not say.
    input_tokens, output_tokens : shape (n,). [tokens]
    prompts : what each prompt is made of; None where the file does not say.
    stage : load stage of each request; None where the file does not say.
    rate, concurrency : the load a benchmark file states, for files without arrivals. [1/s], [requests]
    burstiness : shape of the gaps between arrivals at ``rate``, gamma distributed; 1 is Poisson. [-]
    dropped : rows without an output, left out. filled : rows without an output length, given the others' median.
    """

    arrival_s: NDArray[np.float64] | None
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    prompts: Sequence[Segments] | None = None
    stage: NDArray[np.int64] | None = None
    rate: float | None = None
    concurrency: int | None = None
    burstiness: float = 1.0
    dropped: int = 0
    filled: int = 0

    def __len__(self) -> int:
        return len(self.input_tokens)

    @property
    def mean_rate(self) -> float | None:
        """Requests per second between the first arrival and the last; None for fewer than two. [1/s]"""
        if self.arrival_s is None or len(self) < 2 or not self.arrival_s[-1] > 0:
            return None
        return (len(self) - 1) / float(self.arrival_s[-1])


def format_of(text: str) -> str:
    """The format a file's text is in, by its looks; empty if it looks like none."""
    head = text.lstrip()[:4096]
    first = head.split("\n", 1)[0]
    if "ContextTokens" in first:
        return "azure"
    if "Request tokens" in first:
        return "burstgpt"
    if "arrival_s" in first and "input_tokens" in first:
        return "requests"
    if head.startswith("{"):
        if '"hash_ids"' in first or ('"timestamp"' in first and '"input_length"' in first):
            return "mooncake"
        if '"request_throughput"' in text or '"input_lens"' in text:
            return "sglang" if '"server_info"' in text or '"sharegpt_output_len"' in text else "vllm"
    return ""


class BadLineError(ValueError):
    """A line that does not hold what its format promises."""


def _rows(text: str, *columns: str) -> tuple[list[list[str]], list[int]]:
    """CSV lines as lists of the named columns, and every row's line number."""
    reader = csv.reader(io.StringIO(text))
    header = [name.strip() for name in next(reader)]
    missing = [name for name in columns if name not in header]
    if missing:
        raise BadLineError(f"no column {missing[0]!r}; columns are {', '.join(header)}")
    at = [header.index(name) for name in columns]
    found, lines = [], []
    for line, row in enumerate(reader, start=2):
        if row:
            if len(row) <= max(at):
                raise BadLineError(f"line {line} has {len(row)} cells, the header has {len(header)}")
            found.append([row[i] for i in at])
            lines.append(line)
    return found, lines


def _number(value: Any, line: int, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise BadLineError(f"line {line}: {column} {value!r} is not a number") from None
    if not math.isfinite(number):
        raise BadLineError(f"line {line}: {column} {value!r} is not a finite number")
    return number


def _tokens(value: Any, line: int, column: str) -> float:
    number = _number(value, line, column)
    if number < 0:
        raise BadLineError(f"line {line}: {column} {value!r} is below 0")
    return number


def _trace(
    arrival_s: Sequence[float], inputs: Sequence[float], outputs: Sequence[float],
    prompts: Sequence[Segments] | None = None, stage: Sequence[int] | None = None, filled: int = 0,
) -> Trace:  # fmt: skip
    """Sorted by arrival from 0 on, without the requests that have no input or no output."""
    arrival, tokens_in, tokens_out = (np.asarray(x, dtype=float) for x in (arrival_s, inputs, outputs))
    order = np.argsort(arrival, kind="stable")
    kept = order[(tokens_in[order] >= 1) & (tokens_out[order] >= 1)]
    return Trace(
        arrival_s=arrival[kept] - (arrival[kept[0]] if len(kept) else 0.0),
        input_tokens=tokens_in[kept].astype(np.int64),
        output_tokens=tokens_out[kept].astype(np.int64),
        prompts=None if prompts is None else [prompts[i] for i in kept.tolist()],
        stage=None if stage is None else np.asarray(stage, dtype=np.int64)[kept],
        dropped=len(order) - len(kept),
        filled=filled,
    )


def _azure(text: str) -> Trace:
    rows, lines = _rows(text, "TIMESTAMP", "ContextTokens", "GeneratedTokens")
    seconds = []
    for (stamp, _, _), line in zip(rows, lines, strict=True):
        # seven digits of a second in 2023, which datetime does not take; an offset of +00:00 in 2024
        whole, _, fraction = stamp.strip().partition("+")[0].rstrip("Z").partition(".")
        try:
            second = datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp()
            seconds.append(second + (float("0." + fraction) if fraction else 0.0))
        except ValueError:
            raise BadLineError(f"line {line}: TIMESTAMP {stamp!r} is not a date and time") from None
    return _trace(
        seconds,
        [_tokens(row[1], line, "ContextTokens") for row, line in zip(rows, lines, strict=True)],
        [_tokens(row[2], line, "GeneratedTokens") for row, line in zip(rows, lines, strict=True)],
    )


def _burstgpt(text: str) -> Trace:
    readers = {"Timestamp": _number, "Request tokens": _tokens, "Response tokens": _tokens}
    rows, lines = _rows(text, *readers)
    arrivals, inputs, outputs = (
        [read(row[i], line, name) for row, line in zip(rows, lines, strict=True)]
        for i, (name, read) in enumerate(readers.items())
    )
    return _trace(arrivals, inputs, outputs)


def _mooncake(text: str) -> Trace:
    arrivals, inputs, outputs, prompts = [], [], [], []
    for line, row in enumerate(text.splitlines(), start=1):
        if not row.strip():
            continue
        try:
            entry = json.loads(row)
        except json.JSONDecodeError as problem:
            raise BadLineError(f"line {line} is not JSON: {problem.msg}") from None
        if not isinstance(entry, dict):
            raise BadLineError(f"line {line} holds {type(entry).__name__}, not a request's timestamp and lengths")
        if missing := [name for name in ("timestamp", "input_length", "output_length") if name not in entry]:
            raise BadLineError(f"line {line}: no {missing[0]!r}; keys are {', '.join(entry)}")
        arrivals.append(_number(entry["timestamp"], line, "timestamp") / 1e3)
        inputs.append(int(_tokens(entry["input_length"], line, "input_length")))
        outputs.append(int(_tokens(entry["output_length"], line, "output_length")))
        hashes = entry.get("hash_ids", [])
        if not isinstance(hashes, list) or not all(isinstance(h, int) for h in hashes):
            raise BadLineError(f"line {line}: hash_ids {hashes!r} is not a list of whole numbers")
        if len(hashes) > (most := -(-inputs[-1] // MOONCAKE_BLOCK_TOKENS)):
            raise BadLineError(
                f"line {line}: {len(hashes)} hash_ids for {inputs[-1]} tokens; Mooncake has one for each "
                f"{MOONCAKE_BLOCK_TOKENS}, so at most {most}"
            )
        prompts.append(_blocks(hashes, inputs[-1]))
    return _trace(arrivals, inputs, outputs, prompts=prompts)


def _blocks(hashes: list[int], tokens: int) -> Segments:
    """Blocks of 512 tokens, the last one what is left; tokens beyond the hashes are in no segment, hence unshared."""
    left, segments = tokens, []
    for block in hashes:
        size = min(MOONCAKE_BLOCK_TOKENS, left)
        if size > 0:
            segments.append((block, size))
        left -= size
    return tuple(segments)


def _requests(text: str) -> Trace:
    names = ("stage", "arrival_s", "prompt_id", "input_tokens", "output_tokens")
    rows, lines = _rows(text, *names)
    known = [_tokens(row[4], line, "output_tokens") for row, line in zip(rows, lines, strict=True) if row[4]]
    if not known:
        raise BadLineError("no line has output_tokens")
    median = float(np.median(known))  # failed requests asked for as much, but their length was never seen
    inputs = [_tokens(row[3], line, "input_tokens") for row, line in zip(rows, lines, strict=True)]
    identities = [int(_number(row[2] or "-1", line, "prompt_id")) for row, line in zip(rows, lines, strict=True)]
    return _trace(
        [_number(row[1], line, "arrival_s") for row, line in zip(rows, lines, strict=True)],
        inputs,
        [_tokens(row[4], line, "output_tokens") if row[4] else median for row, line in zip(rows, lines, strict=True)],
        prompts=[((who, int(size)),) if who >= 0 else () for who, size in zip(identities, inputs, strict=True)],
        stage=[int(_number(row[0] or "0", line, "stage")) for row, line in zip(rows, lines, strict=True)],
        filled=len(rows) - len(known),
    )


def _benchmark(text: str) -> Trace:
    """One JSON object, or the last line that is one: SGLang appends a line per run."""
    try:
        entry = json.loads(text)
    except json.JSONDecodeError:
        entry = json.loads([line for line in text.splitlines() if line.strip()][-1])
    if "input_lens" not in entry or "output_lens" not in entry:
        raise BadLineError("no input_lens and output_lens; save the benchmark with --save-detailed (--output-details)")
    columns = {name: entry[name] for name in ("input_lens", "output_lens", "start_times") if name in entry}
    for name, column in columns.items():
        if not isinstance(column, list) or len(column) != len(entry["input_lens"]):
            raise BadLineError(f"{name} is not a list of a number for each of the input_lens")
    inputs, outputs = ([_tokens(n, i, f"{name} (of the list)") for i, n in enumerate(columns[name], start=1)]
                       for name in ("input_lens", "output_lens"))  # fmt: skip
    starts = [_number(t, i, "start_times (of the list)") for i, t in enumerate(columns.get("start_times", []), start=1)]
    trace = _trace(starts or range(len(inputs)), inputs, outputs)
    rate, concurrency = _stated_load(entry, len(inputs))
    return Trace(
        arrival_s=trace.arrival_s if starts else None,
        input_tokens=trace.input_tokens,
        output_tokens=trace.output_tokens,
        rate=rate,
        concurrency=concurrency,
        burstiness=float(entry.get("burstiness") or 1.0),
        dropped=trace.dropped,
    )


def _stated_load(entry: Mapping[str, Any], requests: int) -> tuple[float | None, int | None]:
    """Rate or concurrency of a benchmark: of two limits the one that was met; neither for arrivals of a trace.

    A rate is met if the requests were served within a tenth of it.
    """
    stated, most = entry.get("request_rate", "inf"), entry.get("max_concurrency")
    if stated == "trace":  # SGLang's --use-trace-timestamps
        return None, None
    rate = float(stated)
    if not math.isfinite(rate):
        return None, most or requests
    served = entry.get("request_throughput")
    held_back = most is not None and served is not None and served < 0.9 * rate
    return (None, most) if held_back else (rate, None)


READERS: dict[str, Callable[[str], Trace]] = {
    "azure": _azure,
    "burstgpt": _burstgpt,
    "mooncake": _mooncake,
    "requests": _requests,
    "vllm": _benchmark,
    "sglang": _benchmark,
}
