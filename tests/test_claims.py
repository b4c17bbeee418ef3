"""The claims table: verdicts follow the tolerances, every row stands alone, the page lists what the command says."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from simmoe.cli.main import app
from simmoe.validation.claims import page as claims
from simmoe.validation.claims.claim import Claim, holds, speak

PAGE = Path(__file__).parents[1] / "validate" / "claims" / "README.md"


@pytest.fixture(scope="module")
def spoken():
    return [speak(claim) for claim in claims.all_claims()]


def claim(ours, published, **more):
    return Claim(
        claim="c", source="s", published=published, unit="x", compute=None if ours is None else lambda: ours, **more
    )


@pytest.mark.parametrize(
    ("kind", "ours", "published", "agrees"),
    [("count", 1.02, 1, True), ("count", 1.04, 1, False), ("operator", 0.86, 1, True), ("system", 1.3, 1, False),
     ("historic", 0.51, 1, True), ("historic", 2.1, 1, False), ("points", -3, 1.9, True), ("points", -3, 2.1, False),
     ("at least", 1.0, 1, True), ("at most", 1.1, 1, False)],
)  # fmt: skip
def test_a_verdict_is_what_its_kind_tolerates(kind, ours, published, agrees):
    assert holds(kind, ours, published) == agrees
    verdict = speak(claim(ours, published, kind=kind, because="of x")).verdict
    assert verdict == ("reproduced" if agrees else "differs, because of x")


def test_a_claim_whose_inputs_hold_the_answer_says_so():
    assert speak(claim(1, 1, by_definition=True)).verdict == "reproduced, by definition"
    assert speak(claim(2, 1, by_definition=True, because="of x")).verdict == "differs, because of x"
    assert "2 reproduced (1 of them by definition), 0 differ" in claims.summary(
        [speak(claim(1, 1, by_definition=True)), speak(claim(1, 1))]
    )


def test_what_cannot_be_spoken_to_has_no_number_but_a_reason():
    found = speak(claim(None, 3, because="about taste"))
    assert (found.ours, found.verdict) == (None, "cannot speak: about taste")


def test_at_least_twenty_five_claims_are_spoken_to_each_from_a_computation(spoken):
    assert sum(s.ours is not None and not s.claim.by_definition for s in spoken) >= 25
    assert len({s.claim.claim for s in spoken}) == len(spoken)
    assert all(s.claim.source and s.claim.unit and not s.claim.claim.startswith("...") for s in spoken)
    assert all(s.claim.because for s in spoken if not s.verdict.startswith("reproduced"))


def test_what_is_counted_is_reproduced(spoken):
    assert [
        s.claim.claim for s in spoken if s.claim.kind == "count" and s.ours and not s.verdict.startswith("reproduced")
    ] == []


def test_most_of_what_is_timed_is_reproduced(spoken):
    timed = [s for s in spoken if s.ours is not None and s.claim.kind != "count" and not s.claim.by_definition]
    assert sum(s.verdict == "reproduced" for s in timed) > 0.65 * len(timed)


def test_the_command_gives_the_agreed_keys():
    result = CliRunner().invoke(app, ["validate", "claims", "--json"])
    rows = json.loads(result.stdout)
    assert {"claim", "source", "published", "ours", "unit", "verdict"} <= set(rows[0])
    assert any(row["ours"] is None for row in rows)


def test_the_page_lists_every_claim(spoken):
    listed = re.findall(r"^\| (.+?) \| ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    assert [s.claim.claim for s in spoken] == listed
