"""A transformer by its shapes, with or without an encoder. Counts of parameters follow exactly from these.

Letters of the field: hidden = residual width, q heads / kv heads, head_dim per head. MLA keeps one
latent of ``kv_lora_rank + qk_rope_head_dim`` numbers per token and layer instead of keys and values.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from simmoe.specs.base import Spec


class Attention(Spec):
    """Attention of every layer: grouped-query (MHA is kv_heads == heads) or multi-head latent."""

    kind: Literal["gqa", "mla"]
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1, description="Per-head query/key width; for MLA qk_nope + qk_rope.")
    v_head_dim: int = Field(ge=1)
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int = 0
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = Field(default=False, description="Queries and keys are normalised, each head by one scale.")
    qk_norm_whole: bool = Field(default=False, description="... by a scale for each element of all heads instead.")
    sliding_window: int | None = Field(default=None, ge=1, description="Window of the windowed layers. [tokens]")
    windowed_layers: int = Field(default=0, ge=0, description="How many layers use the sliding window.")

    @model_validator(mode="after")
    def _consistent(self) -> Attention:
        if self.kind == "mla" and not self.kv_lora_rank:
            raise ValueError("mla needs kv_lora_rank")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        return self

    @property
    def qk_nope_head_dim(self) -> int:
        """Non-rotary part of a head's query and key. [elements]"""
        return self.head_dim - self.qk_rope_head_dim

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers cached per token in one layer. [elements]"""
        if self.kind == "mla":
            return int(self.kv_lora_rank or 0) + self.qk_rope_head_dim
        return self.kv_heads * (self.head_dim + self.v_head_dim)


class Experts(Spec):
    """The routed and shared experts of one MoE layer."""

    num_experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    inter_size: int = Field(ge=1, description="Hidden width of one routed expert.")
    matrices: Literal[2, 3] = Field(default=3, description="3: gated (gate, up, down); 2: plain MLP.")
    num_shared: int = Field(default=0, ge=0)
    shared_inter_size: int = Field(default=0, ge=0, description="Total width of the shared experts together.")
    shared_gate: bool = Field(default=False, description="A sigmoid gate (hidden x 1) scales the shared expert.")
    bias: bool = Field(default=False, description="Biases on the expert matrices (gpt-oss).")
    router_bias: bool = False
    score: str = "softmax"
    renormalise: bool = Field(default=False, description="Weights of the chosen experts are rescaled to sum to 1.")
    num_groups: int = Field(default=1, ge=1)
    top_groups: int = Field(default=1, ge=1, description="Groups a token may choose from (group-limited top-k).")
    routed_scaling: float = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> Experts:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}")
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_groups {self.num_groups} must divide num_experts {self.num_experts}")
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups {self.top_groups} exceeds num_groups {self.num_groups}")
        return self


class Published(Spec):
    """What the model card states, to hold our own counts against."""

    total_params: float | None = None
    active_params: float | None = None
    active_excludes_embedding: bool = False
    note: str = ""


class Encoder(Spec):
    """The encoder in front of a decoder: layers of the model's own widths, without cross-attention."""

    layers: int = Field(ge=1)
    moe_layers: int = Field(default=0, ge=0)


class Model(Spec):
    """A transformer by its shapes. With an encoder, ``layers`` and ``moe_layers`` are the decoder's."""

    name: str
    hidden: int = Field(ge=1)
    layers: int = Field(ge=1)
    vocab: int = Field(ge=1)
    attention: Attention
    dense_inter_size: int = Field(default=0, ge=0, description="Width of the plain FFN where a layer has one.")
    dense_matrices: Literal[2, 3] = 3
    moe_layers: int = Field(default=0, ge=0, description="How many layers carry experts; the rest have a plain FFN.")
    experts: Experts | None = None
    encoder: Encoder | None = Field(default=None, description="Reads the prompt; every layer then attends to it.")
    tied_embeddings: bool = False
    mtp_layers: int = Field(
        default=0,
        ge=0,
        description="Multi-token-prediction layers, beside the others and not counted in them.",
    )
    native_precision: str = Field(default="bfloat16", description="Number format the checkpoint is published in.")
    max_context: int | None = Field(default=None, ge=1)
    published: Published | None = None
    source: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        if self.moe_layers > self.layers:
            raise ValueError(f"moe_layers {self.moe_layers} exceeds layers {self.layers}")
        if bool(self.moe_layers) != (self.experts is not None):
            raise ValueError("moe_layers and experts must be given together")
        if self.dense_layers and not self.dense_inter_size:
            raise ValueError(f"{self.dense_layers} layers have a plain FFN but dense_inter_size is 0")
        if self.encoder is not None:
            if self.encoder.moe_layers > self.encoder.layers:
                raise ValueError(f"encoder.moe_layers {self.encoder.moe_layers} exceeds {self.encoder.layers} layers")
            if self.attention.kind != "gqa" or self.attention.sliding_window:
                raise ValueError("an encoder goes with attention of kind gqa, without a sliding window")
        return self

    @property
    def encoder_stack(self) -> Model | None:
        """The encoder as a model of its own, embedding and head those of the whole; None without one."""
        if self.encoder is None:
            return None
        return self.vary(
            name=f"{self.name} encoder", layers=self.encoder.layers, moe_layers=self.encoder.moe_layers, encoder=None,
            experts=self.experts if self.encoder.moe_layers else None, published=None,
        )  # fmt: skip

    @property
    def dense_layers(self) -> int:
        """Layers with a plain FFN."""
        return self.layers - self.moe_layers
