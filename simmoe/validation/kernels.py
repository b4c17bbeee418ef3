"""Measured kernel times beside the operator models' predictions, row by row.

Benchmarks replay one input, so predictions are made with the L2 term on (cold=False). Rows of a device that has a
calibration were, as a rule, what it was fitted to: then the error here is in-sample, and the held-out error stands
in the calibration (`simmoe calibrate --report`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from simmoe.costs.borrowing import DEFAULT_LOG_SIGMA
from simmoe.costs.operators.base import Operator
from simmoe.costs.operators.host import operator_on
from simmoe.costs.operators.registry import MeasuredDevice, measured_device, operator_of
from simmoe.costs.timing import KernelTimes, kernel_times
from simmoe.output_analysis import Z_95
from simmoe.specs.measurement import Table
from simmoe.validation.misses import of_kernel
from simmoe.validation.summary import KERNEL_QUANTITY, Comparison, Explanation, Outcome

#: Number format of tables without a dtype column.
_DTYPE = {"attention_prefill": "bfloat16", "attention_decode": "bfloat16", "nccl": "float16", "allreduce": "float16"}


def is_kernel_table(table: Table) -> bool:
    """Whether simmoe models the operator this table times."""
    return operator_of(table) is not None


def compare(table: Table, given: Mapping[str, MeasuredDevice] | None = None) -> Outcome:
    """Predict every row of a kernel table that can be predicted; ``given``: devices that users describe, by label."""
    outcome = Outcome()
    operator = operator_of(table)
    device = measured_device(table.path, given)
    if operator is None or device is None:
        outcome.skip(f"{table.path.name}: device unknown; the file name should end in one, e.g. _h100_sxm", table.rows)
        return outcome
    operator = operator_on(operator, device.hardware)
    features = operator.features(table)
    measured = operator.measured(table) if operator.measured else table.number("latency_us") * 1e-6
    usable = np.ones(table.rows, dtype=bool)
    for value in features.values():
        usable &= np.isfinite(value)
    outcome.skip(f"{operator.name}: shape or kernel outside the model", int((~usable).sum()))
    untimed = usable & ~(np.isfinite(measured) & (measured > 0))
    outcome.skip(f"{operator.name}: no time in the row", int(untimed.sum()))
    usable &= ~untimed
    if "anomalous" in table.columns:
        odd = usable & (table.number("anomalous") > 0)
        outcome.skip(f"{operator.name}: marked anomalous in the source", int(odd.sum()))
        usable &= ~odd
    framework = table.text("framework") if "framework" in table.columns else np.full(table.rows, _framework(table))
    names = [name for name in operator.variant_columns if name in table.columns]
    columns = [table.text(name) for name in names]
    labels = np.array(["\x1f".join(parts) for parts in zip(framework, *columns, strict=True)])
    times = kernel_times(device.hardware, "")
    asked: list[tuple[np.ndarray, str, dict[str, str]]] = []
    for label in np.unique(labels[usable]):
        rows = np.flatnonzero(usable & (labels == label))
        first, *values = str(label).split("\x1f")
        times.framework = first
        variant = dict(zip(names, values, strict=True))
        group = f"{operator.name}/{device.label}/{first}/{_dtype(operator, variant)}"
        predicted, sigma = _predict(times, operator, {name: value[rows] for name, value in features.items()}, variant)
        asked.append((rows, first, variant))
        spreads = np.exp(Z_95 * sigma).tolist()
        figured = zip(rows.tolist(), measured[rows].tolist(), predicted.tolist(), spreads, strict=True)
        for row, seen, said, spread in figured:
            figures = (1e6 * seen, 1e6 * said, 1e6 * said / spread, 1e6 * said * spread)
            outcome.comparisons.append(Comparison(group, table.path.name, row + 2, "", KERNEL_QUANTITY, *figures))
    outcome.notes |= times.notes

    def explain(line: int, _quantity: str, _predicted: float) -> Explanation | None:
        row = line - 2
        for rows, framework, variant in asked:
            if row in rows:
                times.framework = framework
                fit = times.choose(operator, variant)
                parameters = times.values(operator, fit) if fit else operator.defaults
                sigma = times.log_sigma(fit) if fit else DEFAULT_LOG_SIGMA
                one = {name: value[row : row + 1] for name, value in features.items()}
                return of_kernel(operator, one, parameters, device.hardware, sigma)
        return None

    outcome.explainers[table.path.name] = explain
    return outcome


def _predict(
    times: KernelTimes, operator: Operator, features: Mapping[str, np.ndarray], variant: Mapping[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    return times.seconds(operator, features, cold=False, **variant)


def _framework(table: Table) -> str:
    if "kernel" in table.columns and table.rows:
        return str(table.text("kernel")[0]).split("_")[0]
    return "unstated"


def _dtype(operator: Operator, variant: Mapping[str, str]) -> str:
    for name in ("dtype", "kv_cache_dtype", "comm_dtype"):
        if name in variant:
            return variant[name]
    return _DTYPE.get(operator.name, "any")
