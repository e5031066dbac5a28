"""Plain nn.Modules as torchtitan's Trainer takes them: same classes, same parameter names.

A model of ours *is* the module it was, with torchtitan's protocol beside it: no wrapper that
would put a prefix on every name in a checkpoint. A family is what its folder in models/ and its
plan in parallelize/ give. To add one, name its parts here and in pretrain/family_model.py, its plan
in parallelize/plans/families.py, and its model types in planner/subject.py.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from dtcp.torchtitan.parallelize import parallelize_plain
from dtcp.torchtitan.stage_forwards import (
    DEEPSEEK_V4_STAGE,
    LLAMA_STAGE,
    QWEN3_5_STAGE,
    StageForward,
)
from dtcp.torchtitan.stages import pipeline_stages

import torch
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.distributed import ParallelDims
from torchtitan.models.utils import get_dense_model_nparams_and_flops
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from dtcp.distributed.mesh import ParallelMesh
from dtcp.models import deepseek_v4, gemma4, qwen3_5
from dtcp.models import llama as llamas
from dtcp.parallelize import balance_experts

StateDict = dict[str, Any]
Work = Callable[[nn.Module, DeviceMesh | None], None]


@dataclass(frozen=True)
class Family:
    """The parts of a model family.

    Args:
        name: that of its plan (parallelize/plans/families.py).
        model: built from its config; `init_weights()` draws its weights. The config has
            vocab_size, num_layers, num_heads, head_dim and tied.
        to_hf: a state dict of ours and the config to the names of a Hugging Face checkpoint.
        from_hf: the way back.
        config_to_hf: the `config.json` that goes with the weights.
        mtp_depths: how many tokens further ahead than the next one a config's model predicts; its
            forward then takes `mtp_input_ids` and returns a tuple.
        num_experts: how many each of a config's layers chooses from; 0 for none.
        takes_strategy: whether the section's strategy, boundary, kernel and reduce_dtype are for
            its attention.
        before_step: done before every step of the optimizer, with the model and the axis of all
            ranks that have tokens; None for families with nothing outside of autograd.
        stages: how it is cut into pipeline stages; None where it is not.
    """

    name: str
    model: type[Any]
    to_hf: Callable[[StateDict, Any], StateDict]
    from_hf: Callable[[StateDict, Any], StateDict]
    config_to_hf: Callable[[Any], dict[str, Any]]
    mtp_depths: Callable[[Any], int] = lambda _: 0
    num_experts: Callable[[Any], int] = lambda _: 0
    takes_strategy: bool = True
    before_step: Work | None = None
    stages: StageForward | None = None


LLAMA = Family(
    name="llama",
    model=llamas.Llama,
    to_hf=llamas.to_hf,
    from_hf=llamas.from_hf,
    config_to_hf=llamas.config_to_hf,
    stages=LLAMA_STAGE,
)

QWEN3_5 = Family(
    name="qwen3_5",
    model=qwen3_5.Qwen35,
    to_hf=qwen3_5.to_hf,
    from_hf=qwen3_5.from_hf,
    config_to_hf=qwen3_5.config_to_hf,
    num_experts=lambda config: getattr(config.feed_forward, "num_experts", 0),
    mtp_depths=lambda config: config.num_mtp_layers,
    stages=QWEN3_5_STAGE,
)

GEMMA4 = Family(
    name="gemma4",
    model=gemma4.Gemma4,
    to_hf=gemma4.to_hf,
    from_hf=gemma4.from_hf,
    config_to_hf=gemma4.config_to_hf,
    num_experts=lambda config: config.moe.num_experts if config.moe else 0,
)

DEEPSEEK_V4 = Family(
    name="deepseek_v4",
    model=deepseek_v4.DeepseekV4,
    to_hf=deepseek_v4.to_hf,
    from_hf=deepseek_v4.from_hf,
    config_to_hf=deepseek_v4.config_to_hf,
    num_experts=lambda config: config.num_experts,
    mtp_depths=lambda config: config.num_mtp_layers,
    takes_strategy=False,
    before_step=balance_experts,
    stages=DEEPSEEK_V4_STAGE,
)


@dataclass(frozen=True)
class BeforeStep:
    """What a family does before every step, as torchtitan's post_optimizer_build_fn."""

    work: Work

    def __call__(self, optimizers: Any, model_parts: list[nn.Module], dims: ParallelDims) -> None:
        axis = ParallelMesh.from_parallel_dims(dims).loss
        for part in model_parts:
            self.register(optimizers, part, axis)

    def register(self, optimizers: Any, model: nn.Module, axis: DeviceMesh | None) -> None:
        optimizers.register_step_pre_hook(lambda *_, **__: self.work(model, axis))


def spec_of(family: Family, flavor: str, shape: Any) -> ModelSpec:
    """The ModelSpec of a model of this family and shape."""
    return ModelSpec(
        name=family.name,
        flavor=flavor,
        model=_titan(family).Config(shape=shape),
        parallelize_fn=functools.partial(parallelize_plain, family=family.name),
        pipelining_fn=family.stages and functools.partial(pipeline_stages, how=family.stages),
        post_optimizer_build_fn=family.before_step and BeforeStep(family.before_step),
        state_dict_adapter=functools.partial(NameMapAdapter, family),
    )


def llama(flavor: str, shape: llamas.LlamaConfig) -> ModelSpec:
    """The ModelSpec of a Llama or Qwen of this shape."""
    return spec_of(LLAMA, flavor, shape)


class PlainModel(BaseModel):
    """What torchtitan asks of a model beyond being an nn.Module."""

    mtp_depths: int

    def verify_module_protocol(self) -> None:
        """Submodules are plain torch modules, and meant to be."""


@functools.cache
def _titan(family: Family) -> Any:
    """The family's model class with torchtitan's protocol."""

    class Titan(PlainModel, family.model):
        @dataclass(kw_only=True, slots=True)
        class Config(PlainModel.Config):
            shape: Any

            @property
            def vocab_size(self) -> int:
                return self.shape.vocab_size

            @property
            def num_experts(self) -> int:
                return family.num_experts(self.shape)

            @property
            def mtp_depths(self) -> int:
                return family.mtp_depths(self.shape)

            @property
            def takes_strategy(self) -> bool:
                return family.takes_strategy

            def stage_refusal(self) -> str:
                """Why this model is not cut into pipeline stages; nothing where it is."""
                cut = family.stages is not None
                return "" if cut else f"layers of {family.name} are not cut into stages"

            def to_dict(self) -> dict[str, Any]:
                """As torchtitan prints and saves a config: names for members of enums."""
                shape = json.dumps(
                    asdict(self.shape), default=lambda x: getattr(x, "value", str(x))
                )
                return {"shape": json.loads(shape)}

            def update_from_config(self, *, config: Any, **_: Any) -> None:
                """Nothing to take over: positions and masks come with the batch."""

            def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
                return get_dense_model_nparams_and_flops(
                    model,
                    n_layers=self.shape.num_layers,
                    n_heads=self.shape.num_heads,
                    head_dims=2 * self.shape.head_dim,
                    seq_len=seq_len,
                    enable_weight_tying=self.shape.tied,
                )

        def __init__(self, config: Any) -> None:
            family.model.__init__(self, config.shape)
            self.mtp_depths = config.mtp_depths

        def init_states(self, *, buffer_device: torch.device | None = None) -> None:
            """Draw the weights the model's own way: it has one `init_weights` for all of them."""
            family.model.init_weights(self)

    Titan.__name__ = Titan.__qualname__ = f"Titan{family.model.__name__}"
    return Titan


class NameMapAdapter(BaseStateDictAdapter):
    """Names of a model of ours to and from those of a Hugging Face checkpoint."""

    # None: an export is one file. torchtitan reads a map from here to write several.
    fqn_to_index_mapping = None

    def __init__(self, family: Family, model_config: Any, hf_assets_path: str | None) -> None:
        self.family, self.shape = family, model_config.shape
        self.hf_assets_path = hf_assets_path

    def to_hf(self, state_dict: StateDict) -> StateDict:
        return self.family.to_hf(state_dict, self.shape)

    def from_hf(self, hf_state_dict: StateDict) -> StateDict:
        return self.family.from_hf(hf_state_dict, self.shape)

    def hf_config(self) -> dict[str, Any]:
        return self.family.config_to_hf(self.shape)

    def get_hf_storage_reader(
        self, path: str, from_quantized: bool = False
    ) -> HuggingFaceStorageReader:
        if from_quantized:
            raise NotImplementedError(
                f"Weights are read as they are stored, got quantized ones at path={path}: "
                f"dequantize them first."
            )
        return HuggingFaceStorageReader(path)
