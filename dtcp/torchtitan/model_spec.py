"""Plain nn.Modules as torchtitan's Trainer takes them: same classes, same parameter names.

A model of ours *is* the module it was, with torchtitan's protocol beside it: no wrapper that
would put a prefix on every name in a checkpoint.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torchtitan.models.utils import get_dense_model_nparams_and_flops
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from dtcp.torchtitan.parallelize import parallelize_plain
from models.llama import Llama, LlamaConfig, from_hf, to_hf
from parallelize import llama_plan


class PlainModel(BaseModel):
    """What torchtitan asks of a model beyond being an nn.Module."""

    def verify_module_protocol(self) -> None:
        """Submodules are plain torch modules, and meant to be."""

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Draw the weights the model's own way: it has one `init_weights` for all of them."""
        raise NotImplementedError


class TitanLlama(PlainModel, Llama):
    """models.llama under torchtitan's Trainer."""

    @dataclass(kw_only=True, slots=True)
    class Config(PlainModel.Config):
        shape: LlamaConfig

        @property
        def vocab_size(self) -> int:
            return self.shape.vocab_size

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

    def __init__(self, config: Config) -> None:
        Llama.__init__(self, config.shape)

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        Llama.init_weights(self)


class LlamaStateDictAdapter(BaseStateDictAdapter):
    """Names of models.llama to and from those of a Hugging Face checkpoint."""

    # None: an export is one file. torchtitan reads a map from here to write several.
    fqn_to_index_mapping = None

    def __init__(self, model_config: TitanLlama.Config, hf_assets_path: str | None) -> None:
        self.shape, self.hf_assets_path = model_config.shape, hf_assets_path

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return to_hf(state_dict, self.shape)

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return from_hf(hf_state_dict, self.shape)

    def hf_config(self) -> dict[str, Any]:
        """The `config.json` that goes with the weights: Llama, Qwen2 or Qwen3 by its parts."""
        shape, scaling = self.shape, self.shape.rope_scaling
        kind = "qwen3" if shape.qk_norm else "qwen2" if shape.qkv_bias else "llama"
        config = {
            "architectures": [f"{kind.capitalize()}ForCausalLM"],
            "model_type": kind,
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.dim,
            "intermediate_size": shape.hidden_dim,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "rope_theta": shape.rope_theta,
            "rms_norm_eps": shape.norm_eps,
            "tie_word_embeddings": shape.tied,
            "hidden_act": "silu",
        }
        if scaling is not None:
            config["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high,
                "original_max_position_embeddings": scaling.original_seq_len,
            }
        return config

    def get_hf_storage_reader(
        self, path: str, from_quantized: bool = False
    ) -> HuggingFaceStorageReader:
        if from_quantized:
            raise NotImplementedError(
                f"Weights are read as they are stored, got quantized ones at path={path}: "
                f"dequantize them first."
            )
        return HuggingFaceStorageReader(path)


def llama(flavor: str, shape: LlamaConfig) -> ModelSpec:
    """The ModelSpec of a Llama or Qwen of this shape."""
    return ModelSpec(
        name="llama",
        flavor=flavor,
        model=TitanLlama.Config(shape=shape),
        parallelize_fn=partial(parallelize_plain, make_plan=llama_plan),
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=LlamaStateDictAdapter,
    )
