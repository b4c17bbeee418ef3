"""Specifications from files: YAML (ours) or a Hugging Face config.json, or the name of a shipped one.

A name is matched without regard to case, hyphens and underscores, and may carry an organisation
("deepseek-ai/DeepSeek-V3"). Whatever is wrong with a file becomes one SpecError line: file, key, what is wrong,
what would be right. Left out: writing files, and merging several into one. Checked in tests/test_specs.py.
"""

from __future__ import annotations

import difflib
import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from simmoe.errors import SpecError
from simmoe.specs import aliases, problems, traces
from simmoe.specs.base import SafeLoader, Spec
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Hardware
from simmoe.specs.hf_config import model_from_hf
from simmoe.specs.model import Model
from simmoe.specs.workload import TraceReplay, Workload

AnySpec = TypeVar("AnySpec", bound=Spec)

_SHOWN = 10  # files named in a message

_PACKAGE = Path(__file__).resolve().parents[1]
_PRESETS = _PACKAGE / "specs" / "presets"


def load_hardware(ref: str | Path) -> Hardware:
    """Read a cluster: a path to a YAML file, or a shipped name ("h100", "H200-SXM").

    The calibration a file names is looked for beside the file first (`calibration_beside`).

    Raises
    ------
    SpecError
        If there is no such file or name, or the file does not describe a cluster.
    """
    path = _find(ref, hardware_names(), aliases.HARDWARE, "hardware")
    hardware = _read(Hardware, path)
    beside = calibration_beside(path, hardware)
    return hardware.vary(calibration=str(beside)) if beside else hardware


def load_model(ref: str | Path) -> Model:
    """Read a model: a path to a YAML file, to a Hugging Face config.json or its folder, or a shipped name.

    Raises
    ------
    SpecError
        If there is no such file or name, or its contents do not describe a model simmoe knows.
    """
    path = _find(ref, model_names(), aliases.MODEL, "model")
    if path.suffix != ".json":
        return _read(Model, path)
    config = read_mapping(path)
    try:
        return model_from_hf(config, _hf_name(config, path))
    except ValidationError as problem:
        raise SpecError(f"{path}: {problems.describe(problem, Model)}") from None
    except SpecError as problem:
        raise SpecError(f"{path}: {problem}") from None


def load_deployment(path: str | Path) -> Deployment:
    """Read a deployment from a YAML file; SpecError says what is wrong with it."""
    return _read(Deployment, _existing(path, "deployment"))


def load_workload(path: str | Path) -> Workload:
    """Read a workload from a YAML file; SpecError says what is wrong with it.

    A ``trace`` may stand in for input, output and rate; lengths may come from a ``file`` of one token count per line.
    """
    found = _existing(path, "workload")
    return workload_from(read_mapping(found), found)


def workload_from(contents: dict[str, Any], path: Path) -> Workload:
    """A workload from the keys of a file; paths in it are relative to the file's folder."""
    values = dict(contents)
    try:
        for name in ("input", "output"):
            if isinstance(lengths := values.get(name), dict) and "file" in lengths:
                others = {key: value for key, value in lengths.items() if key != "file"}
                values[name] = {"kind": "empirical", **others, "values": _counts(path.parent / str(lengths["file"]))}
        trace = values.get("trace")
        if trace is not None and not isinstance(trace, str) and not (isinstance(trace, dict) and "path" in trace):
            raise SpecError(f"{path}: trace: {trace!r} will not do: give a file, or a mapping with its path")
        if isinstance(trace, str):
            values["trace"] = trace = {"path": trace}
        if isinstance(trace, dict) and "path" in trace:
            values["trace"] = {**trace, "path": str(path.parent / str(trace["path"]))}
            if "input" not in values or "output" not in values:
                replay = TraceReplay.model_validate(values["trace"], context={"from_file": True})
                values = {**traces.fields_of(replay, values), **values}
        return Workload.model_validate(values, context={"from_file": True})
    except ValidationError as problem:
        raise SpecError(f"{path}: {problems.describe(problem, Workload)}") from None


def _counts(path: Path) -> list[int]:
    try:
        return [int(line) for line in path.read_text(encoding="utf-8").split()]
    except OSError as problem:
        raise SpecError(f"{path}: no list of token counts can be read there ({problem.strerror})") from None
    except ValueError as problem:
        raise SpecError(f"{path}: not a list of token counts, one per line: {problem}") from None


def hardware_names() -> dict[str, Path]:
    """Shipped hardware files by name."""
    return _yaml_files(data_folder("hardware"))


def model_names() -> dict[str, Path]:
    """Shipped model presets by name."""
    return _yaml_files(_PRESETS)


def profile_names() -> dict[str, Path]:
    """Shipped calibrations by device."""
    return {path.parent.name: path for path in sorted(data_folder("profiles").glob("*/calibration.yaml"))}


def calibration_of(hardware: Hardware) -> Path | None:
    """Calibration file of a device, or of the one whose efficiencies stand in; None: documented defaults answer."""
    name = hardware.calibration or hardware.nearest_calibration
    return calibration_path(name) if name else None


def calibration_path(name: str) -> Path:
    """Where the calibration of a device lies, whether or not it is there: ``profiles/<name>/calibration.yaml``.

    A path instead of a name (`load_hardware` makes one of a calibration beside a hardware file) is taken as it is.
    """
    return data_folder("profiles") / name / "calibration.yaml"


def calibration_beside(path: Path, hardware: Hardware) -> Path | None:
    """Folder of the calibration that a user's hardware file names, if it lies by the file; None: among the shipped.

    ``<name>/`` under the file's folder, or that folder itself when it is called ``<name>``, as `simmoe profile` and
    `simmoe calibrate` write them.
    """
    if hardware.calibration is None or path.parent == data_folder("hardware"):
        return None
    named = path.parent / hardware.calibration
    own = path.resolve().parent
    places = [named, own] if own.name == hardware.calibration else [named]
    return next((place.resolve() for place in places if (place / "calibration.yaml").is_file()), None)


def data_folder(name: str) -> Path:
    """Folder of shipped data: inside an installed package, or beside it in a checkout."""
    installed = _PACKAGE / "_data" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


@cache
def _yaml_files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _key(name: str) -> str:
    return name.lower().translate({ord(letter): None for letter in "-_ /"})


def _find(ref: str | Path, shipped: dict[str, Path], other_names: dict[str, str], kind: str) -> Path:
    path = Path(ref)
    if path.suffix in {".yaml", ".yml", ".json"}:
        if path.is_file():
            return path
        known = _close(path.stem, [*shipped, *other_names], 0.8)
        hint = f"did you mean the shipped {known!r}?" if known else f"shipped: {', '.join(shipped)}"
        raise SpecError(f"{ref}: no such file; {hint}")
    names = {_key(name): found for name, found in shipped.items()}
    names.update({_key(name): shipped[target] for name, target in other_names.items() if target in shipped})
    for name in (str(ref), path.name):  # with and without the organisation
        if (found := names.get(_key(name))) is not None:
            return found
    if (path / "config.json").is_file():
        return path / "config.json"
    if path.is_file():
        return path
    known = _close(path.name, [*shipped, *other_names], 0.6)
    hint = f"did you mean {known!r}? " if known else ""
    raise SpecError(f"{kind} {str(ref)!r} is not known; {hint}shipped: {', '.join(shipped)}; or give a file's path")


def _close(name: str, known: list[str], cutoff: float) -> str | None:
    by_key = {_key(candidate): candidate for candidate in reversed(known)}
    matches = difflib.get_close_matches(_key(name), list(by_key), n=1, cutoff=cutoff)
    return by_key[matches[0]] if matches else None


def _existing(path: str | Path, kind: str) -> Path:
    path = Path(path)
    if path.is_file():
        return path
    beside = sorted(file.name for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    more = ["..."] if len(beside) > _SHOWN else []
    listing = f"; {path.parent} holds {', '.join([*beside[:_SHOWN], *more])}" if beside else ""
    raise SpecError(f"{path}: no such {kind} file{listing}")


def _read(kind: type[AnySpec], path: Path) -> AnySpec:
    try:
        return kind.model_validate(read_mapping(path), context={"from_file": True})
    except ValidationError as problem:
        raise SpecError(f"{path}: {problems.describe(problem, kind)}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping a YAML or JSON file holds; SpecError says what keeps it from being one."""
    try:
        text = path.read_text(encoding="utf-8")
        # safe: the loader is a subclass of PyYAML's safe one
        contents = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_UniqueKeys)  # noqa: S506
    except json.JSONDecodeError as problem:
        raise SpecError(f"{path}: line {problem.lineno} is not JSON: {problem.msg}") from None
    except yaml.MarkedYAMLError as problem:
        line = f"line {problem.problem_mark.line + 1} " if problem.problem_mark else ""
        raise SpecError(f"{path}: {line}is not YAML: {problem.problem}") from None
    except OSError as problem:
        raise SpecError(f"{path}: cannot be read: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        raise SpecError(
            f"{path}: is not UTF-8 text: byte {problem.start} is 0x{problem.object[problem.start]:02x}"
        ) from None
    except yaml.YAMLError as problem:
        raise SpecError(f"{path}: cannot be read: {problem}".replace("\n", " ")) from None
    except RecursionError:
        raise SpecError(f"{path}: is nested too deeply") from None
    except ValueError as problem:  # of a YAML date that is none
        raise SpecError(f"{path}: cannot be read: {problem}") from None
    if not isinstance(contents, dict):
        held = "is empty" if contents is None else f"holds a {type(contents).__name__}"
        raise SpecError(f"{path}: {held}, not a mapping of keys to values")
    return contents


def _hf_name(config: dict[str, Any], path: Path) -> str:
    stated = str(config.get("_name_or_path") or "").rstrip("/")
    return (Path(stated).name or (path.resolve().parent.name if path.name == "config.json" else path.stem)).lower()


class _UniqueKeys(SafeLoader):  # type: ignore[misc]
    """PyYAML keeps the last of two equal keys in silence; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no plain text", key_node.start_mark)
            if key_node.value in seen and key_node.tag == "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return dict(super().construct_mapping(node, deep=deep))
