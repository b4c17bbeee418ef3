"""Settings of published runs that stand elsewhere than in their rows: in the benchmark's own launch script, or implied.

`known_settings.yaml` lists them by what a row's source and cells say, so that rows of a source which nobody has looked
at are read alike. Rows of disaggregated runs have scripts of their own and are left out.
Checked in: tests/test_validation_serving.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib import resources
from typing import Literal

import yaml
from pydantic import Field

from simmoe.specs.base import Spec
from simmoe.specs.deployment import Precision
from simmoe.validation.cells import Row, integer, text

#: What of a deployment an entry may set.
_FIELDS = ("weight_precision", "kv_precision", "max_num_seqs", "max_num_batched_tokens", "memory_fraction")


class KnownSetting(Spec):
    """Settings of the rows whose source holds all words of ``in_source`` and whose cells are as ``when`` says."""

    in_source: tuple[str, ...]
    when: dict[str, str | int] = Field(default_factory=dict)
    gpu: str | None = Field(default=None, description="The device the runs had, where the row names another.")
    weight_precision: Precision | None = None
    kv_precision: Precision | None = None
    max_num_seqs: int | Literal["clients"] | None = None
    max_num_batched_tokens: int | None = None
    memory_fraction: float | None = None
    chat: bool = Field(default=False, description="Requests went through the chat API.")
    source: str

    def holds(self, row: Row) -> bool:
        """Whether a row is meant."""
        said = text(row, "source")
        return all(words in said for words in self.in_source) and all(
            (integer(row, name) if isinstance(value, int) else text(row, name)) == value
            for name, value in self.when.items()
        )


@lru_cache(maxsize=1)
def known_settings() -> tuple[KnownSetting, ...]:
    """The entries of known_settings.yaml."""
    said = resources.files("simmoe.validation.serving").joinpath("known_settings.yaml").read_text(encoding="utf-8")
    return tuple(KnownSetting.model_validate(entry) for entry in yaml.safe_load(said)["settings"])


def _of(row: Row) -> Iterator[KnownSetting]:
    if text(row, "disaggregated") != "yes":
        yield from (entry for entry in known_settings() if entry.holds(row))


def device_of(row: Row) -> str:
    """Name of the device a row's run had."""
    return next((entry.gpu for entry in _of(row) if entry.gpu), text(row, "gpu"))


def through_chat(row: Row) -> bool:
    """Whether a row's requests went through the chat API."""
    return any(entry.chat for entry in _of(row))


def limits_of(row: Row) -> dict[str, object]:
    """Fields of the deployment that are known of a row's run."""
    found: dict[str, object] = {}
    for entry in _of(row):
        for name in _FIELDS:
            value = getattr(entry, name)
            if value == "clients":
                value = integer(row, "concurrency")
            if value is not None:
                found.setdefault(name, value)
    return found
