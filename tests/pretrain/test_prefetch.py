"""What is made one item ahead: the same items, errors in their place, and in another thread."""

import threading
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

from dtcp.torchtitan.section import Section

import pytest
import torch
from torch import nn
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader

from dtcp.batch import prepare_batch, shard_batch, shard_prepared
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.pretrain.batches import BatchPreparation
from dtcp.pretrain.data import PackedDocuments
from dtcp.pretrain.prefetch import Prefetcher, end
from dtcp.pretrain.validation import Validation
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.masks import Causal
from dtcp.softmax import RingAttention
from dtcp.softmax.mixer import SoftmaxAttention
from tests.harness.spmd import spmd
from tests.pretrain.test_data import TOKENIZER, batches, loader


def test_items_come_in_order_and_one_is_made_while_the_last_is_used():
    made = SimpleQueue()

    def numbers():
        for number in range(4):
            made.put(threading.current_thread().name)
            yield number

    items = Prefetcher(numbers())
    assert next(items) == 0
    assert [made.get(), made.get()] == ["prefetch"] * 2  # waits for item 1, which nobody asked
    assert made.empty()
    assert list(items) == [1, 2, 3]
    assert list(items) == []


def test_an_error_is_raised_where_its_item_would_have_come():
    def broken():
        yield 1
        yield 2
        raise ValueError("no third item")

    items = Prefetcher(broken())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="no third item"):
        next(items)
    assert list(items) == []


def with_thread(items):
    """Items made ahead, and the thread that makes them: earlier tests may have left others."""
    before = threading.enumerate()
    prefetcher = Prefetcher(items)
    (thread,) = (x for x in threading.enumerate() if x.name == "prefetch" and x not in before)
    return prefetcher, thread


def test_the_thread_ends_with_its_iterator():
    items, thread = with_thread(iter(int, 1))
    next(items)
    del items
    thread.join()


def test_the_end_of_the_process_waits_for_the_item_in_hand_but_not_for_ever():
    """Python would stop the thread inside of torch, which aborts the process."""
    asked, go_on = SimpleQueue(), threading.Event()

    def slow():
        for number in range(3):
            asked.put(number)
            if number:
                go_on.wait()
            yield number

    items, thread = with_thread(slow())
    next(items)
    assert [asked.get(), asked.get()] == [0, 1]  # the thread is in the midst of item 1
    end(weakref.ref(thread), items._requests, seconds=0)
    assert thread.is_alive()
    go_on.set()
    end(weakref.ref(thread), items._requests, seconds=600)
    assert not thread.is_alive()
    assert asked.empty()
    end(lambda: None, items._requests)


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
    assert set(names) == {"prefetch"}


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
    assert "hashes" in vars(prepared)  # what ranks compare is there already
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


def test_the_first_batch_is_made_when_it_is_asked_for_ahead():
    data, made = loader(), SimpleQueue()
    data.prepare = lambda batch, labels: made.put(threading.current_thread().name) or batch
    data.read_ahead()
    assert made.get() == "prefetch"  # nobody has taken it
    state = data.state_dict()
    assert state == loader().state_dict()  # of the batch in use, which was none
    for ahead, plain in zip(batches(data, 3), batches(loader(), 3), strict=True):
        assert all(map(torch.equal, ahead, plain))
    again = loader()
    batches(again, 2)
    data.read_ahead()
    data.load_state_dict(again.state_dict())
    assert torch.equal(batches(data, 1)[0][0], batches(again, 1)[0][0])


class PositionsAsLogits(nn.Module):
    """Takes a batch as our models do."""

    def forward(self, input_ids, position_ids, attn_metadata):
        return input_ids.double() + position_ids


@dataclass(frozen=True)
class WatchedPreparation(BatchPreparation):
    """Notes in which thread batches are made, and may fail at one of them."""

    threads: "SimpleQueue[str]" = field(default_factory=SimpleQueue)
    fails_at: int = 0

    def prepared(self, input_dict: dict[str, Any], labels: torch.Tensor):
        self.threads.put(threading.current_thread().name)
        if self.threads.qsize() == self.fails_at:
            raise OSError("a file is gone")
        return super().prepared(input_dict, labels)


def validation_of(folder, *, steps=3, loader=None, **options):
    """A validator on one device, the losses it logs, and the losses of its batches."""
    logged, of_batches = [], []

    def loss(predictions, labels):
        of_batches.append((predictions - labels).square().sum())
        return of_batches[-1], {}

    dims = dict.fromkeys(("dp_enabled", "pp_enabled", "dp_cp_enabled"), False)
    metrics = SimpleNamespace(
        ntokens_since_last_log=0, log_validation=lambda loss, step: logged.append(loss)
    )
    texts = PackedDocuments.Config(dataset="folder", dataset_path=str(folder), part="all")
    made = Validation.Config(enable=True, freq=1, steps=steps, dataloader=loader or texts).build(
        parallelism=None,
        dp_world_size=1,
        dp_rank=0,
        tokenizer=TOKENIZER,
        parallel_dims=SimpleNamespace(**dims),
        loss_fn=loss,
        validation_context=nullcontext,
        metrics_processor=metrics,
        seq_len=16,
        local_batch_size=2,
    )
    mesh = ParallelMesh(Degrees(), None, *[None] * 7)
    model = PositionsAsLogits()
    made.preparation = WatchedPreparation(mesh, Section(), model, training=False, **options)
    return made, [model], logged, of_batches


def test_batches_of_a_validation_are_made_ahead_and_their_losses_stay(tmp_path):
    (tmp_path / "texts.txt").write_text("the quick brown fox jumps over the lazy dog, again\n" * 9)
    validation, models, logged, of_batches = validation_of(tmp_path)
    validation.validate(models, 1)
    threads = validation.preparation.threads
    assert len(of_batches) == 3 and {threads.get() for _ in range(3)} == {"prefetch"}
    data = validation.dl_config.build(
        dp_world_size=1, dp_rank=0, tokenizer=TOKENIZER, seq_len=16, local_batch_size=2
    )
    expected = [
        (batch["input"].double() + batch["positions"] - labels).square().sum()
        for batch, labels in islice(data, 3)
    ]
    assert of_batches == expected
    while not threads.empty():  # one further may have been made already
        threads.get()
    validation.read_ahead()  # as the step before a validation does
    assert threads.get() == "prefetch" and len(of_batches) == 3
    validation.validate(models, 2)
    assert of_batches[3:] == expected and logged[0] == logged[1]


@pytest.mark.parametrize("loader", [None, HuggingFaceTextDataLoader.Config()])
def test_validations_to_the_end_warn_of_ranks_that_end_apart_where_they_can(
    tmp_path, loader, caplog
):
    """Those of dtcp's loader end together: each packs every row."""
    validation_of(tmp_path, steps=-1, loader=loader)
    warned = [record for record in caplog.records if "hangs" in record.getMessage()]
    assert len(warned) == (loader is not None)


def test_a_validation_of_all_documents_ends(tmp_path):
    """By steps=-1 alone, which torchtitan says to the loader: 41 tokens are one batch of 2 x 16."""
    (tmp_path / "texts.txt").write_text("a" * 40)
    validation, models, logged, of_batches = validation_of(tmp_path, steps=-1)
    validation.validate(models, 1)
    assert len(of_batches) == len(logged) == 1


def test_an_error_of_a_batch_of_a_validation_is_raised_where_it_is_used(tmp_path):
    (tmp_path / "texts.txt").write_text("the quick brown fox jumps over the lazy dog, again\n" * 9)
    validation, models, logged, of_batches = validation_of(tmp_path, fails_at=2)
    with pytest.raises(OSError, match="a file is gone"):
        validation.validate(models, 1)
    assert len(of_batches) == 1 and not logged
