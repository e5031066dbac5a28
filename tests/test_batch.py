"""A batch is sharded by the rule of each key: every token keeps what belongs to it."""

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dtcp._torch.fakes import fake_tensors
from dtcp.batch import prepare_batch, shard_batch
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.distributed.same_rows import RowHashes
from dtcp.labels import IGNORED, shift_labels
from dtcp.mixer_metadata import MixerKinds, batch_metadata
from dtcp.recurrent import CausalConv1d, GatedDeltaRule
from dtcp.rows import DEFAULT_FIELDS, WHOLE, Fill, TokenField
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.buckets import Buckets, MultiplesOf, OneOf
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.host import on_device
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.mask_work import MaskWork
from dtcp.sequence.masks import BlockBidirectional, Causal, SlidingWindow
from dtcp.sequence.per_document import PerDocument
from dtcp.softmax import RingAttention
from dtcp.softmax.mixer import CrossAttention, GatherSharedKV, SoftmaxAttention
from dtcp.softmax.model_masks import masks_of
from tests.harness import packings
from tests.harness.attention_parity import LAYOUTS, mixer_on, refused
from tests.harness.spmd import spmd

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def a_batch(documents, embed=3):
    """Every key that has a rule, each token with numbers of its own."""
    B, S = documents.batch, documents.seq_len
    token = torch.arange(1, B * S + 1).view(B, S)
    return {
        "input_ids": token,
        "labels": shift_labels(token, documents),
        "loss_mask": token * 2,
        "inputs_embeds": (token[..., None] + torch.arange(embed) / embed).float(),
        "position_ids": torch.stack((token, token * 3, token * 5)),
        "mm_token_type_ids": token % 2,
        "token_type_ids": token % 3,
    }


def on_one_rank(batch, documents, layout=HeadTail, **options):
    """shard_batch where the cp axis has one rank; no process group is needed."""
    return shard_batch(batch, ONE_RANK, layout, documents=documents, **options)


ONE_RANK = ParallelMesh(Degrees(), None, *[None] * 7)
"""Nothing to communicate over."""


def test_a_padding_mask_that_is_made_marks_all_padding():
    """Not only what was added: what the documents leave, too."""
    documents = Documents(((3,), (2, 3)), 5)
    for buckets in (Buckets(MultiplesOf(8)), Buckets(rows=OneOf((4,)))):
        batch = {"input_ids": torch.ones(2, 5, dtype=torch.int64)}
        local, sharded = on_one_rank(batch, documents, buckets=buckets)
        assert torch.equal(local["padding_mask"], sharded.documents.document() < 0)


def test_mixers_are_found_though_they_come_after_a_batch():
    """A model remembers its kinds of mixers, and no longer than they are as they were."""
    documents, model = Documents.single(1, 8), nn.Sequential()
    assert len(batch_metadata(model, documents)) == 0
    model.append(nn.Sequential(SoftmaxAttention(Causal())))
    assert len(batch_metadata(model, documents)) == 1
    for copied in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied[0].append(SoftmaxAttention(Causal() & SlidingWindow(2)))
        assert len(batch_metadata(copied, documents)) == 2
    assert len(batch_metadata(model, documents)) == 1
    model[0][0] = SoftmaxAttention(Causal() & SlidingWindow(3))
    assert list(batch_metadata(model, documents)) == [model[0][0].metadata_key]
    model[0][0].mask = Causal()
    model[0][0].set_metadata_key()
    assert list(batch_metadata(model, documents)) == [SoftmaxAttention(Causal()).metadata_key]


@spmd(ranks=(1, 2))
def test_batches_are_planned_on_the_host_whatever_device_new_tensors_have(mesh, ranks):
    parallel = ParallelMesh.of_sequence(mesh)
    masks = {"near": Causal() & SlidingWindow(4), "far": Causal()}
    mixers = {name: mixer_on(mesh, RingAttention(), mask) for name, mask in masks.items()}
    model = nn.ModuleDict(mixers)
    documents = Documents(((5, 19), (24,)), 24)
    batch = a_batch(documents) | {"position_ids": documents.position_ids()}

    def planned(layout):
        local, sharded = shard_batch(batch, parallel, layout, model=model)
        whole = sharded.gather(local["input_ids"])
        sums = sharded.sum_by_document(local["loss_mask"].double())
        metadata = sharded.attn_metadata
        of_mixers = [x for key in metadata for x in metadata[key].tensors()]
        return [*local.values(), *of_mixers, whole, sums, sharded.documents.starts()]

    for layout in (Contiguous, HeadTail, DocumentBalanced):
        expected = planned(layout)
        with torch.device("meta"):  # as torch.set_default_device does
            assert_close(planned(layout), expected, rtol=0, atol=0)


def test_batches_planned_in_inference_mode_serve_training():
    """torch refuses tensors that were made inside of it in a later step's backward pass."""
    documents = Documents(((3, 5), (8,)), 8)
    mixers = nn.ModuleList([SoftmaxAttention(Causal()), GatedDeltaRule(), CausalConv1d(3)])
    with torch.inference_mode():
        batch = a_batch(documents)
        local, sharded = on_one_rank(batch, documents, model=mixers)
        made = [batch_metadata(mixers, documents), sharded.attn_metadata]
    tensors = [x for metadata in made for key in metadata for x in metadata[key].tensors()]
    assert tensors and not any(x.is_inference() for x in (*tensors, *(x.real for x in made)))
    with torch.inference_mode():
        # Gradients are off in it, and stay so.
        assert not on_one_rank(batch, documents)[0]["inputs_embeds"].requires_grad
    q = torch.randn(2, 8, 1, 2, requires_grad=True)
    for metadata in made:
        (grad,) = torch.autograd.grad(mixers[0](q, q, q, metadata).sum(), q)
        assert grad.abs().sum() > 0


@layouts
@spmd(ranks=(1, 2, 3, 4))
def test_every_key_is_cut_along_its_own_sequence_dim(mesh, layout, ranks):
    documents = packings.equal_rows(48, ranks)
    batch = a_batch(documents)
    before = {key: x.clone() for key, x in batch.items()}
    whole = ParallelMesh.from_device_mesh(mesh)
    local, sharded = shard_batch(batch, whole, layout, documents=documents)
    token_index = sharded.layout.token_indices(mesh.get_local_rank())
    real = token_index < 48
    for key, x in batch.items():
        dim = DEFAULT_FIELDS[key].seq_dim % x.ndim
        assert local[key].shape[dim] == sharded.layout.shard_len
        kept = local[key].movedim(dim, 0)[real]
        assert_close(kept, x.movedim(dim, 0)[token_index[real]])
        assert_close(x, before[key], rtol=0, atol=0)


@layouts
@spmd(ranks=(2, 3, 4))
def test_gather_inverts_shard(mesh, layout, ranks):
    """Of any tensor with a token dim, padded or not; with gradients."""
    documents = packings.equal_rows(41, ranks)
    whole = ParallelMesh.from_device_mesh(mesh)
    batch = {"input_ids": torch.zeros(2, 41, dtype=torch.int64)}
    _, sharded = shard_batch(batch, whole, layout, documents=documents)
    for shape, dim in (((2, 41, 3), 1), ((41, 2), 0), ((2, 3, 41), -1)):
        x = torch.randn(shape, dtype=torch.float64)
        local = sharded.shard(x, dim=dim).requires_grad_()
        back = sharded.gather(local, dim=dim)
        assert_close(back, x)
        grad = torch.randn_like(back)
        (actual,) = torch.autograd.grad(back, local, grad / ranks)
        assert_close(actual, sharded.shard(grad, dim=dim))


@spmd(ranks=4)
def test_padding_follows_the_rules(mesh):
    """Constants, counting on, and a mask that says where; 41 tokens become 48."""
    documents = Documents(((20, 21),), 41)
    batch = a_batch(documents)
    whole = ParallelMesh.from_device_mesh(mesh)
    local, sharded = shard_batch(batch, whole, HeadTail, documents=documents)
    assert (sharded.layout.seq_len, sharded.unpadded_len) == (48, 41)
    padded = {}
    for key, x in local.items():
        dim = DEFAULT_FIELDS[key].seq_dim % x.ndim
        parts = [torch.empty_like(x) for _ in range(4)]
        torch.distributed.all_gather(parts, x)
        padded[key] = sharded.layout.restore(torch.cat(parts, dim=dim), dim=dim)
    tail = slice(41, None)
    assert not padded["input_ids"][:, tail].any()
    assert (padded["labels"][:, tail] == IGNORED).all()
    assert not padded["inputs_embeds"][:, tail].any()
    assert padded["position_ids"][0, 0, tail].tolist() == list(range(42, 49))
    assert padded["position_ids"][1, 0, tail].tolist() == list(range(41 * 3 + 1, 41 * 3 + 8))
    assert padded["padding_mask"][0].tolist() == [False] * 41 + [True] * 7
    assert (sharded.documents.document()[:, tail] == -1).all()
    assert padded["padding_mask"].dtype == torch.bool


@spmd(ranks=2)
def test_padding_mask_is_there_if_and_only_if_there_is_padding(mesh):
    whole = ParallelMesh.from_device_mesh(mesh)

    def keys(seq_len, **extra):
        batch = {"input_ids": torch.zeros(1, seq_len, dtype=torch.int64), **extra}
        return shard_batch(batch, whole, HeadTail)[0]

    assert "padding_mask" not in keys(16)
    assert "padding_mask" in keys(15)
    padding_mask = torch.arange(15)[None] >= 12
    mask = keys(15, padding_mask=padding_mask)["padding_mask"]
    assert_close(mask, HeadTail(16, 2).shard(torch.arange(16)[None] >= 12, mesh.get_local_rank()))


@spmd(ranks=2)
def test_what_a_padding_mask_marks_is_in_no_document(mesh):
    """And padding that tokens of its document follow, which they would see, is refused."""
    whole, ids = ParallelMesh.from_device_mesh(mesh), torch.zeros(1, 16, dtype=torch.int64)
    padding, position_ids = torch.arange(16)[None] >= 12, torch.arange(16)[None] % 5
    batch = {"input_ids": ids, "position_ids": position_ids, "padding_mask": padding}
    assert shard_batch(batch, whole)[1].documents == Documents(((5, 5, 2),), 16)
    batch["padding_mask"] = ~padding
    refused("padded on the right", lambda: shard_batch(batch, whole))
    two = Documents(((12, 3, 1),), 16)
    assert shard_batch(batch, whole, documents=two)[1].documents == two
    one = Documents.single(1, 16)
    refused(r"got padding_mask\[0, 11\]=True", lambda: shard_batch(batch, whole, documents=one))


def test_one_rank_has_the_whole_batch():
    documents = packings.two_rows(24, 1)
    batch = a_batch(documents)
    local, sharded = on_one_rank(batch, documents)
    assert_close(local, batch)
    assert_close(sharded.gather(sharded.shard(batch["labels"])), batch["labels"])


def test_rows_are_padded_on_the_way_to_a_layout_on_one_rank_too():
    documents = Documents.single(1, 9)
    local, sharded = on_one_rank(a_batch(documents), documents, BlockBalanced)
    assert sharded.layout.seq_len == 16
    assert local["padding_mask"].sum() == 7


@layouts
@spmd(ranks=(2, 3, 4))
def test_labels_at_shard_borders_are_the_next_shards_tokens(mesh, layout, ranks):
    """Shifted first and cut after: what each rank has is a part of the whole row's labels."""
    documents = packings.across_borders(48, ranks)
    token = torch.arange(48)[None]
    batch = {"input_ids": token, "labels": shift_labels(token, documents)}
    whole = ParallelMesh.from_device_mesh(mesh)
    local, _ = shard_batch(batch, whole, layout, documents=documents)
    has_label = local["labels"] != IGNORED
    assert_close(local["labels"][has_label], local["input_ids"][has_label] + 1)
    total = has_label.sum()
    torch.distributed.all_reduce(total)
    assert total == 48 - len(documents.lengths[0])


def test_documents_are_read_off_position_ids_if_none_are_passed():
    documents = packings.on_borders(24, 4)
    batch = {"input_ids": torch.zeros(1, 24), "position_ids": documents.position_ids()}
    assert on_one_rank(batch, None)[1].documents == documents
    assert on_one_rank({"input_ids": torch.zeros(2, 24)}, None)[1].documents == Documents.single(
        2, 24
    )


def test_key_of_no_sequence_goes_to_every_rank_as_it_is():
    fields = {**DEFAULT_FIELDS, "sample": WHOLE}
    batch = {"input_ids": torch.zeros(2, 9), "sample": torch.arange(2)}
    local, _ = on_one_rank(batch, None, fields=fields)
    assert_close(local["sample"], torch.arange(2))


def test_further_keys_are_sharded_by_rules_of_ones_own():
    fields = {**DEFAULT_FIELDS, "weight": TokenField(-1, 0.5), "time": TokenField(0, Fill.COUNT_ON)}
    batch = {
        "input_ids": torch.zeros(2, 9),
        "weight": torch.ones(2, 4, 9),
        "time": torch.arange(9)[:, None] * torch.ones(1, 2, dtype=torch.int64),
    }
    local, _ = on_one_rank(batch, None, fields=fields)
    assert_close(local["weight"][..., 9:], torch.full((2, 4, 1), 0.5))
    assert local["time"].tolist() == [[i, i] for i in range(10)]


def test_masks_read_what_the_batch_says_of_tokens():
    """prefix and block are read by masks, and go no further."""
    documents = packings.equal_rows(24, 1)
    extra = {
        "prefix": packings.prefix_of_tokens(documents).int(),
        "block": packings.blocks_of_tokens(documents),
    }
    local, sharded = on_one_rank({"input_ids": torch.zeros(2, 23), **trimmed(extra)}, None)
    assert set(local) == {"input_ids", "padding_mask"}
    assert_close(sharded.coords.prefix[:, :23], extra["prefix"][:, :23].long())
    assert sharded.coords.prefix[:, 23].tolist() == [0, 0]
    assert sharded.coords.block[:, 23].tolist() == [-1, -1]


def trimmed(extra):
    return {key: x[:, :23] for key, x in extra.items()}


@spmd(ranks=2)
def test_metadata_are_made_once_per_kind_of_mixer(mesh):
    whole = ParallelMesh.from_device_mesh(mesh)
    kinds = (Causal(), Causal(), Causal() & SlidingWindow(4))
    model = torch.nn.ModuleList(mixer_on(mesh, RingAttention(), mask) for mask in kinds)
    batch = {"input_ids": torch.zeros(1, 16)}
    _, sharded = shard_batch(batch, whole, HeadTail, model=model)
    assert len(sharded.attn_metadata) == 2
    assert {mixer.metadata_key for mixer in model} == set(sharded.attn_metadata)
    read = (x for key in sharded.attn_metadata for x in sharded.attn_metadata[key].tensors())
    assert all(x.dtype in (torch.int32, torch.int64) for x in read)


@spmd(ranks=2)
def test_what_kernels_read_goes_to_the_device_and_what_the_host_reads_stays(mesh):
    whole = ParallelMesh.from_device_mesh(mesh)
    mixer = mixer_on(mesh, RingAttention(), Causal())
    batch = {"input_ids": torch.zeros(1, 16)}
    local, sharded = shard_batch(batch, whole, HeadTail, model=mixer, device="meta")
    assert local["input_ids"].device.type == "meta"
    for x in sharded.attn_metadata[mixer.metadata_key].tensors():
        assert (x.dtype, x.device.type) in ((torch.int32, "meta"), (torch.int64, "cpu"))


def test_a_batch_goes_to_a_gpu_through_pinned_memory(monkeypatch):
    """Out of other memory CUDA copies once all that was launched before has ended."""
    model = nn.ModuleList([SoftmaxAttention(Causal()), GatedDeltaRule(), CausalConv1d(4)])
    documents, pinned, moved = Documents(((5, 7), (12,)), 12), [], []
    made = prepare_batch(a_batch(documents), ONE_RANK, model=model, documents=documents)

    def pin_memory(x):
        pinned.append(x.clone())
        return pinned[-1]

    def to(x, device, non_blocking=False):
        assert device == "cuda" and non_blocking
        moved.append(x.numel() == 0 or any(x is each for each in pinned))
        return x

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    local, sharded = made.to("cuda")
    assert len(moved) > len(local) + len(sharded.attn_metadata) and all(moved)
    # What the host reads is not among them.
    assert all(x.dtype is not torch.int64 for x in pinned[len(local) :])


def test_what_comes_from_a_gpu_is_waited_for(monkeypatch):
    """torch gives pinned memory, which the host may read before it is written."""
    waited = []
    monkeypatch.setattr(
        torch.Tensor, "to", lambda x, device, non_blocking=False: waited.append(not non_blocking)
    )
    with fake_tensors():
        on_device(torch.ones(2, device="cuda"), "cpu")
    assert waited == [True]


@spmd(ranks=4)
def test_work_is_balanced_for_the_mask_asked_for(mesh):
    """A causal mask makes the last blocks dear, a window makes all alike."""
    whole = ParallelMesh.from_device_mesh(mesh)
    batch = {"input_ids": torch.zeros(1, 64)}
    shares = {}
    for mask in (None, SlidingWindow(1, right=0)):
        _, sharded = shard_batch(batch, whole, BlockBalanced, balance_for=mask)
        sees = (mask or Causal()).intervals(sharded.coords)
        work = (sees[1] - sees[0] + 1)[0]
        shares[mask] = [int(work[sharded.layout.token_indices(r)].sum()) for r in range(4)]
        assert max(shares[mask]) <= 1.05 * sum(shares[mask]) / 4
    causal, window = (shard_batch(batch, whole, BlockBalanced, balance_for=m)[1] for m in shares)
    assert causal.layout != window.layout


@spmd(ranks=2)
def test_work_is_balanced_for_the_masks_of_the_model(mesh):
    """For each as often as it has layers, where nobody says for which; keys to share do no work."""
    window, whole = Causal() & SlidingWindow(8), ParallelMesh.from_device_mesh(mesh)
    masks = [Causal(), window, window]
    model = nn.ModuleList(mixer_on(mesh, RingAttention(), mask) for mask in masks)
    images = SoftmaxAttention(SlidingWindow(8) & (BlockBidirectional() | Causal()))
    assert masks_of(MixerKinds.of(images)) == {SlidingWindow(8) & Causal(): 1}, "cut where text is"
    more = nn.ModuleList([*model, GatherSharedKV(Causal()), CrossAttention()])
    balance = masks_of(MixerKinds.of(more))
    assert balance == {Causal(): 1, window: 2}
    batch, documents = {"input_ids": torch.zeros(1, 64)}, Documents(((3, 30, 9, 22),), 64)

    def cut(**options):
        return shard_batch(batch, whole, DocumentBalanced, documents=documents, **options)[1]

    layouts = [cut(model=model), cut(balance_for=balance), cut(model=model, balance_for=Causal())]
    assert layouts[0].layout == layouts[1].layout != layouts[2].layout == cut().layout
    work = MaskWork.under(balance, layouts[0].coords)()
    shares = [int(work[layouts[0].layout.token_indices(rank)].sum()) for rank in range(2)]
    assert abs(shares[0] - shares[1]) <= 2 * int(work.max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_work_is_counted_only_for_a_layout_that_reads_it(layout):
    """Intervals of long rows cost milliseconds per batch."""

    class Counted(Causal):
        def intervals(self, coords):
            calls.append(coords)
            return super().intervals(coords)

    calls = []
    batch = {"input_ids": torch.zeros(1, 16)}
    if layout is BlockBalanced:
        on_one_rank(batch, None, layout, balance_for=Counted())
        assert len(calls) == 1
        return
    with pytest.raises(ValueError, match=f"{layout.__name__} balances no work, got balance_for="):
        on_one_rank(batch, None, layout, balance_for=Counted())
    on_one_rank(batch, None, layout, model=SoftmaxAttention(Counted()))
    # What masks read of a batch on one rank, and no work beside it.
    assert len(calls) == 1


@pytest.mark.parametrize("layout", [PerDocument, BlockBalanced, DocumentBalanced])
@spmd(ranks=(2, 3))
def test_rows_of_different_documents_are_laid_out_each_by_itself(mesh, layout, ranks):
    """41 tokens fit no layout: what is cut is padded row by row."""
    documents, whole = packings.two_rows(41, 1), ParallelMesh.from_device_mesh(mesh)
    batch = {**a_batch(documents), "position_ids": documents.position_ids()}
    batch["mtp_input_ids"] = torch.arange(2 * 3 * 41).view(2, 3, 41)
    local, sharded = shard_batch(batch, whole, layout, documents=documents)
    for row, lengths in enumerate(documents.lengths):
        one = {key: of_row(key, x, row) for key, x in batch.items()}
        alone, by_itself = shard_batch(one, whole, layout, documents=Documents((lengths,), 41))
        assert sharded.layout.rows[row] == by_itself.layout
        for key, x in alone.items():
            assert_close(of_row(key, local[key], row), x)
    assert_close(sharded.gather(local["input_ids"]), batch["input_ids"])
    assert_close(sharded.gather(sharded.shard(batch["labels"])), batch["labels"])


def of_row(key, x, row):
    return x.narrow(DEFAULT_FIELDS[key].rows_dim, row, 1)


def test_unknown_key_is_refused():
    with pytest.raises(ValueError, match=r"got \['attention_mask', 'extra'\]: add them to"):
        on_one_rank(
            {
                "input_ids": torch.zeros(1, 8),
                "attention_mask": torch.ones(1, 8),
                "extra": torch.ones(1),
            },
            None,
        )


@pytest.mark.parametrize("value", [None, [[1, 2]]])
def test_what_is_no_tensor_is_refused(value):
    with pytest.raises(TypeError, match="leave out"):
        on_one_rank({"input_ids": torch.zeros(1, 8), "labels": value}, None)


def test_rows_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"rows of one length, got tokens=.*'labels': 7"):
        on_one_rank({"input_ids": torch.zeros(1, 8), "labels": torch.zeros(1, 7)}, None)


def test_position_ids_that_restart_but_do_not_count_documents_are_refused():
    """Taken for one document, packed rows would see each other."""
    ids, restart = torch.zeros(1, 6, dtype=torch.int64), torch.tensor([[0, 1, 2, 0, 1, 1]])
    images, counted = "position_ids.*that restart: give documents", "Position ids count up by one"
    for position_ids, match in ((restart, counted), (restart.expand(3, 1, -1), images)):
        with pytest.raises(ValueError, match=match):
            on_one_rank({"input_ids": ids, "position_ids": position_ids}, None)
        batch = {"input_ids": ids, "position_ids": position_ids}
        _, sharded = on_one_rank(batch, Documents(((3, 3),), 6))
        assert sharded.documents.lengths == ((3, 3),)
    padded = torch.tensor([[False, False, False, True, True, True]])
    on_one_rank({"input_ids": ids, "position_ids": restart, "padding_mask": padded}, None)
    image = torch.tensor([[[0, 1, 1, 1, 1, 3]]]).expand(3, 1, -1)
    on_one_rank({"input_ids": ids, "position_ids": image}, None)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"labels": torch.zeros(1, 8)}, "rows={'input_ids': 2, 'labels': 1}"),
        ({"mtp_input_ids": torch.zeros(2, 8)}, "mtp_input_ids is its dim 2"),
        ({"position_ids": torch.arange(8)}, r"position_ids.shape=\(8,\)"),
        ({"block": torch.zeros(2, 7)}, r"one block per token, got block.shape=\(2, 7\)"),
        ({"block": torch.zeros(1, 8)}, r"got block.shape=\(1, 8\) for 2 rows of 8"),
        ({"prefix": torch.zeros(2, 9)}, "one prefix per token"),
    ],
)
def test_keys_of_another_shape_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        on_one_rank({"input_ids": torch.zeros(2, 8), **change}, None)


def test_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match=r"with input_ids or inputs_embeds among them"):
        on_one_rank({"position_ids": torch.zeros(3, 1, 8)}, None)
    with pytest.raises(ValueError, match=r"rows of one length, got tokens=\{\}"):
        on_one_rank({}, None)


@pytest.mark.parametrize("documents", [Documents.single(1, 8), Documents.single(2, 6)])
def test_documents_of_another_batch_are_refused(documents):
    with pytest.raises(ValueError, match=r"for a batch of 2 of 8: build them from it"):
        on_one_rank({"input_ids": torch.zeros(2, 8)}, documents)


@spmd(ranks=2)
def test_tensor_that_is_no_row_is_refused(mesh):
    whole = ParallelMesh.from_device_mesh(mesh)
    _, sharded = shard_batch({"input_ids": torch.zeros(1, 16)}, whole, Contiguous)
    for length in (15, 17, 8):
        with pytest.raises(ValueError, match=rf"rows of 16 tokens.*x.shape=\(1, {length}\)"):
            sharded.shard(torch.zeros(1, length))
    with pytest.raises(ValueError, match="shard of 8 tokens"):
        sharded.gather(torch.zeros(1, 9))


def test_mixer_that_no_plan_claims_is_refused_on_a_sharded_sequence():
    model = SoftmaxAttention(Causal())
    coords_of_two = HeadTail(16, 2)
    with pytest.raises(ValueError, match="unclaimed SoftmaxAttention"):
        model.make_metadata(None, coords_of_two)


def test_padding_that_is_cut_out_of_longer_rows_is_compared():
    """Its bytes do not begin where eight of them can be read at once."""
    longer = torch.zeros(1, 17, dtype=torch.bool)
    longer[0, 15:] = True
    ids, mask = torch.arange(16)[None], longer[:, 1:]
    masks = (mask, ~mask, mask.clone())
    hashes = [RowHashes.of({"input_ids": ids, "padding_mask": x}, None).of_rows for x in masks]
    assert mask.is_contiguous() and not torch.equal(*hashes[:2])
    assert torch.equal(hashes[0], hashes[2])  # as of another rank, where it lies by itself


def test_keys_whose_dtype_does_not_hold_their_padding_are_refused():
    ids = torch.ones(1, 5, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"labels.dtype=torch.uint8, which does not hold pad=-100"):
        on_one_rank({"input_ids": ids, "labels": ids.to(torch.uint8)}, None)
    fields = {**DEFAULT_FIELDS, "weights": TokenField(1, 0.5)}
    with pytest.raises(TypeError, match=r"weights.dtype=torch.int64, which does not hold pad=0.5"):
        on_one_rank({"input_ids": ids, "weights": ids}, None, fields=fields)


@pytest.mark.parametrize("layout", [HeadTail, PerDocument, DocumentBalanced])
@spmd(ranks=2)
def test_sums_over_documents_of_rows_that_are_laid_out_each_by_itself(mesh, layout):
    documents = Documents(((5, 8, 3), (9,)), 16)
    batch = {"input_ids": torch.zeros(2, 16, dtype=torch.int64)}
    whole = ParallelMesh.from_device_mesh(mesh)
    _, sharded = shard_batch(batch, whole, layout, documents=documents)
    x = torch.arange(32.0).view(2, 16)
    row, other = x
    expected = [[row[:5].sum(), row[5:13].sum(), row[13:].sum()], [other[:9].sum(), 0, 0]]
    assert_close(sharded.sum_by_document(sharded.shard(x)), torch.tensor(expected))
