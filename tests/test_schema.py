"""Schemas agree with what the files must be: shipped files pass, slips are caught."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from simmoe.cli import main as cli
from simmoe.errors import SpecError
from simmoe.schema import KINDS, schema_of

ROOT = Path(__file__).parents[1]


def test_every_kind_has_a_schema_with_its_fields():
    for kind, spec in KINDS.items():
        schema = schema_of(kind)
        assert set(schema["properties"]) == set(spec.model_fields)
        assert schema["additionalProperties"] is False


def test_quantities_are_texts_with_units():
    device = schema_of("hardware")["$defs"]["Device"]["properties"]
    assert device["memory_bandwidth"]["type"] == "string"
    assert "gt" not in device["memory_bandwidth"]
    assert device["sms"]["type"] == "integer"


@pytest.mark.parametrize("path", sorted((ROOT / "hardware").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_hardware_has_only_keys_of_the_schema(path):
    schema = schema_of("hardware")
    contents = yaml.safe_load(path.read_text())
    assert set(contents) <= set(schema["properties"])
    assert set(schema["required"]) <= set(contents)
    assert set(contents["device"]) <= set(schema["$defs"]["Device"]["properties"])


def test_shipped_files_pass_a_validator_and_slips_do_not():
    for kind, folder in (("hardware", "hardware"), ("model", "simmoe/specs/presets")):
        for path in (ROOT / folder).glob("*.yaml"):
            jsonschema.validate(yaml.safe_load(path.read_text()), schema_of(kind))
    contents = yaml.safe_load((ROOT / "hardware" / "h100.yaml").read_text())
    contents["device"]["memory"] = 80
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(contents, schema_of("hardware"))


def test_command_prints_a_schema():
    result = CliRunner().invoke(cli.app, ["schema", "grid"])
    assert json.loads(result.stdout)["properties"]["method"]["enum"] == ["analytic", "simulated"]
    with pytest.raises(SpecError, match="give one of hardware"):
        schema_of("hardwear")
