"""KV blocks copied to host memory as they fill: what keeping that pool's books costs the scheduler.

Only the time it takes: what such a pool holds and how fast it is read back is `costs.kv_offload` and `host_memory`.

Model: vLLM's OffloadingConnector and its LRU manager (``vllm/v1/kv_offload/lru_manager.py``, 0.11 to 0.15). Every block
a running request fills is given a place in the pool, unless its content has one. The copy counts as complete only when
the request ends or is preempted; until then the place cannot be given to another. Who needs places walks the pool's
entries, least recently used first, to find complete ones; where there are too few, all entries were walked, the store
is refused with a warning in the log, and tried again in the next step. So once running requests hold more blocks than
the pool, every step walks the whole pool for each of them: 128 requests and 8,192 entries are a million entries a step.
Places are counted per prompt segment and per request, complete ones taken to be spread evenly over the pool.
Left out: loading blocks back, the copies themselves (a few percent of a PCIe link, beside the steps).
Checked in: tests/test_kv_offload.py against explicit entries; with validate/vllm_showdown.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from simmoe.costs.memory import kv_bytes_per_token
from simmoe.sim.request import Request
from simmoe.sim.scheduler import Scheduler
from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import EngineParameters
from simmoe.specs.model import Model

SMALL_POOL = 1024
POOL_GROWTH = 1 / 3
"""An entry's walk is the same few hundred instructions in any pool, and waits for caches in one that outgrows the
core's: beyond ``SMALL_POOL`` it takes longer with this power of their number. Taken half way between two measurements
with CPython on an AMD EPYC with 512 KiB of L2 a core (an ``OrderedDict`` of 32-byte keys to ctypes structures as vLLM
has, after three turnovers), as a scheduler's core is neither left alone nor always fought over:

- nothing disturbs (shortest walks, median of 13 draws): 72, 73, 77, 85, 94 and 105 ns an entry at 256, 512, 1,024,
  2,048, 4,096 and 5,461 entries, power 0.16;
- beside other work (tenth percentile of 180 walks): 132, 145, 184, 279, 327 and 485 ns at 1,024, 2,048, 4,096, 5,461,
  8,192 and 12,288 entries, power 0.53.

From 5,461 to 8,192 entries the two give 7 and 24 %, the third 14 %. That 14 % is also what makes the two overloaded
runs of validate/vllm_showdown agree was known when it was chosen. Measured again afterwards, without regard to them
(CPython 3.12, the same kind of core, some 15 runnable processes on two; eight walks of a pool and eight of one half as
large again in turn, 40 to 60 times, for 5 to 9 pools of each size), the sum of all walks an entry grows

- from 5,461 to 8,192 entries by 15 % (8 to 43 % from pool to pool; a typical walk by 12 and, in 9 other pools, 14 %);
- from 2,731 to 4,096, where a pool outgrows 512 KiB, by 43 %; from 1,365 to 2,048 by 28, from 8,192 to 12,288 by 29 %.

Steps wait for sums of walks, not for the quickest tenth, whose 26 % is more because small pools are at times found in
L2. So 14 % holds for such a core beside much other work, a core left alone grows by half of it, and one with more L2
may grow by more at these pools. Which the hosts measured had is not known, and nothing singles out another value.
`tests/benchmarks/test_bench_pool_walks.py` measures it."""
WARNING_ENTRIES = 230
"""A refusal's log line in entries of a small pool: 17 us beside 74 ns, measured with CPython's ``logging`` to a file, a
formatter and a prefixing stream like vLLM's, on the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bookkeeping:
    """A rank's pool in host memory, and the pace of the scheduler that keeps its books.

    Attributes
    ----------
    blocks : places it has.
    entry_s : host time to walk one entry of it, if it is small. [s]
    """

    blocks: int
    entry_s: float


def bookkeeping_of(model: Model, deployment: Deployment, parameters: EngineParameters) -> Bookkeeping | None:
    """The books a deployment's scheduler keeps; None where it has no such pool, or they take no time."""
    rule = deployment.kv_offload
    if rule is None or rule.copies != "filled" or not parameters.offload_entry_time:
        return None
    per_block = deployment.kv_block_size * kv_bytes_per_token(model, deployment) * deployment.devices_per_replica
    return Bookkeeping(blocks=int(rule.host_memory / per_block), entry_s=parameters.offload_entry_time)


class OffloadBooks:
    """The books of one rank's pool.

    Parameters
    ----------
    blocks : places it has.
    block_tokens : tokens of a block. [tokens]
    """

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.blocks = self.free = blocks
        self.block_tokens = block_tokens
        self.refused = 0
        """Requests refused in the steps looked at last."""
        self._slowness = math.pow(max(1.0, blocks / SMALL_POOL), POOL_GROWTH)
        self._offered: dict[Request, int] = {}
        """Blocks of a request that were offered and taken (or found)."""
        self._held: dict[Request, list[tuple[object, int]]] = {}
        """Places whose copy completes with a running request: what they hold, and how many."""
        self._present: dict[object, int] = {}
        """Places of each content, complete or not."""
        self._complete: OrderedDict[object, int] = OrderedDict()
        self._evictable = 0

    def entries_walked(self, scheduler: Scheduler, steps: int) -> float:
        """Store what fills in the next ``steps`` planned steps, at most a block's.

        Returns
        -------
        Entries walked in all these steps, in entries of a small pool.
        """
        self._settle(scheduler)
        pool = scheduler.pool
        period, stride = pool.period, pool.stride
        new = dict.fromkeys(request for request, _, _ in scheduler.chunks)
        walked, self.refused = 0.0, 0
        for request in (*new, *(r for r in scheduler.running if r not in new)):
            offered = self._offered.get(request, 0)
            if request.finish_step >= 0:
                cached = scheduler.cached(request)
                full = (cached + scheduler.growth(request, steps)) // period
            else:  # a prompt's blocks have their names before they are computed
                cached = request.input_tokens * pool.grain
                full = cached // period
            if full > offered:
                waited = cached // period > offered
                tries = steps if waited else max(1, steps - -((cached % period - period) // stride))
                walked += self._store(request, full, tries)
        return walked

    def _settle(self, scheduler: Scheduler) -> None:
        """Complete the copies of requests that run no more."""
        for request in [r for r in self._held if r not in scheduler.running]:
            for content, places in self._held.pop(request):
                self._complete[content] = self._complete.get(content, 0) + places
                self._evictable += places

    def _store(self, request: Request, full: int, tries: int) -> float:
        """Give a request places for its blocks up to the ``full``-th, or refuse it ``tries`` times; entries walked."""
        wanted = [(content, n) for content, n in self._contents(request, full) if n > 0]
        need = sum(n for _, n in wanted)
        lack = max(0, need - self.free)
        if lack > self._evictable:
            self.refused += 1
            return tries * ((self.blocks - self.free) * self._slowness + WARNING_ENTRIES)
        walked = (self.blocks - self.free) * self._slowness * lack / (self._evictable + 1)
        self._evict(lack)
        self.free -= need
        for content, n in wanted:
            self._present[content] = self._present.get(content, 0) + n
        if wanted:
            self._held.setdefault(request, []).extend(wanted)
        self._offered[request] = full
        return walked

    def _contents(self, request: Request, full: int) -> Iterable[tuple[object, int]]:
        """What a request's next blocks hold, and how many of them have no place yet; touches those that have."""
        offered = self._offered.get(request, 0)
        tokens = end = 0
        head: tuple[object, ...] = ()
        for identity, length in request.prompt:
            head, tokens = (*head, identity), tokens + length
            start, end = end, tokens // self.block_tokens
            if head in self._complete:
                self._complete.move_to_end(head)
            if end > offered:
                yield head, end - start - self._present.get(head, 0)
        yield request, full - max(end, offered)

    def _evict(self, places: int) -> None:
        self._evictable -= places
        self.free += places
        while places > 0:
            content, here = next(iter(self._complete.items()))
            lost = min(here, places)
            places -= lost
            self._present[content] -= lost
            if lost == here:
                del self._complete[content]
            else:
                self._complete[content] = here - lost
            if not self._present[content]:
                del self._present[content]
