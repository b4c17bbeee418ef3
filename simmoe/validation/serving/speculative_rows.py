"""Speculative decoding of a measured row, from the words of its ``spec_decoding`` cell and what its source says.

An acceptance that the row or its source states is taken as stated, the middle of a range. Where only the drafts are
known it is assumed: the DeepSeek-V3 report finds 85 to 90 % of second tokens accepted (arXiv 2412.19437, sec. 5.4.3),
taken as a rate of 0.875 for every draft, which flatters the later ones. The two kinds are groups apart. Anything else,
above all rows of which it is unknown whether they speculated, stays out.
"""

from __future__ import annotations

import re

from simmoe.specs.speculative import Speculative

#: Rate assumed where a source gives none. [-]
ASSUMED_RATE = 0.875
#: Acceptance lengths by drafts that a source states once for all its rows. [tokens]
_BY_SOURCE = {"2025-09-26-sglang-ant-group": {1: (1.8, 1.9), 2: (2.4, 2.7)}}


def speculation(words: str, source: str = "", notes: str = "") -> tuple[Speculative | None, str] | None:
    """What a row drafted, and what is told of its acceptance: "", "stated" or "assumed"; None: not understood.

    Parameters
    ----------
    words, source, notes : cells ``spec_decoding``, ``source`` and ``notes``; the last may hold the server's command.
    """
    if words in ("", "none", "none?", "nan"):
        return None, ""
    if found := re.fullmatch(r"simulated mtp \((\d+)% acceptance.*\)", words):
        return _mtp(1, acceptance_rate=int(found.group(1)) / 100), "stated"
    if found := re.fullmatch(r"mtp \((\d+)-token window, accept ([\d.]+)\)", words):  # of tokens verified together
        return _mtp(int(found.group(1)) - 1, acceptance_length=float(found.group(2))), "stated"
    if found := re.match(r"mtp steps=(\d+)", words):
        drafts = int(found.group(1))
        for name, lengths in _BY_SOURCE.items():
            if name in source and drafts in lengths:
                return _mtp(drafts, acceptance_length=sum(lengths[drafts]) / 2), "stated"
        return _mtp(drafts, acceptance_rate=ASSUMED_RATE), "assumed"
    if found := re.fullmatch(r"mtp(\d+)", words):
        return _mtp(int(found.group(1)), acceptance_rate=ASSUMED_RATE), "assumed"
    if words == "eagle/mtp" and (found := re.search(r"--speculative-num-steps (\d+)", notes)):
        return _mtp(int(found.group(1)), acceptance_rate=ASSUMED_RATE), "assumed"
    return None


def _mtp(drafts: int, **acceptance: float) -> Speculative:
    return Speculative(method="mtp", draft_tokens=drafts, **acceptance)
