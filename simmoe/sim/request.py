"""A request on its way through the engines: what it asks for, how far it is, and what it holds."""

from __future__ import annotations

from simmoe.sim.prefix_cache import Held, Path
from simmoe.specs.trace_formats import Segments


class Request:
    """One request on its way. Times in ticks; -1 where a thing has not happened yet."""

    __slots__ = (
        "admitted",
        "arrival",
        "cached",
        "drawn",
        "final_blocks",
        "finish_step",
        "first_token",
        "generated",
        "held",
        "index",
        "input_tokens",
        "joined",
        "last_token",
        "loaded",
        "output_tokens",
        "path",
        "preemptions",
        "prompt",
        "reserved",
        "swapped",
        "target",
        "tokens",
    )

    def __init__(self, index: int, arrival: int, input_tokens: int, output_tokens: int, prompt: Segments = ()) -> None:
        self.index = index
        self.arrival = arrival
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.target = input_tokens
        """Tokens to prefill before the next token can be sampled: the prompt, after a preemption also the output."""
        self.cached = 0
        """Tokens in the KV cache; kept up to date during prefill only."""
        self.generated = 0
        """Output tokens; kept up to date outside decoding only."""
        self.finish_step = -1
        """Rank step count at which it will have its last token, while decoding."""
        self.final_blocks = 0
        """Blocks it will hold at its end, while running."""
        self.joined = -1
        """Rank step count at which it began to decode."""
        self.drawn = 0
        """Decode steps it had before, of those drawn."""
        self.tokens: list[int] = []
        """What its steps since emit, where that is drawn."""
        self.admitted = -1
        self.first_token = -1
        self.last_token = -1
        """When the token before a preemption (or a move to another engine) came."""
        self.preemptions = 0
        self.prompt = prompt
        """What the prompt is made of, see `arrivals.shapes`; () is a prompt like no other."""
        self.path: Path = []
        """The prompt in the prefix cache, once looked up."""
        self.held: Held = []
        """Blocks of it there that this request holds."""
        self.reserved = 0
        """Blocks it has for the rest of its prompt."""
        self.loaded = 0
        """Tokens whose keys and values come with it, computed elsewhere."""
        self.swapped = 0
        """Tokens whose keys and values wait in host memory since a preemption."""

    def lose_cache(self, cached: int, now: int) -> None:
        """Its ``cached`` tokens are gone (0: still in its prompt), to be computed again; its last one came ``now``."""
        if self.finish_step >= 0:
            self.generated = cached + 1 - self.input_tokens
            self.target = cached + 1
            self.finish_step = -1
            self.last_token = now
        self.cached = self.loaded = self.swapped = self.reserved = 0
        self.preemptions += 1
