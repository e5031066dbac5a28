"""Attention modules of a model nobody here wrote, made to heed the context they run in.

A module is claimed by giving it a class of its own, never by a forward hook: a compiled graph
looks at the class and does not see hooks that come late. Inside, attention is one op in the
graph: no break, where wrapping torch's function costs one an attention.
"""

import inspect
from collections.abc import Hashable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp.sdpa.local_shards import ask_attended, ask_causal, ask_layout

_WRAPPERS = ("._checkpoint_wrapped_module", "._orig_mod")


def attach_context_parallel_hooks(model: nn.Module) -> None:
    """Inside a context, let `self_attn` modules ask for causal attention instead of a mask.

    A mask made of a shard's positions means nothing across shards. One that says no more than
    causal is replaced by `is_causal=True`; one that says more raises, for what it says would be
    lost. Outside a context a module runs as it did. Twice is once.

    Raises:
        ValueError: a `self_attn` whose window, or other need, would be lost with its mask.
    """
    for name, module in _self_attention(model).items():
        window = getattr(module, "sliding_window", None)
        if window is not None:
            raise ValueError(
                f"is_causal stands for a mask that is causal and no more, got {name} with "
                f"sliding_window={window}: give the layer a mixer, SoftmaxAttention with "
                f"SlidingWindow({window})."
            )
        parameters = _parameters(module)
        free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "is_causal" not in parameters and not free:
            raise ValueError(
                f"A module takes is_causal in place of its mask, got {name}, a "
                f"{type(module).__name__}, whose forward has no such argument: add it."
            )
        _claim(module, name, _TakesIsCausal)


def attach_cp_sdpa_hooks(model: nn.Module, cp_mesh: DeviceMesh) -> None:
    """Let `self_attn` modules run only where their attention is over the whole sequence.

    Inside a context it is, compiled or not; with this, a call outside one raises instead of
    attending to its shard, and so does a module that computes attention by anything but torch's
    scaled_dot_product_attention. Twice is once; on one rank nothing is done.
    """
    if cp_mesh is None or cp_mesh.size() == 1:
        return
    for name, module in _self_attention(model).items():
        _claim(module, name, _OverAllShards)


class _OverAllShards(nn.Module):
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
                f"Attention on shards goes by scaled_dot_product_attention, got {self.cp_name} "
                f"without a call of it: choose it (attn_implementation='sdpa')."
            )
        return out


class _TakesIsCausal(nn.Module):
    cp_name: str
    cp_place: int  # of attention_mask among the positional arguments; beyond them where it has none

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = len(args) > self.cp_place
        if (given or "attention_mask" in kwargs) and ask_layout(_first_tensor(args, kwargs)):
            mask = args[self.cp_place] if given else kwargs["attention_mask"]
            # An encoder says so of itself, and stays one.
            causal = getattr(self, "is_causal", True)
            if mask is not None and not (causal and ask_causal(mask)):
                raise ValueError(
                    f"On shards of a sequence a mask is causal or none, got {self.cp_name} with "
                    f"attention_mask of shape {tuple(mask.shape)} that says more: give its "
                    f"documents and padding to make_cp_batch_and_ctx."
                )
            kwargs["is_causal"] = causal
            if given:
                args = (*args[: self.cp_place], None, *args[self.cp_place + 1 :])
            else:
                kwargs["attention_mask"] = None
        return super().forward(*args, **kwargs)


def _self_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Modules named self_attn, those inside a wrapper in its place."""
    found = {}
    for name, module in model.named_modules():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        # What is wrapped comes after its wrapper.
        if name.endswith("self_attn"):
            found[name] = module
    if not found:
        raise ValueError(
            f"A model has modules named self_attn, got {type(model).__name__} without: rename "
            f"them, or use SoftmaxAttention and a plan."
        )
    return found


def _claim(module: Any, name: str, how: type[nn.Module]) -> None:
    if isinstance(module, how):
        return
    places = list(_parameters(module))
    if how is _TakesIsCausal:
        at = places.index("attention_mask") if "attention_mask" in places else len(places)
        module.cp_place = at if at < len(places) else 1 << 30
    module.cp_name = name
    module.__class__ = _claimed(cast(Hashable, type(module)), cast(Hashable, how))


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """What the forward of a module's own class takes, claimed already or not."""
    ours = (_OverAllShards, _TakesIsCausal)
    own = next(c for c in type(module).__mro__ if "forward" in vars(c) and c not in ours)
    found = dict(inspect.signature(vars(own)["forward"]).parameters)
    return {name: found[name] for name in list(found)[1:]}


@lru_cache(maxsize=128)
def _claimed(cls: Hashable, how: Hashable) -> type[nn.Module]:
    """One class a pair: modules of a class share their compiled code."""
    own, ours = cast(type[nn.Module], cls), cast(type[nn.Module], how)
    return type(f"{own.__name__}{ours.__name__}", (ours, own), {})


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            return x
    return torch.empty(0)
