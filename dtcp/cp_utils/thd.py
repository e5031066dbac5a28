"""Packed rows in THD form, sharded as Transformer Engine's attention reads them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtcp.distributed.same_rows import compared_keys, prepared_alike
from dtcp.sequence.host import on_host
from dtcp.thd import SENTINEL, row_chunks, shard_thd, to_thd


@on_host
def make_cp_batch_for_te(
    cp_mesh: DeviceMesh | None,
    batch: Mapping[str, Any],
    qkv_format: str = "thd",
    padding_token_id: int = 0,
    num_chunks: int = 1,
    seq_lens_padding_value: int = SENTINEL,
) -> dict[str, Any]:
    """Take packed rows to THD form and keep this rank's tokens, in one or several chunks.

    Args:
        cp_mesh: the 1-D axis of the sequence; None or one rank: THD form, not sharded.
        batch: what `dtcp.thd.to_thd` takes.
        num_chunks: groups of rows, each by itself. If their number does not divide that of the
            rows, rows of padding fill up the last ones, so no row is lost.
    Returns:
        input_ids, labels, position_ids, padding_mask, and every other key of tokens: [T] of this
        rank, or [num_chunks, T]; cu_seqlens, cu_seqlens_padded [N + 1] or [num_chunks, N + 1] of
        the whole, filled up with seq_lens_padding_value; max_seqlen; qkv_format; cp_size and
        cp_rank if sharded; other keys as they came.
    Raises:
        ValueError: another qkv_format, lengths that do not fit, slots that 2n does not divide.
        KeyError: labels, seq_lens or seq_lens_padded are missing.
    """
    sentinel, pad = seq_lens_padding_value, padding_token_id
    return prepared_alike(
        (cp_mesh,),
        lambda: _make_chunks(cp_mesh, batch, qkv_format, pad, num_chunks, sentinel),
        lambda _: compared_keys(batch),
    )


def _make_chunks(
    cp_mesh: DeviceMesh | None,
    batch: Mapping[str, Any],
    qkv_format: str,
    pad: int,
    num_chunks: int,
    sentinel: int,
) -> dict[str, Any]:
    _check_format(qkv_format)
    if num_chunks <= 1:
        whole = to_thd(batch, seq_lens_padding_value=sentinel)
        return _shard_thd_chunk_for_te(whole, cp_mesh, qkv_format, sentinel, pad)
    rows = row_chunks(batch, num_chunks, padding_token_id=pad, seq_lens_padding_value=sentinel)
    chunks = [to_thd(chunk, seq_lens_padding_value=sentinel) for chunk in rows]
    tokens = chunks[0]["labels"].shape[0]
    whole_keys = {key: _stacked(key, chunks, sentinel) for key in chunks[0]}
    parts = [_shard_thd_chunk_for_te(c, cp_mesh, qkv_format, sentinel, pad) for c in chunks]
    return {
        key: torch.stack([part[key] for part in parts])
        if _holds_tokens(key, chunks[0], tokens)
        else whole_keys.get(key, parts[0][key])
        for key in parts[0]
    }


def _shard_thd_chunk_for_te(
    batch: Mapping[str, Any],
    cp_mesh: DeviceMesh | None,
    qkv_format: str,
    seq_lens_padding_value: int,
    padding_token_id: int,
) -> dict[str, Any]:
    """Keep this rank's tokens of a batch in THD form.

    Padding is what lies behind a document in its slot; only a batch that says neither that nor
    its padding_mask is looked at for padding_token_id.
    """
    _check_format(qkv_format)
    batch = dict(batch)
    if "cu_seqlens_padded" not in batch:
        batch["cu_seqlens_padded"] = batch["cu_seqlens"]
    if "padding_mask" not in batch:
        batch["padding_mask"] = batch["input_ids"] == padding_token_id
    if cp_mesh is None or cp_mesh.size() == 1:
        return batch
    return shard_thd(batch, cp_mesh)


def _check_format(qkv_format: str) -> None:
    if qkv_format != "thd":
        raise ValueError(
            f"Packed rows are sharded in the format 'thd', got qkv_format={qkv_format!r}: use "
            f"make_cp_batch_and_ctx for rows of [B, S]."
        )


def _holds_tokens(key: str, chunk: Mapping[str, Any], tokens: int) -> bool:
    x = chunk.get(key)
    if not isinstance(x, Tensor) or key.startswith("cu_seqlens"):
        return False
    return key == "position_ids" or (x.ndim > 0 and x.shape[0] == tokens)


def _stacked(key: str, chunks: list[dict[str, Any]], sentinel: int) -> Any:
    """What chunks hold besides tokens: boundaries are stacked, the rest is the same in each."""
    values = [chunk[key] for chunk in chunks]
    if key == "max_seqlen":
        return torch.stack(values)
    if not key.startswith("cu_seqlens"):
        return values[0]
    longest = max(x.numel() for x in values)
    filled = [torch.nn.functional.pad(x, (0, longest - x.numel()), value=sentinel) for x in values]
    return torch.stack(filled)
