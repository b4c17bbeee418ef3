"""The command line as a user types it: answers, files, and one line for whatever is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


# ---- answers ----------------------------------------------------------------------------------------------------


def test_the_first_command_answers_as_a_process_from_any_folder(tmp_path):
    command = [Path(sys.executable).with_name("simmoe"), "predict", "h100"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "DeepSeek-V2-Lite on 1 x NVIDIA H100" in done.stdout
    for word in (
        "tokens/s",
        "90 % interval",
        "TTFT p50 / p99",
        "TPOT p50 / p99",
        "6 (native)",
        "Mean step",
        "How sure",
    ):
        assert word in done.stdout
    assert "not free" in done.stdout


def test_help_loads_nothing_heavy(tmp_path):
    code = (
        "import sys; from simmoe.cli import main as cli; sys.argv = ['simmoe', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'scipy', 'matplotlib', 'simpy', 'pandas', 'ray', 'pint'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout


def test_predicting_loads_no_plotting_simulation_or_torch(tmp_path):
    code = (
        "import sys; from simmoe.cli import main as cli; sys.argv = ['simmoe', 'predict', 'h100', '--json']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        # not scipy: pint loads it where it is installed
        "heavy = {'torch', 'matplotlib', 'simpy', 'pandas', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_json_holds_a_prediction_per_cap_in_si_units(simmoe):
    status, out, err = simmoe("predict", "h100", "--active-experts", "6,4,2", "--json")
    answer = json.loads(out)
    assert (status, err) == (0, "")
    assert [p["active_experts"] for p in answer["predictions"]] == [6, 4, 2]
    native, _, least = answer["predictions"]
    assert native["gain_over_native"] == 0
    assert least["gain_over_native"] > 0
    low, high = native["output_tokens_per_s_interval_90"]
    assert low < native["metrics"]["output_tokens_per_s"] < high
    assert native["metrics"]["tpot_s"]["p50"] < 1
    assert sum(native["mean_step_parts_s"].values()) == pytest.approx(native["metrics"]["mean_step_s"], rel=0.05)
    assert "not free" in answer["quality_note"]
    assert answer["provenance"]


def test_flags_reach_the_prediction(simmoe):
    words = "predict h200 --model deepseek-v3 --gpus 8 --rate 2 --input 2000 --output 500 --active-experts 8 --json"
    status, out, _ = simmoe(*words.split())
    answer = json.loads(out)
    assert status == 0
    assert answer["model"] == "DeepSeek-V3"
    assert answer["deployment"]["gpus"] == 8
    assert (answer["workload"]["input"]["mean"], answer["workload"]["output"]["mean"]) == (2000, 500)
    assert answer["predictions"][0]["metrics"]["requests_per_s"] == 2.0


def test_an_open_loop_table_shows_where_it_saturates(simmoe):
    status, out, _ = simmoe("predict", "h100", "--rate", "2")
    assert status == 0
    assert "open loop, 2 requests/s" in out
    assert "saturates at" in out


def test_a_pool_smaller_than_the_native_top_k_takes_caps_that_fit_it(simmoe):
    status, out, err = simmoe("predict", "h100", "--total-experts", "4", "--json")
    assert status == 0, err
    assert [one["active_experts"] for one in json.loads(out)["predictions"]] == [4, 3, 2, 1]


def test_a_dense_model_has_no_cap_and_no_quality_note(simmoe):
    status, out, _ = simmoe("predict", "h100", "--model", "llama-3.1-8b")
    assert status == 0
    assert "dense" in out
    assert "routing" not in out
    assert "not free" not in out


def test_a_borrowed_calibration_is_said_in_the_output(simmoe):
    _, out, _ = simmoe("predict", "a800-pcie", "--gpus", "2")
    assert "is not calibrated: efficiencies of" in out


def test_files_and_flags_combine_and_flags_win(simmoe, tmp_path):
    (tmp_path / "layout.yaml").write_text("gpus: 2\ntp: 2\nmax_num_seqs: 32\n")
    (tmp_path / "load.yaml").write_text("concurrency: 16\ninput: {mean: 300}\noutput: {mean: 30}\n")
    words = ("--deployment", "layout.yaml", "--workload", "load.yaml", "--concurrency", "8", "--json")
    status, out, err = simmoe("predict", "h100", *words)
    assert status == 0, err
    answer = json.loads(out)
    assert answer["deployment"]["max_num_seqs"] == 32
    assert answer["workload"]["concurrency"] == 8
    assert answer["workload"]["input"]["mean"] == 300


def test_plot_writes_a_picture(simmoe, tmp_path):
    status, _, err = simmoe("predict", "h100", "--active-experts", "6,3", "--plot", "pictures/caps.png")
    assert status == 0, err
    assert (tmp_path / "pictures/caps.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("kind", ["models", "hardware", "profiles"])
def test_list_names_what_is_shipped(simmoe, kind):
    status, out, _ = simmoe("list", kind, "--json")
    assert status == 0
    assert {"models": "deepseek-v3", "hardware": "h100", "profiles": "h100_sxm"}[kind] in json.loads(out)


def test_version_is_printed(simmoe):
    status, out, _ = simmoe("--version")
    assert (status, out.split()[0]) == (0, "simmoe")


# ---- one line for whatever is wrong -----------------------------------------------------------------------------


MISTAKES = {
    "missing file": ("hardware/h1000.yaml", "no such file"),
    "unknown hardware": ("h1000", "is not known; did you mean 'h100'"),
    "unknown model": ("h100 --model deepseek-v9", "'deepseek-v9' is not known; did you mean 'deepseek-v"),
    "missing model file": ("h100 --model nowhere/config.json", "nowhere/config.json: no such file"),
    "missing workload": ("h100 --workload nowhere.yaml", "nowhere.yaml: no such workload file"),
    "negative size": ("h100 --gpus -1", "--gpus"),
    "negative length": ("h100 --input -5", "--input"),
    "less than a token": ("h100 --input 0.001 --output 0.001", "--input: 0.001 will not do"),
    "zero output": ("h100 --output 0", "--output"),
    "zero rate": ("h100 --rate 0", "--rate"),
    "both loops": ("h100 --rate 1 --concurrency 1", "--rate (open loop) or --concurrency (closed loop), not both"),
    "unknown engine": ("h100 --engine tgi", "--engine"),
    "unknown precision": ("h100 --precision fp7", "--precision"),
    "uneven layout": ("h100 --gpus 3 --tp 2", "3 is not a multiple of tp 2"),
    "bad ep": ("h100 --gpus 8 --ep 3", "ep 3 must be 1 or"),
    "caps not numbers": ("h100 --active-experts 6,x", "give whole numbers with commas"),
    "cap of zero": ("h100 --active-experts 0", "every cap must be at least 1"),
    "cap above top-k": ("h100 --active-experts 7", "active_experts 7 exceeds the top-6 routing"),
    "pool too large": ("h100 --total-experts 65", "total_experts 65 exceeds the 64 experts"),
    "cap of a dense model": ("h100 --model llama-3.1-8b --total-experts 8", "is dense"),
    "does not fit": ("h100 --model deepseek-v3 --gpus 1", "DeepSeek-V3"),
    "rate too high": ("h100 --rate 1e6", "saturates at"),
    "picture format": ("h100 --plot caps.doc", "end the name in .png, .svg or .pdf"),
}


@pytest.mark.parametrize(("words", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_exit_1(simmoe, words, says):
    status, out, err = simmoe("predict", *words.split())
    assert status == 1
    assert out == ""
    assert err.startswith("simmoe: ")
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpu: 2\n", "gpus"),
        ("gpus: two\n", "gpus"),
        ("gpus: 2\ngpus: 4\n", "'gpus' is given twice"),
        ("gpus: [\n", "is not YAML"),
        ("- 1\n", "not a mapping"),
        ("", "not a mapping"),
        ("host_time_per_step: 0.001\n", "host_time_per_step"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_and_the_key(simmoe, tmp_path, text, says):
    (tmp_path / "layout.yaml").write_text(text)
    status, out, err = simmoe("predict", "h100", "--deployment", "layout.yaml")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("simmoe: layout.yaml: ")
    assert says in err


def test_a_misspelt_key_of_a_hardware_file_suggests_the_right_one(simmoe, tmp_path):
    text = (ROOT / "hardware/h100.yaml").read_text().replace("memory_bandwidth:", "memory_bandwith:")
    (tmp_path / "mine.yaml").write_text(text)
    status, _, err = simmoe("predict", "mine.yaml")
    assert status == 1
    assert err.startswith("simmoe: mine.yaml: ")
    assert "memory_bandwith" in err
    assert "memory_bandwidth" in err


def test_a_number_without_unit_in_a_file_says_what_to_write(simmoe, tmp_path):
    text = (ROOT / "hardware/h100.yaml").read_text().replace("3.35 TB/s", "3.35")
    (tmp_path / "mine.yaml").write_text(text)
    status, _, err = simmoe("predict", "mine.yaml")
    assert status == 1
    assert "memory_bandwidth" in err
    assert "B/s" in err


@pytest.mark.parametrize("words", ["predict", "predict h100 --gpu-count 2", "predict h100 --gpus two", "predicts h100"])
def test_wrong_usage_exits_2_without_a_traceback(simmoe, words):
    status, out, err = simmoe(*words.split())
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert "Usage" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("calibrate nowhere", "nowhere: no such file or folder"),
        ("validate nowhere", "nowhere: no such file or folder"),
        ("validate .", "no .csv or .csv.gz file"),
        ("list engines", "give models, hardware or profiles"),
    ],
)
def test_other_commands_fail_in_one_line_too(simmoe, words, says):
    status, out, err = simmoe(*words.split())
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert says in err


# ---- validate ---------------------------------------------------------------------------------------------------


def test_validate_compares_kernels_and_writes_rows(simmoe, tmp_path):
    measured = ROOT / "profiles/h100_sxm/nccl_h100_sxm.csv"
    status, out, err = simmoe("validate", measured, "--json", "--rows", "rows.csv")
    assert status == 0, err
    answer = json.loads(out)
    assert set(answer) == {"groups", "skipped"}
    keys = ("group", "quantity", "n", "mape_percent", "median_ape_percent", "p90_ape_percent", "bias_percent")
    for group in answer["groups"]:
        assert set(group) == {*keys, "inside_90_percent"}
        assert group["group"].split("/")[:2] == ["nccl", "h100_sxm"]
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert lines[0] == "file,row,source_id,quantity,measured,predicted,lower,upper"
    compared = sum(group["n"] for group in answer["groups"])
    assert len(lines) == 1 + compared
    assert compared + sum(s["n"] for s in answer["skipped"]) == len(measured.read_text().splitlines()) - 1


def test_validate_fails_when_the_error_exceeds_what_is_accepted(simmoe):
    status, _, err = simmoe("validate", ROOT / "profiles/h100_sxm/nccl_h100_sxm.csv", "--fail-above", "0.1")
    assert status == 1
    assert "is above --fail-above 0.1" in err


def test_a_table_of_another_kind_is_counted_not_dropped(simmoe, tmp_path):
    (tmp_path / "else.csv").write_text("a,b\n1,2\n3,4\n")
    status, out, err = simmoe("validate", "else.csv", "--json")
    assert (status, err) == (1, "simmoe: validate else.csv: no row could be compared\n")
    assert json.loads(out) == {
        "groups": [],
        "skipped": [{"reason": "else.csv: columns of no kind simmoe compares", "n": 2}],
    }


def test_a_cap_asked_for_alone_is_told_over_the_native_one(simmoe):
    status, out, err = simmoe("predict", "h100", "--active-experts", "2", "--json")
    native, capped = json.loads(out)["predictions"]
    assert (status, err) == (0, "")
    assert (native["active_experts"], capped["active_experts"]) == (6, 2)
    assert capped["gain_over_native"] > 0.05


def test_no_gain_is_told_where_the_pool_is_smaller_than_the_native_cap(simmoe):
    status, out, _ = simmoe("predict", "h100", "--total-experts", "5", "--active-experts", "3,2", "--json")
    assert status == 0
    assert [row["gain_over_native"] for row in json.loads(out)["predictions"]] == [None, None]


@pytest.mark.parametrize("command", ["validate", "calibrate"])
def test_a_table_of_nothing_known_does_not_pass(simmoe, tmp_path, command):
    (tmp_path / "ab.csv").write_text("a,b\n1,2\n")
    status, _, err = simmoe(command, "ab.csv")
    assert (status, err.count("\n")) == (1, 1)
    assert "ab.csv: no " in err


def test_a_check_of_a_table_without_rows_does_not_pass(simmoe, tmp_path):
    header = "kernel,phase,num_experts,num_gpus,num_local_experts,top_k,hidden_size,expert_inter_size,"
    (tmp_path / "moe_grouped_gemm_h20.csv").write_text(
        header + "num_tokens_per_gpu,tokens_per_expert,up_proj_us,down_proj_us\n"
    )
    status, _, err = simmoe("validate", "moe_grouped_gemm_h20.csv", "--fail-above", "5")
    assert status == 1
    assert err.endswith("moe_grouped_gemm_h20.csv: no row could be compared\n")


def test_a_file_that_cannot_be_written_is_one_line(simmoe, tmp_path):
    (tmp_path / "taken").write_text("a file where a folder is needed")
    table = ROOT / "profiles/h20/mla_decode_h20.csv"
    status, _, err = simmoe("validate", table, "--rows", "taken/rows.csv")
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith("simmoe: taken")


def test_names_in_angle_brackets_stay_in_the_help(simmoe):
    _, out, _ = simmoe("calibrate", "--help")
    assert "<device>/calibration.yaml" in out


def test_one_output_token_has_no_time_between_tokens(simmoe):
    status, out, _ = simmoe("simulate", "h100", "--output", "1", "--requests", "50", "--concurrency", "4")
    assert status == 0
    assert "nan" not in out
    assert ".. -" not in out


def test_an_older_engine_version_is_named_with_what_it_costs(simmoe):
    words = ("predict", "h100", "--active-experts", "6", "--engine-version", "0.15.1")
    status, out, _ = simmoe(*words, "--json")
    older = json.loads(out)
    newest = json.loads(simmoe("predict", "h100", "--active-experts", "6", "--json")[1])
    rates = [one["predictions"][0]["metrics"]["output_tokens_per_s"] for one in (older, newest)]
    told = older["engine_version"]
    assert (status, told["asked"], newest["engine_version"]["asked"]) == (0, "0.15.1", None)
    assert told["gain_over_newest"] == pytest.approx(rates[0] / rates[1] - 1)
    assert -0.2 < told["gain_over_newest"] < -0.05  # DeepSeek-V2-Lite's experts have no tuned tiles there
    assert newest["engine_version"]["gain_over_newest"] is None
    page = " ".join(simmoe(*words)[1].split())
    assert "engine vllm 0.15.1 closed loop" in page
    assert (
        f"Engine: vllm 0.15.1: {100 * told['gain_over_newest']:+.1f} % output tokens/s against the newest known" in page
    )
    assert "vllm as its newest known version runs (--engine-version gives another)" in " ".join(
        simmoe("predict", "h100", "--active-experts", "6")[1].split()
    )
    assert "engine vllm 0.15.1" in simmoe("simulate", "h100", "--engine-version", "0.15.1", "--requests", "50")[1]


def test_routing_and_a_pruned_pool_mean_the_same_to_simulate_as_to_predict(simmoe):
    line = "h200 --model deepseek-v3 --gpus 8 --tp 1 --dp 8 --ep 8 --concurrency 256 --input 64 --output 64"
    words = line.split()
    found = {}
    for routing in ("uniform", "zipf:1.2"):
        _, predicted, _ = simmoe("predict", *words, "--routing", routing, "--active-experts", "8", "--json")
        status, simulated, err = simmoe("simulate", *words, "--routing", routing, "--requests", "600", "--json")
        assert status == 0, err
        assert json.loads(simulated)["deployment"]["routing"] == json.loads(predicted)["deployment"]["routing"]
        found[routing] = (
            json.loads(predicted)["predictions"][0]["metrics"]["output_tokens_per_s"],
            json.loads(simulated)["metrics"]["output_tokens_per_s"],
        )
    told, played = (skewed / even for skewed, even in zip(found["zipf:1.2"], found["uniform"], strict=True))
    assert told < 0.95
    assert played == pytest.approx(told, abs=0.05)
    _, out, _ = simmoe("simulate", "h100", "--routing", "zipf:1.2", "--total-experts", "48", "--requests", "50")
    assert "routing zipf, exponent 1.2" in out
    status, _, err = simmoe("simulate", "h100", "--routing", "zipf:x")
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith("simmoe: --routing: exponent: 'x' will not do")
