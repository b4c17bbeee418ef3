"""Measured kernel tables to calibration files: which tables, which fits, on how many processes, written where.

Finished fits are kept in ``.fits/`` beside the calibration until it is written, so that an interrupted run goes on
where it stopped; a kept fit answers only for the same rows, operator code, device and folds.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml
from pydantic import ValidationError

from simmoe import __version__
from simmoe.calibrate.checks import check
from simmoe.calibrate.fit import Sample, calibrate_operator, samples, solver
from simmoe.costs import calibration as calibration_files
from simmoe.costs.calibration import Calibration, OperatorFit
from simmoe.costs.operators.base import Operator
from simmoe.costs.operators.host import operator_on
from simmoe.costs.operators.registry import described, measured_device, operator_of
from simmoe.errors import CalibrationError, SpecError
from simmoe.specs.hardware import Hardware
from simmoe.specs.load import load_hardware
from simmoe.specs.measurement import read_table, table_paths

_PACKAGE = Path(__file__).resolve().parents[1]
#: Code a fit depends on; a kept fit of other code is not used again.
_FIT_CODE = ("costs", "routing", "calibrate/fit.py", "calibrate/checks.py")


@dataclass
class Plan:
    """What will be fitted for one device, and the user's file that describes it (None: shipped)."""

    device: str
    hardware: Hardware
    hardware_file: Path | None = None
    jobs: list[tuple[Operator, Sample, str]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def folder(self, out: Path | None) -> Path:
        """Where the calibration goes: ``<out>/<device>``; for a user's device by its hardware file, unless given."""
        if out is None and self.hardware_file is not None:
            here = self.hardware_file.resolve().parent
            return here if here.name == self.device else here / self.device
        return (out or Path("profiles")) / self.device


def plan(
    paths: Sequence[Path], hardware_file: Path | None = None, only: Collection[str] = ()
) -> tuple[list[Plan], list[str]]:
    """Sort measured tables by device and split them into fits; also what was left out, in words.

    Parameters
    ----------
    paths : tables or folders of them.
    hardware_file : describes a device that is not shipped; its tables' names end in its name.
    only : operators to fit; (): all.

    Raises
    ------
    CalibrationError
        If no table is of an operator in ``only``.
    """
    given = described(hardware_file) if hardware_file else None
    plans: dict[str, Plan] = {}
    left_out: list[str] = []
    met: set[str] = set()
    for path in table_paths(paths):
        table = read_table(path)
        operator = operator_of(table)
        if operator is None:
            left_out.append(f"{path.name}: not a table of an operator simmoe models")
            continue
        device = measured_device(path, given)
        if device is None:
            wanted = f"_{next(iter(given))}" if given else "_h100_sxm, or give --hardware"
            left_out.append(f"{path.name}: its name ends in no known device (e.g. {wanted})")
            continue
        entry = plans.setdefault(device.label, Plan(device.label, device.hardware, device.file))
        entry.files.append(path)
        operator = operator_on(operator, device.hardware)
        met.add(operator.name)
        if only and operator.name not in only:
            continue
        for sample in samples(operator, table):
            if len(sample.seconds) <= len(operator.parameters) + 2:
                left_out.append(
                    f"{path.name}: {operator.name} {dict(sample.variant)}: {len(sample.seconds)} rows for "
                    f"{len(operator.parameters)} parameters, too few to fit"
                )
                continue
            entry.jobs.append((operator, sample, path.name))
    if unknown := [name for name in only if name not in met]:
        raise CalibrationError(f"--operator {unknown[0]}: no table of it; there are {', '.join(sorted(met)) or 'none'}")
    return [entry for entry in plans.values() if entry.jobs or not only], left_out


def run(
    entry: Plan,
    *,
    folds: int = 10,
    processes: int | None = None,
    done: Callable[[], None] | None = None,
    keep: Path | None = None,
) -> Calibration:
    """Fit everything planned for a device.

    Parameters
    ----------
    folds : folds of shape groups the fits are judged by.
    keep : folder for finished fits until the calibration is written; None: none are kept.

    Raises
    ------
    CalibrationError
        If nothing could be fitted.
    """
    if not entry.jobs:
        raise CalibrationError(f"{entry.device}: no table with enough rows to fit")
    solver()  # said here if it is missing, not by every process
    places = [keep / f"{_fit_digest(job, entry.hardware, folds)}.json" if keep else None for job in entry.jobs]
    results = {i: fit for i, place in enumerate(places) if place and (fit := _kept(place)) is not None}
    for _ in results:
        if done:
            done()
    for i, fit in _fitted(entry, [i for i in range(len(entry.jobs)) if i not in results], folds, processes):
        results[i] = fit
        place = places[i]
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(fit.model_dump_json(), encoding="utf-8")
        if done:
            done()
    return Calibration(
        device=entry.hardware.device.name,
        created_by=f"simmoe {__version__}",
        digest=_digest(entry.files),
        sources=tuple(sorted(path.name for path in entry.files)),
        fits=tuple(results[i] for i in range(len(entry.jobs))),
    )


def with_others(calibration: Calibration, folder: Path) -> Calibration:
    """Add what the calibration in a folder holds of other operators, fitted to the same tables.

    Raises
    ------
    CalibrationError
        If there is none, or it was made from other tables.
    """
    path = folder / "calibration.yaml"
    before = calibration_files.load(path)
    if before.digest != calibration.digest:
        raise CalibrationError(f"{path}: made from other tables than these; fit all operators, without --operator")
    fitted = {fit.operator for fit in calibration.fits}
    fits = [*calibration.fits, *(fit for fit in before.fits if fit.operator not in fitted)]
    return calibration.vary(fits=tuple(sorted(fits, key=lambda fit: calibration.sources.index(fit.source))))


def write(entry: Plan, calibration: Calibration, folder: Path) -> Path | None:
    """Write a calibration, drop the kept fits, and see that a user's device has a hardware file that finds it.

    Returns the hardware file to predict with; None for a shipped device.
    """
    calibration_files.dump(calibration, folder / "calibration.yaml")
    kept = folder / ".fits"
    for file in kept.glob("*.json"):
        file.unlink()
    if kept.is_dir() and not any(kept.iterdir()):
        kept.rmdir()
    if entry.hardware_file is None:
        return None
    found = load_hardware(entry.hardware_file).calibration
    if found is not None and Path(found) == folder.resolve():
        return entry.hardware_file
    try:
        text = yaml.safe_load(entry.hardware_file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as problem:
        raise SpecError(f"{entry.hardware_file}: cannot be read again ({problem})") from problem
    ready = folder / f"{entry.hardware_file.stem}.yaml"
    comment = f"# {entry.hardware_file.name}, with the calibration written beside it\n"
    data = yaml.safe_dump({**text, "calibration": folder.name}, sort_keys=False, allow_unicode=True, width=110)
    ready.write_text(comment + data, encoding="utf-8")
    return ready


def _fitted(
    entry: Plan, missing: Sequence[int], folds: int, processes: int | None
) -> Iterator[tuple[int, OperatorFit]]:
    if not missing:
        return
    with ProcessPoolExecutor(max_workers=processes or os.cpu_count() or 1, initializer=_one_thread) as pool:
        # the longest first, so that no worker ends alone with it
        order = sorted(missing, key=lambda i: -len(entry.jobs[i][1].seconds))
        futures = {pool.submit(_fit, *entry.jobs[i], entry.hardware, folds): i for i in order}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:  # Ctrl-C: finished fits are kept, nobody waits for the rest
            for worker in multiprocessing.active_children():
                worker.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fit(operator: Operator, sample: Sample, source: str, hardware: Hardware, folds: int) -> OperatorFit:
    fit = calibrate_operator(operator, sample, hardware, source, folds)
    return fit.vary(notes=tuple(check(operator, sample, hardware, fit)))


def _one_thread() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.name):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _fit_digest(job: tuple[Operator, Sample, str], hardware: Hardware, folds: int) -> str:
    operator, sample, source = job
    digest = hashlib.sha256(_code_digest().encode())
    described_by = (operator.name, dict(sample.variant), source, folds, hardware.model_dump(mode="json"))
    digest.update(json.dumps(described_by, sort_keys=True).encode())
    for values in (sample.seconds, sample.groups, *(sample.features[name] for name in sorted(sample.features))):
        digest.update(values.tobytes())
    return digest.hexdigest()[:24]


@cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    for name in _FIT_CODE:
        place = _PACKAGE / name
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _kept(path: Path) -> OperatorFit | None:
    """A fit finished earlier; one that was cut short while writing counts as none."""
    try:
        return OperatorFit.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def warnings(calibration: Calibration) -> dict[str, list[str]]:
    """What a reader of this calibration should know, by fit."""
    found: dict[str, list[str]] = {}
    for fit in sorted(calibration.fits, key=lambda fit: (fit.operator, tuple(fit.variant.values()))):
        wide = fit.log_sigma > 0.3
        lines = [f"residual spread {100 * fit.log_sigma:.0f} %, predictions are rough"] if wide else []
        if lines or fit.notes:
            found[f"{fit.operator} {'/'.join(fit.variant.values())}"] = [*lines, *fit.notes]
    return found
