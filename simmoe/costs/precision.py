"""Number formats of a deployment's matrix products: bytes to move, units that multiply, kernels to ask for.

Where a device has no units for a format, engines keep the weights in it and widen them to 16 bits before they multiply
(weight-only kernels: Marlin on NVIDIA since Ampere, Triton's moe_wna16 for integers): weights are read as narrow, but
FLOPs, activations and exchanges are those of 16 bits. What widening takes is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from simmoe.errors import SpecError
from simmoe.specs.deployment import BYTES_PER_ELEMENT, Deployment
from simmoe.specs.hardware import Device
from simmoe.specs.model import Model


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of product: ``dtype`` is the measured kernels' label."""

    dtype: str
    weight_bytes: float
    activation_bytes: float
    compute_bits: float

    @property
    def quantises(self) -> bool:
        """The kernel first quantises a 16-bit input."""
        return self.compute_bits < 16


@dataclass(frozen=True, slots=True)
class Precision:
    """Formats of routed experts, of other weight matrices, and of what always stays wide (router, head)."""

    experts: Format
    dense: Format
    plain: Format


_FORMATS = {
    "float32": Format("float32", 4.0, 4.0, 32.0),
    "bfloat16": Format("bfloat16", 2.0, 2.0, 16.0),
    "float16": Format("bfloat16", 2.0, 2.0, 16.0),
    "fp8": Format("fp8", 1.0, 1.0, 8.0),
    "fp8_block": Format("fp8_block", BYTES_PER_ELEMENT["fp8_block"], 1.0, 8.0),
    "int8": Format("int8", 1.0, 1.0, 8.0),
    "int4": Format("int4", BYTES_PER_ELEMENT["int4"], 2.0, 16.0),
    "int4_g32": Format("int4", BYTES_PER_ELEMENT["int4_g32"], 2.0, 16.0),
    "mxfp4": Format("mxfp4", BYTES_PER_ELEMENT["mxfp4"], 2.0, 16.0),
    "mxfp4_mxfp8": Format("mxfp4_mxfp8", BYTES_PER_ELEMENT["mxfp4_mxfp8"], 1.0 + 1 / 32, 8.0),
    "nvfp4": Format("nvfp4", BYTES_PER_ELEMENT["nvfp4"], BYTES_PER_ELEMENT["nvfp4"], 4.0),
}
#: Formats that checkpoints of MoE models use for expert weights only; the other matrices stay in bf16.
EXPERTS_ONLY = frozenset({"mxfp4", "mxfp4_mxfp8", "int4", "int4_g32"})
#: Ends the label of a format whose weights alone are narrow.
WEIGHT_ONLY = "_weight_only"
#: Formats multiplied by units of their own -> the data sheet's name of these.
_UNITS = {"fp8": "fp8", "fp8_block": "fp8", "int8": "int8", "mxfp4_mxfp8": "fp4", "nvfp4": "fp4"}
#: Engines that narrow the inputs of mxfp4 experts to mxfp8, at the fp8 units' rate, where a device has fp4 units
#: (TensorRT-LLM's deployment guide for gpt-oss: MXFP8 on B200, BF16 on H200). vLLM does where
#: VLLM_USE_FLASHINFER_MOE_MXFP4_MXFP8 is set: ask for mxfp4_mxfp8.
_NARROWS_INPUTS = frozenset({"trtllm"})
#: Architectures on which engines widen no 8- or 4-bit floats: vLLM's kernels for them begin with compute capability
#: 7.5 or 8.0 (Fp8Config.get_min_capability, is_fp4_marlin_supported). Integers have older ones (MoeWNA16Config).
_INTEGERS_ONLY = frozenset({"Volta"})


def precision_of(model: Model, deployment: Deployment) -> Precision:
    """Formats in force: the deployment's, else the checkpoint's."""
    name = deployment.weight_precision or model.native_precision
    experts = _FORMATS[name]
    wide = _FORMATS["float32" if name == "float32" else "bfloat16"]
    dense = wide if name in EXPERTS_ONLY and model.experts is not None else experts
    return Precision(experts=experts, dense=dense, plain=wide)


def on_device(found: Precision, device: Device, engine: str) -> tuple[Precision, str | None]:
    """Formats as the engine has the device multiply them, and in words what is widened; None: nothing is.

    Raises
    ------
    SpecError
        If no engine serves the format on such a device.
    """
    name = found.experts.dtype
    if name == "mxfp4" and engine in _NARROWS_INPUTS and device.peak.fp4 is not None:
        return replace(found, experts=_FORMATS["mxfp4_mxfp8"]), None
    if device.architecture in _INTEGERS_ONLY and name in ("fp8", "fp8_block", "mxfp4", "mxfp4_mxfp8", "nvfp4"):
        raise SpecError(
            f"precision {name}: {device.name} has no units for it, and engines widen such weights on Ampere and later "
            "only; give float16, int8 or int4"
        )
    units = _UNITS.get(name)
    if units is None or getattr(device.peak, units) is not None:
        return found, None
    widened = replace(found.experts, dtype=name + WEIGHT_ONLY, activation_bytes=2.0, compute_bits=16.0)
    note = f"{device.name} has no {units} units: {name} weights are widened to 16 bits before they multiply"
    dense = found.dense if found.dense == found.plain else widened
    return Precision(experts=widened, dense=dense, plain=found.plain), note
