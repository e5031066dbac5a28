"""Experts on ranks of their own: equal to a loop over tokens, for any routing; bytes counted."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing import assert_close

from dtcp.compile import DATA_SIZES, count_graphs
from dtcp.distributed import staging
from dtcp.distributed.ledger import count_traffic
from dtcp.experts import op
from dtcp.experts.expected_moves import ExpertSizes, expected_moves
from dtcp.models.moe import Experts
from dtcp.parallelize.experts import ExpertParallel, ExpertTensorParallel
from tests.distributed.test_moves import Stated
from tests.harness.spmd import spmd
from tests.kernels.test_grouped_linear import gated, gradients, one_by_one

DIM, HIDDEN, E, N, K = 16, 8, 8, 11, 3


def all_to_one(index):
    return index.zero_()


def one_expert_unused(index):
    return index % (E - 1)


def first_rank_idle(index):
    return E // 2 + index % (E // 2)


ROUTINGS = {
    "as drawn": lambda index: index,
    "all to one": all_to_one,
    "an expert unused": one_expert_unused,
    "ranks unused": first_rank_idle,
}


def a_case(ranks, routing="as drawn"):
    """Experts, the tokens of all ranks, and which are no padding: on the last rank none."""
    experts = Experts(DIM, HIDDEN, E, gated).double()
    index = torch.stack([torch.randperm(E)[:K] for _ in range(ranks * N)])
    x = torch.randn(ranks * N, DIM, dtype=torch.float64)
    weight = torch.rand(ranks * N, K, dtype=torch.float64)
    real = torch.rand(ranks * N) < 0.8
    real[-N:] = ranks == 1
    return experts, x, ROUTINGS[routing](index), weight, real, torch.randn_like(x)


def spread(whole, mesh, **options):
    copy = Experts(DIM, HIDDEN, E, gated).double()
    copy.load_state_dict(whole.state_dict())
    parallelize_module(copy, mesh, ExpertParallel(**options))
    return copy


def check(mesh, experts, case, mine, call=None):
    """Output and every gradient on this rank against a loop over the tokens of all ranks."""
    whole, x, index, weight, real, cotangent = case
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = one_by_one(whole, x, index, weight).where(real[:, None], 0)
    wanted = gradients(expected, cotangent, x, weight, *whole.parameters())
    own = [y.detach()[mine].requires_grad_(y.requires_grad) for y in (x, weight)]
    out = (experts if call is None else call)(own[0], index[mine], own[1], real[mine])
    assert_close(out, expected[mine])
    actual = gradients(out, cotangent[mine], *own, *experts.parameters())
    assert_close(actual[:2], [y[mine] for y in wanted[:2]])
    assert_close(actual[2:], wanted[2:])


@pytest.mark.parametrize("routing", ROUTINGS)
@spmd(ranks=(2, 4))
def test_experts_on_their_own_ranks_equal_a_loop_over_tokens(mesh, routing, ranks):
    """Tokens of the last rank are all padding: it sends none, and its experts work all the same."""
    case = a_case(ranks, routing)
    rank = mesh.get_local_rank()
    experts = spread(case[0], mesh)
    assert experts.gate.to_local().shape[0] == E // ranks
    check(mesh, experts, case, slice(rank * N, (rank + 1) * N))


@spmd(axes={"cp": 2, "tp": 2})
def test_experts_take_each_token_of_tp_ranks_once(mesh):
    """Compiled, and eager: ranks of tp hold the same tokens, and different experts."""
    case = a_case(2)
    rank = mesh["cp"].get_local_rank()
    ep = init_device_mesh("cpu", (4,))
    experts = spread(case[0], ep, shared_by=mesh["tp"])
    with torch._dynamo.config.patch(**DATA_SIZES):
        call = torch.compile(experts, backend="aot_eager", fullgraph=True)
        check(mesh, experts, case, slice(rank * N, (rank + 1) * N), call)
    check(mesh, experts, case, slice(rank * N, (rank + 1) * N))


@spmd(ranks=2)
def test_experts_have_one_graph_for_any_routing(mesh):
    rank, ranks = mesh.get_local_rank(), mesh.size()
    cases = [a_case(ranks, routing) for routing in ROUTINGS]
    experts = spread(cases[0][0], mesh)
    with count_graphs() as graphs, torch._dynamo.config.patch(**DATA_SIZES):
        call = torch.compile(experts, backend="aot_eager", fullgraph=True)
        for case in cases:
            check(mesh, experts, (cases[0][0], *case[1:]), slice(rank * N, (rank + 1) * N), call)
    assert (graphs.graphs, graphs.breaks) == (1, 0)


@spmd(ranks=(2, 4))
def test_experts_receive_what_the_formula_says(mesh, ranks):
    """To the byte, forward and backward: rows of other ranks to this one's experts, and home."""
    whole, x, index, weight, real, cotangent = a_case(ranks)
    rank, per_rank = mesh.get_local_rank(), E // ranks
    experts = spread(whole, mesh)
    mine = slice(rank * N, (rank + 1) * N)
    with count_traffic() as forward:
        out = experts(x[mine].requires_grad_(), index[mine], weight[mine], real[mine])
    with count_traffic() as backward:
        out.backward(cotangent[mine])
    home = torch.arange(ranks * N) // N
    away = (index // per_rank != home[:, None]) & real[:, None]
    here = int((away & (index // per_rank == rank)).sum())
    gone = int(away[mine].sum())
    row = DIM * 8
    counts = 8 * (ranks - 1) * (per_rank + 1)
    assert forward["dtcp::route_tokens"].received == forward["dtcp::route_tokens"].sent == counts
    for traffic in (forward, backward):
        to_experts, homeward = traffic["dtcp::dispatch_tokens"], traffic["dtcp::combine_results"]
        assert (to_experts.received, to_experts.sent) == (here * row, gone * row)
        assert (homeward.received, homeward.sent) == (gone * row, here * row)
    assert backward["dtcp::route_tokens"].calls == 0


@pytest.mark.parametrize("routing", ROUTINGS)
@spmd(ranks=4)
def test_experts_on_nodes_equal_a_loop_over_tokens(mesh, routing):
    case = a_case(4, routing)
    rank = mesh.get_local_rank()
    experts = spread(case[0], mesh, ranks_per_node=2)
    check(mesh, experts, case, slice(rank * N, (rank + 1) * N))


@spmd(ranks=4)
def test_tokens_of_experts_cross_between_nodes_once_for_each_node(mesh):
    """Two nodes of two ranks: what a rank receives from the other node, and inside its own."""
    whole, x, index, weight, real, _ = a_case(4)
    rank = mesh.get_local_rank()
    experts = spread(whole, mesh, ranks_per_node=2)
    mine = slice(rank * N, (rank + 1) * N)
    with count_traffic() as traffic:
        experts(x[mine], index[mine], weight[mine], real[mine])
    home = (torch.arange(4 * N) // N)[:, None]
    held = index // (E // 4)
    same_place, node = home % 2 == rank % 2, rank // 2
    crosses = (held // 2 != home // 2).any(1, keepdim=True) & real[:, None]
    across = int((crosses & same_place & (home // 2 != node)).sum())
    stops_here = same_place & real[:, None] & (held // 2 == node)
    # Choices whose token stops at the other rank of this node and whose expert is here.
    inside = (home % 2 != rank % 2) & real[:, None] & (held == rank)
    row, words = DIM * 8, K * (8 + 8)
    received = across * (row + words) + int(inside.sum()) * row
    assert traffic["dtcp::dispatch_tokens"].received == received
    returned = int((crosses[mine]).sum()) + int((stops_here & (held != rank)).sum())
    assert traffic["dtcp::combine_results"].received == returned * row


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@spmd(ranks=2)
def test_experts_travel_while_a_shared_one_computes(mesh, compiled):
    """Between the op that sends tokens and the one that waits for them; equal all the same."""
    check_beside_a_shared_one(mesh, compiled)


@spmd(ranks=2)
def test_experts_of_ranks_that_share_a_gpu_travel_through_host_memory(mesh):
    """Beside a shared one, too: gloo has no all_to_all of a GPU's tensors, in flight or not."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (staging, op):
            patch.setattr(module, "is_staged", lambda x, group: True)
        patch.setattr(op, "start_all_to_all", None)
        check_beside_a_shared_one(mesh, False)


def check_beside_a_shared_one(mesh, compiled):
    whole, x, index, weight, real, cotangent = a_case(2)
    rank = mesh.get_local_rank()
    mine = slice(rank * N, (rank + 1) * N)
    experts, shared = spread(whole, mesh), torch.nn.Linear(DIM, DIM).double()
    seen = []

    def call(x, weight):
        def beside():
            seen.append("computed")
            return shared(x)

        return experts(x, index[mine], weight, real[mine], beside)

    own = [y[mine].clone().requires_grad_() for y in (x, weight)]
    expected = whole(own[0], index[mine], own[1], real[mine]) + shared(own[0])
    wanted = gradients(expected, cotangent[mine], *own, *shared.parameters())
    with count_traffic() as traffic, torch._dynamo.config.patch(**DATA_SIZES):
        run = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
        out = run(*own)
    assert_close(out, expected)
    assert_close(gradients(out, cotangent[mine], *own, *shared.parameters()), wanted)
    # All tokens of the last rank are padding.
    assert seen and traffic["dtcp::send_tokens"].calls == 1
    assert (traffic["dtcp::send_tokens"].sent > 0) == (rank == 0)


@spmd(ranks=2)
def test_experts_refuse_a_routing_with_nan_on_every_rank(mesh):
    whole, x, index, weight, *_ = a_case(1)
    experts = spread(whole, mesh)
    wrong = weight.clone()
    wrong[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"got NaN or infinity on rank 1 of ep: lower"):
        experts(x, index, wrong if mesh.get_local_rank() else weight)
    outside = index.clone()
    outside[0, 0] = E + 4
    with pytest.raises(ValueError, match=r"got an index outside 0 to 7 on rank 0 of ep"):
        experts(x, index if mesh.get_local_rank() else outside, weight)


@spmd(ranks=4)
def test_experts_on_nodes_refuse_a_wrong_routing_on_every_rank(mesh):
    """Of which the ranks of other places hear inside their nodes."""
    whole, x, index, weight, *_ = a_case(1)
    experts = spread(whole, mesh, ranks_per_node=2)
    wrong = weight.clone()
    wrong[3, 1] = torch.inf
    with pytest.raises(ValueError, match=r"got NaN or infinity on rank 3 of ep: lower"):
        experts(x, index, wrong if mesh.get_local_rank() == 3 else weight)
    outside = index.clone()
    outside[0, 0] = -2
    with pytest.raises(ValueError, match=r"got an index outside 0 to 7 on rank 2 of ep"):
        experts(x, outside if mesh.get_local_rank() == 2 else index, weight)


@pytest.mark.parametrize("ranks_per_node", [0, 2], ids=["straight", "nodes"])
@spmd(ranks=4)
def test_experts_ops_move_what_they_say_and_what_is_expected(mesh, ranks_per_node):
    """Each token chooses other experts, and all choices come up."""
    experts = spread(Experts(DIM, HIDDEN, E, gated).double(), mesh, ranks_per_node=ranks_per_node)
    index = torch.combinations(torch.arange(E), K)
    x = torch.randn(len(index), DIM, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(index.shape, dtype=torch.float64, requires_grad=True)
    passes = []
    with Stated() as forward, count_traffic() as counted:
        out = experts(x, index, weight)
    passes.append((forward.moved, counted))
    with Stated() as backward, count_traffic() as counted:
        out.backward(torch.ones_like(out))
    passes.append((backward.moved, counted))
    rank = mesh.get_local_rank()
    sizes = ExpertSizes(len(x), DIM, E, K, size=8, weight_size=8)
    expected = expected_moves(sizes, 4, rank=rank, ranks_per_node=ranks_per_node)
    for (stated, counted), moved in zip(passes, (expected.forward, expected.backward), strict=True):
        assert sum(stated.sent) == counted.sent and sum(stated.received) == counted.received
        assert (sum(moved.sent), sum(moved.received)) == (counted.sent, counted.received)
        if not ranks_per_node:
            # By rank of ep; ops on nodes state ranks of other groups.
            assert (stated.sent, stated.received) == (moved.sent, moved.received)


@spmd(ranks=3)
def test_experts_that_ep_does_not_divide_are_refused(mesh):
    with pytest.raises(ValueError, match=r"num_experts=8 with ep=3: choose"):
        parallelize_module(Experts(DIM, HIDDEN, E, gated), mesh, ExpertParallel())
    for style in (ExpertParallel(), ExpertTensorParallel()):
        with pytest.raises(TypeError, match=r"got a Linear"):
            parallelize_module(torch.nn.Linear(2, 2), mesh, style)
