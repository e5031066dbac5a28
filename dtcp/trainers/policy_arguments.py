"""Refuses, by name, what a policy trainer is asked for and a mesh does not do."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from torch import nn


def trains_policy(trainer: type) -> bool:
    """Whether a class is TRL's GRPOTrainer, or made of it."""
    return "GRPOTrainer" in names_of_trl(trainer)


def names_of_trl(kind: type) -> list[str]:
    """Names of the classes of TRL that a class derives from, in their order."""
    return [each.__name__ for each in kind.__mro__ if each.__module__.startswith("trl.")]


def arguments_by_name(
    classes: Iterable[type], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """A trainer's arguments by name, whether they were passed by position or by name.

    Args:
        classes: in the order of classes; one that takes `*args` hands them to the next.
    Raises:
        ValueError: a positional argument whose name no class gives.
    """
    places: list[str] = []
    for each in classes:
        if "__init__" not in vars(each):
            continue
        parameters = inspect.signature(vars(each)["__init__"]).parameters.values()
        own = [its.name for its in parameters if its.kind is its.POSITIONAL_OR_KEYWORD][1:]
        if own[: len(places)] != places:
            break
        places = own
        if all(its.kind is not its.VAR_POSITIONAL for its in parameters):
            break
    if len(args) > len(places):
        raise ValueError(
            f"What a Trainer on a mesh is made of is known by name, got {len(args)} arguments by "
            f"place, of which {len(places)} have one ({', '.join(places) or 'none'}): give the "
            f"others by name."
        )
    return dict(zip(places, args, strict=False)) | dict(kwargs)


KNOWN_TRL = "1.16"

OF_RATIOS = ("vllm_mode", "vllm_importance_sampling_")
"""What use_vllm asks for that is a loss's, not a server's."""


def check_policy(
    trainer: type, named: Mapping[str, Any], sync_weights: Callable[..., Any] | None
) -> None:
    """Refuse a trainer that would generate rows with the model on the mesh, or another loss.

    Args:
        trainer: any class; one that trains no policy has no use for sync_weights.
        named: the trainer's arguments by name.
        sync_weights: of the mixin.
    Raises:
        ValueError: naming the first of them, and what to do instead.
        ImportError: another TRL.
    """
    if not trains_policy(trainer):
        if sync_weights is not None:
            raise ValueError(
                f"Weights are sent to what generates rows for GRPOTrainer, got sync_weights with "
                f"{trainer.__name__}: leave it out."
            )
        return
    args = named.get("args")
    _check_release(args)
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


def check_made_policy(trainer: Any, sync_weights: Callable[..., Any] | None) -> None:
    """The same for a trainer whose classes may have chosen its arguments themselves.

    Args:
        trainer: as it makes its Accelerator, before it would connect to a server.
    """
    made = {"environment_factory": "environment_factories"}
    names = ("args", "tools", "environment_factory", "reward_funcs", "rollout_func")
    found = {name: getattr(trainer, made.get(name, name)) for name in names}
    check_policy(type(trainer), found, sync_weights)


def _check_release(args: Any) -> None:
    if args is None or hasattr(args, "entropy_coef"):
        return
    raise ImportError(
        f"A policy on a mesh is trained by GRPOTrainer as TRL {KNOWN_TRL} has it, got "
        f"trl={version('trl')}, whose {type(args).__name__} has no entropy_coef: pip install "
        f"'trl=={KNOWN_TRL}.*'.",
        name="trl",
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


def _refuse(name: str, value: Any, remedy: str) -> None:
    said = f"a {type(value).__name__}" if isinstance(value, nn.Module) else f"{value!r}"
    raise ValueError(
        f"A policy on a mesh is trained on completions that others generate, and judge, got {name}="
        f"{said}: {remedy}."
    )
