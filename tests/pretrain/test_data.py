"""Rows of packed documents: the same on every mesh, and no label lost."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import pytest
import torch

from dtcp.pretrain.data import PackedDocuments
from dtcp.pretrain.text_files import Document
from dtcp.pretrain.tokenizer import Tokenizer

TOKENIZER = Tokenizer.Config().build(tokenizer_path="")


@dataclass(frozen=True)
class Texts:
    """A source of made-up documents, in another order each epoch."""

    texts: tuple[str, ...]

    def documents(self, epoch: int) -> Iterator[Document]:
        texts = self.texts if epoch % 2 == 0 else self.texts[::-1]
        return (Document(text, f"text {text[:8]!r}") for text in texts)

    def fingerprint(self) -> dict[str, Any]:
        return {"texts": list(self.texts)}


TEXTS = Texts(("a", "bcdefghijklmnopqrstuvwxyz" * 3, "0123456789", "xy", "end"))


def loader(*, ranks: int = 1, rank: int = 0, rows: int = 1, **options: Any) -> PackedDocuments:
    built = PackedDocuments.Config(**options).build(
        dp_world_size=ranks, dp_rank=rank, tokenizer=TOKENIZER, seq_len=16, local_batch_size=rows
    )
    built.source = TEXTS
    return built


def batches(data: PackedDocuments, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(batch["input"], labels) for batch, labels in islice(data, count)]


def test_a_byte_is_a_token():
    text = "def f(x): return '\u00e9' # \N{SNOWMAN}"
    ids = TOKENIZER.encode(text, add_bos=True, add_eos=True)
    assert len(ids) == len(text.encode()) + 2
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize(("ranks", "rows"), [(1, 4), (2, 2), (4, 1)])
def test_every_mesh_reads_the_same_rows(ranks, rows):
    expected = batches(loader(rows=4), 5)
    parts = [batches(loader(ranks=ranks, rank=r, rows=rows), 5) for r in range(ranks)]
    for step, (tokens, labels) in enumerate(expected):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), tokens)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), labels)


def test_a_label_is_the_next_token_of_its_document():
    for batch, labels in islice(loader(rows=2), 10):
        for row, lengths in enumerate(batch["documents"].lengths):
            ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
            for start, end in pairwise([0, *ends]):
                inside = labels[row, start : end - 1]
                assert torch.equal(inside, batch["input"][row, start + 1 : end])
        assert (labels != TOKENIZER.bos_id).all()


def test_rows_hold_every_token_of_an_epoch_once():
    rows = batches(loader(infinite=False), 100)
    tokens = torch.cat([tokens.flatten() for tokens, _ in rows]).tolist()
    whole = [t for text in TEXTS.texts for t in TOKENIZER.encode(text, add_bos=True)]
    assert tokens == whole[: len(tokens)] and len(whole) - len(tokens) < 16


@pytest.mark.parametrize("stop", range(1, 9))
def test_data_goes_on_where_it_stopped_on_another_mesh(stop):
    """Through the end of an epoch, too."""
    expected = batches(loader(rows=2), stop + 3)[stop:]
    data = loader(rows=2)
    batches(data, stop)
    state = json.loads(json.dumps(data.state_dict()))
    resumed = [loader(ranks=2, rank=rank) for rank in range(2)]
    parts = []
    for each in resumed:
        each.load_state_dict(state)
        parts.append(batches(each, 3))
    for step, (tokens, _) in enumerate(expected):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), tokens)


def test_positions_restart_with_each_document():
    batch, _ = next(iter(loader()))
    assert batch["positions"][0].tolist()[:5] == [0, 1, 0, 1, 2]
    assert batch["documents"].to("meta") is batch["documents"]


def test_a_source_without_documents_is_refused():
    data = loader()
    data.source = Texts(())
    with pytest.raises(ValueError, match="got none from dataset=stdlib"):
        next(iter(data))
