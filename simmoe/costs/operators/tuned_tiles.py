"""Which expert shapes an engine's Triton kernel has tuned tiles for; all others run with its default ones.

vLLM and SGLang ship launch configurations per device, expert count and width, found by a search over tiles. Where none
was shipped, 16-bit experts get tiles of 16 x 32 while a step has no more tokens than the device has experts, and of
64 x 64 beyond (``get_default_config``, the same in vLLM 0.14 and SGLang 0.5), which on Hopper take up to twice as long.
Block-quantised experts are left out: their default tile is as wide as a block, and measures no slower. So is vLLM's
newer kernel (0.24, another name in the tables): its shapes without tuned tiles measure like those with, since 0.17
chose better default ones. For an older vLLM on a device where only the newer kernel was measured, SGLang's stands in
where the shape is not tuned: the same source, with the same default tiles.
Checked in tests/test_tuned_tiles.py and, row by row, by `simmoe calibrate --report profiles`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmoe.specs.base import from_yaml
from simmoe.specs.engines import version_numbers

Array = NDArray[np.float64]

#: Rows of the default tile up to as many tokens as experts, and beyond.
FEW, MANY = 16.0, 64.0
_WIDEST = 1 << 20
_SIXTEEN_BIT = ("bfloat16", "float16")


def list_number(kernel: str | None, dtype: str) -> float:
    """Which list of tuned shapes binds a kernel, as the measured tables name it; 0: none. A feature of `experts`."""
    kernels = list(_shipped())
    return float(kernels.index(kernel) + 1) if kernel in kernels and dtype in _SIXTEEN_BIT else 0.0


def fixed_rows(numbers: Array, device: str, tokens: Array, experts: Array, width: Array) -> Array:
    """Rows of the tile a kernel is bound to, 0 where it may take the quickest. Shapes broadcast. [rows]

    Parameters
    ----------
    numbers : of `list_number`.
    device : name in its hardware file.
    tokens : tokens the kernel is launched for. [tokens]
    experts, width : experts on a device, and their width there. [experts], [elements]
    """
    bound = np.zeros(np.broadcast_shapes(numbers.shape, tokens.shape))
    if not numbers.any():
        return bound
    shape = experts * _WIDEST + width
    for number, shapes in enumerate(_shipped().values(), start=1):
        tuned = np.isin(shape, shapes.get(device, np.empty(0)))
        bound[(numbers == number) & ~tuned] = MANY
    return np.where((bound > 0) & (tokens <= experts), FEW, bound)


def older_kernel(engine: str, version: str | None, dtype: str) -> tuple[float, Mapping[str, str]] | None:
    """List number of an engine's kernel of that version, and the variant that stands in for it where not measured.

    None: the newest kernel, as a version not known counts, or one of a number format without default tiles.
    """
    known = version_numbers(version)
    for kernel, entry in _lists().items():
        before = version_numbers(entry.get("before"))
        if entry.get("engine") == engine and known is not None and before is not None and known < before:
            number = list_number(kernel, dtype)
            return (number, entry["stand_in"]) if number else None
    return None


@lru_cache(maxsize=1)
def _lists() -> Mapping[str, Any]:
    text = resources.files("simmoe.costs.operators").joinpath("tuned_tiles.yaml").read_text(encoding="utf-8")
    lists: Mapping[str, Any] = from_yaml(text)
    return lists


@lru_cache(maxsize=1)
def _shipped() -> Mapping[str, Mapping[str, Array]]:
    """Kernel -> device -> shapes with tuned tiles, each as one number."""
    return {
        kernel: {
            device: np.array([experts * _WIDEST + width for experts, width in pairs], dtype=np.float64)
            for device, pairs in entry["shapes"].items()
        }
        for kernel, entry in _lists().items()
    }
