"""Backends of attention on a GPU, where there is one: python -m pytest -m gpu.

Truth is plain torch in fp64 on the same card. What a card or its packages cannot do is refused in a
sentence, and that is no failure; what is computed must be right.
"""

import pytest
import torch

from benchmarks.gpu import kernels, ranks
from benchmarks.gpu.problems import Heads, whole_problem
from dtcp.kernels.softmax.api import SavedForward, SoftmaxParams
from dtcp.kernels.softmax.backends import BACKENDS

pytestmark = pytest.mark.gpu
NAMES = [backend.name for backend in BACKENDS if backend.name != "reference"]


@pytest.mark.parametrize("width", kernels.WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_a_backend_on_a_gpu_is_right_under_every_mask(name, width):
    cases = [x for x in kernels.cases("cuda") if x.name.startswith(f"{name} {width} ")]
    results = {case.name: case.run() for case in cases}
    assert len(results) == 6
    wrong = {name: x for name, x in results.items() if "refused" not in x and not x["right"]}
    assert wrong == {}


@pytest.mark.parametrize("case", ranks.right_cases("cuda"), ids=lambda case: case.name)
def test_what_ranks_compute_on_a_gpu_is_what_one_device_does(case):
    result = case.run()
    assert result["right"], result


@pytest.mark.parametrize("mask", ["causal", "documents", "window", "images"])
def test_the_chosen_backend_on_a_gpu_waits_for_nothing(mask):
    """No call waits for the host once kernels are compiled and compared with plain torch."""
    problem, params = whole_problem(mask, 5000, Heads(8, 2, 128), "cuda"), SoftmaxParams(0.1)

    def step():
        out, lse = problem.forward(params)
        return problem.backward(SavedForward(torch.ones_like(out), out, lse), params)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
