"""Specifications: loading by path and name, one-line errors, shipped hardware."""

import json
import math
import subprocess
import sys

import jsonschema
import pytest
import yaml

from simmoe.errors import SpecError
from simmoe.schema import schema_of
from simmoe.specs import aliases
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.load import (
    calibration_path,
    hardware_names,
    load_deployment,
    load_hardware,
    load_model,
    load_workload,
    model_names,
)
from simmoe.specs.workload import Workload

H100 = """
name: X
device:
  name: X
  memory: 80 GB
  memory_bandwidth: 3.35 TB/s
  peak: {bfloat16: 989 TFLOP/s}
  source: test
scale_up: {bandwidth: 450 GB/s, latency: 5 us}
"""


def written(tmp_path, text, name="x.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def complaint(load, path):
    with pytest.raises(SpecError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("ref", ["h100", "H100", "h100-sxm", "H100_SXM", "h100 sxm5"])
def test_names_match_whatever_the_case_and_hyphens(ref):
    assert load_hardware(ref).name == "H100-SXM"


@pytest.mark.parametrize("ref", ["deepseek-r1", "DeepSeek_V3", "deepseek-ai/DeepSeek-V3", "deepseek-v3.1"])
def test_a_model_is_found_by_its_other_names(ref):
    assert load_model(ref).name == "DeepSeek-V3"


def test_dots_tell_models_apart():
    assert load_model("ds-moe-2.4b-128e").hidden == 3584
    assert load_model("ds-moe-24b-128e").hidden == 8192


def test_every_alias_leads_to_a_shipped_file_and_none_hides_one():
    assert set(aliases.HARDWARE.values()) <= set(hardware_names())
    assert set(aliases.MODEL.values()) <= set(model_names())
    assert not set(aliases.HARDWARE) & set(hardware_names())
    assert not set(aliases.MODEL) & set(model_names())


def test_a_path_is_read_as_written(tmp_path):
    hardware = load_hardware(written(tmp_path, H100))
    assert hardware.device.memory == 80e9
    assert hardware.scale_up.latency == 5e-6
    assert hardware.devices_per_node == 8


def test_equal_specs_hash_alike(tmp_path):
    path = written(tmp_path, H100)
    assert hash(load_hardware(path)) == hash(load_hardware(str(path)))
    assert load_hardware(path) == load_hardware(path)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("3.35 TB/s", "3.35", ["device.memory_bandwidth", "has no unit", "3.35 TB/s"]),
        ("80 GB", "80 GB/s", ["device.memory", "not in byte", "80 GB"]),
        ("80 GB", "-1 GB", ["device.memory", "greater than or equal to 0"]),
        ("memory_bandwidth", "memory_bandwith", ["memory_bandwith", "did you mean 'memory_bandwidth'?"]),
        ("bfloat16:", "bf16:", ["device.peak.bf16", "unknown key"]),
        ("  source: test\n", "", ["device.source", "missing", "Document the numbers come from"]),
        ("name: X\ndevice", "name: X\nname: Y\ndevice", ["line 3", "given twice"]),
        ("450 GB/s, latency", "450 GB/s latency", ["line 9", "not YAML"]),
        ("name: X\ndevice:", "- name: X\n", ["not YAML"]),
    ],
)
def test_a_wrong_hardware_file_is_described_in_one_line(tmp_path, old, new, parts):
    message = complaint(load_hardware, written(tmp_path, H100.replace(old, new, 1)))
    for part in parts:
        assert part in message


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    assert "not a mapping" in complaint(load_hardware, written(tmp_path, "- 1\n- 2\n"))
    assert "not a mapping" in complaint(load_hardware, written(tmp_path, ""))


def test_a_missing_file_names_what_is_there(tmp_path):
    written(tmp_path, "gpus: 1", "there.yaml")
    assert "there.yaml" in complaint(load_deployment, tmp_path / "absent.yaml")
    assert "did you mean the shipped 'h100'" in complaint(load_hardware, tmp_path / "h100.yaml")


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(SpecError, match=r"did you mean 'h800'\?"):
        load_hardware("h8000")
    with pytest.raises(SpecError, match=r"did you mean 'deepseek-v2-lite'\?"):
        load_model("deepseek-v2-light")
    with pytest.raises(SpecError, match=r"shipped: .*h100"):
        load_hardware("zzz")


def test_deployments_and_workloads_come_from_files(tmp_path):
    deployment = load_deployment(written(tmp_path, "gpus: 16\ntp: 8\ndp: 2\nep: 16\nhost_time_per_step: 3 ms\n"))
    assert deployment == Deployment(gpus=16, tp=8, dp=2, ep=16, host_time_per_step=3e-3)
    text = "rate: 8 request/s\ninput: {mean: 1024}\noutput: {kind: uniform, mean: 15, low: 10, high: 20}\n"
    workload = load_workload(written(tmp_path, text))
    assert workload.rate == 8.0
    assert workload.output.high == 20


def test_contradictions_are_told_as_the_spec_tells_them(tmp_path):
    assert "exactly one of rate" in complaint(load_workload, written(tmp_path, "input: {mean: 1}\noutput: {mean: 1}\n"))
    assert "not a multiple of tp 8" in complaint(load_deployment, written(tmp_path, "gpus: 12\ntp: 8\n"))
    assert "rate: 8 has no unit" in complaint(
        load_workload, written(tmp_path, "rate: 8\ninput: {mean: 1}\noutput: {mean: 1}\n")
    )
    assert "engine: 'vlm' will not do" in complaint(load_deployment, written(tmp_path, "engine: vlm\n"))


def test_specs_in_code_take_plain_si_numbers():
    workload = Workload.model_validate({"rate": 8, "input": {"mean": 1}, "output": {"mean": 1}})
    assert workload.rate == 8.0


@pytest.mark.parametrize(
    ("name", "teraflop_per_s", "gib", "gb_per_s", "pod", "bisection_tb_per_s"),
    [  # as the vendor's documentation of the system architecture prints them
        ("tpu-v3", 123, 32, 900, 1024, 6.4),
        ("tpu-v4", 275, 32, 1200, 4096, 24),
        ("tpu-v5e", 197, 16, 819, 256, 1.6),
        ("tpu-v5p", 459, 95, 2765, 8960, None),
    ],
)
def test_tpu_pods_are_those_of_their_documentation(name, teraflop_per_s, gib, gb_per_s, pod, bisection_tb_per_s):
    hardware = load_hardware(name)
    device, torus = hardware.device, hardware.fabric.torus
    assert device.flop_per_s("bfloat16") == teraflop_per_s * 1e12
    assert device.memory == gib * 2**30
    assert device.memory_bandwidth == gb_per_s * 1e9
    assert math.prod(torus) == hardware.devices_per_node == pod
    if bisection_tb_per_s is not None:  # two links of every ring across the longest side; v3's file says what disagrees
        cut = 2 * pod / max(torus) * hardware.scale_up.bandwidth
        assert cut == pytest.approx(bisection_tb_per_s * 1e12, rel=0.2)


@pytest.mark.parametrize("name", list(hardware_names()))
def test_shipped_hardware_is_complete_and_plausible(name):
    hardware = load_hardware(name)
    device = hardware.device
    assert hardware.calibration or hardware.nearest_calibration
    assert device.source
    assert 10e9 < device.memory < 400e9
    assert 30 < device.peak.bfloat16 / device.memory_bandwidth < 500  # ridge point [FLOP/B]
    if device.peak.fp8 is not None and name != "tpu-v5p":
        assert device.peak.fp8 / device.peak.bfloat16 == pytest.approx(2, rel=0.03)
    if hardware.scale_out is not None:
        assert hardware.scale_out.bandwidth <= hardware.scale_up.bandwidth


def test_the_measured_devices_name_their_calibration():
    named = {name: load_hardware(name).calibration for name in hardware_names()}
    assert {name: found for name, found in named.items() if found} == {
        "h100": "h100_sxm",
        "h200": "h200_sxm",
        "a100": "a100_sxm",
        "l40s": "l40s",
        "h800": "h800",
        "h20": "h20",
    }
    for name in hardware_names():
        hardware = load_hardware(name)
        for profile in filter(None, (hardware.calibration, hardware.nearest_calibration)):
            assert calibration_path(profile).is_file(), profile


def test_numbers_formats_without_a_unit_run_at_the_next_wider_peak():
    device = load_hardware("a100").device
    assert device.flop_per_s("fp8_block") == device.peak.bfloat16
    assert load_hardware("h100").device.flop_per_s("mxfp4") == load_hardware("h100").device.peak.fp8


def test_a_config_json_is_read_by_path_and_by_folder(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    folder = tmp_path / "Tiny-Llama"
    folder.mkdir()
    path = written(folder, json.dumps(config), "config.json")
    assert load_model(path) == load_model(folder)
    assert load_model(folder).name == "tiny-llama"
    assert "line 1 is not JSON" in complaint(load_model, written(tmp_path, "{", "broken.json"))
    del config["vocab_size"]
    assert "vocab_size: missing" in complaint(load_model, written(tmp_path, json.dumps(config), "c.json"))


def test_loading_specs_imports_nothing_heavy():
    code = (
        "import sys; import simmoe.specs.load as l; l.load_model('deepseek-v3');"
        "print([m for m in ('scipy', 'torch', 'simpy', 'matplotlib', 'pint') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_spec_varied_is_checked_again():
    hardware = load_hardware("h100")
    assert isinstance(hardware.vary(nodes=2), Hardware)
    with pytest.raises(ValueError, match="not a multiple"):
        Deployment(gpus=8).vary(gpus=7, tp=2)


def test_a_number_of_tokens_stands_for_fixed_lengths_in_files_and_their_schema(simmoe, tmp_path):
    (tmp_path / "plain.yaml").write_text("concurrency: 8\ninput: 300\noutput: 30\n")
    (tmp_path / "long.yaml").write_text("concurrency: 8\ninput: {mean: 300}\noutput: {kind: fixed, mean: 30}\n")
    assert load_workload(tmp_path / "plain.yaml") == load_workload(tmp_path / "long.yaml")
    jsonschema.validate(yaml.safe_load((tmp_path / "plain.yaml").read_text()), schema_of("workload"))
    _, plain, _ = simmoe("predict", "h100", "--workload", "plain.yaml", "--json")
    _, long, _ = simmoe("predict", "h100", "--workload", "long.yaml", "--json")
    assert plain == long
    scenario = "hardware: h100\nmodel: deepseek-v2-lite\nworkload: {concurrency: 4, input: 64, output: 8}\n"
    (tmp_path / "scenario.yaml").write_text(scenario)
    status, out, _ = simmoe("simulate", "scenario.yaml", "--requests", "20", "--json")
    assert (status, json.loads(out)["workload"]["input"]["mean"]) == (0, 64)


@pytest.mark.parametrize("length", ["0", "-4", "true", "'64'", "[64]", ".nan", ".inf", "null"])
def test_what_is_no_length_is_one_line(simmoe, tmp_path, length):
    (tmp_path / "load.yaml").write_text(f"concurrency: 8\ninput: {length}\noutput: 30\n")
    status, out, err = simmoe("predict", "h100", "--workload", "load.yaml")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("simmoe: load.yaml: input")
