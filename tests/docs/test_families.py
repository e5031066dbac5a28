"""The table of families shows what was found, of every family, and no family is left unanswered."""

import pytest

from docs.families import PAGE, Results, all_cases, page_of
from docs.families.cases import MESHES, Case
from docs.families.limited import outcome_of


def test_the_page_shows_the_results():
    """Made anew by `python -m docs.families llama` where it does not."""
    assert PAGE.read_text() == page_of(Results.read())


@pytest.mark.parametrize("mesh", MESHES)
def test_B8_every_family_passes_or_is_refused(mesh):
    counts = Results.read().counts(mesh)
    assert set(counts) <= {"passed", "refused"}
    assert counts["passed"] > 20


@pytest.mark.slow
def test_B8_no_family_is_left_out():
    assert {case.name for case in all_cases()} == set(Results.read().outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["olmo2", "gemma3_text", "bloom", "mamba2"])
def test_B8_results_are_those_of_a_run(model_type):
    """In processes with limits, as the command runs them."""
    (case,) = (case for case in all_cases() if case == Case(model_type))
    for mesh, options in MESHES.items():
        assert outcome_of(case, options).verdict == Results.read().outcomes[case.name][mesh].verdict
