"""Where tokens meet in a model nobody here wrote: found by running it, not by reading names.

A module is run a second time with one token of its input changed. If its output at another
token moves, tokens meet in it; and whatever a plan does not claim of these would, on a sharded
sequence, see its own shard only.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from dtcp.mixer import Mixer

Calls = Callable[[], object]


def probe_length(model: nn.Module) -> int:
    """Tokens to run a model with, such that a dim of this size is the sequence and nothing else."""
    sizes = {size for x in (*model.parameters(), *model.buffers()) for size in x.shape}
    return next(length for length in range(37, 37 + 2 * len(sizes) + 2, 2) if length not in sizes)


def find_mixing(model: nn.Module, run: Calls, seq_len: int) -> list[str]:
    """Names of the innermost modules in which tokens meet, in the order they run.

    Args:
        run: one forward of the model over one row of seq_len tokens, in eval mode.
        seq_len: of probe_length.
    """
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []
    replaying = False

    def look(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        nonlocal replaying
        if replaying or names[module] in found:
            return
        replaying = True
        try:
            changed_args, changed_kwargs = _change(args, kwargs, seq_len)
            again = module.forward(*changed_args, **changed_kwargs)
        finally:
            replaying = False
        if _moved(out, again, seq_len):
            found.append(names[module])

    hooks = [m.register_forward_hook(look, with_kwargs=True) for m in names]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in found if not any(_inside(other, name) for other in found)]


@contextmanager
def mixers_apart(model: nn.Module) -> Iterator[list[str]]:
    """Inside, every mixer of dtcp hands each token its own value; yields the mixers' names.

    What mixes then, mixes without a mixer.
    """
    mixers = {name: m for name, m in model.named_modules() if isinstance(m, Mixer)}
    for mixer in mixers.values():
        mixer.forward = mixer.forward_without_mixing
    try:
        yield list(mixers)
    finally:
        for mixer in mixers.values():
            del mixer.forward


def own_value(v: Tensor, heads: int) -> Tensor:
    """Attention of a token to itself alone: v [B, L, G, V] -> [B, L, H, V]."""
    return v.repeat_interleave(heads // v.shape[2], dim=2)


def _inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


def tensors(value: object) -> list[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [x for part in value for x in tensors(part)] if isinstance(value, tuple | list) else []


def _seq_dim(x: Tensor, seq_len: int) -> int | None:
    """The one dim that is as long as the sequence; rows are one, so a flattened one is found."""
    dims = [dim for dim, size in enumerate(x.shape) if size == seq_len]
    return dims[0] if len(dims) == 1 else None


def _change(args: Any, kwargs: Any, seq_len: int) -> tuple[Any, Any]:
    """The same inputs with the token in the middle changed: features, or ids if there are none."""
    along = [x for x in tensors((args, kwargs)) if _seq_dim(x, seq_len) is not None]
    features = [x for x in along if x.is_floating_point()]
    new = {id(x): _change_token(x, seq_len) for x in features or along[:1]}

    def put(value: Any) -> Any:
        if isinstance(value, Tensor):
            return new.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)(put(part) for part in value)
        return {key: put(part) for key, part in value.items()} if type(value) is dict else value

    return put(args), put(kwargs)


def _change_token(x: Tensor, seq_len: int) -> Tensor:
    at, x = seq_len // 2, x.clone()
    token = x.select(cast(int, _seq_dim(x, seq_len)), at)
    if x.is_floating_point():
        spread = x.std() + 1e-3
        token += spread * torch.randn_like(token)
    else:
        token.copy_(x.select(cast(int, _seq_dim(x, seq_len)), 0) + 1).clamp_(max=int(x.max()))
    return x


def _moved(out: object, again: object, seq_len: int) -> bool:
    """Whether anything but the changed token's part of an output is another now."""
    return any(
        _tensor_moved(a, b, seq_len)
        for a, b in zip(tensors(out), tensors(again), strict=True)
        if a.is_floating_point()
    )


def _tensor_moved(a: Tensor, b: Tensor, seq_len: int) -> bool:
    if a.numel() == 0 or (seq_len in a.shape and _seq_dim(a, seq_len) is None):
        return False
    far = (a - b).abs().nan_to_num(nan=torch.inf)
    dim = _seq_dim(a, seq_len)
    if dim is not None:
        far.select(dim, seq_len // 2).zero_()
    # Kernels may add up in another order where a batch of tokens is cut in another way.
    noise = max(1e-5, 16 * torch.finfo(a.dtype).eps) * float(a.abs().max())
    return float(far.max()) > noise
