"""How a model is laid out on devices and which engine drives it.

``gpus`` devices make ``gpus / (tp * pp)`` replicas under plain tensor parallelism. With ``dp > 1``
attention runs data-parallel and ranks step together; experts spread over all ``ep`` ranks (the
wide-EP layout) or, with ``ep`` 1, are sliced over all ``tp x dp`` devices.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from pydantic import Field, model_validator

from simmoe.specs.base import Seconds, Spec
from simmoe.specs.mechanisms import Dispatch, Exchange, KvOffload, Offload
from simmoe.specs.routing import Routing
from simmoe.specs.speculative import Speculative

Precision = Literal[
    "float32", "bfloat16", "float16", "fp8", "fp8_block", "int8", "int4", "int4_g32", "mxfp4", "mxfp4_mxfp8", "nvfp4"
]  # fmt: skip
EngineName = Literal["vllm", "sglang", "trtllm", "generic"]

#: bytes per weight element, block scales included (fp8_block: one fp32 per 128x128; int4: 16 bits per 128, as AWQ and
#: GPTQ do by default, int4_g32: per 32; mxfp4: 8 bits per 32, whether or not activations are narrowed to mxfp8)
BYTES_PER_ELEMENT: dict[str, float] = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0 + 4.0 / (128 * 128),
    "int8": 1.0,
    "int4": 0.5 + 2.0 / 128,
    "int4_g32": 0.5 + 2.0 / 32,
    "mxfp4": 4.25 / 8,
    "mxfp4_mxfp8": 4.25 / 8,
    "nvfp4": 4.5 / 8,
}


class EngineOverrides(Spec):
    """Engine parameters known for this deployment, in place of its engine's; see `simmoe.specs.engines`."""

    host_time_per_sequence: Seconds | None = None
    front_end_time: Seconds | None = None
    front_end_time_per_request: Seconds | None = None
    front_end_time_per_token: Seconds | None = None
    nucleus_time: Seconds | None = None
    offload_entry_time: Seconds | None = None
    shared_beside_tokens: int | None = Field(default=None, ge=0, description="Most tokens of a second stream's step.")
    steps_ahead: int | None = Field(default=None, ge=0, le=1, description="0: no asynchronous scheduling.")
    pads_to_graphs: bool | None = None


class Deployment(Spec):
    """Layout, precision, the cap on active experts, and the engine's limits."""

    gpus: int = Field(default=1, ge=1, le=65536, description="Devices in total, over all replicas.")
    tp: int | None = Field(default=None, ge=1, description="Tensor-parallel size of attention and dense parts.")
    ep: int = Field(default=1, ge=1, description="Expert-parallel size; 1: experts are sliced by tp x dp.")
    expert_slices: int = Field(default=1, ge=1, description="Devices that share each expert's width, ep above 1.")
    dp: int = Field(default=1, ge=1, description="Data-parallel attention ranks in one engine (they step together).")
    pp: int = Field(default=1, ge=1, description="Pipeline stages.")
    pipeline: Literal["continuous", "drained"] = Field(
        default="continuous", description="Whether steps follow each other through the stages, or each empties them."
    )
    weight_precision: Precision | None = Field(default=None, description="None: the model's native precision.")
    activation_precision: Precision | None = None
    wide_attention: bool = Field(default=False, description="Attention weights stay in 16 bit (not quantised).")
    kv_precision: Precision = "bfloat16"
    active_experts: int | None = Field(default=None, ge=1, description="Cap on routed experts per token; None: native.")
    total_experts: int | None = Field(default=None, ge=1, description="Size of a pruned expert pool; None: all.")
    routing: Routing = Field(default=Routing(), description="Who gets the tokens, and where experts lie.")
    exchange: Exchange = Field(default=Exchange(), description="How tokens travel between expert-parallel ranks.")
    dispatch: Dispatch = Field(default=Dispatch(), description="Padding, drops and launches of the expert products.")
    offload: Offload | None = Field(default=None, description="Experts in host memory; None: all on the device.")
    kv_offload: KvOffload | None = Field(default=None, description="KV blocks in host memory; None: device only.")
    speculative: Speculative | None = Field(default=None, description="Drafted tokens; None: one token a step.")
    max_num_seqs: int = Field(default=256, ge=1, description="Requests running together on one data-parallel rank.")
    max_num_batched_tokens: int = Field(default=8192, ge=1, description="Tokens in one batch of one dp rank.")
    memory_fraction: float = Field(default=0.9, gt=0, le=1, description="Share of device memory the engine may use.")
    kv_block_size: int = Field(default=16, ge=1, description="Tokens per KV block.")
    kv_blocks: int | None = Field(
        default=None, ge=1, description="KV blocks of one dp rank, as its server logs; None: what memory leaves."
    )
    prefix_caching: bool = Field(default=True, description="Prompts that share a head share its KV blocks.")
    nucleus_sampling: bool = Field(default=False, description="Tokens are drawn with top-p or top-k.")
    engine: EngineName = "vllm"
    engine_version: str | None = Field(default=None, min_length=1, max_length=60)
    host_time_per_step: Seconds | None = Field(default=None, description="Host time a step adds. [s] None: default.")
    engine_overrides: EngineOverrides | None = None
    kernel_slowdown: float = Field(default=1.0, gt=0, description="Factor on every kernel's time (old engines).")

    @model_validator(mode="after")
    def _consistent(self) -> Deployment:
        if self.gpus % self.devices_per_replica:
            raise ValueError(
                f"gpus {self.gpus} is not a multiple of tp {self.tp_size} x dp {self.dp} x pp {self.pp} = "
                f"{self.devices_per_replica}"
            )
        if self.expert_slices > 1 and self.ep == 1:
            raise ValueError("expert_slices needs ep above 1; with ep 1 experts are sliced by tp x dp")
        if self.ep > 1 and self.ep * self.expert_slices != self.tp_size * self.dp:
            sliced = f", or that over expert_slices {self.expert_slices}" if self.expert_slices > 1 else ""
            raise ValueError(f"ep {self.ep} must be 1 or tp x dp = {self.tp_size * self.dp}{sliced}")
        if self.speculative is not None and self.pp > 1:
            raise ValueError("speculative decoding over pipeline stages (pp above 1) is not modelled; leave one out")
        return self

    @property
    def tp_size(self) -> int:
        """Tensor-parallel size; when not given, all devices of a replica."""
        return self.tp if self.tp is not None else max(1, self.gpus // (self.dp * self.pp))

    @property
    def devices_per_replica(self) -> int:
        """Devices that work on one engine's step."""
        return self.tp_size * self.dp * self.pp

    @property
    def exchanges_tokens(self) -> bool:
        """Whether data-parallel ranks share experts (of a model with any), so that tokens travel."""
        return self.dp > 1

    @property
    def expert_shards(self) -> int:
        """Devices that share each expert's width: without expert parallelism all, over data-parallel ranks too.

        So do vLLM ("the expert layers form a tensor parallel group of size DP x TP", docs: data parallel deployment)
        and SGLang and TensorRT-LLM under attention DP, whose tensor-parallel group is cut for attention alone.
        """
        return self.expert_slices if self.ep > 1 else self.tp_size * self.dp

    @property
    def shared_whole(self) -> bool:
        """Whether a shared expert is whole on every device: tokens reach it as they lie, spread over all of them."""
        return self.exchanges_tokens and self.ep > 1

    @property
    def rows_per_decode(self) -> int:
        """Tokens a decoding request brings to a step: one, and the drafts it verifies."""
        return 1 + (self.speculative.draft_tokens if self.speculative else 0)

    @property
    def tokens_per_decode(self) -> Fraction:
        """Mean tokens a decode step emits for a request. [tokens]"""
        return self.speculative.tokens_per_step if self.speculative else Fraction(1)

    @property
    def requests_per_replica(self) -> int:
        """Requests that may run together in one engine, over its data-parallel ranks."""
        return self.max_num_seqs * self.dp

    @property
    def tokens_per_replica(self) -> int:
        """Tokens one engine may compute in a step, over its data-parallel ranks."""
        return self.rank_tokens * self.dp

    @property
    def rank_tokens(self) -> int:
        """Tokens one data-parallel rank may compute in a step: a batch for every pipeline stage, if they overlap."""
        return self.max_num_batched_tokens * (self.pp if self.pipeline == "continuous" else 1)

    @property
    def replicas(self) -> int:
        """Independent engines behind the router."""
        return self.gpus // self.devices_per_replica
