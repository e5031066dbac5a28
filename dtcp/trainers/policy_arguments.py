"""What a trainer of policies is asked for that a mesh does not do, refused by name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn


def trains_policy(trainer: type) -> bool:
    """Whether a class is TRL's GRPOTrainer, or made of it."""
    return any(
        each.__module__.startswith("trl.") and each.__name__ == "GRPOTrainer"
        for each in trainer.__mro__
    )


def arguments_by_name(
    init: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """What a trainer is made of, whether it was given by place or by name."""
    signature = inspect.signature(init)
    places = [
        each.name
        for each in signature.parameters.values()
        if each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    return dict(zip(places, args, strict=False)) | dict(kwargs)


def check_policy(named: Mapping[str, Any]) -> None:
    """Refuse a trainer that would generate rows with the model on the mesh, or another loss.

    Args:
        named: the trainer's arguments by name.
    Raises:
        ValueError: naming the first of them, and what to do instead.
    """
    args = named.get("args")
    in_rollout = "do it in rollout_func, whose completions may have been made in several turns"
    for name, remedy in {"tools": in_rollout, "environment_factory": in_rollout}.items():
        if named.get(name):
            _refuse(name, named[name], remedy)
    rewards = named.get("reward_funcs")
    for each in rewards if isinstance(rewards, list) else [rewards]:
        if isinstance(each, str | nn.Module):
            _refuse("reward_funcs", each, "give a function that calls a reward model")
    own_entropy = "leave it out: entropies on a mesh are logged, and have no gradient"
    for name, remedy in {
        "use_vllm": "leave it False, and ask the server in rollout_func",
        "use_transformers_continuous_batching": "leave it False: rollout_func generates",
        "cast_lm_head_to_fp32": "leave it False: log-probabilities are fp32, of logits as they are",
        "entropy_coef": own_entropy,
        "use_adaptive_entropy": own_entropy,
    }.items():
        if getattr(args, name, None):
            _refuse(name, getattr(args, name), remedy)
    if named.get("rollout_func") is None:
        _refuse(
            "rollout_func",
            None,
            "give one that asks a server, or a plain model, for completions (docs/trainers.md)",
        )


def _refuse(name: str, value: Any, remedy: str) -> None:
    said = f"a {type(value).__name__}" if isinstance(value, nn.Module) else f"{value!r}"
    raise ValueError(
        f"A policy on a mesh is trained on completions that others generate, and judge, got {name}="
        f"{said}: {remedy}."
    )
