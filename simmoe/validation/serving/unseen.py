"""Engine times that never saw a model: its own runs left out of every fit, so that its rows judge an unseen model.

An entry of simmoe/specs/engines.yaml fitted to several models answers with the times the others give
(unseen_engines.yaml, printed by ``python -m simmoe.calibrate.engines --without``). An entry fitted to the one model is
left out, and the next most specific answers: a newer release, or no slowdown at all. Left out: what was chosen, not
fitted, with a model's runs at hand, such as which kernels a release ran.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib import resources

import yaml

from simmoe.predict import compiled, engine_of
from simmoe.specs.engines import ENTRIES, EngineParameters, shipped_entries

#: Ends the names of files, groups and lists that are judged so.
SUFFIX = ", model unseen"


@lru_cache(maxsize=1)
def _times() -> Mapping[str, Mapping[str, Mapping[str, float]]]:
    text = resources.files("simmoe.validation.serving").joinpath("unseen_engines.yaml").read_text(encoding="utf-8")
    found: Mapping[str, Mapping[str, Mapping[str, float]]] = yaml.safe_load(text)["without"]
    return found


def entries_without(model: str) -> tuple[EngineParameters, ...]:
    """The shipped entries as fits without a model's runs have them; those with no other model are left out."""
    kept = []
    for entry in shipped_entries():
        if model not in entry.fitted_to:
            kept.append(entry)
        elif len(entry.fitted_to) > 1:
            kept.append(entry.vary(**_times()[entry.title][model], source=f"{entry.source}; without {model}"))
    return tuple(kept)


@contextmanager
def left_out(model: str) -> Iterator[None]:
    """Predict as if no run of a model had ever been fitted to, while the context lasts."""
    mark = ENTRIES.set(entries_without(model))
    _forget()
    try:
        yield
    finally:
        ENTRIES.reset(mark)
        _forget()


def _forget() -> None:
    compiled.cache_clear()
    engine_of.cache_clear()
