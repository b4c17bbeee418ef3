"""A cluster as its data sheets give it: device peaks, links, node. No derating is hidden here.

What kernels reach of these peaks is fitted to measurements and lives in a calibration
(`simmoe.costs.calibration`), never in a hardware file.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from simmoe.specs.base import Bytes, BytesPerSecond, FlopPerSecond, Seconds, Spec, UsdPerHour, Watts

DType = Literal["float32", "float16", "bfloat16", "fp8", "int8", "fp4"]


class Peaks(Spec):
    """Dense matrix peaks per number format; None where the device has no unit for it. [FLOP/s]"""

    bfloat16: FlopPerSecond
    fp8: FlopPerSecond | None = None
    int8: FlopPerSecond | None = None
    fp4: FlopPerSecond | None = None
    float32: FlopPerSecond | None = None


class Device(Spec):
    """One accelerator: peaks from its data sheet, not what kernels reach."""

    name: str
    vendor: str = ""
    architecture: str = ""
    memory: Bytes = Field(description="Device memory. [B]")
    memory_bandwidth: BytesPerSecond = Field(description="Peak memory bandwidth. [B/s]")
    peak: Peaks
    l2_cache: Bytes = 0.0
    sms: int = Field(default=0, ge=0, description="Streaming multiprocessors, compute units or cores.")
    tdp: Watts | None = None
    source: str = Field(description="Document the numbers come from, and how sure they are.")

    def flop_per_s(self, dtype: str) -> float:
        """Dense peak for a dtype; formats without a unit of their own run at the next wider peak. [FLOP/s]"""
        wider = {
            "fp4": ("fp4", "fp8", "bfloat16"),
            "mxfp4": ("fp4", "fp8", "bfloat16"),
            "nvfp4": ("fp4", "fp8", "bfloat16"),
            "int4": ("bfloat16",),
            "int4_g32": ("bfloat16",),
            "fp8": ("fp8", "bfloat16"),
            "fp8_block": ("fp8", "bfloat16"),
            "int8": ("int8", "bfloat16"),
            "float32": ("float32", "bfloat16"),
        }.get(dtype, ("bfloat16",))
        for name in wider:
            value = getattr(self.peak, name)
            if value is not None:
                return float(value)
        return float(self.peak.bfloat16)


class Link(Spec):
    """One class of connection, seen from one device. Bandwidth is per direction."""

    bandwidth: BytesPerSecond
    latency: Seconds = 5e-6


class PriceRange(Spec):
    """Rental price of one device-hour. Prices move; treat as input. [USD/h]"""

    low: UsdPerHour
    high: UsdPerHour
    source: str

    @model_validator(mode="after")
    def _ordered(self) -> PriceRange:
        if self.low > self.high:
            raise ValueError(f"low {self.low} must not exceed high {self.high}")
        return self


class Fabric(Spec):
    """What joins nodes, where it is less than a link of full rate between any two."""

    oversubscription: float = Field(default=1.0, ge=1, description="Fat tree: rate of leaves over core. [-]")
    path_collisions: float = Field(
        default=1.0, ge=1, description="Slow-down where many flows hash onto the same paths; 1: rails or adaptive. [-]"
    )
    torus: tuple[int, ...] = Field(default=(), description="Sides of a torus that is one scale-up domain; (): none.")
    source: str = ""


class Hardware(Spec):
    """A cluster: a device, how many share a node, and the links within and between nodes."""

    name: str
    device: Device
    devices_per_node: int = Field(default=8, ge=1)
    nodes: int = Field(default=1, ge=1)
    scale_up: Link = Field(description="Within a node (NVLink, xGMI, PCIe) or scale-up domain.")
    scale_out: Link | None = Field(default=None, description="Between nodes, per device; None: no network.")
    host_link: Link | None = Field(default=None, description="Device to host (PCIe).")
    fabric: Fabric | None = Field(
        default=None,
        description="Topology of the network; {}: rails of full rate. None: not known; the same, but DeepEP's kernels "
        "lose over many nodes what they lost where they were measured.",
    )
    price_per_device_hour: PriceRange | None = None
    calibration: str | None = Field(default=None, description="Folder under profiles/ with a calibration.yaml.")
    nearest_calibration: str | None = Field(
        default=None, description="Calibration whose efficiencies stand in when the device has none of its own."
    )
