"""What device this is: name, memory, caches, driver and clock, as the system tells.

Left out: anything a data sheet says; peaks are probed (simmoe.profiling.probes).
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from simmoe.errors import CoverageError

#: Assumed where the system does not tell: a private L2 of a server core, and no shared cache.
ASSUMED_CPU_CACHE_BYTES = 32.0 * 2**20
#: Assumed likewise for a core's own: that of current server cores.
ASSUMED_PRIVATE_CACHE_BYTES = 2.0 * 2**20
#: Shared caches of virtual machines are often reported whole though they belong to a whole socket.
LARGEST_USEFUL_CACHE_BYTES = 256.0 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """One device as the operating system and torch describe it.

    Attributes
    ----------
    slug : str
        Folder name under ``profiles/``.
    memory_bytes : float
        Device memory; for a CPU the machine's. [B]
    cache_bytes : float
        Last-level cache a working set must exceed to be cold. [B]
    private_cache_bytes : float
        Second-level cache of one core of a CPU. [B]
    units : int
        Streaming multiprocessors, or threads torch may use.
    """

    kind: str
    name: str
    slug: str
    memory_bytes: float
    cache_bytes: float
    units: int
    driver: str
    torch_version: str
    private_cache_bytes: float = 0.0

    @property
    def device(self) -> torch.device:
        """The torch device."""
        return torch.device(self.kind)

    def clock_mhz(self) -> float | None:
        """Clock right now, if the system tells. [MHz]"""
        if self.kind == "cuda":
            text = _nvidia_smi("clocks.sm")
            return float(text) if text.isdigit() else None
        found = re.search(r"^cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo"), re.MULTILINE)
        return float(found[1]) if found else None


def describe(kind: str, threads: int | None = None, name: str | None = None) -> DeviceFacts:
    """Look at the device; ``threads`` fixes how many a CPU run uses (default: those the process may use).

    Raises
    ------
    CoverageError
        If torch has no such device here.
    """
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise CoverageError("--device cuda: torch finds no GPU here; use --device cpu, or install a CUDA build")
        properties = torch.cuda.get_device_properties(0)
        return DeviceFacts(
            kind="cuda",
            name=name or properties.name,
            slug=_slug(name or properties.name),
            memory_bytes=float(properties.total_memory),
            cache_bytes=float(getattr(properties, "L2_cache_size", 0) or 64 * 2**20),
            units=int(properties.multi_processor_count),
            driver=_nvidia_smi("driver_version") or f"CUDA {torch.version.cuda}",
            torch_version=torch.__version__,
        )
    if kind != "cpu":
        raise CoverageError(f"--device {kind}: write cuda or cpu")
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    used = torch.get_num_threads()
    model = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    label = name or f"{model[1].strip() if model else platform.machine()} {used}t"
    return DeviceFacts(
        kind="cpu",
        name=label,
        slug=_slug(label),
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        cache_bytes=min(_cpu_cache_bytes(), LARGEST_USEFUL_CACHE_BYTES),
        units=used,
        driver=f"{platform.system()} {platform.release()}",
        torch_version=torch.__version__,
        private_cache_bytes=_cache_sizes().get(2, ASSUMED_PRIVATE_CACHE_BYTES),
    )


def _slug(name: str) -> str:
    plain = re.sub(r"\((r|tm)\)|\b(nvidia|amd|processor|cpu)\b|@", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "_", plain).strip("_") or "device"


def _cpu_cache_bytes() -> float:
    return max(_cache_sizes().values(), default=ASSUMED_CPU_CACHE_BYTES)


def _cache_sizes() -> dict[int, float]:
    """Size of the largest cache of each level, as far as the system tells. [B]"""
    sizes: dict[int, float] = {}
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG])", _read(str(path)).strip())
        level = _read(str(path.with_name("level"))).strip()
        if found and level.isdigit():
            size = float(found[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[found[2]]
            sizes[int(level)] = max(size, sizes.get(int(level), 0.0))
    return sizes


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _nvidia_smi(field: str) -> str:
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", f"--id={index}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
