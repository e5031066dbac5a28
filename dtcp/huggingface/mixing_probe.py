"""Finds where tokens meet in a model written elsewhere: by running it, not by reading names.

A module is run again with some tokens of its input changed: the one in the middle, then the first
and the last. If its output changes at another token, or an output without a token dim does, tokens
meet in it; on a sharded sequence, any such module that no plan claims would only see its own shard.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dtcp.huggingface.padding_ids import padding_token
from dtcp.mixer import Mixer

RunModel = Callable[[], object]


PROBED, FEWEST, MOST = 37, 16, 999
"""How many tokens a model is run with: PROBED or more if it has positions for them, else fewer."""


def probe_length(model: nn.Module, *, longer: bool = False, most: int | None = None) -> int:
    """Tokens to run a model with, such that a dim of this size can only be the sequence.

    Args:
        longer: a number other than the default one, for a second sequence.
        most: as many positions as the model has learned; None: any number.
    """
    sizes = {size for x in (*model.parameters(), *model.buffers()) for size in x.shape}
    more = range(PROBED, min(most or MOST, MOST) + 1, 2)
    fewer = range(min(most or MOST, PROBED - 1), FEWEST - 1, -1)
    lengths = [length for length in (*more, *fewer) if length not in sizes]
    # A model with fewer positions cannot be run, and its own error says so.
    return [*lengths, PROBED, PROBED + 2][int(longer)]


def probe_ids(model: Any, seq_len: int) -> Tensor:
    """A row of tokens to run a model of transformers with, none of them padding: [1, S]."""
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(1, seq_len + 1, device=embedding.device) % len(embedding)
    padding = padding_token(model)
    if padding is not None:
        ids = ids.where(ids != padding, (ids + 1) % len(embedding))
    return ids[None]


def find_mixing(model: nn.Module, run: RunModel, seq_len: int, *, pools: bool = False) -> list[str]:
    """Names of the innermost modules in which tokens meet, in the order they run.

    Args:
        run: one forward of the model on one row of seq_len tokens, in eval mode.
        seq_len: from probe_length.
        pools: what the model gives for a row is known: outputs of the model itself that have no
            sequence are not looked at.
    """
    names = {module: name for name, module in model.named_modules()}
    mixing: list[str] = []
    called: set[str] = set()
    pooling: set[str] = set()
    replaying = False
    # One at the start or at the end may be all that a module reads of a row.
    probes = ((seq_len // 2,), (0, seq_len - 1))

    def replay(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        nonlocal replaying
        called.add(names[module])
        if replaying or names[module] in mixing:
            return
        replaying = True
        try:
            moved = _pools_too_few(out, (args, kwargs), seq_len)
            pooling.update([names[module]] * moved)
            for tokens in probes:
                changed_args, changed_kwargs = _change(args, kwargs, seq_len, tokens)
                changed_out = module.forward(*changed_args, **changed_kwargs)
                by_token = pools and module is model
                moved = moved or _moved(out, changed_out, seq_len, tokens, by_token=by_token)
            # Run it as it was, for what it leaves to later layers (shared keys and values).
            module.forward(*args, **kwargs)
        finally:
            replaying = False
        if moved:
            mixing.append(names[module])

    with ExitStack() as hooks, torch.no_grad(), torch.random.fork_rng():
        for module in names:
            hooks.enter_context(module.register_forward_hook(replay, with_kwargs=True))
        run()
    # A router that sorts the tokens of a row mixes them; the module around it, which puts them
    # back, does not. Modules that pool more tokens than there are give nothing that could show it.
    shown = [name for name in mixing if name not in pooling]
    undone = {name for name in shown if _called_around(name, called) not in (None, *mixing)}
    mixing = [name for name in mixing if name not in undone]
    return [name for name in mixing if not any(_inside(other, name) for other in mixing)]


def _called_around(name: str, called: set[str]) -> str | None:
    """The innermost called module around this one; None for the model itself."""
    around = [other for other in called if _inside(name, other)]
    return max(around, key=len, default=None)


@contextmanager
def calls(model: nn.Module, kind: type[nn.Module] = nn.Module) -> Iterator[list[str]]:
    """Yields the names of the modules of a kind that are running, the innermost last.

    After an error they are those in which it was raised.
    """
    running: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, kind):
                hooks.enter_context(module.register_forward_pre_hook(enter(name)))
                hooks.enter_context(module.register_forward_hook(leave))
        yield running


@contextmanager
def mixers_without_mixing(model: nn.Module) -> Iterator[list[str]]:
    """Inside, every mixer of dtcp gives each token its own operands; yields the mixers' names.

    If tokens still meet, they meet outside of mixers, on the way to any operand of one.
    """
    mixers = {name: m for name, m in model.named_modules() if isinstance(m, Mixer)}
    for mixer in mixers.values():
        mixer.forward = partial(_own_operands, mixer)
    try:
        yield list(mixers)
    finally:
        for mixer in mixers.values():
            del mixer.forward


def _own_operands(mixer: Mixer, *args: Any, **kwargs: Any) -> Tensor:
    """A mixer's output without mixing, plus a share of its other operands for the same token."""
    out = mixer.forward_without_mixing(*args, **kwargs)
    for x in tensors((args, kwargs)):
        if x.is_floating_point() and x.shape[:2] == out.shape[:2]:
            per_token = x.flatten(2).mean(-1) if x.ndim > 2 else x
            out = out + per_token.view(*per_token.shape, *(1,) * (out.ndim - 2))
    return out


def own_operands(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a token to itself alone, plus a share of its query and key: [B, L, H, V].

    If tokens meet on the way to any of the three, they meet in the result.

    Args:
        q: [B, L, H, D].
        k, v: [B, L, G, D or V]; if of other tokens than q, no key is a token's own.
    """
    if k.shape[1] != q.shape[1]:
        return (q * 0).mean(-1, keepdim=True) + v.mean(dim=(1, 2), keepdim=True) + k.mean()
    own = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    of_key = k.mean(-1, keepdim=True).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return own + q.mean(-1, keepdim=True) + of_key


def _inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


def tensors(value: object) -> list[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value) and not isinstance(value, Mapping | type):
        value = {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [x for part in value for x in tensors(part)] if isinstance(value, tuple | list) else []


def _seq_dim(x: Tensor, seq_len: int) -> int | None:
    """The one dim as long as the sequence; as there is one row, a dim of all tokens counts, too."""
    dims = [dim for dim, size in enumerate(x.shape) if size == seq_len]
    return dims[0] if len(dims) == 1 else None


def _change(args: Any, kwargs: Any, seq_len: int, tokens: Sequence[int]) -> tuple[Any, Any]:
    """The same inputs with some tokens changed: features, or ids without features."""
    sequences = [x for x in tensors((args, kwargs)) if _seq_dim(x, seq_len) is not None]
    features = [x for x in sequences if x.is_floating_point()]
    changed = {id(x): _change_tokens(x, seq_len, tokens) for x in features or sequences[:1]}

    def replaced(value: Any) -> Any:
        if isinstance(value, Tensor):
            return changed.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)(replaced(part) for part in value)
        if type(value) is dict:
            return {key: replaced(part) for key, part in value.items()}
        return value

    return replaced(args), replaced(kwargs)


def _change_tokens(x: Tensor, seq_len: int, tokens: Sequence[int]) -> Tensor:
    dim, before = cast(int, _seq_dim(x, seq_len)), x
    x = x.clone()
    for index in tokens:
        token = x.select(dim, index)
        if x.is_floating_point():
            spread = x.std() + 1e-3
            token += spread * torch.randn_like(token)
        else:
            other = before.select(dim, seq_len // 3)
            token.copy_(other + 1).clamp_(max=int(before.max()))
    return x


def _moved(
    out: object, changed_out: object, seq_len: int, tokens: Sequence[int], *, by_token: bool
) -> bool:
    """Whether an output differs at any unchanged token, or differs and has no token dim.

    Args:
        by_token: look at outputs of tokens only.
    """
    return any(
        differs_elsewhere(a, b, seq_len, tokens)
        for a, b in zip(tensors(out), tensors(changed_out), strict=True)
        if a.is_floating_point() and not (by_token and seq_len not in a.shape)
    )


def _pools_too_few(out: object, given: object, seq_len: int) -> bool:
    """Whether a sequence gives an empty output: its windows are longer than what is run."""
    empty = any(
        x.is_floating_point() and x.numel() == 0 and seq_len not in x.shape for x in tensors(out)
    )
    return empty and any(_seq_dim(x, seq_len) is not None for x in tensors(given))


def differs_elsewhere(a: Tensor, b: Tensor, seq_len: int, tokens: Sequence[int]) -> bool:
    """Whether two tensors differ at other tokens than these, by more than rounding."""
    if a.numel() == 0 or (seq_len in a.shape and _seq_dim(a, seq_len) is None):
        return False
    difference = (a - b).abs().nan_to_num(nan=torch.inf)
    dim = _seq_dim(a, seq_len)
    if dim is not None:
        difference.index_fill_(dim, torch.tensor(tokens, device=a.device), 0)
    # Kernels may sum in another order if tokens are grouped in another way.
    noise = max(1e-5, 16 * torch.finfo(a.dtype).eps) * float(a.abs().max())
    return float(difference.max()) > noise
