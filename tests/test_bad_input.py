"""What cannot be right is refused: one clear error on every rank, and no rank is left waiting.

What concerns one value alone is in that value's own test: documents, layouts, masks, batches.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from dtcp.batch import shard_batch
from dtcp.compile import EagerIsland
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.distributed.relayout import roll
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Bidirectional, BlockBidirectional, Causal, SlidingWindow
from dtcp.sequence.per_document import PerDocument
from dtcp.sequence.prefix_masks import FirstTokens, PrefixLM
from dtcp.softmax import (
    AllGatherAttention,
    HaloAttention,
    HybridAttention,
    RingAttention,
    SharedKVAttention,
    UlyssesAttention,
)
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness.attention_parity import (
    CAUSAL,
    WINDOW,
    Block,
    Case,
    assert_equals_one_device,
    local_inputs,
    mixer_on,
    refused,
    run,
    shard_case,
    styles,
)
from tests.harness.spmd import spmd


def two_attentions():
    """A model of two blocks, each a mixer and something that is none."""
    blocks = [nn.ModuleDict({"mixer": SoftmaxAttention(Causal()), "norm": nn.LayerNorm(8)})]
    blocks += [nn.ModuleDict({"mixer": SoftmaxAttention(Causal()), "norm": nn.LayerNorm(8)})]
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)})


def sharded_for(mesh, mixer, layout, documents=None, **batch):
    """shard_batch on this mesh, of rows of 32 tokens if no documents are given."""
    documents = documents or Documents.single(1, 32)
    batch["input_ids"] = torch.zeros(documents.batch, documents.seq_len, dtype=torch.int64)
    whole = ParallelMesh.from_device_mesh(mesh)
    return shard_batch(batch, whole, layout, model=mixer, documents=documents)[1]


@pytest.mark.parametrize(
    "key", ["layers.*.attention", "layers.2.mixer", "mixer", "layers.mixer", "layers.*.mixer.q", ""]
)
@spmd(ranks=2)
def test_plan_key_without_a_match_is_refused(mesh, key):
    """Where torch warns and goes on."""
    plan = {"layers.*.mixer": RingAttention(), key: RingAttention()}
    if key == "":
        # The root itself is no mixer.
        return refused("takes over an unclaimed", lambda: apply(mesh, plan), TypeError)
    return refused(
        rf"got key='{key}', which matches none of \['layers'".replace("*", r"\*"),
        lambda: apply(mesh, plan),
    )


def apply(mesh, plan):
    return apply_plan(two_attentions(), mesh, plan)


@spmd(ranks=2)
def test_plan_is_checked_on_one_rank_too(mesh):
    """So that a plan that runs on a laptop runs on a cluster."""
    refused("matches none of", lambda: apply(None, {"layer.*.mixer": RingAttention()}))
    refused("every mixer is claimed", lambda: apply(None, {"layers.0.mixer": RingAttention()}))


@spmd(ranks=2)
def test_unclaimed_mixer_is_refused(mesh):
    """It would attend to its own shard only."""
    refused(
        r"got mixer='layers\.1\.mixer' and the keys \['layers\.0\.mixer'\]",
        lambda: apply(mesh, {"layers.0.mixer": RingAttention()}),
    )
    refused("got mixer='layers.0.mixer'", lambda: apply(mesh, {}))


@spmd(ranks=2)
def test_mixer_claimed_by_torchs_function_alone_is_refused_when_the_batch_is_built(mesh):
    model = two_attentions()
    parallelize_module(model, mesh, {"layers.0.mixer": RingAttention()})
    refused("unclaimed SoftmaxAttention", lambda: sharded_for(mesh, model, HeadTail))


@spmd(ranks=2)
def test_what_is_no_mixer_cannot_be_claimed(mesh):
    plan = {"layers.*.mixer": RingAttention(), "layers.*.norm": RingAttention()}
    refused("got a LayerNorm: name the mixer itself", lambda: apply(mesh, plan), TypeError)


@spmd(ranks=2)
def test_mixer_claimed_twice_is_refused(mesh):
    mixer = mixer_on(mesh, RingAttention(), Causal())
    refused(
        "got a ContextParallelAttention", lambda: UlyssesAttention()._apply(mixer, mesh), TypeError
    )


@spmd(ranks=2)
def test_mixer_that_layers_share_is_claimed_once(mesh):
    """A mixer has no parameters: layers may well have one and the same."""
    model, shared = two_attentions(), SoftmaxAttention(Causal())
    for layer in model["layers"]:
        layer["mixer"] = shared
    apply_plan(model, mesh, {"layers.*.mixer": RingAttention()})
    assert_equals_one_device(Case(), shared, shared, mesh, HeadTail)
    two = {"layers.0.mixer": RingAttention(), "layers.*.mixer": RingAttention(tile=64)}
    refused("name each mixer in one key", lambda: apply(mesh, two), TypeError)


@spmd(ranks=2)
def test_mixer_that_layers_share_is_named_by_any_of_its_names(mesh):
    """torch finds it under each of them; as a list of all modules has it, it has the first."""
    style = RingAttention()
    for names in ([1], [0, 1], ["1"], ["*"]):
        model, shared = two_attentions(), SoftmaxAttention(Causal())
        for layer in model["layers"]:
            layer["mixer"] = shared
        apply_plan(model, mesh, {f"layers.{name}.mixer": style for name in names})
        assert_equals_one_device(Case(), shared, shared, mesh, HeadTail)


@pytest.mark.parametrize(
    "make",
    [
        lambda: HybridAttention(RingAttention()),
        lambda: HybridAttention(2),
        lambda: HybridAttention(outer=UlyssesAttention()),
        lambda: SharedKVAttention(RingAttention()),
    ],
)
def test_styles_of_other_kinds_inside_of_another_are_refused(make):
    """The first would be Ulysses all the same."""
    with pytest.raises(TypeError, match=r"takes (inner|outer|gather) of .*Attention, got"):
        make()


@pytest.mark.parametrize(
    ("outer", "make"),
    [
        ("HybridAttention", lambda: HybridAttention(outer=RingAttention(kernel="triton"))),
        ("HybridAttention", lambda: HybridAttention(UlyssesAttention(tile=64))),
        (
            "SharedKVAttention",
            lambda: SharedKVAttention(AllGatherAttention(boundary=EagerIsland())),
        ),
    ],
)
def test_options_of_a_style_inside_of_another_are_refused(outer, make):
    """They would be ignored."""
    with pytest.raises(ValueError, match=f"inside: give it to {outer}"):
        make()


@spmd(axes={"dp_shard": 2, "cp": 1, "tp": 2})
def test_mesh_of_three_axes_is_refused(mesh):
    refused(
        "got a mesh of 3 axes", lambda: RingAttention()._apply(SoftmaxAttention(Causal()), mesh)
    )


@dataclass(frozen=True)
class Stranger(Contiguous):
    """A layout that nobody here knows."""


@dataclass
class RingOfEqualShards(RingAttention):
    layouts = (HeadTail,)


@pytest.mark.parametrize("layout", [PerDocument, DocumentBalanced, Stranger])
@spmd(ranks=2)
def test_layout_that_a_style_cannot_carry_out_is_refused(mesh, layout):
    mixer = mixer_on(mesh, RingOfEqualShards(), WINDOW.mask)
    match = f"works on the layouts HeadTail, got layout={layout.__name__}"
    refused(match, lambda: sharded_for(mesh, mixer, layout))


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (Causal(), "sees 31 tokens to the left and 0 to the right"),
        (Bidirectional(), "sees 31 tokens to the left and 31 to the right"),
        (SlidingWindow(4), "sees 3 tokens to the left and 31 to the right"),
        (Causal() & SlidingWindow(5), "sees 4 tokens to the left and 0 to the right"),
        (SlidingWindow(4, right=1), "sees 3 tokens to the left and 1 to the right"),
        (Causal() & (SlidingWindow(4) | FirstTokens(2)), "0 to the right: use AllGatherAttention"),
    ],
)
@spmd(ranks=2)
def test_mask_that_sees_beyond_the_halo_is_refused(mesh, mask, match):
    mixer = mixer_on(mesh, HaloAttention(4), mask)
    refused(match, lambda: sharded_for(mesh, mixer, Contiguous))


@pytest.mark.parametrize("sides", [{"window": 0}, {"window": 3, "right": -1}])
@spmd(ranks=2)
def test_halo_without_the_token_itself_is_refused(mesh, sides):
    refused("window >= 1 and right >= 0", lambda: HaloAttention(**sides))


@pytest.mark.parametrize(
    ("mask", "field"), [(PrefixLM(), "prefix"), (BlockBidirectional(), "block")]
)
@spmd(ranks=2)
def test_mask_without_what_it_reads_is_refused(mesh, mask, field):
    mixer = mixer_on(mesh, RingAttention(), mask)
    refused(f"coords.{field}=None", lambda: sharded_for(mesh, mixer, HeadTail))


@pytest.mark.parametrize("layout", [PerDocument, BlockBalanced, DocumentBalanced])
@spmd(ranks=2)
def test_rows_laid_out_each_by_itself_are_refused_where_one_layout_is_read(mesh, layout):
    mixer = mixer_on(mesh, RingAttention(), Causal())
    sharded = sharded_for(mesh, mixer, layout, Documents(((32,), (17, 15)), 32))
    x = torch.zeros(2, 16)
    refused("laid out each by itself, got 2 of", lambda: roll(x, sharded.layout, mesh))
    refused("is cut row by row, got", lambda: sharded.shard(torch.zeros(3, 32)))


@pytest.mark.parametrize(
    ("boundary", "heads", "kv_heads"),
    [
        *(("eager", *heads) for heads in ((6, 2), (2, 2), (12, 3), (12, 6))),
        ("graph", 6, 2),
        ("island", 12, 3),
    ],
)
@spmd(ranks=4)
def test_heads_that_ranks_do_not_divide_are_refused(mesh, heads, kv_heads, boundary):
    """By Ulysses; a ring does not mind."""
    case = Case(CAUSAL, heads=heads, kv_heads=kv_heads)
    options = {"boundary": EagerIsland()} if boundary == "island" else {}
    mixer = mixer_on(mesh, UlyssesAttention(**options), CAUSAL.mask)
    sharded = shard_case(case, mixer, mesh, HeadTail)
    attend = mixer
    if boundary != "eager":
        attend = torch.compile(Block(mixer), backend="aot_eager", fullgraph=boundary == "graph")
    match = f"got heads={heads}, kv_heads={kv_heads}, ranks=4: use fewer ranks"
    error = Exception if boundary == "graph" else ValueError
    refused(match, lambda: run(case, attend, sharded, local_inputs(case, sharded)), error)
    ring = mixer_on(mesh, RingAttention(), CAUSAL.mask)
    sharded = shard_case(case, ring, mesh, HeadTail)
    run(case, ring, sharded, local_inputs(case, sharded))


@spmd(ranks=4)
def test_inner_ranks_that_do_not_divide_the_axis_are_refused(mesh):
    for inner in (3, 8):
        style = HybridAttention(inner_ranks=inner)
        refused(
            f"got 4 ranks with inner_ranks={inner}: choose a divisor",
            lambda style=style: mixer_on(mesh, style, Causal()),
        )


@spmd(ranks=4)
def test_neighbours_that_process_groups_count_otherwise_are_refused(mesh):
    """They would be split in one order, and count themselves in another."""
    crossed = DeviceMesh("cpu", [2, 0, 3, 1], mesh_dim_names=("cp",))
    refused(
        r"got ranks \[2, 0, 3, 1\]",
        lambda: mixer_on(crossed, HybridAttention(inner_ranks=2), WINDOW.mask),
    )
    mixer = mixer_on(crossed, RingAttention(), WINDOW.mask)
    assert_equals_one_device(Case(WINDOW), mixer, mixer, crossed, HeadTail)


@pytest.mark.parametrize("layout", [Contiguous, HeadTail])
@spmd(ranks=2)
def test_metadata_of_another_batch_are_refused(mesh, layout):
    """They would leave queries out, or read keys that are not there."""
    for style in styles(2):
        mixer = mixer_on(mesh, style, WINDOW.mask)
        case, longer = Case(WINDOW), Case(WINDOW, seq_len=64)
        sharded, other = (shard_case(c, mixer, mesh, layout) for c in (case, longer))
        inputs, long_inputs = local_inputs(case, sharded), local_inputs(longer, other)
        match = "reads the (metadata|keys) of its own batch"
        for (q, k, v, _), attn_metadata in (
            (inputs, other.attn_metadata),
            (long_inputs, sharded.attn_metadata),
        ):
            refused(match, lambda q=q, k=k, v=v, t=attn_metadata: mixer(q, k, v, t))  # noqa: B023


@spmd(ranks=2)
def test_batch_without_metadata_is_refused(mesh):
    mixer, other = (mixer_on(mesh, RingAttention(), mask) for mask in (Causal(), Bidirectional()))
    case = Case(CAUSAL)
    sharded = shard_case(case, mixer, mesh, HeadTail)
    q, k, v, _ = local_inputs(case, sharded)
    for attn_metadata in ({}, shard_case(case, other, mesh, HeadTail).attn_metadata):
        refused(
            "got none for .*Causal",
            lambda attn_metadata=attn_metadata: mixer(q, k, v, attn_metadata),
        )
    # Nor will those of one device do.
    one = batch_metadata(SoftmaxAttention(Causal()), case.documents(2))
    refused("got none for .*Causal", lambda: mixer(q, k, v, one))


@spmd(ranks=2)
def test_layout_of_another_mesh_is_refused(mesh):
    mixer = mixer_on(mesh, RingAttention(), Causal())
    coords = sharded_for(mesh, mixer, HeadTail).coords
    for layout in (HeadTail(32, 4), None):
        refused(
            "needs a layout of as many shards, got layout=",
            lambda layout=layout: mixer.make_metadata(coords, layout),
        )
    refused("batch_metadata|as many shards", lambda: batch_metadata(mixer, Documents.single(1, 32)))


@spmd(ranks=2)
def test_degrees_that_do_not_fit_the_world_are_refused(mesh):
    refused(
        r"dp_replicate=1 \* dp_shard=2 \* cp=2 \* tp=1 = 4 with world_size=2: change a degree",
        lambda: ParallelMesh.from_degrees(Degrees(dp_shard=2, cp=2), "cpu"),
    )
    refused("got tp=0: give 1", lambda: Degrees(tp=0))


@spmd(ranks=2)
def test_rows_shorter_than_the_ranks_are_padded(mesh):
    """A sequence that no layout divides is no error: padding is added, and marked."""
    mixer = mixer_on(mesh, RingAttention(), Causal())
    for layout in (Contiguous, HeadTail, PerDocument, BlockBalanced):
        sharded = sharded_for(mesh, mixer, layout, Documents.single(1, 1))
        assert sharded.layout.seq_len == layout.multiple(2)
        x = torch.randn(1, 1, 2, 8)
        q = sharded.shard(x)
        out = sharded.gather(mixer(q, q, q, sharded.attn_metadata))
        torch.testing.assert_close(out, x)


@spmd(ranks=2)
def test_batch_of_padding_alone_attends_to_nothing(mesh):
    for style in styles(2):
        mixer = mixer_on(mesh, style, WINDOW.mask)
        sharded = sharded_for(mesh, mixer, Contiguous, Documents(((),), 32))
        q = torch.randn(1, 16, 4, 8, requires_grad=True)
        out = mixer(q, q, q, sharded.attn_metadata)
        out.sum().backward()
        assert not out.any() and not q.grad.any()


@spmd(ranks=2)
def test_query_that_is_no_number_makes_its_own_output_none_and_no_other(mesh):
    case = Case(CAUSAL)
    for style in (RingAttention(), AllGatherAttention(), UlyssesAttention()):
        mixer = mixer_on(mesh, style, CAUSAL.mask)
        sharded = shard_case(case, mixer, mesh, Contiguous)
        q, k, v, _ = (x.detach() for x in local_inputs(case, sharded))
        q[0, 3, 0] = torch.nan
        broken = mixer(q, k, v, sharded.attn_metadata).isnan().any(-1).nonzero().tolist()
        assert broken == [[0, 3, 0]]
