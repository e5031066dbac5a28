"""Pipeline stages of models of transformers, as torchtitan's Trainer asks for them."""

import copy
import functools
from dataclasses import replace
from typing import Any

from dtcp.torchtitan.stage_forwards import StageForward
from dtcp.torchtitan.stage_part import StagePart
from dtcp.torchtitan.stages import pipeline_stages

from torch import nn

from dtcp.huggingface.install import install_mixers
from dtcp.huggingface.stages import HFStage, StageCut
from dtcp.parallelize.tied_parameters import TiedParameters

STAGE = "dtcp_hf_stage"
"""Where a model that is to be cut has the stage that parallelize_hf makes of it."""


def hf_pipeline_stages(model: nn.Module, *, model_config: Any, **options: Any) -> Any:
    """torchtitan's pipelining_fn for a model of transformers on the meta device.

    Args, Returns: as of `pipeline_stages`.
    """
    cut: StageCut = model_config.stage_cut()
    how = StageForward(
        _by_itself,
        layers=cut.layers,
        first=cut.first,
        last=cut.last,
        stream=lambda config: (config.hidden_size,),
        prepare=install_mixers,
    )

    def marked(whole: Any, part: StagePart, _: StageForward, *, last: bool) -> Any:
        """A whole model that parallelize_hf cuts, once it has surveyed it."""
        stage = copy.deepcopy(whole)
        vars(stage)[STAGE] = HFStage(cut, part.layers, part.index == 0, last)
        stage.stage = replace(part, whole=None)
        elsewhere = (*(() if part.index == 0 else cut.first), *(() if last else cut.last))
        tied = _without(part.tied, tuple(f"{name}." for name in elsewhere))
        stage.init_weights = functools.partial(model_config.fill, stage, tied)
        return stage

    return pipeline_stages(model, model_config=model_config, how=how, cut=marked, **options)


def _without(tied: TiedParameters, prefixes: tuple[str, ...]) -> TiedParameters:
    """Those that a stage has twice itself."""
    own = (tuple(name for name in names if not name.startswith(prefixes)) for names in tied)
    return tuple(names for names in own if len(names) > 1)


def _by_itself(stage: Any, *args: Any, **kwargs: Any) -> Any:
    return stage(*args, **kwargs)
