"""What is made one item ahead: the same items, errors in their place, and in another thread."""

import threading
from itertools import islice
from queue import SimpleQueue

import pytest
import torch

from dtcp.batch import prepare_batch, shard_batch, shard_prepared
from dtcp.distributed.mesh import ParallelMesh
from dtcp.pretrain.ahead import Ahead
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.masks import Causal
from dtcp.softmax import RingAttention
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness.spmd import spmd
from tests.pretrain.test_data import batches, loader


def test_items_come_in_order_and_one_is_made_while_the_last_is_used():
    made = SimpleQueue()

    def numbers():
        for number in range(4):
            made.put(threading.current_thread().name)
            yield number

    items = Ahead(numbers())
    assert next(items) == 0
    assert [made.get(), made.get()] == ["ahead", "ahead"]  # waits for item 1, which nobody asked
    assert made.empty()
    assert list(items) == [1, 2, 3]
    assert list(items) == []


def test_an_error_is_raised_where_its_item_would_have_come():
    def broken():
        yield 1
        yield 2
        raise ValueError("no third item")

    items = Ahead(broken())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="no third item"):
        next(items)
    assert list(items) == []


def test_the_thread_ends_with_its_iterator():
    items = Ahead(iter(int, 1))
    next(items)
    thread = next(x for x in threading.enumerate() if x.name == "ahead")
    del items
    thread.join()


def test_a_batch_is_prepared_in_the_thread_and_the_cursor_stays_with_the_one_in_use():
    data, names = loader(), []

    def prepare(batch, labels):
        names.append(threading.current_thread().name)
        return batch | {"sum": int(batch["input"].sum() + labels.sum())}

    data.prepare = prepare
    stream = iter(data)
    for step in range(1, 4):
        batch, labels = next(stream)
        assert batch["sum"] == int(batch["input"].sum() + labels.sum())
        state, again = data.state_dict(), loader()
        batches(again, step)
        assert state == again.state_dict()
    assert set(names) == {"ahead"}


@spmd(ranks=2)
def test_a_prepared_batch_is_the_sharded_batch(mesh):
    """Nothing is exchanged while it is prepared; one rank's error is heard by all after that."""
    whole = ParallelMesh.of_sequence(mesh)
    model, ids = SoftmaxAttention(Causal()), torch.arange(48)[None]
    style = RingAttention()
    style._apply(model, mesh)
    documents = Documents(((20, 28),), 48)
    options = {"model": model, "documents": documents}
    prepared = prepare_batch({"input_ids": ids}, whole, DocumentBalanced, **options)
    local, sharded = shard_prepared(lambda: prepared, whole, device="cpu")
    expected, same = shard_batch({"input_ids": ids}, whole, DocumentBalanced, **options)
    assert torch.equal(local["input_ids"], expected["input_ids"])
    tables = [model.own(x.attn_metadata).tensors() for x in (sharded, same)]
    assert all(map(torch.equal, *tables))
    assert torch.equal(sharded.attn_metadata.real, same.attn_metadata.real)

    def refused():
        if mesh.get_local_rank() == 1:
            raise OSError("a file is gone")
        return prepared

    kind, said = (
        (OSError, "is gone") if mesh.get_local_rank() else (ValueError, "refused its batch")
    )
    with pytest.raises(kind, match=said):
        shard_prepared(refused, whole)


def test_reading_ahead_gives_the_batches_of_reading():
    """Through the ends of epochs, on two ranks."""
    for rank in range(2):
        data = loader(ranks=2, rank=rank)
        expected = [each.batch["input"] for each in islice(data._micro_batches(data.cursor), 7)]
        assert all(map(torch.equal, expected, (tokens for tokens, _ in batches(data, 7))))
