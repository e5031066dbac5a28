"""Every collective equals its meaning, forward and backward, and moves the bytes it says."""

import pytest
import torch
from torch.testing import assert_close

from dtcp.distributed import collectives
from dtcp.distributed.groups import group_name
from dtcp.distributed.ledger import count_traffic
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from dtcp.sequence.routes import Route, halo_token_indices
from tests.harness.collective_reference import BOUNDARIES, assert_equals_one_process
from tests.harness.spmd import spmd

FP64 = 8
DIMS = {False: (0, 1, -1), True: (1,)}
"""In a graph one dim stands for all: compiling takes the time."""
boundaries = pytest.mark.parametrize("compiled", BOUNDARIES, ids=["eager", "compiled"])


@boundaries
@spmd(ranks=(1, 2, 3, 4))
def test_all_gather_concatenates_and_its_backward_sums(mesh, compiled, ranks):
    for dim in DIMS[compiled]:
        check_all_gather(mesh, dim, compiled, ranks)


def check_all_gather(mesh, dim, compiled, ranks):
    shape = (2, 3, 4)
    moved = assert_equals_one_process(
        mesh,
        lambda x: collectives.all_gather(x, mesh, dim=dim),
        lambda xs: [torch.cat(xs, dim=dim)] * ranks,
        [shape] * ranks,
        compiled=compiled,
    )
    expected = (ranks - 1) * 24 * FP64
    assert [(t.calls, t.sent, t.received) for t in moved] == [(1, expected, expected)] * 2
    assert moved[0]["dtcp::all_gather"].received == expected
    assert moved[1]["dtcp::reduce_scatter"].received == expected


@boundaries
@spmd(ranks=(1, 2, 3, 4))
def test_reduce_scatter_sums_and_its_backward_gathers(mesh, compiled, ranks):
    for dim in DIMS[compiled]:
        check_reduce_scatter(mesh, dim, compiled, ranks)


def check_reduce_scatter(mesh, dim, compiled, ranks):
    shape = [2, 3, 4]
    shape[dim] = 2 * ranks
    size = torch.Size(shape).numel()
    moved = assert_equals_one_process(
        mesh,
        lambda x: collectives.reduce_scatter(x, mesh, dim=dim),
        lambda xs: torch.stack(xs).sum(0).chunk(ranks, dim=dim),
        [shape] * ranks,
        compiled=compiled,
    )
    expected = (ranks - 1) * size // ranks * FP64
    assert [(t.calls, t.sent, t.received) for t in moved] == [(1, expected, expected)] * 2


@boundaries
@spmd(ranks=(1, 2, 3, 4))
def test_all_to_all_sends_uneven_and_empty_parts(mesh, compiled, ranks):
    rank = mesh.get_local_rank()
    # Rank q sends (q + r) % 3 rows to rank r, so some pairs exchange nothing.
    counts = [[(q + r) % 3 for r in range(ranks)] for q in range(ranks)]
    receive = [counts[q][rank] for q in range(ranks)]

    def reference(xs):
        parts = [x.split(sends) for x, sends in zip(xs, counts, strict=True)]
        return [torch.cat([parts[q][r] for q in range(ranks)]) for r in range(ranks)]

    forward, backward = assert_equals_one_process(
        mesh,
        lambda x: collectives.all_to_all(x, mesh, receive=receive, send=counts[rank]),
        reference,
        [(sum(sends), 2, 3) for sends in counts],
        compiled=compiled,
    )
    away = (sum(receive) - counts[rank][rank]) * 6 * FP64
    home = (sum(counts[rank]) - counts[rank][rank]) * 6 * FP64
    assert (forward.received, forward.sent) == (away, home)
    assert (backward.received, backward.sent) == (home, away)


@spmd(ranks=2)
def test_all_to_all_counts_what_a_rank_without_rows_receives(mesh):
    send, receive = ([2, 3], [2, 0]) if mesh.get_local_rank() == 0 else ([0, 0], [3, 0])
    with count_traffic() as moved:
        out = collectives.all_to_all(torch.ones(sum(send), 4), mesh, receive=receive, send=send)
    assert out.shape == (sum(receive), 4)
    assert moved.received == (0 if mesh.get_local_rank() == 0 else 3 * 4 * 4)


@boundaries
@spmd(ranks=(1, 2, 3, 4))
def test_ring_shift_moves_by_places_around_the_ring(mesh, compiled, ranks):
    for by in (1,) if compiled else (1, -1, 2, 5):
        check_ring_shift(mesh, by, compiled, ranks)


def check_ring_shift(mesh, by, compiled, ranks):
    forward, backward = assert_equals_one_process(
        mesh,
        lambda x: collectives.ring_shift(x, mesh, by=by),
        lambda xs: [xs[(rank - by) % ranks] for rank in range(ranks)],
        [(2, 3)] * ranks,
        compiled=compiled,
    )
    expected = 6 * FP64 if by % ranks else 0
    assert (forward.received, backward.received) == (expected, expected)
    assert (forward.sent, backward.sent) == (expected, expected)


@pytest.mark.parametrize("kind", [Contiguous, HeadTail, PerDocument, BlockBalanced])
@spmd(ranks=(1, 2, 3, 4))
def test_halo_brings_the_tokens_next_to_each_segment(mesh, kind, ranks):
    """From one rank or several; halos may overlap, and hold this rank's own tokens."""
    for left, right in [(2, 0), (0, 1), (3, 2), (13, 9), (0, 0), (40, 40)]:
        check_halo(mesh, kind, left, right, ranks, compiled=False)


@pytest.mark.parametrize("kind", [Contiguous, HeadTail])
@spmd(ranks=(2, 4))
def test_halo_in_a_graph_brings_the_same(mesh, kind, ranks):
    check_halo(mesh, kind, 13, 9, ranks, compiled=True)


def check_halo(mesh, kind, left, right, ranks, *, compiled):
    layout = kind.for_batch(Documents(((5, 10, 3),), 24), ranks)
    wanted = [halo_token_indices(layout, r, left=left, right=right) for r in range(ranks)]

    def reference(xs):
        whole = layout.restore(torch.cat(xs, dim=1))
        padded = torch.cat([whole, torch.zeros_like(whole[:, :1])], dim=1)
        return [padded[:, positions] for positions in wanted]

    forward, backward = assert_equals_one_process(
        mesh,
        lambda x: collectives.halo(x, layout, mesh, left=left, right=right),
        reference,
        [(2, layout.shard_len, 3)] * ranks,
        compiled=compiled,
    )
    mine = set(layout.token_indices(mesh.get_local_rank()).tolist()) | {-1}
    foreign = [p for p in wanted[mesh.get_local_rank()].tolist() if p not in mine]
    assert forward.received == len(foreign) * 6 * FP64
    assert backward.sent == forward.received and backward.received == forward.sent
    assert (forward.calls, backward.calls) == (1, 1)


@spmd(ranks=3)
def test_halo_of_contiguous_shards_moves_exactly_its_tokens(mesh):
    rank = mesh.get_local_rank()
    with count_traffic() as moved:
        collectives.halo(torch.ones(1, 4, 5), Contiguous(12, 3), mesh, left=3, right=1)
    assert moved.received == 4 * 5 * ((3 if rank > 0 else 0) + (1 if rank < 2 else 0))
    assert moved.sent == 4 * 5 * ((3 if rank < 2 else 0) + (1 if rank > 0 else 0))


@spmd(ranks=2)
def test_halo_has_the_same_shape_on_every_rank_of_head_tail(mesh):
    """The last rank's two chunks are neighbours; it owns two segments all the same."""
    out = collectives.halo(torch.ones(1, 4, 5), HeadTail(8, 2), mesh, left=1, right=0)
    assert out.shape == (1, 2, 5)
    assert halo_token_indices(HeadTail(8, 2), 0, left=1, right=0).tolist() == [-1, 5]
    assert halo_token_indices(HeadTail(8, 2), 1, left=1, right=0).tolist() == [1, 3]


@spmd(ranks=(1, 2, 4))
def test_empty_tensors_pass_through_every_collective(mesh, ranks):
    x = torch.empty(2, 0, 3)
    assert collectives.all_gather(x, mesh, dim=1).shape == (2, 0, 3)
    assert collectives.reduce_scatter(x, mesh, dim=1).shape == (2, 0, 3)
    assert collectives.ring_shift(x, mesh).shape == (2, 0, 3)
    none = [0] * ranks
    rows = collectives.all_to_all(torch.empty(0, 3), mesh, receive=none, send=none)
    assert rows.shape == (0, 3)
    assert collectives.exchange_tokens(x, Route((), (), 4), mesh).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@spmd(ranks=4)
def test_sums_are_rounded_once(mesh, dtype):
    """Summed in fp32 (fp64 in fp64): of reduce_scatter, and of the gradients of the others."""
    rank = mesh.get_local_rank()
    xs = torch.randn(4, 8, 6).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = xs.to(wide).sum(0).to(dtype).chunk(4)[rank]
    assert_close(collectives.reduce_scatter(xs[rank], mesh, dim=0), expected, rtol=0, atol=0)

    local = xs[0, :2].clone().requires_grad_()
    out = collectives.all_gather(local, mesh, dim=0)
    (grad,) = torch.autograd.grad(out, local, xs[rank])
    assert_close(grad, expected, rtol=0, atol=0)

    # Every rank reads rank 0's token: a halo as wide as the sequence.
    token = xs[0, :1].clone().requires_grad_()
    out = collectives.halo(token, Contiguous(4, 4), mesh, left=3, right=0, dim=0)
    cotangents = xs[:, :3]
    (grad,) = torch.autograd.grad(out, token, cotangents[rank])
    # Rank r wants positions r-3 .. r-1, so position p is in place p - r + 3 of rank r.
    readers = [cotangents[r, rank - r + 3] for r in range(rank + 1, 4)]
    summed = torch.stack(readers).to(wide).sum(0) if readers else torch.zeros(6, dtype=wide)
    assert_close(grad[0], summed.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@spmd(ranks=2)
def test_collectives_move_half_the_bytes_in_half_the_width(mesh, dtype):
    with count_traffic() as moved:
        collectives.all_gather(torch.ones(5, 3, dtype=dtype), mesh, dim=1)
    assert moved.received == moved.sent == 15 * dtype.itemsize


@spmd(ranks=(1, 3))
def test_outputs_share_no_memory_with_inputs(mesh, ranks):
    x = torch.randn(ranks, 4)
    counts = [1] * ranks
    rows = [[(r * ranks, (r + 1) * ranks)] for r in range(ranks)]
    route = Route.between(rows, rows, mesh.get_local_rank())
    for out in (
        collectives.all_gather(x, mesh, dim=0),
        collectives.reduce_scatter(x, mesh, dim=0),
        collectives.all_to_all(x, mesh, receive=counts, send=counts),
        collectives.ring_shift(x, mesh, by=ranks),
        collectives.exchange_tokens(x, route, mesh, dim=0),
    ):
        assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "op", ["all_gather", "reduce_scatter", "all_to_all", "ring_shift", "exchange_tokens"]
)
@spmd(ranks=2)
def test_op_keeps_the_contract_of_torch_library(mesh, op):
    """Schema, fake, autograd and aot_autograd agree, on inputs of awkward strides too."""
    name = group_name(mesh)
    counts = [[2, 1], [1, 2]][mesh.get_local_rank()]
    # Each rank keeps one token and sends the other rank two.
    send = [[0, 0, 1, 1, 1, 3], [0, 1, 3, 1, 0, 1]][mesh.get_local_rank()]
    receive = [[0, 0, 1, 1, 2, 4], [0, 2, 4, 1, 0, 1]][mesh.get_local_rank()]
    args = {
        "all_gather": (1, 2, name),
        "reduce_scatter": (1, 2, name),
        "ring_shift": (1, name),
        "all_to_all": (counts, counts, name),
        "exchange_tokens": (1, 4, send, receive, name),
    }[op]
    x = torch.randn(4, 3, 2, requires_grad=True).transpose(0, 1)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.dtcp, op), (x, *args), test_utils=checks)


@spmd(ranks=2)
def test_two_batches_of_one_shape_make_one_graph(mesh):
    frames = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=frames, fullgraph=True)
    def step(x):
        x = collectives.halo(x, HeadTail(8, 2), mesh, left=2, right=0)
        return collectives.ring_shift(collectives.all_gather(x, mesh, dim=1), mesh)

    for _ in range(2):
        step(torch.randn(1, 4, 3))
    assert frames.frame_count == 1


@spmd(ranks=2)
def test_misuse_is_refused(mesh):
    x = torch.ones(1, 3, 2)
    with pytest.raises(ValueError, match="dim=1 on 2 ranks: pad dim to a multiple of 2"):
        collectives.reduce_scatter(x, mesh, dim=1)
    with pytest.raises(ValueError, match=r"send=\[3\], receive=\[1, 0\]: give 2 counts each"):
        collectives.all_to_all(x, mesh, receive=[1, 0], send=[3])
    with pytest.raises(ValueError, match="got left=-1, right=0"):
        collectives.halo(x, Contiguous(6, 2), mesh, left=-1, right=0)
    with pytest.raises(ValueError, match=r"shard of 4 tokens .* x.shape=\(1, 3, 2\), dim=1"):
        collectives.halo(x, Contiguous(8, 2), mesh, left=1, right=0)
    with pytest.raises(ValueError, match=r"for each of 3 ranks, .* on 2 ranks"):
        collectives.halo(x, Contiguous(9, 3), mesh, left=1, right=0)
    with pytest.raises(TypeError, match=r"one of a layout, got layout=.*Contiguous.*an instance"):
        collectives.halo(x, Contiguous, mesh, left=1, right=0)
    with pytest.raises(TypeError, match=r"got send=\(1, 2\), receive=\[1, 0\]: give a list of 2"):
        collectives.all_to_all(x, mesh, receive=[1, 0], send=(1, 2))


@spmd(axes={"dp": 2, "cp": 2})
def test_collectives_stay_on_their_axis(mesh):
    cp, dp = mesh["cp"], mesh["dp"]
    x = torch.tensor([float(torch.distributed.get_rank())])
    base = 2.0 * dp.get_local_rank()
    assert collectives.all_gather(x, cp, dim=0).tolist() == [base, base + 1]
    with pytest.raises(ValueError, match=r"one axis, got mesh.ndim=2"):
        collectives.all_gather(x, mesh, dim=0)
