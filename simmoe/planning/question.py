"""What a plan is asked: load, objective, how sure, what may be bought; and one replica screened over its loads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from simmoe.errors import SpecError
from simmoe.planning.confirm import REQUESTS
from simmoe.planning.objective import Limit
from simmoe.planning.offers import Offer
from simmoe.planning.screen import LoadGrid
from simmoe.specs.deployment import Deployment
from simmoe.specs.model import Model
from simmoe.specs.workload import Workload

#: Screening may be pessimistic by this factor of slack without hiding a cheaper option: simulation decides.
OPTIMISM = 1.08


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked: load, objective, how sure, what may be bought.

    Attributes
    ----------
    workload : open loop; its rate is the load. [1/s]
    base : precision, engine, cap on active experts and limits; sizes are searched.
    confidence : chance with which the objective shall hold, given the calibration's uncertainty. [-]
    spares : replicas beyond those needed, so that as many may fail; of prefill and of decode each. [replicas]
    most_devices : most devices bought. [devices]
    budget_usd_per_hour : most spent; None: no limit. [USD/h]
    replica_devices : largest replica tried. [devices]
    split : whether prefill and decode may be served by replicas of their own.
    """

    models: tuple[Model, ...]
    offers: tuple[Offer, ...]
    workload: Workload
    limits: tuple[Limit, ...]
    base: Deployment = field(default_factory=Deployment)
    confidence: float = 0.9
    spares: int = 0
    most_devices: int = 1024
    budget_usd_per_hour: float | None = None
    replica_devices: int = 32
    split: bool = True
    seed: int = 0
    requests: int = REQUESTS

    def __post_init__(self) -> None:
        if self.workload.rate is None:
            raise SpecError("a plan needs a load: give --rate, requests per second")
        if not self.limits:
            raise SpecError("a plan needs an objective: give at least one limit, e.g. --ttft-p99 2s or --tpot-p99 50ms")
        if not 0.5 <= self.confidence < 1:
            raise SpecError(f"--confidence {self.confidence:g}: give a chance from 0.5 to below 1, e.g. 0.9")
        if not self.models or not self.offers:
            raise SpecError("a plan needs at least one model and one kind of hardware")
        if min(self.most_devices, self.replica_devices, self.requests) < 1 or self.spares < 0:
            raise SpecError("--max-gpus, --replica-gpus and --requests must be at least 1, --spares at least 0")
        if self.budget_usd_per_hour is not None and not 0 < self.budget_usd_per_hour < math.inf:
            raise SpecError(f"--budget {self.budget_usd_per_hour:g}: give USD per hour, above 0 and finite")
        if self.seed < 0:
            raise SpecError(f"--seed {self.seed}: a seed is 0 or more")

    @property
    def rate(self) -> float:
        """Offered load. [1/s]"""
        assert self.workload.rate is not None
        return self.workload.rate

    def affordable(self, offer: Offer) -> int:
        """Devices of an offer that may be bought. [devices]"""
        devices = self.most_devices
        if offer.available is not None:
            devices = min(devices, offer.available)
        if self.budget_usd_per_hour is not None:
            devices = min(devices, int(self.budget_usd_per_hour / offer.usd_per_device_hour + 1e-9))
        return devices


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One replica of a model on an offer, screened over its loads."""

    offer: Offer
    model: Model
    replica: Deployment
    grid: LoadGrid
