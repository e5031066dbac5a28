"""Make any model's attention modules respect the context they run in.

A module is claimed by a class of its own, never by a forward hook: a compiled graph guards the
class of a module, not hooks that are attached later. Inside, attention is one op in the graph,
without the break per attention that wrapping torch's function would cost.
"""

import inspect
from collections.abc import Hashable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp.sdpa.local_shards import ask_attended, ask_causal, ask_layout
from dtcp.sequence.arguments import check_kind

_WRAPPERS = ("._checkpoint_wrapped_module", "._orig_mod")


def attach_context_parallel_hooks(model: nn.Module) -> None:
    """Inside a context, let `self_attn` modules ask for causal attention instead of a mask.

    A mask built from a shard's positions is wrong across shards. A causal one is replaced by
    `is_causal=True`; any other raises, for it would be lost. Outside a context a module runs as
    before. A second call changes nothing.

    Raises:
        ValueError: a `self_attn` with a window, which would be lost with its mask, or without
            an `is_causal` argument.
    """
    check_kind("attach_context_parallel_hooks", nn.Module, model=model)
    for name, module in _self_attention(model).items():
        window = getattr(module, "sliding_window", None)
        if window is not None:
            raise ValueError(
                f"is_causal replaces a mask that is causal and no more, got {name} with "
                f"sliding_window={window}: give the layer a mixer, SoftmaxAttention with "
                f"SlidingWindow({window})."
            )
        parameters = _forward_parameters(module)
        free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "is_causal" not in parameters and not free:
            raise ValueError(
                f"A module takes is_causal in place of its mask, got {name}, a "
                f"{type(module).__name__}, whose forward has no such argument: add it."
            )
        _claim(module, name, _TakesIsCausal)


def attach_cp_sdpa_hooks(model: nn.Module, cp_mesh: DeviceMesh) -> None:
    """Let `self_attn` modules run only where their attention spans the whole sequence.

    That is inside a context, compiled or not. A call outside one then raises instead of attending
    to its shard, and so does a module that computes attention by anything but torch's
    scaled_dot_product_attention. A second call changes nothing; nor does a call on one rank.
    """
    check_kind("attach_cp_sdpa_hooks", nn.Module, model=model)
    check_kind("attach_cp_sdpa_hooks", (DeviceMesh, type(None)), cp_mesh=cp_mesh)
    if cp_mesh is None or cp_mesh.size() == 1:
        return
    for name, module in _self_attention(model).items():
        _claim(module, name, _AcrossShards)


class _AcrossShards(nn.Module):
    cp_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        probe = _first_tensor(args, kwargs)
        if not ask_layout(probe):
            raise ValueError(
                f"A module that is sharded over cp runs inside the context of its batch, got "
                f"{self.cp_name} outside: enter it, also around a backward pass that recomputes."
            )
        out = super().forward(*args, **kwargs)
        if not ask_attended(probe):
            raise ValueError(
                f"Attention on shards is by scaled_dot_product_attention, got {self.cp_name} "
                f"without a call of it: choose it (attn_implementation='sdpa')."
            )
        return out


class _TakesIsCausal(nn.Module):
    cp_name: str
    cp_mask_index: int
    """Index of attention_mask among the positional arguments; beyond them if it is not one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        positional = len(args) > self.cp_mask_index
        if (positional or "attention_mask" in kwargs) and ask_layout(_first_tensor(args, kwargs)):
            mask = args[self.cp_mask_index] if positional else kwargs["attention_mask"]
            # An encoder's modules have is_causal=False, and stay bidirectional.
            causal = getattr(self, "is_causal", True)
            if mask is not None and not (causal and ask_causal(mask)):
                raise ValueError(
                    f"On shards of a sequence a mask is causal or none, got {self.cp_name} with "
                    f"attention_mask of shape {tuple(mask.shape)} that says more: give its "
                    f"documents and padding to make_cp_batch_and_ctx."
                )
            kwargs["is_causal"] = causal
            if positional:
                args = (*args[: self.cp_mask_index], None, *args[self.cp_mask_index + 1 :])
            else:
                kwargs["attention_mask"] = None
        return super().forward(*args, **kwargs)


def _self_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Modules named self_attn; of a wrapped one, the module inside."""
    modules = {}
    for name, module in model.named_modules():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        # The wrapped module comes after its wrapper, under the same name.
        if name.endswith("self_attn"):
            modules[name] = module
        kinds = getattr(module, "rope_type", "")
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if "dynamic" in f"{kind}" or kind == "longrope":
                raise ValueError(
                    f"Rotary frequencies are those of a whole batch, got {name} with rope_type="
                    f"{kind!r}, which goes by the longest position of a shard: use parallelize_hf."
                )
    if not modules:
        raise ValueError(
            f"A model has modules named self_attn, got {type(model).__name__} without: rename "
            f"them, or use SoftmaxAttention and a plan."
        )
    return modules


def _claim(module: Any, name: str, claim: type[nn.Module]) -> None:
    if isinstance(module, claim):
        return
    names = list(_forward_parameters(module))
    if claim is _TakesIsCausal:
        has_mask = "attention_mask" in names
        module.cp_mask_index = names.index("attention_mask") if has_mask else 1 << 30
    module.cp_name = name
    module.__class__ = _claimed_class(cast(Hashable, type(module)), cast(Hashable, claim))


def _forward_parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """Parameters of the forward of a module's own class, whether it is claimed already or not."""
    claims = (_AcrossShards, _TakesIsCausal)
    own = next(c for c in type(module).__mro__ if "forward" in vars(c) and c not in claims)
    _, *parameters = inspect.signature(vars(own)["forward"]).parameters.items()
    return dict(parameters)


@lru_cache(maxsize=128)
def _claimed_class(cls: Hashable, claim: Hashable) -> type[nn.Module]:
    """One class per pair, so that modules of a class share their compiled code."""
    own, mixin = cast(type[nn.Module], cls), cast(type[nn.Module], claim)
    return type(f"{own.__name__}{mixin.__name__}", (mixin, own), {})


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            return x
    return torch.empty(0)
