"""transformers' GatedDeltaNet layers on a sharded sequence, with their parameters as they are.

The names and signatures are NeMo Automodel's (components.models.qwen3_5_moe.cp_linear_attn); the
method is not: no activation is gathered. Where a rank's tokens are one stretch, or a head and a
tail, the layer works on them as they are and hands on states. Tokens in any other order, or if
asked to, it moves to contiguous shards in one all-to-all, and back in another.
"""

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from dtcp.cp_utils.delta_net_segments import check_call, forward_on_segments, index_in_document
from dtcp.cp_utils.inferred_layout import infer_layout
from dtcp.distributed.collectives import all_gather, reduce_scatter
from dtcp.distributed.groups import axis_of
from dtcp.distributed.relayout import relayout
from dtcp.recurrent.conv import causal_conv
from dtcp.recurrent.metadata import ConvMetadata
from dtcp.sequence.arguments import check_kind
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout

CLASSES: Mapping[str, tuple[str, str]] = {
    "qwen3_5_text": ("qwen3_5", "Qwen3_5GatedDeltaNet"),
    "qwen3_5": ("qwen3_5", "Qwen3_5GatedDeltaNet"),
    "qwen3_5_moe_text": ("qwen3_5_moe", "Qwen3_5MoeGatedDeltaNet"),
    "qwen3_5_moe": ("qwen3_5_moe", "Qwen3_5MoeGatedDeltaNet"),
    "qwen3_next": ("qwen3_next", "Qwen3NextGatedDeltaNet"),
}
"""transformers' layer for each model_type: folder and class."""


class _AllGatherConcatFn(torch.autograd.Function):
    """Concatenate the shards of all ranks; backward reduce-scatters the gradients.

    The published backward all-reduces the whole gradient and drops the shards of other ranks.
    """

    @staticmethod
    def forward(ctx: Any, local_tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.axis, ctx.dim = _axis(local_tensor, group), dim
        return all_gather(local_tensor, ctx.axis, dim=dim)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(grad_output.contiguous(), ctx.axis, dim=ctx.dim), None, None


class CPAwareGatedDeltaNet(nn.Module):
    """Drop-in replacement for transformers' GatedDeltaNet of Qwen3.5, Qwen3.5-MoE and Qwen3-Next.

    Built like theirs, CPAwareGatedDeltaNet(config, layer_idx), it is one of theirs, with the same
    parameters; `adopt` converts an existing layer. Set `_cp_mesh` to shard the sequence; without
    it, and without documents, transformers' own forward runs.

    Attributes:
        _cp_mesh: the 1-D axis of the sequence.
        _cp_relayout: move the tokens to contiguous shards and back, rather than hand states on
            between the segments as they are.
    """

    _cp_mesh: DeviceMesh | None = None
    _cp_relayout: bool = False
    # Defined by transformers, whose modules are not typed.
    in_proj_qkv: Any
    in_proj_z: Any
    in_proj_b: Any
    in_proj_a: Any
    in_proj_qkvz: Any
    in_proj_ba: Any
    fix_query_key_value_ordering: Any
    conv1d: Any
    norm: Any
    out_proj: Any
    A_log: Tensor
    dt_bias: Tensor
    layer_idx: int
    key_dim: int
    value_dim: int
    head_k_dim: int
    head_v_dim: int
    conv_kernel_size: int
    _published_forward: Any

    def __new__(cls, config: Any, layer_idx: int) -> Self:
        if cls is CPAwareGatedDeltaNet:
            return super().__new__(_subclass_of(_published(config.model_type)))
        return super().__new__(cls)

    @classmethod
    def adopt(cls, layer: Any) -> Any:
        """Make a layer of transformers one of these, in place."""
        if not isinstance(layer, CPAwareGatedDeltaNet):
            names = [name for _, name in CLASSES.values()]
            if type(layer).__name__ not in names:
                raise TypeError(
                    f"CPAwareGatedDeltaNet takes over one of {sorted(set(names))}, got a "
                    f"{type(layer).__name__}: name the linear-attention layer itself."
                )
            layer.__class__ = _subclass_of(cast(Any, type(layer)))
        return layer

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        cache_position: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens: Tensor | None = None,
        seq_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Apply the layer to this rank's tokens.

        Args:
            hidden_states: [B, L, E].
            attention_mask: [B, L], 0 for padding.
            position_ids: [B, L], or with more axes before, of which the first is read: a document
                starts where they restart. Without seq_index they also are the tokens' indices.
            qkv_format: None, "bshd" or "thd": [1, T, E] with cu_seqlens.
            cu_seqlens: [N + 1], where the documents of the whole row start and end.
            seq_index: [L] or [B, L], index of each token in the whole row.
        Returns:
            [B, L, E].
        Raises:
            ValueError: a cache, tokens without an index, or arguments of another shape.
        """
        # From transformers 5.24 on, a cache has another name.
        cache = kwargs.pop("cache", None) if cache_params is None else cache_params
        cu_seqlens = kwargs.pop("cu_seq_lens_q", None) if cu_seqlens is None else cu_seqlens
        sharded = self._cp_mesh is not None and self._cp_mesh.size() > 1
        if not sharded and (cache is not None or cu_seqlens is position_ids is None):
            return self._published_forward(hidden_states, cache, attention_mask, **kwargs)
        if cache is not None:
            raise ValueError(
                f"A sharded sequence is trained on whole, got a cache of type "
                f"{type(cache).__name__} in layer {self.layer_idx}: pass use_cache=False."
            )
        check_call(hidden_states, attention_mask, qkv_format, cu_seqlens)
        if kwargs.get("seq_idx") is not None and cu_seqlens is position_ids is None:
            raise ValueError(
                f"Documents are read off cu_seqlens, or position_ids that restart, got seq_idx in "
                f"layer {self.layer_idx}: pass cu_seqlens."
            )
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[..., None].to(hidden_states.dtype)
        if sharded:
            return self._forward_with_cp(
                hidden_states, position_ids=position_ids, seq_index=seq_index, cu_seqlens=cu_seqlens
            )
        token_index = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        index = index_in_document(hidden_states, token_index, position_ids, cu_seqlens)
        return forward_on_segments(
            self, hidden_states, index, Contiguous(len(token_index), 1), None
        )

    def _forward_with_cp(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor | None,
        seq_index: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        axis = self._axis()
        token_index = self._extract_local_positions(position_ids, seq_index, hidden_states.shape[1])
        if token_index is None:
            raise ValueError(
                f"A layer on a sharded sequence knows which tokens it has, got neither seq_index "
                f"nor position_ids of {hidden_states.shape[1]} tokens in layer {self.layer_idx}: "
                f"pass seq_index, the index of each in the whole row."
            )
        layout = self._layout(token_index, axis)
        restarting = position_ids if seq_index is not None else None
        index = index_in_document(hidden_states, token_index, restarting, cu_seqlens)
        if not self._cp_relayout and isinstance(layout, Contiguous | HeadTail):
            return forward_on_segments(self, hidden_states, index, layout, axis)
        contiguous = Contiguous(layout.seq_len, layout.num_shards)
        x = relayout(hidden_states, layout, contiguous, axis)
        index = relayout(index, layout, contiguous, axis)
        out = forward_on_segments(self, x, index, contiguous, axis)
        return relayout(out, contiguous, layout, axis)

    def _conv1d_with_cp(
        self, mixed_qkv: Tensor, cp_context: tuple[ConvMetadata, list[str]]
    ) -> Tensor:
        """Causal convolution and silu of [B, C, L], after fetching the tokens left of each segment.

        Args:
            cp_context: the convolution's metadata of the batch, and the process group's name.
        """
        attn_metadata, groups = cp_context
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        x = mixed_qkv.transpose(1, 2)
        out = causal_conv(x, weight, attn_metadata, bias=bias, groups=groups)
        return F.silu(out).transpose(1, 2)

    def _extract_local_positions(
        self, position_ids: Tensor | None, seq_index: Tensor | None, seq_len: int
    ) -> Tensor | None:
        """Index of each local token in the row, [L] int64: seq_index, or else position_ids."""
        for index in (seq_index, position_ids):
            if index is not None and 1 <= index.ndim <= 3 and index.shape[-1] == seq_len:
                return index.reshape(-1, seq_len)[0].to(torch.int64)
        return None

    def _all_gather_concat(
        self, tensor: Tensor, cp_group: dist.ProcessGroup, *, dim: int, differentiable: bool = False
    ) -> Tensor:
        """The shards of all ranks, concatenated along dim."""
        x = tensor if differentiable else tensor.detach()
        return _AllGatherConcatFn.apply(x, cp_group, dim % tensor.ndim)

    def _undo_attention_load_balancing(
        self, hidden_states: Tensor, original_positions: Tensor, cp_group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        """Move tokens [B, L, E], whose indices are original_positions [L], to contiguous shards.

        Returns:
            [B, L, E], and the indices of the whole row in order, [S].

        Traffic per rank: the tokens that change owner, forward and backward.
        """
        axis = _axis(hidden_states, cp_group)
        layout = self._layout(original_positions, axis)
        contiguous = Contiguous(layout.seq_len, layout.num_shards)
        order = torch.arange(layout.seq_len, device=original_positions.device)
        return relayout(hidden_states, layout, contiguous, axis), order

    def _redo_attention_load_balancing(
        self,
        output: Tensor,
        original_positions: Tensor,
        sorted_positions: Tensor,
        cp_group: dist.ProcessGroup,
    ) -> Tensor:
        """Move tokens from contiguous shards back to where original_positions [L] were."""
        axis = _axis(output, cp_group)
        layout = self._layout(original_positions, axis)
        if sorted_positions.shape != (layout.seq_len,):
            raise ValueError(
                f"Tokens go back to the row they came from, got sorted_positions.shape="
                f"{tuple(sorted_positions.shape)} for {layout.seq_len} tokens: pass what "
                f"_undo_attention_load_balancing returned."
            )
        contiguous = Contiguous(layout.seq_len, layout.num_shards)
        return relayout(output, contiguous, layout, axis)

    def _layout(self, token_index: Tensor, axis: DeviceMesh) -> SequenceLayout:
        return infer_layout(token_index, axis, reader=f"layer {self.layer_idx}")

    def _axis(self) -> DeviceMesh:
        axis = self._cp_mesh
        if axis is None or axis.ndim != 1:
            raise ValueError(
                f"_cp_mesh is the 1-D axis of the sequence, got _cp_mesh={axis}: slice it, as in "
                f"mesh['cp']."
            )
        return axis


def apply_cp(model: nn.Module, cp_mesh: DeviceMesh) -> nn.Module:
    """Shard every GatedDeltaNet of a model of transformers on the axis, in place.

    A model that was built with CPAwareGatedDeltaNet keeps its layers, which get the axis.

    Raises:
        ValueError: a model that has none.
    """
    check_kind("apply_cp", nn.Module, model=model)
    names = {name for _, name in CLASSES.values()}
    layers = [
        module
        for module in model.modules()
        if isinstance(module, CPAwareGatedDeltaNet) or type(module).__name__ in names
    ]
    if not layers:
        raise ValueError(
            f"apply_cp shards GatedDeltaNet layers of transformers, got a {type(model).__name__} "
            f"without one: leave the call out."
        )
    for layer in layers:
        CPAwareGatedDeltaNet.adopt(layer)._cp_mesh = cp_mesh
    return model


def _axis(x: Tensor, group: dist.ProcessGroup) -> DeviceMesh:
    return axis_of(group.group_name, x.device)


def _published(model_type: str) -> Any:
    if model_type not in CLASSES:
        raise ValueError(
            f"CPAwareGatedDeltaNet knows the layers of {sorted(CLASSES)}, got "
            f"model_type={model_type!r}: pass a config of one of them."
        )
    folder, name = CLASSES[model_type]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    return getattr(module, name)


@cache
def _subclass_of(theirs: Any) -> type[Any]:
    """A class that is both theirs and CPAwareGatedDeltaNet."""

    def published_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return theirs.forward(self, *args, **kwargs)

    members = {"_published_forward": published_forward, "__module__": __name__}
    return type(f"CPAware{theirs.__name__}", (CPAwareGatedDeltaNet, theirs), members)
