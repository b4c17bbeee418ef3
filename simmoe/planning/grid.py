"""A grid of specs: which combinations a sweep asks for, and whether each value can be what it is given for.

A grid names models and hardware and gives fields of deployment and workload, each a value, a list, or a range
``{from: 1, to: 16, steps: 5, scale: log}``; every combination is a point. A value that is wrong by itself (a misspelt
key, a text for a number) is refused before anything runs; values that only do not go together are the sweep's to tell.
Left out: fields that vary together. Checked in: tests/test_sweep.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import Field, ValidationError

import simmoe
from simmoe.errors import SpecError
from simmoe.provenance import digest
from simmoe.specs import load, problems
from simmoe.specs.base import Spec
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model
from simmoe.specs.workload import Workload

AnySpec = TypeVar("AnySpec", bound=Spec)

_SECTIONS: dict[str, type[Spec]] = {"deployment": Deployment, "workload": Workload}
#: More combinations than anybody waits for are mostly a slip in a range.
_MOST_POINTS = 1_000_000


class Grid(Spec):
    """What a grid file holds. Lists and ranges stand wherever a value may."""

    name: str = "sweep"
    model: Any = Field(description="Preset, file, or a list of them.")
    hardware: Any = Field(description="Shipped name, file, or a list of them.")
    deployment: dict[str, Any] = Field(default={}, description="Fields of a deployment; gpus defaults to one replica.")
    workload: dict[str, Any] = Field(description="Fields of a workload.")
    method: Literal["analytic", "simulated"] = "analytic"
    requests: int = Field(default=2000, ge=10, description="Simulated: requests measured at each point.")
    seed: int = Field(default=0, ge=0, description="Simulated: root seed, the same traffic for every deployment.")
    price: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="USD per device-hour by hardware; else its file's middle."
    )


@dataclass(frozen=True, slots=True)
class Point:
    """One combination: plain values, so that it travels to any process."""

    fields: tuple[tuple[str, Any], ...]
    method: str
    requests: int
    seed: int
    price: tuple[tuple[str, float], ...]
    inputs: tuple[str, ...]
    """Digests of what the names of hardware and model stand for, and of its calibration."""

    @property
    def key(self) -> str:
        """Digest of everything the result depends on."""
        asked = [list(map(list, self.fields)), self.method, self.requests, self.seed, sorted(self.price)]
        return digest([*asked, list(self.inputs), simmoe.__version__])

    @property
    def cells(self) -> dict[str, Any]:
        """Its fields as they stand in a table."""
        return {
            name: value if isinstance(value, (str, int, float, type(None))) else str(value)
            for name, value in self.fields
        }


def load_grid(path: Path) -> Grid:
    """Read a grid file, every value of it looked at; SpecError says what is wrong with it: file, key, what is right."""
    try:
        grid = Grid.model_validate(load.read_mapping(path))
        points(grid)
    except ValidationError as problem:
        raise SpecError(f"{path}: {problems.describe(problem, Grid)}") from None
    except SpecError as problem:
        text = str(problem)
        raise SpecError(text if text.startswith(f"{path}: ") else f"{path}: {text}") from None
    return grid


def points(grid: Grid) -> list[Point]:
    """Every combination, the last field varying fastest.

    Raises
    ------
    SpecError
        Naming the key: if it is not known, a list is empty, a range is not one, or a value is wrong whatever the others
        are.
    """
    axes = [(name, _values(name, getattr(grid, name))) for name in ("model", "hardware")]
    shapes = {name: _named("model", name, _model) for name in axes[0][1]}
    clusters = {name: _named("hardware", name, _hardware) for name in axes[1][1]}
    for name in grid.price:
        if name not in clusters:
            raise SpecError(f"price.{name}: not among the grid's hardware: {', '.join(clusters)}")
    for section, kind in _SECTIONS.items():
        axes += [(f"{section}.{name}", values) for name, values in _fields(section, kind, getattr(grid, section))]
    combinations = math.prod(len(values) for _, values in axes)
    if combinations > _MOST_POINTS:
        raise SpecError(f"{combinations:,} points are more than {_MOST_POINTS:,}; give fewer values")
    price = tuple(sorted(grid.price.items()))
    names = [name for name, _ in axes]
    inputs = {
        (model, hardware): (digest(shapes[model]), *_made_from(hardware)) for model in shapes for hardware in clusters
    }
    return [
        Point(
            tuple(zip(names, combination, strict=True)), grid.method, grid.requests, grid.seed, price,
            inputs[combination[0], combination[1]],
        )
        for combination in itertools.product(*(values for _, values in axes))
    ]  # fmt: skip


def specs_of(point: Point) -> tuple[Hardware, Model, Deployment, Workload]:
    """What a point describes; SpecError if its fields do not go together."""
    fields = dict(point.fields)
    layout, traffic = (
        {name.partition(".")[2]: value for name, value in fields.items() if name.startswith(f"{section}.")}
        for section in _SECTIONS
    )
    if "gpus" not in layout:
        layout["gpus"] = math.prod(int(layout.get(name) or 1) for name in ("tp", "dp", "pp"))
    return (
        _hardware(fields["hardware"]),
        _model(fields["model"]),
        _valid(Deployment, layout, "deployment"),
        _valid(Workload, traffic, "workload"),
    )


def _values(name: str, value: Any) -> list[Any]:
    if isinstance(value, Mapping) and "from" in value:
        return _range(name, value)
    if isinstance(value, (list, tuple)):
        if not value:
            raise SpecError(f"{name}: the list is empty; give at least one value")
        twice = next((one for number, one in enumerate(value) if one in value[:number]), None)
        if twice is not None:
            raise SpecError(f"{name}: {twice!r} is given twice")
        return list(value)
    return [value]


def _range(name: str, value: Mapping[str, Any]) -> list[Any]:
    wrong = SpecError(f"{name}: {dict(value)} is not a range; write {{from: 1, to: 16, steps: 5, scale: log}}")
    scale = value.get("scale", "linear")
    if set(value) - {"from", "to", "steps", "scale"} or scale not in ("linear", "log"):
        raise wrong
    try:
        low, high, steps = float(value["from"]), float(value["to"]), float(value["steps"])
    except (KeyError, TypeError, ValueError):
        raise wrong from None
    ends = (low, high, steps)
    if (
        not all(map(math.isfinite, ends))
        or steps % 1
        or steps > _MOST_POINTS
        or (scale == "log" and min(ends[:2]) <= 0)
    ):
        raise wrong
    if steps < 1:
        raise SpecError(f"{name}.steps: {value['steps']} values are none; give 1 or more")
    spaced = np.geomspace(low, high, int(steps)) if scale == "log" else np.linspace(low, high, int(steps))
    numbers = [float(f"{number:.6g}") for number in spaced]
    return list(dict.fromkeys(int(number) if number == int(number) else number for number in numbers))


def _fields(section: str, kind: type[Spec], given: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """The axes of a section, each value looked at by itself."""
    for name, value in given.items():
        if name not in kind.model_fields:
            raise SpecError(f"{section}.{name}: unknown key; {problems.suggest(name, kind)}")
        values = _values(f"{section}.{name}", value)
        for one in values:
            try:
                kind.model_validate({name: one})
            except ValidationError as problem:
                if (wrong := problems.describe_under(problem, kind, name)) is not None:
                    raise SpecError(f"{section}.{wrong}") from None
        yield name, values
    for name, field in kind.model_fields.items():
        if field.is_required() and name not in given:
            raise SpecError(f"{section}.{name}: missing; e.g. {name}: 1024")


def _named(key: str, name: Any, read: Callable[[str], AnySpec]) -> AnySpec:
    if not isinstance(name, str):
        raise SpecError(f"{key}: {name!r} will not do: give a shipped name or a file")
    try:
        return read(name)
    except SpecError as problem:
        text = str(problem)
        raise SpecError(text if text.startswith(f"{key} ") else f"{key}: {text}") from None


@lru_cache(maxsize=64)
def _hardware(name: str) -> Hardware:
    return load.load_hardware(name)


@lru_cache(maxsize=64)
def _model(name: str) -> Model:
    return load.load_model(name)


@lru_cache(maxsize=64)
def _made_from(hardware: str) -> tuple[str, ...]:
    described = _hardware(hardware)
    fits = load.calibration_of(described)
    # where the calibration lies is not part of what it says
    return (digest(described.vary(calibration=None)), digest(fits) if fits is not None and fits.is_file() else "")


def _valid(kind: type[AnySpec], values: Mapping[str, Any], section: str) -> AnySpec:
    try:
        return kind.model_validate(values)
    except ValidationError as problem:
        raise SpecError(f"{section}: {problems.describe(problem, kind)}") from None
