"""JSON Schemas of the YAML files, for editors that check while one types.

Quantities are texts with units ("80 GB", "3.35 TB/s"), as the files must have them; the schema says so. Checks that
need several fields at once (tp divides gpus ...) are made when a file is read, not here.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from simmoe.errors import SpecError
from simmoe.planning.grid import Grid
from simmoe.specs.base import Spec
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model
from simmoe.specs.scenario import Scenario
from simmoe.specs.workload import Workload

#: Kind of file -> what it holds.
KINDS: dict[str, type[Spec]] = {
    "hardware": Hardware,
    "model": Model,
    "deployment": Deployment,
    "workload": Workload,
    "scenario": Scenario,
    "grid": Grid,
}


class _Quantities(GenerateJsonSchema):
    """Floats read with a unit are texts in a file."""

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        inner = super().function_before_schema(schema)
        if inner.get("type") != "number":
            return inner
        return {"type": "string", "examples": ["80 GB", "3.35 TB/s", "5 us", "2 USD/hour"], "pattern": r"\d.*[A-Za-z%]"}


def schema_of(kind: str) -> dict[str, Any]:
    """JSON Schema (2020-12) of a kind of file.

    Raises
    ------
    SpecError
        If the kind is not known.
    """
    if kind not in KINDS:
        raise SpecError(f"schema {kind!r}: give one of {', '.join(KINDS)}")
    schema = TypeAdapter(KINDS[kind]).json_schema(schema_generator=_Quantities)
    _drop_bounds_of_texts(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _drop_bounds_of_texts(node: Any) -> None:
    """Numeric bounds mean nothing on a text."""
    if isinstance(node, dict):
        if node.get("type") == "string":
            for bound in ("ge", "gt", "le", "lt", "minimum", "exclusiveMinimum"):
                node.pop(bound, None)
        for child in node.values():
            _drop_bounds_of_texts(child)
    elif isinstance(node, list):
        for child in node:
            _drop_bounds_of_texts(child)
