"""Which expert shapes an engine's Triton kernel has tuned tiles for; all others run with its default ones.

vLLM and SGLang ship launch configurations per device, expert count and width, found by a search over tiles. Where none
was shipped, 16-bit experts get tiles of 16 x 32 while a step has no more tokens than the device has experts, and of
64 x 64 beyond (``get_default_config``, the same in vLLM 0.14 and SGLang 0.5), which on Hopper take up to twice as long.
Block-quantised experts are left out: their default tile is as wide as a block, and measures no slower. So is vLLM's
newer kernel (0.24, another name in the tables): its shapes without tuned tiles measure like those with.
Checked in tests/test_tuned_tiles.py and, row by row, by `simmoe calibrate --report profiles`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import resources

import numpy as np
import yaml
from numpy.typing import NDArray

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


@lru_cache(maxsize=1)
def _shipped() -> Mapping[str, Mapping[str, Array]]:
    """Kernel -> device -> shapes with tuned tiles, each as one number."""
    text = resources.files("simmoe.costs.operators").joinpath("tuned_tiles.yaml").read_text(encoding="utf-8")
    return {
        kernel: {
            device: np.array([experts * _WIDEST + width for experts, width in pairs], dtype=np.float64)
            for device, pairs in entry["shapes"].items()
        }
        for kernel, entry in yaml.safe_load(text).items()
    }
