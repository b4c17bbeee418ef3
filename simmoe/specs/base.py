"""What every specification has in common: frozen, hashable, unknown keys refused, SI floats inside."""

from __future__ import annotations

from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo

from simmoe import units
from simmoe.errors import SpecError
from simmoe.specs.problems import describe

#: libyaml's where PyYAML was built with it, ten times as fast
SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def from_yaml(text: str) -> Any:
    """What a YAML text holds, plain data only."""
    return yaml.load(text, Loader=SafeLoader)  # noqa: S506  (a safe loader)


class Spec(BaseModel):
    """A frozen description. Two equal specs hash alike, so they serve as cache keys.

    Raises
    ------
    SpecError
        If it cannot be so, when made or varied. `model_validate`, which readers of files use, raises pydantic's error:
        they say where in the file it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as problem:
            raise SpecError(describe(problem, type(self))) from None

    # parts of a spec are then still made by pydantic itself, which knows their place in the whole
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def vary(self, **changes: Any) -> Self:
        """Return a validated copy with some fields changed."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def _quantity(unit: str) -> BeforeValidator:
    def read(value: Any, info: ValidationInfo) -> float:
        from_file = bool(info.context and info.context.get("from_file"))
        return units.quantity(value, unit, bare_numbers=not from_file)

    return BeforeValidator(read)


Bytes = Annotated[float, _quantity("byte"), Field(ge=0)]
BytesPerSecond = Annotated[float, _quantity("byte/second"), Field(gt=0)]
FlopPerSecond = Annotated[float, _quantity("FLOP/second"), Field(gt=0)]
Seconds = Annotated[float, _quantity("second"), Field(ge=0, le=1e10)]  # three centuries
Watts = Annotated[float, _quantity("watt"), Field(gt=0)]
PerSecond = Annotated[float, _quantity("1/second"), Field(gt=0, ge=1e-9, le=1e9)]
PerSecondFromZero = Annotated[float, _quantity("1/second"), Field(ge=0, le=1e9)]
UsdPerHour = Annotated[float, _quantity("USD/hour"), Field(gt=0)]
