"""Where a result comes from: version, digests of what went in, calibration, seed. Stamped on every result.

A digest is the first 16 hex digits of the SHA-256 of an input's canonical JSON (sorted keys, shortest round-trip
floats), so two runs on equal specs carry equal digests whatever files the specs came from. Left out: the time of the
run and the machine's name, which would make equal results differ. Checked in tests/test_provenance.py.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import simmoe

DIGEST_DIGITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What produced a result.

    Attributes
    ----------
    simmoe : version of simmoe.
    python : version of Python.
    inputs : digest of each input by name, sorted.
    calibration : digest of the calibration's contents (its neighbour's, of a device without); None: documented default
        efficiencies.
    seed : root seed of the run; None: nothing was drawn.
    """

    simmoe: str
    python: str
    inputs: tuple[tuple[str, str], ...]
    calibration: str | None
    seed: int | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "inputs": dict(self.inputs)}


def stamp(inputs: Mapping[str, Any], *, calibration: Any = None, seed: int | None = None) -> Provenance:
    """Stamp a result with what made it.

    Parameters
    ----------
    inputs : name -> spec (anything with ``model_dump``), dataclass, or JSON-like value.
    calibration : the calibration used, as an object or the path of its file; None if there was none.
    seed : root seed, if random numbers were drawn.
    """
    return Provenance(
        simmoe=simmoe.__version__,
        python=platform.python_version(),
        inputs=tuple(sorted((name, digest(value)) for name, value in inputs.items())),
        calibration=None if calibration is None else digest(calibration),
        seed=seed,
    )


def digest(value: Any) -> str:
    """Digest of an object's canonical JSON, or of a file's bytes if a Path is given."""
    if isinstance(value, Path):
        raw = value.read_bytes()
    else:
        raw = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain).encode()
    return hashlib.sha256(raw).hexdigest()[:DIGEST_DIGITS]


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no canonical JSON form")
