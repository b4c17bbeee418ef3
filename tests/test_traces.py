"""Every trace format is read into the same table, and played as recorded."""

import gzip
import json

import numpy as np
import pytest

from simmoe.errors import SpecError
from simmoe.sim.arrivals import Streams, arrival_ticks, shapes
from simmoe.sim.ticks import S_PER_TICK
from simmoe.specs.trace_formats import READERS
from simmoe.specs.traces import read_trace, workload_of
from simmoe.specs.workload import Arrivals, TraceReplay

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319569,3180,8
2023-11-16 18:17:06.5000000,110,27
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:01+00:00,2399,6
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
45.5,GPT-4,417,276,693,API log
"""
# newer files: a session and the time the answer took
BURSTGPT_2 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5.0,1,3.1,ChatGPT,472,18,490,Conversation log
45.0,1,0.0,ChatGPT,1087,0,1087,Conversation log
45.5,2,9.4,GPT-4,417,276,693,API log
"""
MOONCAKE = (
    '{"timestamp": 2000, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 48]}\n'
    '{"timestamp": 500, "input_length": 700, "output_length": 9, "hash_ids": [46, 99]}\n'
)
REQUESTS = """idx,stage,arrival_s,prompt_id,input_tokens,output_tokens,ok,ttft_s,e2e_s
0,0,1.0,7,596,251,1,0.06,4.4
1,0,1.5,8,594,,0,,
2,1,9.0,7,596,249,1,0.07,4.2
"""
VLLM = {
    "request_rate": "inf",
    "max_concurrency": 2,
    "request_throughput": 3.0,
    "input_lens": [10, 20, 30],
    "output_lens": [5, 0, 6],
    "ttfts": [0.1, 0.0, 0.2],
    "itls": [[0.01], [], [0.02]],
}


# as bench_serving appends it with --output-details, texts shortened
SGLANG = (
    '{"tag": null, "backend": "sglang", "dataset_name": "random", "request_rate": 4.0, "max_concurrency": null, '
    '"sharegpt_output_len": null, "random_input_len": 1024, "random_output_len": 128, "random_range_ratio": 0.0, '
    '"server_info": {"tp_size": 1}, "duration": 1.2, "completed": 2, "total_input_tokens": 1024, '
    '"request_throughput": 1.7, "mean_ttft_ms": 31.5, "concurrency": 1.1, "accept_length": null, '
    '"input_lens": [700, 324], "output_lens": [64, 128], "ttfts": [0.03, 0.03], "itls": [[0.01], [0.01]], '
    '"generated_texts": ["a", "b"], "errors": ["", ""]}\n'
)


@pytest.fixture
def replay(tmp_path):
    def write(text, name="trace.csv", **options):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return TraceReplay(path=str(path), **options)

    return write


@pytest.mark.parametrize(
    ("text", "arrivals", "inputs", "outputs", "dropped"),
    [
        (AZURE, [0, 0.0519969, 2.52004], [4808, 3180, 110], [10, 8, 27], 0),
        (AZURE_2024, [0, 0.99007], [2162, 2399], [5, 6], 0),
        (BURSTGPT, [0, 40.5], [472, 417], [18, 276], 1),
        (MOONCAKE, [0, 1.5], [700, 1100], [9, 52], 0),
        (REQUESTS, [0, 0.5, 8.0], [596, 594, 596], [251, 250, 249], 0),
        (AZURE.replace("ContextTokens", " ContextTokens"), [0, 0.0519969, 2.52004], [4808, 3180, 110], [10, 8, 27], 0),
        (BURSTGPT_2, [0, 40.5], [472, 417], [18, 276], 1),
        (json.dumps({**VLLM, "start_times": [100.5, 100.0, 101.0]}), [0, 0.5], [10, 30], [5, 6], 1),
    ],
)
def test_formats_are_told_apart_and_read_alike(replay, text, arrivals, inputs, outputs, dropped):
    trace = read_trace(replay(text))
    np.testing.assert_allclose(trace.arrival_s, arrivals, atol=1e-6)
    assert trace.input_tokens.tolist() == inputs
    assert trace.output_tokens.tolist() == outputs
    assert trace.dropped == dropped


def test_a_failed_requests_length_is_the_others_median_and_counted(replay):
    trace = read_trace(replay(REQUESTS))
    assert trace.filled == 1
    assert trace.stage.tolist() == [0, 0, 1]
    assert trace.prompts == [((7, 596),), ((8, 594),), ((7, 596),)]


def test_mooncake_hashes_are_blocks_of_512_tokens(replay):
    trace = read_trace(replay(MOONCAKE))
    assert trace.prompts == [((46, 512), (99, 188)), ((46, 512), (47, 512), (48, 76))]


def test_a_trace_is_played_as_recorded_at_its_speed(replay):
    workload = workload_of(replay(AZURE, speed=2.0, limit=2))
    assert workload.input.mean == pytest.approx((4808 + 3180) / 2)
    streams = Streams.of(0)
    ticks = list(arrival_ticks(workload, streams))
    np.testing.assert_allclose(np.array(ticks) * S_PER_TICK, [0, 0.0519969 / 2], atol=1e-6)
    played = shapes(workload, streams)
    assert [next(played)[:2] for _ in range(3)] == [(4808, 10), (3180, 8), (4808, 10)]


def test_a_trace_under_a_rate_of_its_own_keeps_lengths_only(replay):
    workload = workload_of(replay(BURSTGPT), rate=100.0)
    streams = Streams.of(0)
    ticks = arrival_ticks(workload, streams)
    assert next(t for i, t in enumerate(ticks) if i == 1000) * S_PER_TICK == pytest.approx(10, rel=0.15)
    assert next(shapes(workload, streams))[:2] == (472, 18)


def test_a_benchmark_without_times_is_played_at_the_load_it_states(replay):
    closed = workload_of(replay(json.dumps(VLLM), "a.json"))
    assert (closed.concurrency, closed.rate) == (2, None)
    opened = workload_of(replay(json.dumps({**VLLM, "request_rate": 4.0, "max_concurrency": None}), "b.json"))
    assert (opened.concurrency, opened.rate) == (None, 4.0)


def test_of_two_limits_a_benchmark_states_the_one_that_was_met_is_played(replay):
    limits = {**VLLM, "request_rate": 4.0, "max_concurrency": 2}
    met = workload_of(replay(json.dumps({**limits, "request_throughput": 3.9}), "a.json"))
    assert (met.concurrency, met.rate) == (None, 4.0)
    held_back = workload_of(replay(json.dumps({**limits, "request_throughput": 3.0}), "b.json"))
    assert (held_back.concurrency, held_back.rate) == (2, None)


def test_a_benchmarks_burstiness_is_the_shape_of_its_gaps(replay):
    """vllm bench serve draws gaps from a gamma law of this shape: coefficient of variation 1 / sqrt(shape)."""
    stated = {**VLLM, "request_rate": 4.0, "max_concurrency": None, "burstiness": 0.25}
    workload = workload_of(replay(json.dumps(stated)))
    assert workload.arrivals == Arrivals(kind="gamma", cv=2.0)
    assert workload_of(replay(json.dumps({**stated, "burstiness": 1.0}), "b.json")).arrivals == Arrivals()


def test_sglang_appends_a_line_per_run_and_the_last_counts(replay):
    line = {"sharegpt_output_len": 3, "request_rate": 2.0, "input_lens": [1], "output_lens": [2]}
    text = json.dumps(line) + "\n" + json.dumps({**line, "input_lens": [9, 9], "output_lens": [3, 3]}) + "\n"
    assert read_trace(replay(text, "run.jsonl")).input_tokens.tolist() == [9, 9]


def test_compressed_traces_are_read(tmp_path):
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(REQUESTS.encode()))
    assert len(read_trace(TraceReplay(path=str(path)))) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AZURE.replace("3180", "many"), "line 3: ContextTokens 'many' is not a number"),
        (AZURE.replace("2023-11-16 18:17:04", "soon"), "line 3: TIMESTAMP 'soon.0319569' is not a date"),
        (BURSTGPT.replace("Response tokens", "Answer"), "no column 'Response tokens'; columns are Timestamp, Model"),
        (AZURE.replace("3180", "-3"), "line 3: ContextTokens '-3' is below 0"),
        (AZURE.replace("3180", "nan"), "line 3: ContextTokens 'nan' is not a finite number"),
        (BURSTGPT + "46,GPT-4\n", "line 5 has 2 cells, the header has 6"),
        (
            MOONCAKE + '{"timestamp": 1, "input_length": 4}\n',
            "line 3: no 'output_length'; keys are timestamp, input_len",
        ),
        (MOONCAKE + '{"timestamp": 1, "inp\n', "line 3 is not JSON: Unterminated string"),
        (MOONCAKE.replace("[46, 99]", "46"), "line 2: hash_ids 46 is not a list of whole numbers"),
        (MOONCAKE.replace("2000", "NaN"), "line 1: timestamp nan is not a finite number"),
        (
            MOONCAKE.replace("[46, 99]", "[1, 2, 3, 4]"),
            "line 2: 4 hash_ids for 700 tokens; Mooncake has one for each 512",
        ),
        ("", "is empty"),
        (json.dumps({**VLLM, "output_lens": [5]}), "output_lens is not a list of a number for each of the input_lens"),
        (
            json.dumps({**VLLM, "output_lens": [5, None, 6]}),
            r"line 2: output_lens \(of the list\) None is not a number",
        ),
        (SGLANG.replace("4.0", '"trace"'), "does not say when requests came; give rate or concurrency beside trace"),
        ("a,b\n1,2\n", "trace format not recognised; known: azure, burstgpt"),
        (AZURE.split("\n", maxsplit=1)[0] + "\n", "holds no request with an output"),
        (json.dumps({"request_throughput": 3.0}), "no input_lens and output_lens; save the benchmark with"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(replay, text, message):
    with pytest.raises(SpecError, match=message) as caught:
        workload_of(replay(text))
    assert "trace.csv: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_unknown_format_are_named(replay):
    with pytest.raises(SpecError, match=r"nowhere.csv: no such trace file"):
        read_trace(TraceReplay(path="nowhere.csv"))
    with pytest.raises(SpecError, match="trace format splitwise; known: " + ", ".join(READERS)):
        read_trace(replay(AZURE, format="splitwise"))
