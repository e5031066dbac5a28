"""Metadata are identified by the values of masks and styles; fields of the host stay there."""

import copy
import pickle
from dataclasses import dataclass, fields

import pytest
import torch

from dtcp.compile import EagerIsland, InGraph
from dtcp.metadata import AttentionMetadata, BatchMetadata, HostTensor, NoMetadata, metadata_key
from dtcp.mixer_metadata import batch_metadata
from dtcp.mixer_plan import apply_plan
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Causal, Mask, SlidingWindow
from dtcp.softmax import RingAttention
from dtcp.softmax.mixer import KeysFromValues, SoftmaxAttention
from tests.harness.attention_parity import WINDOW, Block, Case, assert_equals_one_device, styles
from tests.harness.spmd import spmd


class Undeclared(Mask):
    """A mask of a user's that keeps its size where no field says so."""

    def __init__(self, size):
        object.__setattr__(self, "size", size)

    def _sees(self, q, k):
        return (q.token_index[:, :, None] - k.token_index[:, None, :]).abs() < self.size

    def _interval(self, coords):
        return coords.token_index - self.size + 1, coords.token_index


@dataclass(frozen=True)
class Declared(Mask):
    """The same, as a dataclass."""

    size: int

    _sees, _interval = Undeclared._sees, Undeclared._interval


def test_masks_that_hold_more_than_their_fields_are_refused_A1():
    """Two of them would share metadata, and the second layer would see what the first does."""
    with pytest.raises(TypeError, match=r"Undeclared that holds \['size'\].*as fields"):
        SoftmaxAttention(Undeclared(2))
    with pytest.raises(TypeError, match="Undeclared"):
        SoftmaxAttention(Causal() & Undeclared(2))


def test_masks_of_a_users_own_read_their_own_metadata_A1():
    model = torch.nn.ModuleList(SoftmaxAttention(Declared(size)) for size in (2, 8, 2))
    metadata = batch_metadata(model, Documents.single(1, 16))
    assert len(metadata) == 2
    first, second, third = (mixer.own(metadata) for mixer in model)
    assert first is third
    assert not torch.equal(first.first_key, second.first_key)
    q = torch.randn(1, 16, 1, 4, dtype=torch.float64)
    for size, mixer in zip((2, 8), model, strict=False):
        seen = torch.ones(16, 16).tril().triu(-(size - 1)).bool()
        scores = (q[0, :, 0] @ q[0, :, 0].T / 2).masked_fill(~seen, -torch.inf)
        torch.testing.assert_close(
            mixer(q, q, q, metadata)[0, :, 0], scores.softmax(-1) @ q[0, :, 0]
        )


def test_a_mask_that_is_changed_reads_its_own_metadata_A1():
    """It would go on reading those of the mask that it was made with."""
    model = torch.nn.ModuleList(SoftmaxAttention(Declared(8)) for _ in range(2))
    key, copied = model[0].metadata_key, copy.deepcopy(model)
    model[0].mask, model[1].mask = Declared(8), Declared(2)
    assert model.eval()[0].metadata_key is key
    metadata = batch_metadata(model, Documents.single(1, 16))
    assert len(metadata) == 2 and len(batch_metadata(copied, Documents.single(1, 16))) == 1
    expected = batch_metadata(SoftmaxAttention(Declared(2)), Documents.single(1, 16))
    assert torch.equal(model[1].own(metadata).first_key, expected[model[1].metadata_key].first_key)


def test_subclasses_differ_from_their_base_A1():
    """Of equal fields, but of another meaning."""

    @dataclass(frozen=True)
    class Backward(SlidingWindow):
        pass

    assert metadata_key(SlidingWindow(3)) == metadata_key(SlidingWindow(3))
    assert metadata_key(SlidingWindow(3)) != metadata_key(Backward(3))
    assert metadata_key(SlidingWindow(3)) != metadata_key(SlidingWindow(4))
    assert metadata_key(Causal() & SlidingWindow(3)) != metadata_key(Causal() | SlidingWindow(3))


def test_keys_hold_no_numbers_that_a_graph_would_make_symbols_of():
    """dynamo hashes keys while it traces; in DeepSeek-V4's blocks it had a ratio as a symbol."""

    def leaves(value):
        return [x for each in value for x in leaves(each)] if isinstance(value, tuple) else [value]

    key = metadata_key(SlidingWindow(3), Causal() & SlidingWindow(4), 2, 0.5, True)
    assert not any(isinstance(leaf, int | float) for leaf in leaves(key.value))
    assert {"3", "4", "2", "0.5", "True"} <= set(map(str, leaves(key.value)))


def test_kinds_of_mixers_do_not_share_metadata_A1():
    pair = torch.nn.ModuleList([SoftmaxAttention(Causal()), KeysFromValues(Causal())])
    assert len(batch_metadata(pair, Documents.single(1, 8))) == 2


def test_metadata_of_whole_rows_know_the_last_position():
    """By which some rotary embeddings choose their frequencies."""
    mixer, documents = SoftmaxAttention(Causal()), Documents(((3, 5), (2,)), 9)
    assert batch_metadata(mixer, documents).last_position == 4
    position_ids = torch.arange(7, 16).expand(2, 9)
    assert batch_metadata(mixer, documents, position_ids=position_ids).last_position == 15


def test_a_field_without_a_hash_is_refused():
    @dataclass(frozen=True)
    class Listed(Mask):
        sizes: dict

    with pytest.raises(TypeError, match="one of dict, which has no hash"):
        metadata_key(Listed({}))


def test_metadata_of_another_model_are_refused_A1():
    metadata = batch_metadata(SoftmaxAttention(SlidingWindow(3)), Documents.single(1, 8))
    x = torch.zeros(1, 8, 1, 4)
    with pytest.raises(ValueError, match="got none for SoftmaxAttention, Causal"):
        SoftmaxAttention(Causal())(x, x, x, metadata)


def test_what_the_host_reads_stays_there():
    @dataclass(frozen=True, eq=False)
    class Inner(AttentionMetadata):
        sizes: HostTensor

    @dataclass(frozen=True, eq=False)
    class Outer(AttentionMetadata):
        index: torch.Tensor
        inner: Inner

    key = metadata_key(Causal())
    outer = Outer(torch.zeros(2), Inner(torch.ones(3)))
    moved = BatchMetadata({key: outer}).to("meta")[key]
    assert (moved.index.device.type, moved.inner.sizes.device.type) == ("meta", "cpu")
    assert [x.numel() for x in moved.tensors()] == [2, 3]
    assert NoMetadata().to("meta").tensors() == []


@pytest.mark.parametrize("style", styles(4), ids=lambda style: style.op.name)
def test_metadata_come_back_from_the_tensors_that_an_op_takes(style):
    """Field by field, with what they nest; of other metadata there are too few or too many."""
    coords, layout = Coords.of(Documents(((9, 7),), 16)), Contiguous(16, 4)
    made = style.make_metadata(SoftmaxAttention(WINDOW.mask), coords, layout, rank=1)
    tensors, metadata_of = made.tensors(), style.op.strategy.metadata_of
    back = metadata_of(tensors)
    kinds = [[type(getattr(x, each.name)) for each in fields(x)] for x in (made, back)]
    assert kinds[0] == kinds[1]
    assert all(x is y for x, y in zip(back.tensors(), tensors, strict=True))
    for other in (tensors[1:], [*tensors, tensors[0]]):
        with pytest.raises(ValueError, match="zip"):
            metadata_of(other)


@pytest.mark.parametrize("boundary", [InGraph(), EagerIsland()])
@spmd(ranks=2)
def test_a_copied_model_is_carried_out_like_the_model(mesh, boundary):
    """As a reference model of DPO, or an average of weights: over the same ranks, by itself."""
    block = Block(SoftmaxAttention(WINDOW.mask))
    apply_plan(block, mesh, {"mixer": RingAttention(boundary=boundary)})
    copied = copy.deepcopy(block)
    assert copied.mixer is not block.mixer and copied.mixer.metadata_key == block.mixer.metadata_key
    block.mixer.scale = 100.0
    assert_equals_one_device(Case(WINDOW), copied, copied, mesh, HeadTail)
    with pytest.raises(TypeError, match=r"belongs to the ranks of this process.*state_dict"):
        pickle.dumps(block)
