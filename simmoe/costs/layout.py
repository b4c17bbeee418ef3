"""How a model may be cut over devices and its experts thinned out. Checked in tests/test_memory.py."""

from __future__ import annotations

from simmoe.costs.speculation import drafter
from simmoe.errors import SpecError
from simmoe.specs.deployment import Deployment
from simmoe.specs.model import Model


def check_layout(model: Model, deployment: Deployment) -> None:
    """Refuse a layout that cannot be cut: SpecError names the key."""
    a, tp = model.attention, deployment.tp_size
    if a.heads % tp:
        fits = ", ".join(str(n) for n in range(1, a.heads + 1) if a.heads % n == 0 and n <= 64)
        raise SpecError(f"tp {tp} does not divide the {a.heads} heads of {model.name}; tp may be {fits}")
    if (found := drafter(model, deployment)) is not None and found[0].attention.heads % tp:
        raise SpecError(f"tp {tp} does not divide the {found[0].attention.heads} heads of {found[0].name}")
    if model.encoder is not None and deployment.pp > 1:
        raise SpecError(f"pp {deployment.pp}: {model.name} has an encoder; pipelines of two stacks are not modelled")
    if model.encoder is not None and found is not None:
        raise SpecError(f"speculation: {model.name} has an encoder; drafting behind one is not modelled")
    if deployment.pp > model.layers:
        raise SpecError(f"pp {deployment.pp} exceeds the {model.layers} layers of {model.name}")
    if model.experts is None and deployment.ep > 1:
        raise SpecError(f"ep {deployment.ep}: {model.name} has no experts; leave ep at 1")
    if model.experts is None and deployment.offload is not None:
        raise SpecError(f"offload: {model.name} has no experts to keep in host memory; leave it out")
    active_and_pool(model, deployment)


def active_and_pool(model: Model, deployment: Deployment) -> tuple[int, int]:
    """Active experts per token and size of the pool, after cap and pruning; 0 and 0 of a dense model.

    Raises
    ------
    SpecError
        If the model has fewer of either, or ``ep`` does not divide the pool and its copies.
    """
    d, e = deployment, model.experts
    if e is None:
        if d.active_experts or d.total_experts:
            raise SpecError(f"{model.name} is dense; active_experts and total_experts do not apply")
        return 0, 0
    pool = d.total_experts or e.num_experts
    if pool > e.num_experts:
        raise SpecError(f"total_experts {pool} exceeds the {e.num_experts} experts of {model.name}")
    cap = d.active_experts or min(e.top_k, pool)
    if cap > (most := min(e.top_k, pool)):
        limit = f"the top-{e.top_k} routing of {model.name}" if pool >= e.top_k else f"the pool of {pool} experts"
        raise SpecError(f"active_experts {cap} exceeds {limit}; a cap may be 1 to {most}")
    if (slots := pool + d.routing.redundant_experts) % d.ep:
        copies = f" and {slots - pool} copies" if slots > pool else ""
        raise SpecError(f"ep {d.ep} does not divide the {pool} experts{copies} of {model.name}")
    return cap, pool
