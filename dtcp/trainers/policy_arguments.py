"""What a trainer of policies is asked for that a mesh does not do, refused by name."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
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


OF_RATIOS = ("vllm_mode", "vllm_importance_sampling_")
"""What use_vllm asks for that is a loss's, not a server's."""


def check_policy(
    trainer: type, named: Mapping[str, Any], sync_weights: Callable[..., Any] | None
) -> None:
    """Refuse a trainer that would generate rows with the model on the mesh, or another loss.

    Args:
        trainer: of a policy; another one has no weights to be taken to who generates.
        named: the trainer's arguments by name.
        sync_weights: of the mixin.
    Raises:
        ValueError: naming the first of them, and what to do instead.
    """
    if not trains_policy(trainer):
        if sync_weights is not None:
            raise ValueError(
                f"Weights are taken to who generates rows for GRPOTrainer, got sync_weights with "
                f"{trainer.__name__}: leave it out."
            )
        return
    args = named.get("args")
    in_rollout = "do it in rollout_func, whose completions may have been made in several turns"
    for name, remedy in {"tools": in_rollout, "environment_factory": in_rollout}.items():
        if named.get(name):
            _refuse(name, named[name], remedy)
    rewards = named.get("reward_funcs")
    for each in rewards if isinstance(rewards, list) else [rewards]:
        if isinstance(each, str | nn.Module):
            _refuse("reward_funcs", each, "give a function that calls a reward model")
    for name, remedy in {
        "use_transformers_continuous_batching": "leave it False: rollout_func generates",
        "cast_lm_head_to_fp32": "leave it False: log-probabilities are fp32, of logits as they are",
        "use_adaptive_entropy": "leave it out, for a checkpoint keeps no coefficient: entropy_coef",
    }.items():
        if getattr(args, name, None):
            _refuse(name, getattr(args, name), remedy)
    if getattr(args, "use_vllm", False):
        _check_server(args, sync_weights)
    if named.get("rollout_func") is None:
        _refuse(
            "rollout_func",
            None,
            "give one that asks a server, or a plain model, for completions (docs/trainers.md)",
        )


def _check_server(args: Any, sync_weights: Callable[..., Any] | None) -> None:
    """Of use_vllm, losses keep the correction for what a server computes in another way."""
    if args.vllm_mode != "server":
        _refuse("vllm_mode", args.vllm_mode, "set 'server', which rollout_func asks")
    if sync_weights is None:
        _refuse("use_vllm", True, "give sync_weights=, which takes weights to the server")
    for each in fields(args):
        value = getattr(args, each.name)
        if (
            each.name.startswith("vllm_")
            and not each.name.startswith(OF_RATIOS)
            and value != each.default
        ):
            _refuse(each.name, value, "leave it out, and say it in rollout_func and sync_weights")
    of_tokens = args.vllm_importance_sampling_mode.startswith("token")
    if args.loss_type == "vespo" and args.vllm_importance_sampling_correction and not of_tokens:
        mode = args.vllm_importance_sampling_mode
        _refuse("vllm_importance_sampling_mode", mode, "set a token_* one for loss_type='vespo'")


@contextmanager
def without_server(args: Any) -> Iterator[None]:
    """Inside, a trainer is made that connects to no server, and sends it no shards."""
    used = getattr(args, "use_vllm", False)
    if used:
        args.use_vllm = False
    try:
        yield
    finally:
        if used:
            args.use_vllm = True


def _refuse(name: str, value: Any, remedy: str) -> None:
    said = f"a {type(value).__name__}" if isinstance(value, nn.Module) else f"{value!r}"
    raise ValueError(
        f"A policy on a mesh is trained on completions that others generate, and judge, got {name}="
        f"{said}: {remedy}."
    )
