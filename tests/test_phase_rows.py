"""Rows that measured one phase alone are predicted as steps of that phase, or counted with the reason."""

import numpy as np
import pytest

from simmoe.routing.layers import layer_kinds
from simmoe.specs.load import load_model
from simmoe.validation.serving.phase_rows import compare_row, is_phase_row
from simmoe.validation.serving.phases import R1_BALANCED, R1_FAVOURITES
from simmoe.validation.serving.rows import group_of
from simmoe.validation.summary import Outcome

ROW = {
    "source_id": "r", "model": "DeepSeek-V3", "precision": "fp8", "gpu": "H100-SXM", "num_gpus": 16, "engine": "sglang",
    "tp": 1, "ep": 16, "dp": 16, "dp_attention": "yes", "disaggregated": "yes", "spec_decoding": "none",
    "phase": "decode", "input_tokens": 2000, "batch_per_gpu": 64, "output_tokens_per_s": 1e5, "active_experts": 8,
    "total_experts": 256,
}  # fmt: skip


def outcome(**changes):
    result = Outcome()
    compare_row({**ROW, **changes}, "f.csv", 2, "g", result)
    return result


def test_decode_rate_is_the_batch_over_a_step_and_grows_less_than_the_batch():
    small, large = (outcome(batch_per_gpu=batch).comparisons[0] for batch in (32, 128))
    assert small.quantity == "output_tokens_per_s"
    assert small.predicted < large.predicted < 4 * small.predicted
    assert small.lower < small.predicted < small.upper


def test_prefill_rates_count_prompt_tokens_and_fall_with_the_prompt():
    row = {"phase": "prefill", "input_tokens_per_s": 1e5, "output_tokens_per_s": float("nan")}
    short, long = (outcome(**row, input_tokens=tokens).comparisons[0] for tokens in (1024, 8192))
    assert short.quantity == "input_tokens_per_s"
    assert long.predicted < short.predicted


def test_a_pool_that_devices_do_not_divide_is_filled_with_copies():
    assert outcome(num_gpus=72, ep=72, dp=72).comparisons


def test_notes_tell_of_copies_and_of_routing_forced_even():
    """Copies free tokens from their groups, so that more cross nodes; an even load has no busiest rank."""
    row = {"phase": "prefill", "input_tokens_per_s": 1e5, "output_tokens_per_s": float("nan"), "input_tokens": 4096}
    row |= {"num_gpus": 32, "ep": 32, "dp": 32}
    plain, copies, even = (
        outcome(**row, notes=notes).comparisons[0].predicted
        for notes in ("", "EPLB with 32 redundant experts", "forced balanced routing")
    )
    assert copies < 0.95 * plain
    assert even != plain


def test_favourites_make_ranks_as_uneven_as_counted():
    """TensorRT-LLM's EPLB example for DeepSeek-R1: steps of 128 tokens a rank, means over layers; see phases.py."""

    def layers(routing, ep):
        return layer_kinds(routing.vary(orders=100), load_model("deepseek-v3").experts, 58, pool=256, top_k=8, ep=ep)

    def busiest(kinds, ep):
        return np.mean([kind.load(np.array([128.0 * ep])).routed_pairs[0] for kind in kinds]) / (128 * 8)

    uneven = layers(R1_FAVOURITES, 32)
    assert busiest(uneven, 32) == pytest.approx(2.564, abs=0.1)
    scatter = np.mean([kind.inclusion.reshape(32, 8).sum(axis=1).std(ddof=1) * 32 / 8 for kind in uneven])
    assert scatter == pytest.approx(491.65 / 1024, rel=0.05)
    assert busiest(layers(R1_BALANCED, 36), 36) == pytest.approx(1.115, abs=0.01)


def test_the_date_of_another_engine_is_no_release_of_sglang():
    """SGLang of February 2025 ran 2.5 times below its kernels; DeepSeek's own engine of that month did not."""
    dated = {"num_gpus": 128, "ep": 128, "dp": 128, "gpu": "H800-SXM", "measured_date": "2025-02/03"}
    own, old = (outcome(**dated, engine=engine).comparisons[0].predicted for engine in ("deepseek internal", "sglang"))
    assert own > 2.0 * old


def test_a_host_is_charged_to_its_own_engine_alone():
    """SGLang's scheduler handles requests one by one; DeepSeek's profile is of the device."""
    row = {"num_gpus": 128, "ep": 128, "dp": 128, "gpu": "H800-SXM", "batch_per_gpu": 128}
    own, sglang = (outcome(**row, engine=name).comparisons[0].predicted for name in ("deepseek internal", "sglang"))
    assert own > 1.02 * sglang


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"batch_per_gpu": float("nan")}, "batch"),
        ({"input_tokens": float("nan")}, "context"),
        ({"spec_decoding": "mtp"}, "speculative"),
        ({"gpu": "Abacus"}, "no hardware file"),
        ({"output_tokens_per_s": float("nan")}, "without a rate"),
    ],
)
def test_what_cannot_be_predicted_is_counted_with_the_reason(changes, reason):
    result = outcome(**changes)
    assert not result.comparisons
    assert reason in next(iter(result.skipped))


def test_accepted_drafts_count_and_their_rows_stand_apart():
    plain, drafted = (outcome(spec_decoding=words).comparisons[0] for words in ("none", "mtp steps=1"))
    assert 1.1 * plain.predicted < drafted.predicted < 1.875 * plain.predicted
    assert group_of({**ROW, "spec_decoding": "mtp steps=1"}) == "/speculative, acceptance assumed"
    assert group_of(ROW) == ""


def test_mixed_rows_are_not_phase_rows():
    assert is_phase_row(ROW)
    assert not is_phase_row({**ROW, "phase": "mixed"})
