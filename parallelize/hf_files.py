"""Weights of transformers as their files hold them, and what they become in a model.

transformers (5) writes weights under the names and in the shapes that a family was published with:
one tensor for each expert where the model has one for all, for example. The rules are its own.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from dtcp.checkpoint.huggingface import file_of_tensors, weight_files
from dtcp.huggingface.stages import weights_elsewhere


class WeightFiles(Mapping[str, Tensor]):
    """The weights in a folder of safetensors files, each read from disk when it is asked for.

    Raises:
        ValueError: a folder that is not there, or whose files are missing or lie elsewhere; one
            that is no safetensors file; a tensor that two files hold.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(
                f"Weights are read from the folder that save_pretrained wrote, got {folder}, which "
                f"is none: correct the path."
            )
        self.file_of = file_of_tensors(weight_files(folder))

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.file_of[name], "pt") as file:
            weight: Tensor = file.get_tensor(name)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)


def check_not_quantized(folder: Path, left_over: Sequence[str]) -> None:
    """Refuse a folder of quantized weights, which are no weights of a model that is not quantized.

    Args:
        left_over: names of weights that the model has no use for, scales for example.
    Raises:
        ValueError: as above.
    """
    config = folder / "config.json"
    fields = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    method = (fields.get("quantization_config") or {}).get("quant_method")
    if method:
        raise ValueError(
            f"Weights are read as numbers that need no scale, got {folder} with quantized ones "
            f"({method}: {left_over[0]}, ..): dequantize them first; to train adapters over them, "
            f"call from_pretrained on every rank, then parallelize_hf."
        )


@dataclass
class WeightGroup:
    """Weights of files that together become one weight of a model, or several.

    Args:
        target: the first of them, by the model's name.
        rule: what makes them; None: it is the weight itself.
        sources: names in the files, each with the part of the rule that reads it.
    """

    target: str
    rule: Any = None
    sources: list[tuple[str, str]] = field(default_factory=list)

    def weights(self, model: Any, files: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read the group: whole weights by the model's names.

        Raises:
            ValueError: weights of shapes that do not go together, or too few of them.
        """
        if self.rule is None:
            return {self.target: files[self.sources[0][0]]}
        rule = deepcopy(self.rule)
        for name, pattern in self.sources:
            rule.add_tensor(self.target, name, pattern, files[name])
        try:
            converted = rule.convert(self.target, model=model, config=model.config)
        except RuntimeError as error:
            raise ValueError(
                f"Weights of one parameter go together, got {len(self.sources)} for {self.target} "
                f"({self.sources[0][0]}, ..) that do not ({error}): copy all files of the "
                f"checkpoint."
            ) from error
        return {name: x[0] if isinstance(x, list) else x for name, x in converted.items()}


def weight_groups(model: Any, files: Mapping[str, Tensor]) -> tuple[list[WeightGroup], list[str]]:
    """What each weight of the files becomes in a model, and those that it has no use for.

    Of a pipeline stage those that other stages hold are neither.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    with _own_classes(model):
        rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    elsewhere = weights_elsewhere(model).weights
    own, prefix = {**dict.fromkeys(elsewhere), **model.state_dict()}, model.base_model_prefix
    ignored = [re.compile(each) for each in model._keys_to_ignore_on_load_unexpected or ()]
    groups: dict[str, WeightGroup] = {}
    left_over = []
    # In the order of their numbers: that of the experts in the weight that has all of them.
    for name in sorted(files, key=dot_natural_key):
        target, pattern = name, None
        if name not in own:
            target, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if target in elsewhere:
            continue
        if target in own:
            rule = None if pattern is None else by_pattern[pattern]
            group = groups.setdefault(target, WeightGroup(target, rule))
            group.sources.append((name, pattern or name))
        elif not any(each.search(name) for each in ignored):
            left_over.append(name)
    return list(groups.values()), left_over


@dataclass
class SavedGroup:
    """Weights of a model that together become one weight of its files, or several."""

    names: list[str] = field(default_factory=list)

    def revert(self, model: Any, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole weights by their names in files."""
        from transformers.core_model_loading import revert_weight_conversion

        with _own_classes(model):
            reverted = revert_weight_conversion(model, dict(whole))
        # Parts of one tensor share its memory, which files do not.
        return {
            name: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x
            for name, x in reverted.items()
        }


def saved_groups(model: Any, names: Sequence[str]) -> list[SavedGroup]:
    """The weights of a model in the order of their names, those together that files have as one."""
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    # As in revert_weight_conversion, which takes all weights at once.
    rules = [rule.reverse_transform() for rule in reversed(_rules_of_saving(model))]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    groups: dict[str, SavedGroup] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, [], converters, reverse=True)
        key = name if pattern is None else f"{target}, converted"
        groups.setdefault(key, SavedGroup()).names.append(name)
    return list(groups.values())


@contextmanager
def _own_classes(model: Any) -> Iterator[None]:
    """Inside, modules that FSDP has wrapped are of their own classes again.

    transformers looks rules up by the names and places of classes, and takes FSDP's for code of a
    user's, which has none: those of the model inside would count, relative to it.
    """
    wrapped = [
        (module, type(module)) for module in model.modules() if isinstance(module, FSDPModule)
    ]
    for module, kind in wrapped:
        module.__class__ = next(own for own in kind.__mro__ if not issubclass(own, FSDPModule))  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, kind in wrapped:
            module.__class__ = kind


def _rules_of_saving(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    own = getattr(model, "_weight_conversions", None)
    if own is not None:
        return list(own)
    with _own_classes(model):
        rules = get_model_conversion_mapping(model, add_legacy=False)
    return [rule for rule in rules if not isinstance(rule, PrefixChange)]
