"""The table of a sweep on disk: it grows row by row, can be gone on with, and becomes Parquet at the end."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simmoe.errors import MeasurementError, SpecError

Row = dict[str, Any]


def _journal(out: Path) -> Path:
    return out if out.suffix == ".csv" else out.with_suffix(".csv")


class Journal:
    """Appends rows to a sweep's CSV file, each complete on disk before the next; a context manager.

    Raises
    ------
    SpecError, MeasurementError
        On entering: if the name ends otherwise, or the file holds something else.
    """

    def __init__(self, out: Path | None, names: Sequence[str]) -> None:
        self._out, self._names = out, names

    def __enter__(self) -> Callable[[Row], None]:
        if self._out is None:
            return lambda _: None
        if self._out.suffix not in (".csv", ".parquet"):
            raise SpecError(f"--out {self._out}: end the name in .csv or .parquet")
        if self._out.suffix == ".parquet" and find_spec("pyarrow") is None:  # told before the work, not after it
            raise SpecError(f"--out {self._out}: Parquet needs pyarrow; install it with `pip install simmoe[import]`")
        path = _journal(self._out)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = list(read_rows(self._out).values())
        # written anew beside it: a run that was killed may have left half a line at the end
        unfinished = path.with_name(path.name + ".tmp")
        self._file = unfinished.open("w", encoding="utf-8", newline="")
        writer = csv.DictWriter(self._file, self._names)
        writer.writeheader()
        writer.writerows(whole)
        self._file.flush()
        unfinished.replace(path)

        def write(row: Row) -> None:
            writer.writerow(row)
            self._file.flush()

        return write

    def __exit__(self, *_: object) -> None:
        if self._out is not None:
            self._file.close()


def read_rows(out: Path) -> dict[str, Row]:
    """Rows that an earlier run completed, by point.

    Raises
    ------
    MeasurementError
        If the file is not a table of a sweep.
    """
    path = _journal(out)
    if not path.exists():
        return {}
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise MeasurementError(f"{path}: cannot be read as a table ({problem})") from None
    with io.StringIO(text[: text.rfind("\n") + 1], newline="") as file:  # the last line may be half written
        reader = csv.DictReader(file)
        if "point" not in (reader.fieldnames or ()):
            raise MeasurementError(f"{path}: not a table of a sweep (no column point)")
        rows = [row for row in reader if None not in row.values() and None not in row and row["status"]]
    return {row["point"]: {name: _number(name, text) for name, text in row.items()} for row in rows}


def check_same(found: Mapping[str, Row], asked: Mapping[str, Row], names: Sequence[str], out: Path) -> None:
    """Refuse to go on with the table of another sweep.

    Parameters
    ----------
    found : rows of the table, by point.
    asked : cells of the points of this sweep, by point.
    names : columns of this sweep's table.

    Raises
    ------
    MeasurementError
        If the table holds a row that this sweep does not ask for: which, and how to go on.
    """
    strange = [row for key, row in found.items() if key not in asked or list(row) != list(names)]
    if not strange:
        return
    row = strange[0]
    if list(row) != list(names):
        only = [
            f"{whose} {', '.join(more)}"
            for whose, more in (("it alone has", set(row) - set(names)), ("it lacks", set(names) - set(row)))
            if more
        ]
        said = f"holds a sweep over other fields ({'; '.join(only) or 'in another order'})"
    else:
        said = f"{len(strange)} of its {len(found)} rows are not of this grid ({_difference(row, asked)})"
    path = _journal(out)
    raise MeasurementError(f"{path}: {said}; give another --out, or delete {path} to begin anew")


def _difference(row: Row, asked: Mapping[str, Row]) -> str:
    for name in next(iter(asked.values())):
        values = dict.fromkeys(_cell(cells[name]) for cells in asked.values())
        if (cell := _cell(row[name])) not in values:
            shown = ", ".join(list(values)[:5]) + (", ..." if len(values) > 5 else "")
            return f"the first has {name} {cell}, the grid {shown}"
    return (
        "made with another method, requests, seed or price, from other contents of the model's, hardware's or "
        "calibration's file, or by another version of simmoe"
    )


def _cell(value: Any) -> str:
    return "none" if value is None else str(value)


def _number(name: str, text: str) -> Any:
    if text == "":
        return None
    if name == "point":
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def write_parquet(rows: Sequence[Row], names: Sequence[str], out: Path) -> None:
    """Write all rows as Parquet."""
    import pyarrow as pa  # noqa: PLC0415  (an extra)
    import pyarrow.parquet as pq  # noqa: PLC0415

    columns = {name: [row[name] for row in rows] for name in names}
    table = {
        name: values if all(v is None or isinstance(v, (int, float)) for v in values) else [_text(v) for v in values]
        for name, values in columns.items()
    }
    pq.write_table(pa.table(table), out)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
