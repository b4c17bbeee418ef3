"""SimPy's environment with its time in integer ticks, and events ordered within one instant."""

from __future__ import annotations

from collections.abc import Callable

import simpy


class Clock(simpy.Environment):
    """A SimPy environment that starts at tick 0 and is only ever advanced by whole ticks."""

    _now: int

    def __init__(self) -> None:
        super().__init__(initial_time=0)
        self.over = False
        """Whether the run has ended, now."""

    @property
    def now(self) -> int:
        """Ticks since the start."""
        return self._now

    def advance(self, tick: int) -> None:
        """Move to a later time without an event; for a run that has none."""
        self._now = tick


class At(simpy.Event):
    """An event after a delay, with a priority among those of the same instant."""

    def __init__(self, clock: Clock, delay: int, priority: int, then: Callable[[simpy.Event], None]) -> None:
        # as in simpy.Timeout, which fixes the priority; Event.__init__ would only set what is set here
        self.env = clock
        self.callbacks = [then]
        self._value = None
        self._ok = True
        clock.schedule(self, priority, delay)  # type: ignore[arg-type]
