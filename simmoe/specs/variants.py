"""Models made from a model: dense ones of the same active or total size, and the part of a pool one task uses.

Model: everything but the feed-forward layers stays; a dense layer is as wide as the experts it replaces together.
Left out: quality (equal size is not equal quality). Checked in tests/test_alternatives.py.
"""

from __future__ import annotations

from typing import Literal

from simmoe.errors import SpecError
from simmoe.specs.model import Model


def dense_equivalent(model: Model, equal: Literal["active", "total"] = "active") -> Model:
    """A dense model with as many parameters as ``model`` uses per token, or holds; routers aside.

    Layers keep their number and widths; MoE layers and plain ones get one width, the mean of what they had.

    Raises
    ------
    SpecError
        If the model has no experts.
    """
    e = model.experts
    if e is None:
        raise SpecError(f"{model.name} has no experts; it is dense already")
    routed = e.inter_size * (e.top_k if equal == "active" else e.num_experts)
    before = model.encoder
    layers = model.layers + (before.layers if before else 0)
    sparse = model.moe_layers + (before.moe_layers if before else 0)
    elements = sparse * (routed + e.shared_inter_size) * e.matrices
    elements += (layers - sparse) * model.dense_inter_size * model.dense_matrices
    width = round(elements / (layers * e.matrices))
    return model.vary(
        encoder=before.vary(moe_layers=0) if before else None,
        name=f"{model.name} dense, equal {equal}", experts=None, moe_layers=0, dense_inter_size=width,
        dense_matrices=e.matrices, published=None, source=f"derived from {model.name}",
    )  # fmt: skip


def task_submodel(model: Model, experts_per_layer: int | None = None) -> Model:
    """What one task of a task-routed model needs: the experts it uses, default as many as a token takes.

    Raises
    ------
    SpecError
        If the model has no experts, or fewer are kept than a token takes.
    """
    e = model.experts
    if e is None:
        raise SpecError(f"{model.name} has no experts; there is no part of them to keep")
    kept = experts_per_layer or e.top_k
    if not e.top_k <= kept <= e.num_experts:
        raise SpecError(f"a task keeps {e.top_k} to {e.num_experts} experts of {model.name}, not {kept}")
    experts = e.vary(num_experts=kept, num_groups=1, top_groups=1)
    return model.vary(
        name=f"{model.name} one task", experts=experts, published=None, source=f"derived from {model.name}"
    )
