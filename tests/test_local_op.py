"""In a graph, what an op returns follows from its arguments: every op there is, and its derivative.

Inductor's cache on the disk knows graphs by their text, which has a group's name and not its ranks:
sizes that a fake had asked of a group of 2 ranks would be those of one of 4 with the same name.
"""

import importlib
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves

import dtcp
from dtcp._torch.fakes import real_tensors
from dtcp._torch.ops import TorchDispatchMode
from dtcp.local_op import _without_tangents
from dtcp.recurrent.metadata import delta_metadata
from dtcp.sdpa.aten_rules import BIDIRECTIONAL, CAUSAL
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous
from dtcp.sequence.masks import Causal, SlidingWindow
from dtcp.softmax import AllGatherAttention, HybridAttention
from dtcp.softmax.inputs import AttentionInputs
from dtcp.softmax.local import ATTENTION
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.softmax.op import ForwardArguments
from tests.harness.attention_parity import styles

OPS = torch.ops.dtcp
N, LENGTH = 4, 8
COORDS, LAYOUT = Coords.of(Documents.single(1, N * LENGTH)), Contiguous(N * LENGTH, N)
GROUP = "a group that nobody has made"


class Seen(TorchDispatchMode):
    """Which ops of ours ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dtcp":
            self.names.add(func.name().removeprefix("dtcp::"))
        return func(*args, **(kwargs or {}))


def leaf(*shape):
    return torch.empty(shape, requires_grad=True)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int64)


@real_tensors()
def metadata_of(style):
    mixer = SoftmaxAttention(Causal() & SlidingWindow(7))
    return style.make_metadata(mixer, COORDS, LAYOUT, 0).tensors()


@real_tensors()
def metadata_of_one_device():
    alone = Coords.of(Documents.single(1, LENGTH))
    return SoftmaxAttention(Causal()).make_metadata(alone, None).tensors()


def attend(op, metadata, sizes):
    """On one of `sizes[0]` ranks."""
    x = AttentionInputs(*(leaf(1, LENGTH, heads, 8) for heads in (4, 2, 2)))
    groups = [GROUP] * len(sizes)
    arguments = ForwardArguments(*x, metadata, 1.0, 0.0, groups, sizes)
    return op.forward(*arguments)


def of_collectives():
    x, hops = leaf(LENGTH, 3), [0, 0, LENGTH]
    yield OPS.all_gather(x, 0, N, GROUP)
    yield OPS.reduce_scatter(x, 0, N, GROUP)
    yield OPS.all_gather_on_nodes(x, 0, 2, N, GROUP)
    yield OPS.reduce_scatter_on_nodes(x, 0, 2, N, GROUP)
    yield OPS.all_to_all(x, [5, 1, 2, 2], [2] * N, GROUP)
    yield OPS.ring_shift(x, 1, GROUP)
    yield OPS.exchange_tokens(x, 0, LENGTH, hops, hops, GROUP)
    order = ints(LENGTH).int()
    yield OPS.relayout(x[None], order, order, ints(2, N), GROUP, False)


def of_attention():
    for style in styles(N):
        sizes = [N, 2, 2] if isinstance(style, HybridAttention) else [N]
        yield attend(style.op, metadata_of(style), sizes)
    for op in (CAUSAL, BIDIRECTIONAL):
        yield attend(op, [], [N])
    yield attend(ATTENTION, metadata_of_one_device(), [])
    keys = metadata_of(AllGatherAttention())
    yield OPS.gather_shared_kv(leaf(1, LENGTH, 2, 8), keys, GROUP, torch.float32, True)
    yield [ask(torch.empty(2)) for ask in (OPS.ask_layout, OPS.ask_attended, OPS.ask_causal)]


def of_recurrence():
    q, k, v = (leaf(1, LENGTH, heads, 8) for heads in (2, 2, 4))
    by_head = leaf(1, LENGTH, 4)
    with real_tensors():
        metadata = delta_metadata(COORDS, LAYOUT, 0).tensors()
    yield OPS.gated_delta_rule(q, k, v, by_head, by_head, metadata, True, [GROUP])
    yield OPS.gated_linear_attention(q, k, v, by_head, metadata, True, [GROUP])
    x, route = leaf(1, LENGTH, 3), ints(2, 1, 3)
    yield OPS.left_halo(x, route, route, 3, GROUP, torch.float32)


def of_sparse_attention():
    q, keys, entries = leaf(1, LENGTH, 4, 8), leaf(1, LENGTH, 8), leaf(1, 4, 8)
    at, tiles = ints(1, LENGTH).int(), ints(1, 1, 6)
    weight = leaf(1, LENGTH, 4)
    selected = OPS.select_entries(q, weight, entries, at, at, ints(1, 4).int(), tiles, 3)
    yield OPS.select_blocks(q, leaf(1, LENGTH, 2, 8), [at] * 4, 4, 2, 1)
    yield OPS.sparse_attention(q, keys, entries, selected, leaf(4), [at] * 10, 1.0, 6)
    routes = ints(1, 2, 1, 3)
    yield OPS.bring_left([keys], routes, routes, [3], GROUP)


def of_experts():
    x, weight, index, counts = leaf(6, 3), leaf(6, 2), ints(6, 2), ints(2, N)
    order, place, *_ = OPS.route_tokens(index, ints(1), 8, N, GROUP, "", True)
    yield OPS.dispatch_tokens(x, order, place, counts, 2, GROUP)
    yield OPS.receive_tokens(OPS.send_tokens(x, order, place, counts, 2, GROUP), place)
    yield OPS.combine_results(leaf(5, 3), order, ints(5), counts, GROUP)
    way = counts, GROUP, "deep_ep"
    rows, weighs, ends, *handle = OPS.library_dispatch(x, *way, index, weight, 8, "")
    yield OPS.library_combine(rows * weighs[:, None], *way, *handle, weighs.detach(), 6)
    yield OPS.grouped_linear(leaf(7, 3), leaf(2, 5, 3), ends)


def every_op():
    """Their names, once whatever makes one is imported."""
    root = Path(dtcp.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if any(make in path.read_text() for make in ("_op(", "AttentionOp(")):
            importlib.import_module(".".join(path.relative_to(root.parent).with_suffix("").parts))
    return set(OPS)


class OnSecond(torch.Tensor):
    """As on the second GPU of a process."""

    is_cuda = True

    def get_device(self):
        return 1


def test_an_op_runs_on_the_device_of_its_first_tensor(monkeypatch):
    """Where fla's and flash-attn-4's kernels launch otherwise is the device that is current."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext(entered.append(index)))
    run = _without_tangents("an op", lambda *inputs: inputs)
    x = torch.ones(2)
    run([x], x.as_subclass(OnSecond), x)
    run(x, x.as_subclass(OnSecond))
    run([x])
    assert entered == [1, -1, -1]


def test_no_cuda_graph_has_an_op_of_ours():
    """It would send and compute for every batch what the first one was: the host is not asked.

    Inductor cuts its graphs at such ops under mode="reduce-overhead", and takes others into them
    whatever tensors of the host they read.
    """
    unsafe = torch.Tag.cudagraph_unsafe
    assert {name for name in every_op() if unsafe not in getattr(OPS, name).default.tags} == set()


def test_no_fake_and_no_derivative_asks_a_group():
    """There is none to ask. An op that no call above reaches fails, too: give it one."""
    made = every_op()
    assert not dist.is_initialized()
    fakes, seen = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), Seen()
    with fakes, seen:
        for calls in (of_collectives, of_attention, of_recurrence, of_sparse_attention, of_experts):
            for results in calls():
                out = [x for x in tree_leaves(results) if x.requires_grad]
                torch.autograd.backward([x.sum() for x in out])
    assert made == seen.names
