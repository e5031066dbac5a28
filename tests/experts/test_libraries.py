"""Experts whose tokens travel by DeepEP or HybridEP, on stand-ins: equal to a loop over tokens."""

import sys
from contextlib import contextmanager

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

from dtcp.compile import DATA_SIZES, count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.experts import installed_libraries, library_for
from dtcp.experts.libraries import library_of
from dtcp.experts.libraries.deep_ep import DeepEP
from dtcp.experts.libraries.hybrid_ep import HybridEP
from dtcp.experts.libraries.types import Handle, pack_handle, unpack_handle
from dtcp.parallelize import FullCheckpoint
from tests.experts.test_experts import DIM, ROUTINGS, E, N, a_case, check, spread
from tests.harness.spmd import spmd
from tests.harness.stand_in_deep_ep import HYBRID, MAIN, deep_ep_with

LIBRARIES = ("deep_ep", "hybrid_ep")


@contextmanager
def installed(*names, dtypes=(torch.float64,)):
    """Inside, Python has a package deep_ep of these names, whose kernels take these dtypes."""
    before = DeepEP.dtypes
    library_of.cache_clear()
    sys.modules["deep_ep"] = deep_ep_with(*names)
    DeepEP.dtypes = HybridEP.dtypes = dtypes
    try:
        yield
    finally:
        del sys.modules["deep_ep"]
        DeepEP.dtypes = HybridEP.dtypes = before
        library_of.cache_clear()


def own_tokens(mesh):
    rank = mesh.get_local_rank()
    return slice(rank * N, (rank + 1) * N)


@pytest.mark.slow_where(lambda routing, **_: routing not in ("as drawn", "ranks unused"))
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("library", LIBRARIES)
@spmd(ranks=2)
def test_experts_by_a_library_equal_a_loop_over_tokens(mesh, library, routing):
    case = a_case(2, routing)
    with installed(*MAIN, *HYBRID):
        check(mesh, spread(case[0], mesh, exchange=library), case, own_tokens(mesh))


@pytest.mark.slow_where(lambda library: library == "hybrid_ep")
@pytest.mark.parametrize("library", LIBRARIES)
@spmd(ranks=2)
def test_experts_by_a_library_have_one_graph_for_any_routing(mesh, library):
    """Recomputed in full, too: what arrived is kept with the routes."""
    cases = [a_case(2, routing) for routing in ROUTINGS]
    with installed(*MAIN, *HYBRID), torch._dynamo.config.patch(**DATA_SIZES):
        experts = spread(cases[0][0], mesh, exchange=library)
        recomputed = FullCheckpoint(routes=True).wrap(experts.forward)
        call = torch.compile(recomputed, backend="aot_eager", fullgraph=True)
        with count_graphs() as graphs, count_traffic() as traffic:
            for case in cases:
                check(mesh, experts, (cases[0][0], *case[1:]), own_tokens(mesh), call)
        assert (graphs.graphs, graphs.breaks) == (1, 0)
        assert traffic["dtcp::library_dispatch"].calls == len(cases)
        check(mesh, experts, cases[0], own_tokens(mesh), recomputed)


@pytest.mark.parametrize("library", LIBRARIES)
@spmd(axes={"cp": 2, "tp": 2})
def test_experts_by_a_library_take_each_token_of_tp_ranks_once(mesh, library):
    case, ep = a_case(2), init_device_mesh("cpu", (4,))
    with installed(*MAIN, *HYBRID):
        experts = spread(case[0], ep, shared_by=mesh["tp"], exchange=library)
        check(mesh, experts, case, own_tokens(mesh["cp"]))


@pytest.mark.parametrize("library", LIBRARIES)
@spmd(ranks=2)
def test_experts_by_a_library_receive_a_token_once_for_each_rank(mesh, library):
    """To the byte, forward and backward, as the counts of the routing say."""
    whole, x, index, weight, real, cotangent = a_case(2)
    rank, mine = mesh.get_local_rank(), own_tokens(mesh)
    with installed(*MAIN, *HYBRID):
        experts = spread(whole, mesh, exchange=library)
        own = x[mine].requires_grad_()
        with count_traffic() as forward:
            out = experts(own, index[mine], weight[mine], real[mine])
        with count_traffic() as backward:
            out.backward(cotangent[mine])
    home = torch.arange(2 * N) // N
    held = torch.stack([(index // (E // 2) == r).any(1) & real for r in range(2)], dim=1)
    here = int((held[:, rank] & (home != rank)).sum()) * DIM * 8
    gone = int((held[:, 1 - rank] & (home == rank)).sum()) * DIM * 8
    pairs = [
        (forward["dtcp::library_dispatch"], backward["dtcp::library_dispatch_backward"]),
        (backward["dtcp::library_combine_backward"], forward["dtcp::library_combine"]),
    ]
    for out, back in pairs:
        assert (out.received, out.sent, back.received, back.sent) == (here, gone, gone, here)
    assert forward["dtcp::route_tokens"].received == 8 * 2
    assert backward["dtcp::route_tokens"].calls == 0


@spmd(ranks=2)
def test_experts_by_deep_ep_arrive_in_a_fixed_order_where_asked(mesh):
    """And its buffer is made anew for it, and for a larger batch."""
    case, mine = a_case(2), own_tokens(mesh)
    with installed(*MAIN):
        experts = spread(case[0], mesh, exchange="deep_ep")
        library = library_of("deep_ep", experts.exchange.group)
        before = torch.are_deterministic_algorithms_enabled()
        try:
            for fixed in (False, True):
                torch.use_deterministic_algorithms(fixed)
                check(mesh, experts, case, mine)
                assert library.buffer.deterministic == fixed
        finally:
            torch.use_deterministic_algorithms(before)
        assert library.room == (N, DIM, 3)
        twice = [torch.cat([y, y]) for y in (case[1], case[2], case[3])]
        experts(*twice)
        assert library.room == (len(twice[0]), DIM, 3)
        experts(*(y[:N] for y in twice))
        assert library.buffer.num_max_tokens_per_rank == len(twice[0])


@spmd(ranks=2)
def test_experts_by_a_library_refuse_what_all_refuse_on_every_rank(mesh):
    whole, x, index, weight, *_ = a_case(1)
    with installed(*HYBRID):
        experts = spread(whole, mesh, exchange="hybrid_ep")
        wrong = weight.clone()
        wrong[3, 1] = torch.nan
        with pytest.raises(ValueError, match=r"got NaN or infinity on rank 1 of ep: lower"):
            experts(x, index, wrong if mesh.get_local_rank() else weight)
    with installed(*HYBRID, dtypes=DeepEP.dtypes):
        named = spread(whole, mesh, exchange="hybrid_ep")
        with pytest.raises(TypeError, match=r"by hybrid_ep in torch.bfloat16, got torch.float64"):
            named(x, index, weight)


@spmd(ranks=2)
def test_experts_of_a_dtype_that_no_library_takes_travel_by_torch(mesh):
    """Where nobody has named a library."""
    case = a_case(2)
    with installed(*MAIN, dtypes=DeepEP.dtypes):
        from dtcp.parallelize import expert_exchange

        expert_exchange.library_for = lambda name, device: library_for(name, "cuda")
        try:
            experts = spread(case[0], mesh)
        finally:
            expert_exchange.library_for = library_for
        assert experts.exchange.library == "deep_ep"
        with count_traffic() as traffic:
            check(mesh, experts, case, own_tokens(mesh))
        assert traffic["dtcp::dispatch_tokens"].calls > 0


def test_experts_go_by_the_library_that_is_installed():
    assert installed_libraries() == []
    assert library_for("auto", "cuda") == library_for("all_to_all", "cuda") == ""
    for names, expected in ((MAIN, "deep_ep"), (HYBRID, "hybrid_ep"), ((), "")):
        with installed(*names):
            assert library_for("auto", "cuda") == expected
            assert library_for("auto", "cpu") == library_for("all_to_all", "cuda") == ""
    with (
        installed(*MAIN),
        pytest.raises(ValueError, match=r"'hybrid_ep' without deep_ep.HybridEPBuffer: install"),
    ):
        library_for("hybrid_ep", "cuda")
    with pytest.raises(ValueError, match=r"got exchange='nvshmem': choose one"):
        library_for("nvshmem", "cuda")


def test_handles_of_experts_libraries_are_tensors_and_back():
    tensors = [
        torch.arange(100, dtype=torch.int32).view(5, 20),
        None,
        torch.empty(7, 0, dtype=torch.bool),
        torch.tensor([3], dtype=torch.int32),
        torch.rand(40) < 0.5,
        torch.arange(120, 0, -1).view(2, 3, 4, 5),
    ]
    layout, numbers = pack_handle(Handle(tensors, [4, 0, -1]))
    assert (layout.dtype, numbers.dtype) == (torch.uint8, torch.int64)
    back = unpack_handle(layout, numbers)
    assert back.numbers == [4, 0, -1] and back.tensors[1] is None
    for actual, expected in zip(back.tensors, tensors, strict=True):
        if expected is not None:
            assert_close(actual, expected, rtol=0, atol=0)
