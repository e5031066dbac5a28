"""What a dropout by token keeps, written again in numpy, and put into an unmodified model."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BITS = np.uint64(0xFFFFFFFFFFFFFFFF)


def mix(x: Any) -> Any:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def number_of(name: str) -> np.uint64:
    return np.frombuffer(hashlib.blake2b(name.encode(), digest_size=8).digest(), "<u8")[0]


def keep(
    seed: int, name: str, rows: Any, tokens: Any, width: int, p: float, call: int = 0
) -> Tensor:
    """Which channels a module of this name keeps: [.., C] bool, for rows and tokens [..]."""
    key = mix(mix(mix(np.uint64(seed)) ^ rows.astype("u8")) ^ tokens.astype("u8"))
    key = mix(key ^ number_of(name) ^ np.uint64(call))[..., None]
    low, high = (key & np.uint64(0xFFFFFFFF)).astype("u4"), (key >> np.uint64(32)).astype("u4")
    with np.errstate(over="ignore"):
        x = np.arange(width, dtype="u4") * np.uint32(0x9E3779B9) + low
        x = ((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)) ^ high
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    dropped = round(p * 2**32)  # Of numbers from -2^31 on, the lowest.
    return torch.from_numpy((x ^ np.uint32(0x80000000)) >= np.uint32(dropped))


def drop_by_token(model: nn.Module, seed: int, rows: Any, tokens: Any, prefix: str = "") -> None:
    """Let nn.Dropout of an unmodified model drop by row and token of what it is run on: [D, L].

    It is to be run once.

    Args:
        prefix: of the names that its modules have on a mesh.
    """

    def dropped(name: str, module: nn.Dropout) -> Any:
        calls = []

        def forward(x: Tensor) -> Tensor:
            call, p = len(calls), module.p
            calls.append(1)
            mask = keep(seed, f"{prefix}{name}", rows, tokens, x.shape[-1], p, call)
            return x * mask.view(x.shape) / (1 - p)

        return forward

    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            vars(module)["forward"] = dropped(name, module)
