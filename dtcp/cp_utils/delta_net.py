"""transformers' GatedDeltaNet layers on a sharded sequence, with their parameters as they are.

The names and signatures are NeMo Automodel's (components.models.qwen3_5_moe.cp_linear_attn);
what happens underneath is not: no activation is gathered. Where a rank's tokens are one stretch
or a head and a tail, the layer works on them as they lie, and hands on states; from any other
order, or where asked to, it deals the tokens anew in one all-to-all there and one back.
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

from dtcp.compile import assert_in_graph
from dtcp.cp_utils.inferred_layout import layout_of
from dtcp.distributed.collectives import (
    all_gather,
    axis_of,
    group_name,
    reduce_scatter,
)
from dtcp.distributed.relayout import relayout
from dtcp.recurrent.conv import causal_conv
from dtcp.recurrent.metadata import ConvMetadata, DeltaMetadata, chain_of, halo_route
from dtcp.recurrent.mixer import GatedDeltaRule
from dtcp.recurrent.op import gated_delta_rule
from dtcp.recurrent.style import FEWEST_BYTES, DeltaShape
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
    """Concatenate the shards of all ranks; backward, sum each shard's gradients and keep one's own.

    The published backward all-reduces the whole gradient and throws the other shards away.
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
    parameters; `adopt` turns one that is there. Set `_cp_mesh` to shard the sequence; without it,
    and with no documents given, theirs runs as it is.

    Attributes:
        _cp_mesh: the 1-D axis of the sequence.
        _cp_relayout: deal the tokens to contiguous shards and back, rather than hand states on
            between the segments as they lie.
    """

    _cp_mesh: DeviceMesh | None = None
    _cp_relayout: bool = False
    # What theirs defines: modules that transformers builds are not typed.
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
            return super().__new__(_over(_published(config.model_type)))
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
            layer.__class__ = _over(cast(Any, type(layer)))
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
        """Carry the layer out on this rank's tokens.

        Args:
            hidden_states: [B, L, D].
            attention_mask: [B, L], 0 for padding.
            position_ids: [B, L], or with more axes before, of which the first is read: where they
                restart a document starts. Without seq_index they also say which tokens these are.
            qkv_format: None, "bshd" or "thd": [1, T, D] with cu_seqlens.
            cu_seqlens: [N + 1], where the documents of the whole row start and end.
            seq_index: [L] or [B, L], place of each token in the whole row.
        Raises:
            ValueError: a cache, tokens whose place nobody says, or arguments of another shape.
        """
        cu_seqlens = kwargs.pop("cu_seq_lens_q", None) if cu_seqlens is None else cu_seqlens
        sharded = self._cp_mesh is not None and self._cp_mesh.size() > 1
        if not sharded and (cache_params is not None or cu_seqlens is position_ids is None):
            return self._published_forward(hidden_states, cache_params, attention_mask, **kwargs)
        if cache_params is not None:
            raise ValueError(
                f"A sharded sequence is trained on whole, got cache_params="
                f"{type(cache_params).__name__} in layer {self.layer_idx}: pass use_cache=False."
            )
        _check(hidden_states, attention_mask, qkv_format, cu_seqlens)
        if kwargs.get("seq_idx") is not None and cu_seqlens is position_ids is None:
            raise ValueError(
                f"Documents are told by cu_seqlens, or by position_ids that restart, got seq_idx "
                f"in layer {self.layer_idx}: pass cu_seqlens."
            )
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[..., None].to(hidden_states.dtype)
        if sharded:
            return self._forward_with_cp(
                hidden_states,
                position_ids=position_ids,
                seq_index=seq_index,
                cu_seqlens=cu_seqlens,
            )
        place = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        into = _into_document(hidden_states, place, position_ids, cu_seqlens)
        return self._on_segments(hidden_states, into, Contiguous(len(place), 1), None)

    def _forward_with_cp(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor | None,
        seq_index: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        axis = self._axis()
        place = self._extract_local_positions(position_ids, seq_index, hidden_states.shape[1])
        if place is None:
            raise ValueError(
                f"A layer on a sharded sequence is told which tokens it has, got neither "
                f"seq_index nor position_ids of {hidden_states.shape[1]} tokens in layer "
                f"{self.layer_idx}: pass seq_index, the place of each in the whole row."
            )
        layout = self._layout(place, axis)
        restart = position_ids if seq_index is not None else None
        into = _into_document(hidden_states, place, restart, cu_seqlens)
        if not self._cp_relayout and isinstance(layout, Contiguous | HeadTail):
            return self._on_segments(hidden_states, into, layout, axis)
        inside = Contiguous(layout.seq_len, layout.num_shards)
        there = relayout(hidden_states, layout, inside, axis)
        out = self._on_segments(there, relayout(into, layout, inside, axis), inside, axis)
        return relayout(out, inside, layout, axis)

    def _on_segments(
        self, x: Tensor, into: Tensor, layout: SequenceLayout, axis: DeviceMesh | None
    ) -> Tensor:
        """The layer on tokens that lie as the layout says: [B, L, D].

        Args:
            into: [B, L], tokens of the document before each one.
        """
        groups = [] if axis is None else [group_name(axis)]
        chain = chain_of(layout)
        route = halo_route(
            layout, self.conv_kernel_size, 0 if axis is None else axis.get_local_rank()
        )
        reach = into.clamp(max=self.conv_kernel_size - 1).to(torch.int32)
        conv = ConvMetadata(reach.unflatten(1, (chain.shape[1], -1)), route)
        rule = DeltaMetadata((into == 0).to(torch.int32), chain)

        mixed, z, b, a = self._project(x)
        mixed = self._conv1d_with_cp(mixed.transpose(1, 2), (conv, groups)).transpose(1, 2)
        q, k, v = mixed.split((self.key_dim, self.key_dim, self.value_dim), dim=-1)
        q, k = UNIT(*(y.unflatten(-1, (-1, self.head_k_dim)) for y in (q, k)))
        v = v.unflatten(-1, (-1, self.head_v_dim))
        wide = torch.promote_types(a.dtype, torch.float32)
        g = -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias)
        ranks, segments = chain.shape
        scan = FEWEST_BYTES.scans(ranks, segments, DeltaShape.of(k, v).summary)
        out = gated_delta_rule(q, k, v, g, b.sigmoid(), rule, scan=scan, groups=groups)
        normed = self.norm(out.flatten(0, 2), z.reshape(-1, self.head_v_dim))
        found: Tensor = self.out_proj(normed.unflatten(0, out.shape[:3]).flatten(2))
        return found

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v in one [B, L, C], and z, b, a."""
        if "in_proj_qkv" in self._modules:
            return self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)
        q, k, v, z, b, a = self.fix_query_key_value_ordering(
            self.in_proj_qkvz(x), self.in_proj_ba(x)
        )
        return torch.cat([y.flatten(2) for y in (q, k, v)], dim=-1), z, b, a

    def _conv1d_with_cp(
        self, mixed_qkv: Tensor, cp_context: tuple[ConvMetadata, list[str]]
    ) -> Tensor:
        """Causal convolution and silu of [B, C, L], tokens left of each segment brought first.

        Args:
            cp_context: tables of the batch, and the process group's name.
        """
        attn_metadata, groups = cp_context
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        out = causal_conv(mixed_qkv.transpose(1, 2), weight, attn_metadata, groups=groups)
        return F.silu(out if bias is None else out + bias).transpose(1, 2)

    def _extract_local_positions(
        self, position_ids: Tensor | None, seq_index: Tensor | None, seq_len: int
    ) -> Tensor | None:
        """Place of each local token in the row, [L] int64: of seq_index, else of position_ids."""
        for given in (seq_index, position_ids):
            if given is not None and 1 <= given.ndim <= 3 and given.shape[-1] == seq_len:
                return given.reshape(-1, seq_len)[0].to(torch.int64)
        return None

    def _all_gather_concat(
        self,
        tensor: Tensor,
        cp_group: dist.ProcessGroup,
        *,
        dim: int,
        differentiable: bool = False,
    ) -> Tensor:
        """The shards of all ranks, one after another along dim."""
        x = tensor if differentiable else tensor.detach()
        whole: Tensor = _AllGatherConcatFn.apply(x, cp_group, dim % tensor.ndim)
        return whole

    def _undo_attention_load_balancing(
        self, hidden_states: Tensor, original_positions: Tensor, cp_group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        """Deal tokens [B, L, D] from where positions [L] say they stand to contiguous shards.

        Returns:
            [B, L, D], and the positions of the whole row in order, [S].

        Traffic per rank: the tokens that change owner, and as much back.
        """
        axis = _axis(hidden_states, cp_group)
        layout = self._layout(original_positions, axis)
        inside = Contiguous(layout.seq_len, layout.num_shards)
        order = torch.arange(layout.seq_len, device=original_positions.device)
        return relayout(hidden_states, layout, inside, axis), order

    def _redo_attention_load_balancing(
        self,
        output: Tensor,
        original_positions: Tensor,
        sorted_positions: Tensor,
        cp_group: dist.ProcessGroup,
    ) -> Tensor:
        """Deal tokens back from contiguous shards to where positions [L] say they stood."""
        axis = _axis(output, cp_group)
        layout = self._layout(original_positions, axis)
        if sorted_positions.shape != (layout.seq_len,):
            raise ValueError(
                f"Tokens go back to the row they came from, got sorted_positions.shape="
                f"{tuple(sorted_positions.shape)} for {layout.seq_len} tokens: pass what "
                f"_undo_attention_load_balancing returned."
            )
        inside = Contiguous(layout.seq_len, layout.num_shards)
        return relayout(output, inside, layout, axis)

    def _layout(self, place: Tensor, axis: DeviceMesh) -> SequenceLayout:
        return layout_of(place, axis, reader=f"layer {self.layer_idx}")

    def _axis(self) -> DeviceMesh:
        axis = self._cp_mesh
        if axis is None or axis.ndim != 1:
            raise ValueError(
                f"_cp_mesh is the 1-D axis of the sequence, got _cp_mesh={axis}: slice it, as in "
                f"mesh['cp']."
            )
        return axis


UNIT = GatedDeltaRule().unit


def apply_cp(model: nn.Module, cp_mesh: DeviceMesh) -> nn.Module:
    """Make every GatedDeltaNet of a model of transformers one that knows of the axis, in place.

    Raises:
        ValueError: a model that has none.
    """
    names = {name for _, name in CLASSES.values()}
    layers = [m for m in model.modules() if type(m).__name__ in names]
    if not layers:
        raise ValueError(
            f"apply_cp finds GatedDeltaNet layers of transformers, got a {type(model).__name__} "
            f"without one: leave the call out."
        )
    for layer in layers:
        CPAwareGatedDeltaNet.adopt(layer)._cp_mesh = cp_mesh
    return model


def _check(
    x: Tensor, mask: Tensor | None, qkv_format: str | None, cu_seqlens: Tensor | None
) -> None:
    if qkv_format not in (None, "bshd", "thd"):
        raise ValueError(
            f"A layer takes tokens as bshd or thd, got qkv_format={qkv_format!r}: pass "
            f"[B, L, D], or one row of packed documents."
        )
    if cu_seqlens is not None and (x.shape[0] != 1 or cu_seqlens.numel() != cu_seqlens.shape[-1]):
        raise ValueError(
            f"cu_seqlens describes one packed row, got hidden_states.shape={tuple(x.shape)} with "
            f"cu_seqlens.shape={tuple(cu_seqlens.shape)}: pass rows one by one, or position_ids "
            f"that restart, with seq_index."
        )
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(
            f"A padding mask has one value a local token, got attention_mask.shape="
            f"{tuple(mask.shape)} for hidden_states.shape={tuple(x.shape)}: shard it with them."
        )


def _into_document(
    x: Tensor, place: Tensor, restart: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """How many tokens of its document come before each token: [B, L] int64, never read here."""
    if cu_seqlens is not None:
        starts = cu_seqlens.to(torch.int64).flatten()
        assert_in_graph(
            starts[0] == 0, "cu_seqlens starts at 0, got another start: give the whole row's."
        )
        # Packed rows in chunks fill boundaries up with a negative number: no document starts there.
        starts = starts.where(starts >= 0, torch.iinfo(torch.int64).max)
        first = starts[torch.searchsorted(starts, place, right=True) - 1]
        return (place - first).expand(x.shape[0], -1).contiguous()
    if restart is not None and restart.ndim == 3 and restart.shape[0] == 4:
        restart = restart[0]
    if restart is not None and restart.ndim <= 2:
        return restart.to(torch.int64).expand(x.shape[0], -1).contiguous()
    # Time, height and width of images do not say where documents start.
    return place.expand(x.shape[0], -1).contiguous()


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
def _over(theirs: Any) -> type[Any]:
    """A layer of theirs that is one of ours."""

    def published_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return theirs.forward(self, *args, **kwargs)

    members = {"_published_forward": published_forward, "__module__": __name__}
    return type(f"CPAware{theirs.__name__}", (CPAwareGatedDeltaNet, theirs), members)
