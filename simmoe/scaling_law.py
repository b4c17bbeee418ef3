"""Loss of MoE language models against size, data and experts, and where a training budget is best spent.

Laws (natural units: parameters, tokens, nats per token):
- `chinchilla`: Hoffmann et al., arXiv 2203.15556, eq. 10 with the published coefficients.
- `clark`: Clark et al., arXiv 2202.01169, eq. 20 with Table 3; all models saw 130 B tokens, so data is no variable.
- `krajewski`: Krajewski et al., arXiv 2402.07871, eq. 9 (fine-grained experts; N counts all parameters).
- `surrogate` for Yun et al., arXiv 2404.02852, eq. 4: their coefficients are not published, their loss values only as
  plots. It puts Clark's effective parameter count of (N, E) into Chinchilla's law, so it keeps expert saturation, the
  interaction of size and experts, and the data term. It is not a fit: expect its directions, not its percentages.
Left out: learning-rate schedules, data repetition, quality beyond loss.
Checked in tests/test_scaling_law.py against the papers' tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from simmoe.errors import SpecError

#: Chinchilla, approach 3: irreducible loss, A, alpha, B, beta (arXiv 2203.15556, eq. 10).
CHINCHILLA = (1.69, 406.4, 0.34, 410.7, 0.28)
#: Router -> a, b, c, d, E_start, E_max; logarithms to base 10 (arXiv 2202.01169, Table 3).
CLARK = {
    "s-base": (-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
    "rl-r": (-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
    "hash": (-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
}
#: a, alpha, b, beta, g, gamma, c of the MoE law (arXiv 2402.07871, Table 1).
KRAJEWSKI = (18.1, 0.115, 30.8, 0.147, 2.1, 0.58, 0.47)
#: Share of a dense model's parameters that an added expert repeats: MLP two thirds of a layer, every second layer MoE
#: (arXiv 2404.02852, section 2).
EXPERT_SHARE = 1.0 / 3.0


def chinchilla(parameters: float, tokens: float) -> float:
    """Loss of a dense model. [nats/token]"""
    E, A, alpha, B, beta = CHINCHILLA
    return float(E + A / parameters**alpha + B / tokens**beta)


def saturated_experts(experts: float, start: float, most: float) -> float:
    r"""Experts as the law sees them (arXiv 2202.01169, eq. 7).

    .. math:: 1/\hat E = 1 / (E - 1 + (1/E_{start} - 1/E_{max})^{-1}) + 1/E_{max}

    It is E_start for one expert and tends to E_max.
    """
    return 1.0 / (1.0 / (experts - 1.0 + 1.0 / (1.0 / start - 1.0 / most)) + 1.0 / most)


def clark(parameters: float, experts: float, router: str = "s-base") -> float:
    """Validation loss after 130 B tokens of a model of dense size N with E experts in every second layer. [nats/token]

    Raises
    ------
    SpecError
        If the router is not one of Table 3.
    """
    a, b, c, d, start, most = _router(router)
    e, n = math.log10(saturated_experts(experts, start, most)), math.log10(parameters)
    return float(10.0 ** (a * n + b * e + c * n * e + d))


def effective_parameters(parameters: float, experts: float, router: str = "s-base") -> float:
    """Size of the dense model with the same loss (arXiv 2202.01169, section 6). [parameters]"""
    a, b, c, d, start, most = _router(router)
    dense = math.log10(saturated_experts(1, start, most))
    loss = math.log10(clark(parameters, experts, router))
    return float(10.0 ** ((loss - d - b * dense) / (a + c * dense)))


def routing_stops_helping(router: str = "s-base") -> float:
    """Size beyond which more experts no longer lower Clark's loss. [parameters]

    The printed coefficients are too rounded to recover the paper's 85 B and 83 B for RL-R and Hash.
    """
    _, b, c, _, _, _ = _router(router)
    return float(10.0 ** (-b / c))


def krajewski(parameters: float, tokens: float, granularity: float) -> float:
    """Loss of a fine-grained MoE with 64 x G experts, G of them active. [nats/token]

    ``parameters``: all of them, without embedding. ``granularity``: G, the dense FFN's width over an expert's.
    """
    a, alpha, b, beta, g, gamma, c = KRAJEWSKI
    return float(c + (g / granularity**gamma + a) / parameters**alpha + b / tokens**beta)


def surrogate(parameters: float, tokens: float, experts: float) -> float:
    """Stand-in for Yun et al.'s law: dense size N, D tokens, E experts. Not their fit. [nats/token]"""
    return chinchilla(effective_parameters(parameters, experts), tokens)


def total_parameters(parameters: float, experts: float) -> float:
    """All parameters of an MoE whose dense twin has N: (1 + (E - 1) / 3) N (arXiv 2404.02852, section 2)."""
    return (1.0 + (experts - 1.0) * EXPERT_SHARE) * parameters


def training_flop(parameters: float, tokens: float) -> float:
    """6 N D with N the dense size; the second active expert is not counted, as in arXiv 2404.02852. [FLOP]"""
    return 6.0 * parameters * tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """A way to spend a training budget.

    Attributes
    ----------
    parameters : dense size N. [parameters]
    total : with all experts, what has to be served. [parameters]
    """

    experts: int
    parameters: float
    tokens: float
    loss: float

    @property
    def total(self) -> float:
        """Parameters of all experts together."""
        return total_parameters(self.parameters, self.experts)


Law = Callable[[float, float, float], float]


def loss_optimal(budget_flop: float, experts: int, law: Law = surrogate) -> Allocation:
    """The dense size N, with D = budget / 6 N tokens, of lowest loss."""
    _check(budget_flop, experts)
    low, high = math.log(1e6), math.log(1e14)
    for _ in range(200):  # golden section: the loss has one minimum along a budget
        third = (high - low) * 0.381966
        if _along(budget_flop, low + third, experts, law) < _along(budget_flop, high - third, experts, law):
            high -= third
        else:
            low += third
    return _allocation(budget_flop, math.exp((low + high) / 2), experts, law)


def over_trained(budget_flop: float, experts: int, loss: float, law: Law = surrogate) -> Allocation | None:
    """The smallest model that the whole budget trains to ``loss``: fewer parameters, more tokens. None: out of reach.

    Below its loss-optimal size a model's loss falls with size, so bisection finds it (arXiv 2404.02852, algorithm 1).
    """
    best = loss_optimal(budget_flop, experts, law)
    if best.loss > loss:
        return None
    low, high = math.log(1e5), math.log(best.parameters)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _along(budget_flop, middle, experts, law) <= loss else (middle, high)
    return _allocation(budget_flop, math.exp(high), experts, law)


def of_size(budget_flop: float, experts: int, total: float, law: Law = surrogate) -> Allocation:
    """The model with ``total`` parameters over all experts that the whole budget trains (bounded serving cost)."""
    _check(budget_flop, experts)
    return _allocation(budget_flop, total / total_parameters(1.0, experts), experts, law)


def budget_for(loss: float, experts: int, law: Law = surrogate) -> float:
    """Smallest training budget whose loss-optimal model reaches ``loss``. [FLOP]

    Raises
    ------
    SpecError
        If the loss is below what the law reaches at 1e30 FLOP.
    """
    low, high = math.log(1e15), math.log(1e30)
    if loss_optimal(math.exp(high), experts, law).loss > loss:
        raise SpecError(f"a loss of {loss:g} nats/token is out of reach of the law with {experts} experts")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if loss_optimal(math.exp(middle), experts, law).loss <= loss else (middle, high)
    return math.exp(high)


def _along(budget: float, log_parameters: float, experts: float, law: Law) -> float:
    n = math.exp(log_parameters)
    return law(n, budget / training_flop(n, 1.0), experts)


def _allocation(budget: float, parameters: float, experts: int, law: Law) -> Allocation:
    tokens = budget / training_flop(parameters, 1.0)
    return Allocation(experts=experts, parameters=parameters, tokens=tokens, loss=law(parameters, tokens, experts))


def _check(budget: float, experts: int) -> None:
    if not budget > 0 or experts < 1:
        raise SpecError(f"budget {budget:g} FLOP and {experts} experts: give a budget above 0 and at least one expert")


def _router(name: str) -> tuple[float, float, float, float, float, float]:
    if name not in CLARK:
        raise SpecError(f"router {name!r}: give one of {', '.join(CLARK)}")
    return CLARK[name]
