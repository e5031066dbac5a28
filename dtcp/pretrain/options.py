"""The command line: which config, and what to change in it.

    [--module MODULE] [--config NAME] [--model.hf SOURCE] [--model.dtcp SOURCE]
    [--section.key VALUE ...]

A config is a function of no arguments that returns a torchtitan `Trainer.Config`; a module is a
registry of such functions. Both have a default; a model of transformers (--model.hf), or of dtcp's
families (--model.dtcp), may take the place of the config's: by a folder, a config.json or a model
type. The rest is torchtitan's own parser.
"""

import difflib
import importlib
import inspect
import textwrap
from collections.abc import Collection
from copy import copy
from dataclasses import replace
from types import ModuleType
from typing import Any

from dtcp.torchtitan import compat as compat
from dtcp.torchtitan.hf_model import huggingface_spec

from torchtitan.config import ConfigManager
from torchtitan.experiments import _supported_experiments
from torchtitan.models import _supported_models
from torchtitan.models.common.decoder import Decoder

from dtcp.pretrain.adopt import adopt, replaced_parts
from dtcp.pretrain.family_model import family_spec, with_weights_of
from dtcp.pretrain.launch import launched, rank
from dtcp.pretrain.report import usage_errors_once
from dtcp.pretrain.switches import check_switched_on
from dtcp.pretrain.tokenizer import Tokenizer
from dtcp.pretrain.trainer import Trainer
from dtcp.pretrain.validation_data import named_options, validated_on_the_same
from dtcp.pretrain.without_effect import without_unread_export

MODULE = "dtcp.pretrain.configs"
CONFIG = "llama_tiny"
_HELP = """
  --config NAME         the config to start from{configs}
  --module MODULE       where configs are looked up: a module of yours, or a model of torchtitan's
  --model.hf SOURCE     a model of transformers in its place: a folder, a config.json, a model type
  --model.dtcp SOURCE   the same, as dtcp's own model of its family

Everything in config {config} can be changed; words may be joined by - or by _:
"""


class OptionParser(ConfigManager):
    """torchtitan's parser; configs of its own get our section as well."""

    def _load_config(self, args: list[str]) -> tuple[Trainer.Config, list[str]]:
        try:
            config, rest = super()._load_config(args)
        except ImportError as error:
            raise ValueError(
                f"A config needs what it imports, got {' '.join(args[:4])}: {error}."
            ) from error
        adopted = adopt(config)
        # Before the command line changes them.
        self.loaders = tuple(map(copy, (adopted.dataloader, adopted.validator.dataloader)))
        for line in replaced_parts(config):
            if not launched() or rank() == 0:
                print(f"adopted     {line}", flush=True)
        return adopted, rest


def parse(arguments: list[str]) -> Trainer.Config:
    """The config that the arguments name, with their overrides.

    Raises:
        ValueError: no such module, config or model, or a package that reads it is missing.
        SystemExit: no such option, or --help.
    """
    module, rest = _take(arguments, "--module", MODULE)
    name, rest = _take(rest, "--config", CONFIG)
    source, rest = _take_model(rest, "--model.hf", "A model of transformers")
    own, rest = _take_model(rest, "--model.dtcp", "A model of dtcp's")
    if source and own:
        raise ValueError(
            f"A run has one model, got --model.hf {source} with --model.dtcp {own}: leave one out."
        )
    _check_name(module, name)
    if {"-h", "--help"} & {*rest}:
        print(_HELP.format(config=name, configs=_listed(module)), flush=True)
    parser = OptionParser()
    with usage_errors_once():
        try:
            config = parser.parse_args(["--module", module, "--config", name, *rest])
        except AssertionError as error:
            # Some sections of torchtitan (0.3.0) assert what they take.
            raise ValueError(
                f"Options have values that their sections take, got {' '.join(rest)}: {error}."
            ) from error
    named = named_options(rest)
    config = validated_on_the_same(config, parser.loaders, named)
    config = without_unread_export(config, named)
    try:
        if own:
            config = _with_family(config, own, named)
        elif source:
            config = _with_huggingface(config, source, named)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Models of transformers and their configs are read by it, got {source or own!r}, and "
            f"{error}: pip install 'dtcp[hf]'."
        ) from error
    _refuse_assets(config, named, source=source, own=own)
    check_switched_on(config, named)
    return config


def _refuse_assets(
    config: Trainer.Config, named: Collection[str], *, source: str, own: str
) -> None:
    """Refuse torchtitan's option for a tokenizer where dtcp's own is used, and nothing reads it."""
    if (
        "hf_assets_path" in named
        and isinstance(config.tokenizer, Tokenizer.Config)
        and not isinstance(config.model_spec.model, Decoder.Config)
    ):
        weights = "--checkpoint.initial_load_path with --checkpoint.initial_load_in_hf"
        if source or own:
            weights = "--model.hf" if source else "--model.dtcp"
        raise ValueError(
            f"A tokenizer of dtcp's is read from the folder that --tokenizer.folder names, got "
            f"--hf_assets_path {config.hf_assets_path}: set --tokenizer.folder to it, and "
            f"{weights} for weights."
        )


def _take_model(arguments: list[str], option: str, what: str) -> tuple[str, list[str]]:
    """Split off an option that names a model, which may not be empty."""
    named = any(word.split("=")[0] == option for word in arguments)
    source, rest = _take(arguments, option, "")
    if named and not source:
        raise ValueError(
            f"{what} is a folder, a config.json or a model type, got {option} without one: name "
            f"it, or leave {option} out."
        )
    return source, rest


def _with_family(config: Trainer.Config, source: str, named: Collection[str]) -> Trainer.Config:
    """The config with a model of dtcp's, and a folder of its own unless one is named."""
    spec = family_spec(source)
    config = replace(config, model_spec=spec, dump_folder=_folder(config, spec.flavor, named))
    return with_weights_of(config, source)


def _folder(config: Trainer.Config, name: str, named: Collection[str]) -> str:
    return config.dump_folder if "dump_folder" in named else f"outputs/{name}"


def _with_huggingface(
    config: Trainer.Config, source: str, named: Collection[str]
) -> Trainer.Config:
    """The config with a model of transformers, and a folder of its own unless one is named."""
    if config.dtcp.verify:
        raise ValueError(
            f"A model of transformers is compared with one device by python -m dtcp.check, got "
            f"--dtcp.verify {config.dtcp.verify} with --model.hf {source}: leave it out."
        )
    if config.checkpoint.initial_load_in_hf:
        raise ValueError(
            f"Weights of a model of transformers are those of its folder, got "
            f"--checkpoint.initial_load_in_hf with --model.hf {source}: name the folder as "
            f"--model.hf, and leave it out."
        )
    spec = huggingface_spec(source)
    folder = _folder(config, f"hf_{spec.name}", named)
    return replace(config, model_spec=spec, dump_folder=folder)


def config_names(registry: ModuleType) -> list[str]:
    """The configs of a registry: its public functions that need no argument."""
    return [
        name
        for name, value in vars(registry).items()
        if inspect.isfunction(value)
        and value.__module__ == registry.__name__
        and not name.startswith("_")
        and not inspect.signature(value).parameters
    ]


def _take(arguments: list[str], option: str, default: str) -> tuple[str, list[str]]:
    """Split `option VALUE` or `option=VALUE` off the arguments."""
    rest, value, words = [], default, iter(arguments)
    for word in words:
        if word == option:
            value = next(words, "")
        elif word.startswith(option + "="):
            value = word.removeprefix(option + "=")
        else:
            rest.append(word)
    return value, rest


def _listed(module: str) -> str:
    """The names of a registry, for --help; torchtitan has too many to list."""
    if module in _supported_models | _supported_experiments:
        return ""
    names = textwrap.wrap(", ".join(config_names(_import_registry(module))), 74)
    return ":\n" + textwrap.indent("\n".join(names), " " * 24)


def _check_name(module: str, name: str) -> None:
    if module in _supported_models | _supported_experiments:
        _check_titans_registry(module)
        return
    registry = _import_registry(module)
    if _is_config(getattr(registry, name, None)):
        return
    names = config_names(registry)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? There are" if close else "there are"
    raise ValueError(
        f"A config is a function of the module, got --config {name} with --module {module}: "
        f"{hint} {', '.join(names)}."
    )


def _is_config(value: Any) -> bool:
    """Whether it can be called without arguments, as far as Python knows its parameters."""
    if not callable(value):
        return False
    try:
        inspect.signature(value).bind()
    except TypeError:
        return False
    except ValueError:  # of what is not written in Python
        return True
    return True


def _check_titans_registry(module: str) -> None:
    """Name the missing package that a registry of torchtitan needs beside torchtitan."""
    for parent in ("torchtitan.models", "torchtitan.experiments"):
        try:
            importlib.import_module(f"{parent}.{module}.config_registry")
            return
        except ModuleNotFoundError as error:
            if not f"{parent}.{module}.config_registry".startswith(error.name or ""):
                raise ValueError(
                    f"torchtitan's configs of {module} need the package {error.name}, got "
                    f"--module {module} where it is not installed: pip install {error.name}."
                ) from error


def _import_registry(module: str) -> ModuleType:
    # Python cannot import an empty name, nor a relative one from here.
    named = bool(module) and not module.startswith(".")
    for candidate in (f"{module}.config_registry", module) if named else ():
        try:
            return importlib.import_module(candidate)
        except ModuleNotFoundError as error:
            # A missing import inside the module is that module's own error.
            if error.name not in (candidate, module, module.split(".")[0]):
                raise
    raise ValueError(
        f"A module with configs can be imported, got --module {module}: "
        f"check the name, and that its folder is on PYTHONPATH."
    )
