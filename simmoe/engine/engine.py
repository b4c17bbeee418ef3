"""One engine step of a batch, as named parts and their total; `tabulate` compiles the same to a table.

Overlap rule: the parts of a step run one after another on the device, unless the deployment's ``exchange.overlap`` puts
something under dispatch and combine, which then count with what still shows; the host's time is added, and the total is
their sum. Attention runs on each data-parallel rank's share of the batch, experts see the tokens of all ranks. Pipeline
stages work on micro-batches (`costs.pipeline`). With speculative decoding a decoding request brings the rows it
verifies to every product, to the experts and to the head, and drafting comes on top (`costs.speculation`). An encoder
reads a prompt whole, its attention both ways; the decoder sees the prompt through cross-attention alone, in one kernel
with its own context.
Left out: power throttling, collectives that slow each other. Checked against: validate/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from simmoe.costs import overlap, pipeline
from simmoe.costs.attention_layers import AttentionLayers
from simmoe.costs.layout import active_and_pool
from simmoe.costs.moe_layers import MoeLayers
from simmoe.costs.operators.host import is_host
from simmoe.costs.precision import on_device, precision_of
from simmoe.costs.speculation import Drafts, drafter
from simmoe.costs.timing import KernelTimes, kernel_times
from simmoe.engine.dense_layers import DenseLayers
from simmoe.engine.matrices import Matrix, before_attention, cross_keys, cross_queries, token_matrices
from simmoe.engine.step import UNFITTED_LOG_SIGMA, Batch, StepBreakdown, micro_batches, spread
from simmoe.specs.deployment import Deployment
from simmoe.specs.engines import EngineParameters, engine_kernels, engine_parameters
from simmoe.specs.hardware import Hardware
from simmoe.specs.model import Model

Array = NDArray[np.float64]


class Engine:
    """Times steps of one deployment of one model on one kind of device.

    Parameters
    ----------
    hardware, model, deployment : the specs.
    times : how kernels are timed; None: the hardware's own calibration, or its neighbour's.
    inclusion : chance of each expert to be in a token's top-k, shape (experts,); None: uniform routing.
    parameters : what the engine adds around kernels; None: the defaults of its version.

    Attributes
    ----------
    width : rows a decoding request brings to a step: its own and drafts to verify. [tokens]
    sigma : part -> spread of ln(measured / predicted) of the steps timed last. [-]

    Raises
    ------
    SpecError
        If the cap or the pool exceeds what the model has, or engines do not serve the number format on the device.
    """

    def __init__(
        self,
        hardware: Hardware,
        model: Model,
        deployment: Deployment,
        times: KernelTimes | None = None,
        inclusion: Array | None = None,
        parameters: EngineParameters | None = None,
    ) -> None:
        self.hardware, self.model, self.deployment = hardware, model, deployment
        known = engine_kernels(deployment, hardware.device.architecture)
        self.times = times if times is not None else kernel_times(hardware, deployment.engine, known)
        self.inclusion = inclusion
        self.precision, widened = on_device(precision_of(model, deployment), hardware.device, deployment.engine)
        if widened is not None:
            self.times.notes[widened] = None
        self.top_k, self.num_experts = active_and_pool(model, deployment)
        self.sigma: dict[str, float | Array] = {}
        self._given = parameters
        self.width = deployment.rows_per_decode
        stack = model.encoder_stack
        self.encoder = Engine(hardware, stack, deployment, self.times, inclusion, parameters) if stack else None

    @cached_property
    def parameters(self) -> EngineParameters:
        """What the engine adds around kernels."""
        return self._given or engine_parameters(self.deployment, self.hardware.device.name, self.model.layers)

    @property
    def host_per_row(self) -> float:
        """Host time a sequence adds, by the rows it samples: every data-parallel rank has its own scheduler. [s]"""
        return self.parameters.host_time_per_sequence / self.deployment.dp / self.width

    @property
    def _experts_tuned(self) -> bool:
        """Whether the engine's version shipped a tuned expert kernel for this shape: slowdown leaves it alone."""
        e, d = self.model.experts, self.deployment
        width = e.inter_size / d.expert_shards if e else 0
        return (self.num_experts, width) in self.parameters.tuned_expert_shapes

    # ---- what depends on the number of tokens alone -----------------------------------------------------------

    @cached_property
    def dense(self) -> DenseLayers:
        """Products of every token, norms, sums over tensor-parallel ranks and the head."""
        return DenseLayers(self.hardware, self.model, self.deployment, self.times, self.precision, self.parameters)

    @cached_property
    def moe(self) -> MoeLayers | None:
        """The MoE layers, None of a dense model."""
        if self.model.experts is None:
            return None
        return MoeLayers(
            self.model, self.deployment, self.times, self.precision, self.top_k, self.num_experts, self.inclusion,
            self._shared_fused,
        )  # fmt: skip

    @property
    def _shared_fused(self) -> bool:
        """Whether the shared expert runs as one more routed expert."""
        e = self.model.experts
        alike = e is not None and e.num_shared == 1 and e.shared_inter_size == e.inter_size
        return self.parameters.fuses_shared_expert and alike and self.deployment.ep == 1

    def token_parts(
        self, tokens: Array, attention_s: Array | float = 0.0, micro_batches: int | None = None
    ) -> dict[str, Array]:
        """Time of every part that depends on the step's token count alone, all layers. [s]

        Parameters
        ----------
        tokens : shape (n,), new tokens of the whole replica in the step. [tokens]
        attention_s : attention of the step, under which two half batches hide their exchange. [s]
        micro_batches : parts of the step that follow each other through pipeline stages; the time is one's. None: as
            many as stages.
        """
        d, m = self.deployment, self.model
        halves = 2 if self._exchanges_tokens and d.exchange.overlap == "two_batch" else 1
        cut = d.dp * (micro_batches or d.pp) * halves
        local = np.maximum(np.ceil(np.asarray(tokens, dtype=np.float64) / cut), 1.0)
        parts = self.dense.products(self._matrices(), local)
        if self.moe is not None:
            parts |= self.moe.parts(local)
            self.sigma |= self.moe.sigma
        if d.tp_size > 1:
            # gathered tokens come back as sums over the ranks of one index, which are reduced once more
            reduced = not self._exchanges_tokens or (self.moe is not None and self.moe.exchange.gathers)
            after_ffn = m.layers if reduced else m.dense_layers
            message = local * m.hidden * 2.0
            across = m.layers if m.encoder is not None else 0  # cross-attention ends in sums over the ranks too
            embedding = 1  # each rank has a part of the vocabulary
            sums = embedding + m.layers + across + after_ffn
            parts["all_reduce"] = sums * self.dense.all_reduce(message)
        parts["elementwise"] = self.dense.elementwise(local)
        self.sigma |= self.dense.sigma
        slow = self.parameters.kernel_slowdown
        parts = {
            name: value if name == "routed_experts" and self._experts_tuned else value * slow
            for name, value in parts.items()
        }
        streams = not is_host(self.hardware)
        if streams and self.parameters.shared_beside_tokens and "shared_experts" in parts:
            beside = overlap.beside_routed_experts(parts)
            parts["shared_experts"] = np.where(
                local <= self.parameters.shared_beside_tokens, beside, parts["shared_experts"]
            )
        if self.moe is not None and d.exchange.overlap == "shared":
            parts = overlap.under_shared_expert(parts)
        if self.moe is not None and halves == 2:
            both = {name: 2 * value for name, value in parts.items()}
            held, bulk = self.moe.exchange.held_share(local)
            ahead = 2 * slow * self.dense.products(before_attention(m, d), local)["projections"]
            parts = overlap.two_batches(
                both, attention_s, held, m.moe_layers / m.layers, kept=bulk, staged=~bulk, ahead=ahead
            )
        host = self.parameters.host_time_per_step
        parts["host"] = np.full(local.shape, host)
        self.sigma["host"] = UNFITTED_LOG_SIGMA
        return parts

    def _matrices(self) -> list[Matrix]:
        m, d = self.model, self.deployment
        shapes = token_matrices(m, d, replicated=d.shared_whole, fused=self._shared_fused)
        return shapes if self.encoder is None else shapes + cross_queries(m, d.tp_size)

    def encode(self, prompts: Sequence[int]) -> dict[str, float]:
        """Parts of encoding whole prompts of these lengths, and of the keys and values the decoder sees of them. [s]"""
        assert self.encoder is not None
        d = self.deployment
        tokens = np.array([max(sum(prompts), 1)], dtype=np.float64)
        lengths = np.array(prompts, dtype=np.float64)
        # n queries after (n - 1) / 2 cached tokens form the n^2 pairs of attention both ways
        attention = float(self.encoder.prefill_attention(lengths, (lengths - 1) / 2).sum()) / d.dp
        parts = {name: float(value[0]) for name, value in self.encoder.token_parts(tokens, attention).items()}
        local = np.maximum(np.ceil(tokens / d.dp), 1.0)
        # spreads stay those of the step's own tokens
        across = self.dense.products([cross_keys(self.model, d.tp_size)], local)["projections"]
        parts["projections"] += float(across[0]) * self.parameters.kernel_slowdown
        return parts | {"attention": attention, "host": 0.0}

    @property
    def _exchanges_tokens(self) -> bool:
        """Experts shared by data-parallel ranks: tokens travel (dispatch, combine) instead of being reduced."""
        return self.model.experts is not None and self.deployment.exchanges_tokens

    # ---- attention and head -----------------------------------------------------------------------------------

    @cached_property
    def attention(self) -> AttentionLayers:
        """The attention layers."""
        return AttentionLayers(self.hardware, self.model, self.deployment, self.times, self.precision, self.width)

    def decode_attention(self, requests: Array, context: Array) -> Array:
        """Attention of ``requests`` decoding requests with a mean ``context`` each, all layers. [s]"""
        layers = self.attention
        return self._slowed((layers.decode if self.width == 1 else layers.mixed)(requests, context))

    def prefill_attention(self, new: Array, cached: Array) -> Array:
        """Attention of one prompt chunk of ``new`` tokens after ``cached`` ones, all layers. [s]"""
        return self._slowed(self.attention.prefill(new, cached))

    def mixed_attention(self, requests: Array, context: Array) -> Array:
        """As `decode_attention` in a step that also computes prompts, all layers. [s]"""
        return self._slowed(self.attention.mixed(requests, context))

    def _slowed(self, attention_s: Array) -> Array:
        self.sigma["attention"] = self.attention.sigma
        return attention_s * self.parameters.kernel_slowdown

    def head(self, sequences: Array) -> Array:
        """Vocabulary projection of the sequences that sample, and the drawing of their tokens. [s]"""
        seconds = self.dense.head(sequences)
        self.sigma["head"] = self.dense.sigma["head"]
        return seconds

    def rows(self, tokens: Array) -> Array:
        """Rows that kernels work on for a step's tokens: a captured graph's next size, where the engine uses them.

        vLLM captures 1, 2, 4, then every 8 up to 256 and every 16 up to 512, at most twice the rows that
        ``max_num_seqs`` requests bring (``cudagraph_capture_sizes`` of its compilation config).
        """
        d = self.deployment
        if not self.parameters.pads_to_graphs:
            return tokens
        ranks = d.dp * d.pp
        each = np.ceil(np.asarray(tokens, dtype=np.float64) / ranks)
        small = np.where(each <= 2, each, np.where(each <= 4, 4, 8 * np.ceil(each / 8)))
        padded = np.where(each <= 256, small, 16 * np.ceil(each / 16))
        captured = min(2 * d.max_num_seqs * self.width, 512)
        return np.where(each <= captured, np.maximum(padded * ranks, tokens), tokens)

    # ---- what stands around the layers ------------------------------------------------------------------------

    @cached_property
    def drafts(self) -> Drafts | None:
        """What drafts tokens on the device; None: nothing does."""
        found = drafter(self.model, self.deployment)
        chosen = self.deployment.speculative
        if found is None or chosen is None:
            return None
        inclusion = self.inclusion if chosen.method == "mtp" else None
        stack = Engine(self.hardware, *found, self.times, inclusion, self.parameters)
        return Drafts(stack, chosen.draft_tokens, chosen.method == "mtp", self.parameters.kernel_slowdown)

    def _drafting(self, batch: Batch, rows: Array) -> float:
        """Drafting in a step. [s]"""
        drafts, requests = self.drafts, np.array([float(batch.decode_requests)])
        if drafts is None:
            return 0.0
        seconds = float(drafts.tokens_s(rows)[0])
        if batch.decode_requests:
            context = batch.decode_context_tokens / requests
            seconds += float((drafts.requests_s(requests) + drafts.attention_s(requests, context))[0])
        for new, cached in batch.prefill_chunks:
            seconds += float(drafts.prompt_attention_s(np.array([new]), np.array([cached]))[0]) / self.deployment.dp
        self.sigma["draft"] = drafts.sigma
        return seconds

    @property
    def drained(self) -> bool:
        """Whether a pipeline ends one step before it begins the next."""
        return self.deployment.pipeline == "drained"

    def _hand_over(self, tokens: Array, micro_batches: Array | float) -> Array:
        """Time each stage waits for a micro-batch to arrive, shape (stages, n). [s]"""
        each = np.ceil(tokens / (self.deployment.dp * micro_batches))
        return pipeline.hand_over_s(self.model, self.deployment, self.hardware, np.maximum(each, 1.0))

    def waiting(self, parts: Mapping[str, Array], tokens: Array, requests: Array | None, chunks: int = 0) -> Array:
        """What a step takes longer than its parts because of pipeline stages: of decodes, or of prompt chunks. [s]"""
        stages = self.deployment.pp
        if stages == 1:
            return np.zeros(np.shape(tokens))
        self.sigma["pipeline"] = UNFITTED_LOG_SIGMA
        layers = pipeline.stage_times(parts, self.model, stages)
        in_flight = float(min(chunks, stages)) if requests is None else np.ceil(requests / self.deployment.dp)
        in_flight = np.minimum(in_flight, stages)
        arriving = layers + self._hand_over(tokens, in_flight)
        taken = pipeline.step_s(arriving, in_flight, drained=self.drained)
        return np.asarray(taken - layers.sum(axis=0))

    # ---- a step --------------------------------------------------------------------------------

    def step(self, batch: Batch, finishing_prompts: int | None = None) -> StepBreakdown:
        """Time one step, part by part.

        ``finishing_prompts`` of its chunks end their prompt and sample a token; None: all of them.
        """
        if self.encoder is not None and batch.prefill_chunks:  # an answer begins with a decoder step of its own
            prompts = [new for new, _ in batch.prefill_chunks]
            begun = len(prompts) if finishing_prompts is None else finishing_prompts
            decoding = self.step(Batch(batch.decode_requests + begun, batch.decode_context_tokens + sum(prompts)))
            both = decoding.parts
            for name, seconds in self.encode(prompts).items():
                both[name] = both.get(name, 0.0) + seconds
            sigma = {name: float(np.ravel(value)[0]) for name, value in self.sigma.items()}
            return StepBreakdown(**{f"{n}_s": s for n, s in both.items()}, log_sigma=spread(both, sigma))
        rows = self.rows(np.array([max(batch.rows(self.width), 1)], dtype=np.float64))
        attention = self._attention(batch)
        chunks = self._micro_batches(batch)
        timed = self.token_parts(rows, attention, min(chunks, self.deployment.pp) or None)
        if chunks:
            timed["pipeline"] = self.waiting(timed, rows, None, chunks)
        finishing = len(batch.prefill_chunks) if finishing_prompts is None else finishing_prompts
        sequences = batch.decode_requests * self.width + finishing
        timed["head"] = self.head(np.array([sequences], dtype=np.float64))
        timed["attention"] = np.array([attention])
        if not chunks:
            timed["pipeline"] = self.waiting(timed, rows, np.array([float(batch.decode_requests)]))
        timed["host"] = timed["host"] + self.host_per_row * sequences
        timed["draft"] = np.array([self._drafting(batch, rows)])
        parts = {name: float(value[0]) for name, value in timed.items()}
        named = {f"{name}_s": value for name, value in parts.items()}
        return StepBreakdown(**named, log_sigma=spread(parts, {name: np.max(s) for name, s in self.sigma.items()}))

    def _micro_batches(self, batch: Batch) -> int:
        """Those of a step with prompts that follow each other through stages; 0: it has none."""
        chunks, d = len(batch.prefill_chunks), self.deployment
        return micro_batches(chunks, batch.rows(self.width), d.max_num_batched_tokens * d.dp) if chunks else 0

    def _attention(self, batch: Batch) -> float:
        attention = 0.0
        if batch.decode_requests:
            mean = batch.decode_context_tokens / batch.decode_requests
            kernel = self.mixed_attention if batch.prefill_chunks else self.decode_attention
            attention += float(kernel(np.array([batch.decode_requests]), np.array([mean]))[0])
        d, chunks = self.deployment, self._micro_batches(batch)
        in_flight = np.array([float(min(max(chunks, 1), d.pp))])
        share = float(pipeline.prompt_share(in_flight, d.pp, drained=self.drained)[0]) / d.dp
        for new, cached in batch.prefill_chunks:  # spread over the data-parallel ranks
            attention += share * float(self.prefill_attention(np.array([new]), np.array([cached]))[0])
        return attention

    def usual_attention(self, tokens: Array, mean_context: float, prompt_tokens: float) -> Array | float:
        """Attention of steps told by their tokens alone: requests that decode up to the limit, prompts beyond. [s]"""
        if self.deployment.exchange.overlap != "two_batch":
            return 0.0
        decoding = np.minimum(tokens / self.width, self.deployment.requests_per_replica)
        chunk = np.array([min(prompt_tokens, float(self.deployment.max_num_batched_tokens))])
        chunks = (tokens - decoding * self.width) / np.maximum(chunk, 1.0) / self.deployment.dp
        decode = self.decode_attention(decoding, np.full(tokens.shape, mean_context))
        return np.asarray(decode + chunks * self.prefill_attention(chunk, np.zeros(1)), dtype=np.float64)
