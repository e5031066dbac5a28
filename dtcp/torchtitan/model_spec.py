"""Plain nn.Modules as torchtitan's Trainer takes them: same classes, same parameter names.

A model of ours *is* the module it was, with torchtitan's protocol beside it: no wrapper that
would put a prefix on every name in a checkpoint. What there is to a family is in its record
(parallelize/plans/families.py).
"""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from dtcp.torchtitan.parallelize import parallelize_plain
from dtcp.torchtitan.stage_forwards import FAMILY_STAGES
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
from dtcp.models.llama import LlamaConfig
from dtcp.parallelize.plans.families import LLAMA, Family, StateDict


@dataclass(frozen=True)
class BeforeStep:
    """What a family does before every step, as torchtitan's post_optimizer_build_fn."""

    work: Callable[[nn.Module, DeviceMesh | None], None]

    def __call__(self, optimizers: Any, model_parts: list[nn.Module], dims: ParallelDims) -> None:
        axis = ParallelMesh.from_parallel_dims(dims).loss
        for part in model_parts:
            self.register(optimizers, part, axis)

    def register(self, optimizers: Any, model: nn.Module, axis: DeviceMesh | None) -> None:
        optimizers.register_step_pre_hook(lambda *_, **__: self.work(model, axis))


def spec_of(family: Family, flavor: str, shape: Any) -> ModelSpec:
    """The ModelSpec of a model of this family and shape."""
    stages = FAMILY_STAGES.get(family)
    return ModelSpec(
        name=family.name,
        flavor=flavor,
        model=_titan(family).Config(shape=shape),
        parallelize_fn=functools.partial(parallelize_plain, plan=family.plan),
        pipelining_fn=stages and functools.partial(pipeline_stages, how=stages),
        post_optimizer_build_fn=family.before_step and BeforeStep(family.before_step),
        state_dict_adapter=functools.partial(NameMapAdapter, family),
    )


def llama(flavor: str, shape: LlamaConfig) -> ModelSpec:
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
                cut = family in FAMILY_STAGES
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
