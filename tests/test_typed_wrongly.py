"""Whatever is typed or written wrongly: one line that names it, exit status 1, no endless run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLAGS = {
    "a rate too small to ever arrive": ("simulate h100 --rate 1e-300", "--rate: 1e-300 will not do"),
    "a rate nothing carries": ("simulate h100 --rate 1e8 --requests 100", "more than 1000 times what can be carried"),
    "longer than all time": ("simulate h100 --rate 1 --duration 1e300", "--duration: 1e+300 will not do"),
    "more requests than memory": ("simulate h100 --requests 99999999999", "--requests: 99999999999 will not do"),
    "bursts of nothing": ("simulate h100 --rate 1 --burstiness 1e-300", "less than or equal to 100"),
    "layers without end": (
        "predict h100 --routing dirichlet:1,layers_drawn=100000",
        "--routing: layers_drawn: '100000'",
    ),
    "a folder for a result": ("report .", ".: is a folder; give the table or JSON file in it"),
    "a limit that nothing is above": (
        "validate validate/serving/dstack_deepseek_r1_h200.csv --fail-above nan",
        "--fail-above nan: give a percentage of 0 or more",
    ),
    "an axis of no picture": ("frontier h100 --caps 6,4 --benchmark x", "give --plot FILE too"),
    "no version": ("predict h100 --engine-version=", "--engine-version: '' will not do"),
}


@pytest.mark.parametrize(("words", "says"), FLAGS.values(), ids=FLAGS)
def test_a_number_beyond_sense_is_one_line(simmoe, words, says):
    status, out, err = simmoe(*words.split())
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert says in err


LENGTHS = "input: 10\noutput: 4\n"
FILES = {
    "a list for a key": (f"? [1]\n: 2\n{LENGTHS}", "a key is no plain text"),
    "a date that is none": ("concurrency: 4\ninput: 2024-13-45\noutput: 4\n", "month must be in 1..12"),
    "a trace without a path": ("trace: {speed: 2}\n", "trace: {'speed': 2} will not do: give a file, or a mapping"),
    "a key in a list": (
        f"arrivals: {{stages: [{{rat: 1}}]}}\n{LENGTHS}",
        "arrivals.stages.0.rat: unknown key; did you mean",
    ),
    "no list of stages": (f"arrivals: {{kind: staged, stages: 5}}\n{LENGTHS}", "arrivals.stages: 5 will not do"),
}


@pytest.mark.parametrize(("text", "says"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_workload_is_one_line(simmoe, tmp_path, text, says):
    (tmp_path / "load.yaml").write_text(text)
    status, out, err = simmoe("predict", "h100", "--workload", "load.yaml")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("simmoe: load.yaml: ")
    assert says in err


CONFIG = {
    "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 2, "vocab_size": 32000,
    "num_attention_heads": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 14336,
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", "x"), ("num_attention_heads", 0), ("num_hidden_layers", -1)]
)
def test_a_config_with_a_number_that_is_none_is_one_line(simmoe, tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    status, out, err = simmoe("predict", "h100", "--model", "config.json")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"simmoe: config.json: {key}: {value!r} will not do")


@pytest.mark.parametrize(
    ("name", "contents", "says"),
    [
        ("latin.yaml", b"name: caf\xe9\n", "latin.yaml: is not UTF-8 text: byte 9 is 0xe9"),
        ("deep.json", b"[" * 100_000, "deep.json: is nested too deeply"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(simmoe, tmp_path, name, contents, says):
    (tmp_path / name).write_bytes(contents)
    status, out, err = simmoe("predict", "h100", "--model", name)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"simmoe: {says}")


def test_a_device_without_multiprocessors_is_one_line(simmoe, tmp_path):
    (tmp_path / "mine.yaml").write_text((ROOT / "hardware/h100.yaml").read_text().replace("  sms: 132\n", ""))
    status, out, err = simmoe("predict", "mine.yaml")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "device.sms: missing" in err


@pytest.mark.parametrize("processes", ["1", "2"])
def test_an_interrupted_sweep_says_how_to_go_on(tmp_path, processes):
    grid = "{model: deepseek-v2-lite, hardware: h100, method: simulated, requests: 3000, workload: "
    (tmp_path / "grid.yaml").write_text(grid + "{concurrency: {from: 1, to: 64, steps: 64}, input: 512, output: 128}}")
    words = [Path(sys.executable).with_name("simmoe"), "sweep", "grid.yaml", "--out", "grid.csv"]
    running = subprocess.Popen(
        [*words, "--processes", processes], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    table = tmp_path / "grid.csv"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (table.exists() and table.read_text().count("\n") > 1):
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to every process of the command
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err == "simmoe: grid.csv: interrupted; the same command goes on where it ended\n"
    assert 1 < table.read_text().count("\n") < 65
