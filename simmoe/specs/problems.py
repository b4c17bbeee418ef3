"""One line out of a pydantic ValidationError: the key, what is wrong, what would be right.

The first problem is described, the others are counted: a misspelt key often shows up twice, once as
unknown and once as missing. Left out: line numbers (PyYAML's safe loader does not keep them).
"""

from __future__ import annotations

import difflib
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


def describe(problem: ValidationError, kind: type[BaseModel]) -> str:
    """Say in one line what is wrong with ``contents`` as a ``kind``: "device.memory: 80 has no unit; ...".

    Parameters
    ----------
    problem : what pydantic raised.
    kind : the spec that was asked for, whose field names are the right ones.
    """
    return _line(problem.errors(include_url=False), kind)


def describe_under(problem: ValidationError, kind: type[BaseModel], name: str) -> str | None:
    """What is wrong with one key's own value, as `describe` says it; None: nothing, or only beside other keys."""
    details = [detail for detail in problem.errors(include_url=False) if detail["loc"][:1] == (name,)]
    return _line(details, kind) if details else None


def suggest(name: str, owner: type[BaseModel] | None) -> str:
    """The right key near a misspelt one, or all there are."""
    known = list(owner.model_fields) if owner else []
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def _line(details: list[ErrorDetails], kind: type[BaseModel]) -> str:
    # the unknown key first: a missing one beside it is mostly the same slip
    details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
    line = _one(details[0], kind)
    others = len({detail["loc"] for detail in details}) - 1
    return f"{line} (and {others} more)" if others else line


def _one(detail: ErrorDetails, kind: type[BaseModel]) -> str:
    place = [str(part) for part in detail["loc"]]
    key = ".".join(place)
    owner = _owner(kind, place[:-1])
    prefix = f"{key}: " if key else ""
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"{prefix}unknown key; {suggest(place[-1], owner)}"
    if detail["type"] == "missing":
        return f"{prefix}missing; {_meaning(owner, place[-1])}"
    if detail["type"] == "value_error":
        return f"{prefix}{message}"
    if detail["type"] == "model_type":
        return f"{prefix}{detail['input']!r} will not do: it should be a mapping of keys to values"
    expected = message[0].lower() + message[1:].replace("Input should be ", "")
    return f"{prefix}{detail['input']!r} will not do: {expected.replace('input should be', 'it should be')}" + (
        f" ({meaning})" if (meaning := _description(owner, place[-1])) else ""
    )


def _meaning(owner: type[BaseModel] | None, name: str) -> str:
    text = _description(owner, name)
    return f"give {name}: {text}" if text else f"give {name}"


def _description(owner: type[BaseModel] | None, name: str) -> str:
    field = owner.model_fields.get(name) if owner else None
    return field.description or "" if field else ""


def _owner(kind: type[BaseModel], place: list[str]) -> type[BaseModel] | None:
    owner: type[BaseModel] | None = kind
    for part in place:
        if part.isdigit():  # of a list, whose entries are the owner's kind
            continue
        field = owner.model_fields.get(part) if owner else None
        owner = _spec_in(field.annotation) if field else None
    return owner


def _spec_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in {Union, UnionType, Annotated, tuple, list}:
        for argument in get_args(annotation):
            if (found := _spec_in(argument)) is not None:
                return found
    return None
