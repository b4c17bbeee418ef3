"""A deployment that could be bought: replicas that serve whole requests, or prefill and decode replicas apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simmoe.planning.confirm import Confirmation, Trial, confirm
from simmoe.planning.layouts import describe
from simmoe.planning.offers import Offer
from simmoe.planning.question import Layout, Question
from simmoe.specs.deployment import Deployment
from simmoe.specs.model import Model


@dataclass(frozen=True, kw_only=True)
class Side:
    """Replicas of one layout with one role: "serve", "prefill" or "decode"; spares not among them."""

    role: str
    layout: Layout
    replicas: int

    @property
    def deployment(self) -> Deployment:
        """All its replicas that carry load."""
        replica = self.layout.replica
        return replica.vary(gpus=self.replicas * replica.devices_per_replica)


@dataclass(frozen=True, kw_only=True)
class Option:
    """A deployment that could be bought.

    Attributes
    ----------
    sides : one that serves, or prefill and decode, on the same kind of device.
    spares : replicas of each side on top of those that carry the load. [replicas]
    slack : factor by which every step may be slower before the objective breaks, as screened. [-]
    binding : what breaks first.
    probability : chance that the objective holds: as simulated where that was done, else as screened. [-]
    utilisation : load over what the replicas carry at most, of the fuller side. [-]
    log_sigma : spread of the step's logarithm at this load, of the less sure side. [-]
    confirmation : None: not simulated.
    """

    sides: tuple[Side, ...]
    spares: int
    rate: float
    slack: float
    binding: str
    probability: float
    utilisation: float
    log_sigma: float
    confirmation: Confirmation | None = None

    @property
    def split(self) -> bool:
        """Whether prefill and decode are apart."""
        return len(self.sides) > 1

    @property
    def kind(self) -> str:
        """In a word."""
        return "disaggregated" if self.split else "co-located"

    @property
    def offer(self) -> Offer:
        """What is bought."""
        return self.sides[0].layout.offer

    @property
    def model(self) -> Model:
        """What is served."""
        return self.sides[0].layout.model

    @property
    def layout(self) -> Layout:
        """The layout that decodes."""
        return self.sides[-1].layout

    @property
    def replicas(self) -> int:
        """Replicas that carry load, of both sides. [replicas]"""
        return sum(side.replicas for side in self.sides)

    @property
    def devices(self) -> int:
        """Bought. [devices]"""
        return sum((side.replicas + self.spares) * side.layout.replica.devices_per_replica for side in self.sides)

    @property
    def usd_per_hour(self) -> float:
        """Price of all devices. [USD/h]"""
        return self.devices * self.offer.usd_per_device_hour

    def usd_per_million_output_tokens(self, output_tokens: float) -> float:
        """At the offered load. [USD]"""
        return self.usd_per_hour / 3600 / (self.rate * output_tokens) * 1e6

    @property
    def rank(self) -> tuple[float, int, bool, float]:
        """Price first; of equal prices the fewer devices, then the simpler service, then the surer."""
        return (self.usd_per_hour, self.devices, self.split, -self.probability)

    @property
    def name(self) -> str:
        """In words: "16 x h200: 2 x (tp 8, ep 8)"."""
        said = []
        for side in self.sides:
            count = f"{side.replicas} + {self.spares} spare" if self.spares else f"{side.replicas}"
            role = f"{side.role} " if self.split else ""
            said.append(f"{count} {role}x ({describe(side.layout.replica)})")
        return f"{self.devices} x {self.offer.name}: {', '.join(said)}"

    def simulated(self, question: Question) -> Option:
        """The option with what simulation says of it."""
        done = confirm(
            Trial(
                hardware=self.offer.hardware,
                model=self.model,
                deployment=self.sides[0].deployment,
                decode=self.sides[1].deployment if self.split else None,
                workload=question.workload,
                limits=question.limits,
                log_sigma=self.log_sigma,
                confidence=question.confidence,
                seed=question.seed,
                requests=question.requests,
            )
        )
        return replace(self, confirmation=done, probability=done.probability)

    def holds(self, question: Question) -> bool:
        """Whether simulation confirms it."""
        return self.confirmation is not None and self.confirmation.confirms(question.confidence)
