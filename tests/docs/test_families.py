"""The table of families shows what was found, of every family, and no family is left unanswered."""

import pytest

from docs.families import PAGE, Results, all_cases, page_of
from docs.families.cases import Case
from docs.families.limited import outcome_of
from docs.families.outcome import NOT_RUN
from docs.families.tp_parts import PAGE as PARTS_PAGE
from docs.families.tp_parts import row_of
from dtcp.check.matrix import CHECKS, FIRST
from tests.docs.blocks import ROOT


def test_the_page_shows_the_results():
    """Made anew by `python -m docs.families llama` where it does not."""
    assert PAGE.read_text() == page_of(Results.read())


def test_the_readme_counts_what_the_page_shows():
    counts = Results.read().counts(FIRST)
    models, passed = sum(counts.values()), counts["passed"]
    said = f"Of {models} models of transformers [{passed} pass at cp 2]"
    assert said in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("check", CHECKS)
def test_B8_every_family_passes_or_is_refused(check):
    counts = Results.read().counts(check)
    assert set(counts) <= {"passed", "refused", NOT_RUN}
    assert counts["passed"] > 20


def test_every_family_is_checked_on_cp_and_beside_tp():
    results = Results.read()
    assert results.counts(FIRST)["passed"] >= 120
    assert not any(results.counts(check)[NOT_RUN] for check in (FIRST, "cp 2 x tp 2"))


@pytest.mark.slow
def test_B8_no_family_is_left_out():
    assert {case.name for case in all_cases()} == set(Results.read().outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["olmo2", "gemma3_text", "bloom", "mamba2"])
def test_B8_results_are_those_of_a_run(model_type):
    """In processes with limits, as the command runs them."""
    (case,) = (case for case in all_cases() if case == Case(model_type))
    for check in (FIRST, "cp 2 x tp 2"):
        expected = Results.read().outcome(case.name, check)
        assert outcome_of(case, CHECKS[check]).verdict == expected.verdict


def test_every_family_that_passes_is_on_the_page_of_parts():
    """Made anew by `python -m docs.families.tp_parts` where it is not."""
    rows = [row for row in PARTS_PAGE.read_text().splitlines() if row.startswith(("| `", "| (`"))]
    assert len(rows) - 1 == Results.read().counts(FIRST)["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["phi3", "bloom", "jetmoe"])
def test_what_a_rank_of_tp_holds_is_that_of_its_plan(model_type):
    assert row_of(Case(model_type)) in PARTS_PAGE.read_text().splitlines()
