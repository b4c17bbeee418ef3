"""Many independent calls, on this process, on local processes, or on a Ray cluster: same code, same results.

Tasks are pure functions of picklable arguments that carry their own seeds, so where they run cannot change what they
return. Results come back in the order of the tasks. Left out: retries of failed machines (Ray has its own).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from simmoe.errors import SpecError

#: Tasks a process takes at a time, at most.
_LONGEST_CHUNK = 16

Task = TypeVar("Task")
Result = TypeVar("Result")


def run(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    processes: int | None = None,
    ray: str | None = None,
) -> Iterator[Result]:
    """Yield ``function(task)`` for every task, in order.

    Parameters
    ----------
    function : a module-level function.
    processes : local processes; None: one per core this process may use, 1: here.
    ray : address of a Ray cluster ("auto", "host:port"), or "local" to start one here; None: no Ray.

    Raises
    ------
    SpecError
        If Ray is asked for and not installed, or not reachable.
    """
    if ray is not None:
        yield from _on_ray(function, tasks, ray)
        return
    count = (
        min(processes or len(os.sched_getaffinity(0)), len(tasks))
        if hasattr(os, "sched_getaffinity")
        else (processes or 1)
    )
    if count <= 1:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(count)
    try:
        # a few chunks a process: later ones level out uneven tasks; an interruption loses those begun
        yield from pool.map(function, tasks, chunksize=max(1, min(_LONGEST_CHUNK, len(tasks) // (4 * count))))
    except BaseException:  # an interruption among them: what waits is not begun
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _on_ray(function: Callable[[Task], Result], tasks: Sequence[Task], address: str) -> Iterator[Result]:
    try:
        import ray  # noqa: PLC0415  (an extra)
    except ImportError:
        raise SpecError("--ray needs Ray; install it with `pip install simmoe[plan]`") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a plan is nobody else's business
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(**_init_options(address))
        except (ConnectionError, ValueError, RuntimeError) as problem:
            raise SpecError(f"--ray {address}: no Ray cluster there ({problem})".splitlines()[0]) from None
    try:
        remote = ray.remote(function)
        for reference in [remote.remote(task) for task in tasks]:
            yield ray.get(reference)
    finally:
        if started:
            ray.shutdown()


def _init_options(address: str) -> dict[str, Any]:
    options: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False, "logging_level": "error"}
    if address != "local":
        options["address"] = address
        del options["include_dashboard"]
    return options
