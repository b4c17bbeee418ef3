"""Published claims that a model of speed cannot check, each with the reason."""

from __future__ import annotations

from simmoe.validation.claims.claim import Claim

_QUALITY = "quality is tabulated, not computed"
_TRAINING = "about training"


def claims() -> list[Claim]:
    """All of them."""
    rows: tuple[tuple[str, str, float | None, str, str], ...] = (
        ("DeepSeek-V3 loses 0.1 points from 8 to 6 experts", "arXiv 2505.03531", 0.1, "points", _QUALITY),
        (
            "half of DeepSeek-V2-Lite's experts at random: accuracy 66 to 38",
            "arXiv 2505.03531",
            37.7,
            "points",
            _QUALITY,
        ),
        ("dropping 11 % of tokens is harmless in fine-tuning", "ST-MoE, arXiv 2202.08906", 11, "%", _QUALITY),
        ("distillation keeps 30 to 40 % of the quality gain", "Switch, arXiv 2101.03961", 37, "%", _QUALITY),
        (
            "task-level routing serves 1.87 times as much",
            "arXiv 2110.03742",
            1.87,
            "x",
            "shapes and batch of its translation models are not known here",
        ),
        ("1000, 910, 860 examples/s at capacity 1.0, 1.25, 2.0", "Switch, table 1", 1.16, "x", _TRAINING),
        ("Switch trains 7 times as fast as T5", "Switch, arXiv 2101.03961", 7, "x", _TRAINING),
        ("FasterMoE is 17 times faster than ZeRO", "FasterMoE, PPoPP 2022", 17.87, "x", _TRAINING),
        ("SwinV2-MoE runs 2.11 times faster under Tutel", "Tutel, arXiv 2206.03382", 2.11, "x", "a vision model"),
        (
            "EPLB gives 2.54 times the decode",
            "SGLang team, May 2025",
            2.54,
            "x",
            "256 experts do not divide over its 72 ranks without copies: what it compares with is not said",
        ),
        (
            "placement lowers the largest load share from 0.6 to 0.4",
            "arXiv 2303.06182, sec. VII",
            0.4,
            "share",
            "needs their trace of experts",
        ),
        (
            "expert buffering cuts static memory 1.47 times",
            "arXiv 2303.06182, sec. VI",
            1.47,
            "x",
            "what counts as static is not said: the 2.25 GB it saves are a claim of their own",
        ),
        (
            "1.5 T parameters in 25 ms",
            "DeepSpeed-MoE, as often quoted",
            25,
            "ms",
            "dimensions of that model are not published; the claim belongs to the one-trillion model",
        ),
        (
            "over 88 % of experts found at 5 % cache capacity",
            "arXiv 2602.03921",
            88,
            "%",
            "rests on a learned prefetcher's accuracy",
        ),
        ("task routing is 2 to 3 times faster", "survey", None, "x", "no source behind it"),
    )
    return [
        Claim(claim=claim, source=source, published=published, unit=unit, because=why)
        for claim, source, published, unit, why in rows
    ]
