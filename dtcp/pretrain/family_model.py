"""A model of dtcp's families, by its config.json, in place of a config's model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dtcp.torchtitan.hf_model import weights_folder
from dtcp.torchtitan.model_spec import spec_of

from torchtitan.protocols.model_spec import ModelSpec

from dtcp.parallelize.plans.families import FAMILIES, MODEL_TYPES
from dtcp.planner.hf_config import read_hf_config
from dtcp.planner.subject import FamilyModel, subject_of_hf


def family_spec(source: str) -> ModelSpec:
    """The ModelSpec of a model of one of dtcp's families.

    Args:
        source: a folder, a config.json, a preset of the planner or a model type.
    Raises:
        ValueError: no such config, or one of another family.
    """
    subject = subject_of_hf(source)
    if not isinstance(subject, FamilyModel):
        model_type = read_hf_config(source)[1]["model_type"]
        raise ValueError(
            f"A model of dtcp's is of the types {', '.join(MODEL_TYPES)}, got --model.dtcp "
            f"{source} of type {model_type!r}: name it as --model.hf."
        )
    shape = subject.config
    if getattr(shape, "vision_blocks", False):
        # Rows are of text: without images, tokens of images see nothing more than others.
        shape = replace(shape, vision_blocks=False)
    return spec_of(FAMILIES[subject.family], subject.name, shape)


def with_weights_of(config: Any, source: str) -> Any:
    """A config whose run starts from the weights of a folder, if the source is one.

    Raises:
        ValueError: a folder without weights; other weights named beside it.
    """
    folder = weights_folder(source)
    if folder is None:
        return config
    start = config.checkpoint
    if start.initial_load_path:
        raise ValueError(
            f"A run starts from one folder of weights, got --model.dtcp {source} with "
            f"--checkpoint.initial_load_path {start.initial_load_path}: name "
            f"{Path(source, 'config.json')} to start from the other one."
        )
    begun = replace(
        start,
        initial_load_path=str(folder.absolute()),
        initial_load_in_hf=True,
        initial_load_model_only=True,
    )
    return replace(config, checkpoint=begun)
