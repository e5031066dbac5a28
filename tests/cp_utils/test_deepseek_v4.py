"""The seed's functions for DeepSeek-V4: groups, gathers, the dense mask, batches."""

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch.testing import assert_close

from dtcp.cp_utils import (
    build_dsv4_cp_causal_padding_mask,
    dsv4_cp_all_gather,
    dsv4_cp_all_gather_metadata,
    dsv4_cp_enabled,
    dsv4_cp_local_seq_multiple,
    dsv4_cp_rank,
    dsv4_cp_size,
    make_dsv4_contiguous_shard_cp_batch_and_ctx,
)
from dtcp.cp_utils.gemma4 import make_contiguous_shard_cp_batch_and_ctx
from dtcp.models.deepseek_v4 import PRESETS, DeepseekV4, tiny
from tests.harness.spmd import spmd


@dataclass
class Axis:
    """What the batch function asks of a mesh, on any rank without ranks."""

    ranks: int
    rank: int

    def size(self) -> int:
        return self.ranks

    def get_local_rank(self) -> int:
        return self.rank

    def get_group(self) -> str:
        return "group"


def shards(batch, ranks, **options):
    """The batch of every rank."""
    make = make_dsv4_contiguous_shard_cp_batch_and_ctx
    made = [make(Axis(ranks, rank), None, dict(batch), **options) for rank in range(ranks)]
    assert all(isinstance(context(), nullcontext) for context, _ in made)
    return [local for _, local in made]


def rejoined(parts, key, dim=1):
    return torch.cat([part[key] for part in parts], dim)


def plain_batch(seq_len=13, rows=2):
    ids = torch.arange(rows * seq_len).view(rows, seq_len) + 1
    return {"input_ids": ids, "labels": ids + 1}


@pytest.mark.parametrize(
    ("ratios", "multiple"),
    [((0, 4, 128), 128), ((4, 0), 8), ((6, 4), 24), ((128,), 128), ((), 1), (None, 1), ((0,), 1)],
)
def test_the_multiple_keeps_every_window_whole(ratios, multiple):
    assert dsv4_cp_local_seq_multiple(SimpleNamespace(compress_ratios=ratios)) == multiple


def test_the_multiple_is_read_off_models_and_configs():
    assert dsv4_cp_local_seq_multiple(PRESETS["deepseek-v4-flash"]) == 128
    assert dsv4_cp_local_seq_multiple(DeepseekV4(tiny(64))) == 16


def test_without_a_group_everything_stays_as_it_is():
    x = torch.randn(2, 3)
    assert not dsv4_cp_enabled(None)
    assert (dsv4_cp_rank(None), dsv4_cp_size(None)) == (0, 1)
    assert dsv4_cp_all_gather(x, 1, None) is x
    assert dsv4_cp_all_gather_metadata(x, 1, None) is not None
    assert dsv4_cp_all_gather_metadata(None, 1, None) is None


@spmd(ranks=(2, 3))
def test_gathers_concatenate_and_sum_gradients(mesh, ranks):
    group, rank = mesh.get_group(), mesh.get_local_rank()
    assert dsv4_cp_enabled(group)
    assert (dsv4_cp_rank(group), dsv4_cp_size(group)) == (rank, ranks)
    parts = torch.arange(4.0 * ranks).view(ranks, 2, 2)
    mine = parts[rank].clone().requires_grad_()
    whole = dsv4_cp_all_gather(mine, -1, group)
    assert_close(whole, torch.cat(list(parts), -1))
    weight = torch.arange(2.0 * 2 * ranks).view(2, -1)
    (whole * weight * (rank + 1)).sum().backward()
    total = sum(range(1, ranks + 1))
    assert_close(mine.grad, total * weight[:, 2 * rank : 2 * rank + 2])
    known = dsv4_cp_all_gather_metadata(mine, 0, group)
    assert not known.requires_grad and known.shape == (2 * ranks, 2)


@spmd(ranks=2)
def test_the_dense_mask_says_who_sees_whom(mesh):
    """Global queries against all keys, key by key; padding of both ranks is hidden."""
    rank, group = mesh.get_local_rank(), mesh.get_group()
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[1, 6:] = True
    position_ids = torch.arange(8)[4 * rank : 4 * rank + 4]
    mine = padding[:, 4 * rank : 4 * rank + 4]
    mask = build_dsv4_cp_causal_padding_mask(
        position_ids, 8, torch.bfloat16, "cpu", group, padding_mask=mine, sliding_window=3
    )
    assert mask.shape == (2, 1, 4, 8) and mask.dtype == torch.bfloat16
    for row in range(2):
        for index, query in enumerate(position_ids.tolist()):
            for key in range(8):
                seen = key <= query and query - key < 3 and not padding[row, key]
                least = torch.finfo(torch.bfloat16).min
                assert mask[row, 0, index, key] == (0 if seen else least)
    whole = build_dsv4_cp_causal_padding_mask(position_ids[None], 8, torch.float32, "cpu", group)
    assert_close(whole[0, 0] == 0, torch.arange(8) <= position_ids[:, None])
    with pytest.raises(ValueError, match="covers every key"):
        build_dsv4_cp_causal_padding_mask(position_ids, 7, torch.float32, "cpu", group, mine)


def test_rows_are_padded_and_cut_in_stretches():
    batch = plain_batch()
    batch["attention_mask"] = torch.ones(2, 13)
    batch["attention_mask"][1, 9:] = 0
    parts = shards(batch, 2, loss_mask=torch.ones(2, 13), padding_token_id=7, pad_multiple=4)
    assert all(part["input_ids"].shape == (2, 8) for part in parts)
    assert rejoined(parts, "input_ids")[:, 13:].eq(7).all()
    assert rejoined(parts, "labels")[:, 13:].eq(-100).all()
    assert rejoined(parts, "loss_mask")[:, 13:].eq(0).all()
    assert_close(rejoined(parts, "position_ids"), torch.arange(16).expand(2, -1))
    padding = torch.arange(16) >= torch.tensor([[13], [9]])
    assert_close(rejoined(parts, "padding_mask"), padding)
    assert_close(rejoined(parts, "input_ids")[:, :13], batch["input_ids"])
    assert parts[0]["_dsv4_cp_group"] == "group" and "attention_mask" not in parts[0]
    # Without a mask none is made; positions of several axes keep them.
    position_ids = torch.arange(13).expand(3, 2, -1)
    parts = shards({**plain_batch(), "position_ids": position_ids}, 3)
    assert "padding_mask" not in parts[0]
    assert_close(rejoined(parts, "position_ids", -1), torch.arange(18).expand(3, 2, -1))


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_four_dims_is_read_on_its_diagonal(additive):
    padding = torch.arange(8) >= torch.tensor([[8], [5]])
    seen = ~padding[:, None, :] & torch.ones(8, 8, dtype=torch.bool).tril()
    mask = torch.zeros(2, 8, 8).masked_fill(~seen, -1e9) if additive else seen
    parts = shards({**plain_batch(8), "attention_mask": mask[:, None]}, 2)
    assert_close(rejoined(parts, "padding_mask"), padding)


def test_embeddings_and_a_loss_mask_stand_in():
    embeds = torch.randn(2, 6, 4)
    loss_mask = torch.ones(2, 6, dtype=torch.int64)
    parts = shards({"inputs_embeds": embeds}, 2, loss_mask=loss_mask)
    assert_close(rejoined(parts, "inputs_embeds")[:, :6], embeds)
    assert_close(rejoined(parts, "labels")[:, :6], loss_mask)
    assert "loss_mask" not in parts[0]


def test_packed_rows_are_rebuilt_in_whole_windows():
    """Documents of 3 and 5 tokens, the first in a slot of 4, and one of 6: slots of 4, 8 and 8."""
    batch = plain_batch(12)
    batch["seq_lens"] = torch.tensor([[3, 5], [6, -1000]])
    batch["seq_lens_padded"] = torch.tensor([[4, 8], [12, -1000]])
    parts = shards(batch, 2, padding_token_id=99, pad_multiple=4)
    ids = rejoined(parts, "input_ids")
    assert ids.tolist() == [
        [1, 2, 3, 99, 5, 6, 7, 8, 9, 99, 99, 99, 99, 99, 99, 99],
        [13, 14, 15, 16, 17, 18, *[99] * 10],
    ]
    assert rejoined(parts, "position_ids").tolist() == [
        [*range(4), *range(8), *[0] * 4],
        [*range(8), *[0] * 8],
    ]
    assert rejoined(parts, "_packed_seq_ids").tolist() == [
        [1] * 4 + [2] * 8 + [0] * 4,
        [1] * 8 + [0] * 8,
    ]
    assert_close(rejoined(parts, "padding_mask"), ids == 99)
    assert_close(rejoined(parts, "labels") == -100, ids == 99)
    assert parts[0]["seq_lens"].tolist() == [[3, 5], [6, -1000]]
    assert parts[0]["seq_lens_padded"].tolist() == [[4, 8], [8, -1000]]
    where = parts[0]["_dsv4_cp_position_map"]
    assert where[0].tolist() == [0, 1, 2, -1, 4, 5, 6, 7, 8, -1, -1, -1]
    assert parts[0]["qkv_format"] == "thd"
    # One rank: nothing is moved.
    _, alone = make_dsv4_contiguous_shard_cp_batch_and_ctx(None, None, batch)
    assert_close(alone["input_ids"], batch["input_ids"])
    assert alone["qkv_format"] == "thd" and alone["_dsv4_cp_group"] is None


@spmd(ranks=2)
def test_a_batch_of_a_real_mesh_carries_its_group(mesh):
    _, local = make_dsv4_contiguous_shard_cp_batch_and_ctx(mesh, None, plain_batch(8))
    assert dist.get_world_size(local["_dsv4_cp_group"]) == 2
    first = 4 * mesh.get_local_rank()
    assert_close(local["input_ids"], plain_batch(8)["input_ids"][:, first : first + 4])


LEFT = torch.tensor([[0, 0, 1, 1]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 4])}, NotImplementedError, "cu_seqlens without seq_lens"),
        ({"qkv_format": "thd"}, KeyError, "seq_lens"),
        ({"labels": None}, KeyError, "labels"),
        ({"inputs_embeds": torch.ones(1, 4, 2)}, ValueError, "either input_ids or inputs_embeds"),
        ({"input_ids": None}, ValueError, "neither"),
        ({"attention_mask": LEFT}, ValueError, "padded on the right"),
        ({"seq_lens": torch.tensor([[3, 2]])}, ValueError, "fit into it"),
    ],
)
def test_what_cannot_be_honoured_is_refused(change, error, message):
    batch = {**plain_batch(4, 1), **change}
    for axis in (Axis(2, 0), None):
        with pytest.raises(error, match=message):
            make_dsv4_contiguous_shard_cp_batch_and_ctx(axis, None, batch)


RESTARTS = torch.tensor([[0, 1, 0, 1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "added to scores"),
        ({"attention_mask": torch.ones(1, 1, 4, 4, dtype=torch.int64)}, "added to scores"),
        ({"attention_mask": torch.ones(1, 4, 4)}, "four dims"),
        ({"attention_mask": torch.tensor([[0.0, 0.0, 0.0, -1e9]])}, "0 for padding"),
        ({"attention_mask": torch.ones(1, 3)}, "rows of one length"),
        ({"labels": torch.ones(1, 3)}, "rows of one length"),
        ({"position_ids": torch.arange(4)}, "Position ids go with tokens"),
    ],
)
@pytest.mark.parametrize(
    "make", [make_dsv4_contiguous_shard_cp_batch_and_ctx, make_contiguous_shard_cp_batch_and_ctx]
)
def test_a_mask_or_a_key_of_another_shape_is_refused(make, change, message):
    """One of four dims with 1 for what is seen would make padding of every token."""
    with pytest.raises(ValueError, match=message):
        make(Axis(2, 0), None, {**plain_batch(4, 1), **change})


@pytest.mark.parametrize(
    "documents",
    [
        {"attention_mask": torch.tensor([[1, 1, 2, 2]])},
        {"position_ids": RESTARTS},
        {"position_ids": RESTARTS.expand(3, 1, -1)},
    ],
)
@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (make_dsv4_contiguous_shard_cp_batch_and_ctx, "give seq_lens"),
        (make_contiguous_shard_cp_batch_and_ctx, "give _packed_seq_ids"),
    ],
)
def test_documents_in_keys_that_are_not_read_are_refused(make, remedy, documents):
    """Taken for one document, they would see each other."""
    read_keys = {
        "seq_lens": torch.tensor([[2, 2]]),
        "_packed_seq_ids": torch.tensor([[1, 1, 2, 2]]),
    }
    batch = {**plain_batch(4, 1), **documents}
    with pytest.raises(ValueError, match=f"gives its documents where they are read.*{remedy}"):
        make(Axis(2, 0), None, batch)
    _, local = make(Axis(2, 0), None, {**batch, remedy[5:]: read_keys[remedy[5:]]})
    assert local["input_ids"].shape[1] == 2
    for key in ("seq_lens", "cu_seqlens") if remedy.endswith("ids") else ():
        with pytest.raises(ValueError, match=remedy):
            make(Axis(2, 0), None, {**plain_batch(4, 1), key: torch.tensor([[2, 2]])})


def test_positions_of_padding_say_nothing_of_documents():
    for mask, position_ids in (([1, 1, 1, 0], [0, 1, 2, 1]), ([0, 0, 1, 1], [1, 1, 0, 1])):
        batch = {
            "attention_mask": torch.tensor([mask]),
            "position_ids": torch.tensor([position_ids]),
        }
        _, local = make_contiguous_shard_cp_batch_and_ctx(
            Axis(1, 0), None, {**plain_batch(4, 1), **batch}
        )
        assert local["_packed_seq_ids"].tolist() == [mask]


def test_lengths_that_do_not_fit_their_batch_are_refused():
    make = make_dsv4_contiguous_shard_cp_batch_and_ctx
    for lengths in ([4], [[4], [4]]):
        with pytest.raises(ValueError, match="counted in a row of seq_lens"):
            make(Axis(2, 0), None, {**plain_batch(4, 1), "seq_lens": torch.tensor(lengths)})
    padded = {"seq_lens": torch.tensor([[2, 2]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    with pytest.raises(ValueError, match="padding among the tokens 2 to 3 of row 0"):
        make(Axis(2, 0), None, {**plain_batch(4, 1), **padded})


SEEDS = (make_dsv4_contiguous_shard_cp_batch_and_ctx, make_contiguous_shard_cp_batch_and_ctx)


@pytest.mark.parametrize("make", SEEDS)
def test_documents_that_a_mask_of_four_dims_tells_apart_are_refused(make):
    """Its diagonal says what is padding; that tokens see no other document it says elsewhere."""
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    seen = (document[:, None] == document) & torch.ones(8, 8, dtype=torch.bool).tril()
    batch = {**plain_batch(8), "attention_mask": seen.expand(2, 1, -1, -1)}
    with pytest.raises(ValueError, match="tokens do not see the one before them"):
        make(None, None, batch)


@pytest.mark.parametrize("make", SEEDS)
def test_a_mask_and_padding_that_differ_are_refused(make):
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 6:] = 0
    alike = {**plain_batch(8), "attention_mask": mask, "padding_mask": mask == 0}
    assert make(None, None, alike)[1]["padding_mask"].tolist() == (mask == 0).tolist()
    with pytest.raises(ValueError, match="A batch says once what is padding"):
        make(None, None, {**alike, "padding_mask": mask < 0})
