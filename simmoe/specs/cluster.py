"""What stands around replicas: the router, failures, autoscaling, and separate pools for prefill and decode."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from simmoe.specs.base import Seconds, Spec
from simmoe.specs.deployment import Deployment
from simmoe.specs.hardware import Link

RouterName = Literal["round_robin", "least_outstanding", "power_of_two", "prefix_aware"]
PolicyName = Literal["vllm", "trtllm", "trtllm_max_utilization", "sglang", "vllm_v0"]

#: the scheduling policy an engine's name stands for
POLICY_OF_ENGINE = {"vllm": "vllm", "trtllm": "trtllm", "sglang": "sglang", "generic": "vllm"}

#: share of outputs still to come that SGLang keeps blocks for: 0.7 decays to 0.098 within 600 steps (its server's
#: defaults)
NEW_TOKEN_RATIO = 0.1


class Failures(Spec):
    """Replicas fail at random, lose their caches, and come back.

    Requests on a failed replica go to others and compute prompt and generated tokens again; tokens already streamed
    count.
    """

    mean_time_between: Seconds = Field(gt=0, description="Mean time a replica serves until it fails. [s]")
    restart_time: Seconds = Field(description="From failing to serving again: process start, weights. [s]")


class Autoscaling(Spec):
    """Replicas by the number of requests in the system, as Kubernetes' horizontal pod autoscaler counts.

    The deployment's replicas serve at the start; there may be more later, up to ``maximum``. Wanted: ceil(requests /
    target), between minimum and maximum. A new replica serves after ``startup_time``; one too many gets no new requests
    and leaves when it is empty, once fewer have been wanted for ``down_after``. Defaults of interval and down_after are
    the autoscaler's (kubernetes.io, "Horizontal Pod Autoscaling").
    """

    minimum: int = Field(default=1, ge=1, description="Fewest replicas; at most as many as serve at the start.")
    maximum: int = Field(ge=1, description="Most replicas; at least as many as serve at the start.")
    target: float = Field(gt=0, description="Requests in the system per replica aimed at.")
    startup_time: Seconds = Field(description="From the decision to serving: node, image, weights. [s]")
    interval: Seconds = Field(default=15.0, gt=0, description="Time between two looks. [s]")
    down_after: Seconds = Field(default=300.0, description="How long fewer must have been wanted. [s]")

    @model_validator(mode="after")
    def _ordered(self) -> Autoscaling:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum} exceeds maximum {self.maximum}")
        return self


class Disaggregation(Spec):
    """A pool of its own for decoding; the scenario's deployment then computes prompts only.

    The KV cache of a prompt moves over ``link``, per device of the side that has more to move each; with ``layerwise``
    a layer's share leaves as soon as it is computed.
    """

    decode: Deployment
    link: Link | None = Field(default=None, description="None: scale-out of the hardware, or scale-up if it has none.")
    layerwise: bool = False


class Cluster(Spec):
    """How requests find replicas, and how many replicas there are over time."""

    router: RouterName = Field(default="least_outstanding", description="Which replica a request goes to.")
    policy: PolicyName | None = Field(default=None, description="Who joins the next step; None: the engine's own.")
    failures: Failures | None = None
    autoscaling: Autoscaling | None = None
    disaggregation: Disaggregation | None = None

    @model_validator(mode="after")
    def _supported(self) -> Cluster:
        if self.disaggregation is not None and (self.failures or self.autoscaling):
            raise ValueError("failures and autoscaling are not modelled for separate prefill and decode pools")
        return self
