"""A causal language model of transformers as torchtitan's Trainer takes one.

The model stays transformers' own. It is built on the meta device, placed by parallelize_hf and
filled with the weights of its folder, or with those that transformers draws for its config.
"""

import functools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtcp.torchtitan.hf_stages import STAGE, hf_pipeline_stages
from dtcp.torchtitan.parallelize import mesh_with_section, options_of
from dtcp.torchtitan.section import Section

import torch
from torch import Tensor, nn
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointingConfig
from torchtitan.models.utils import get_dense_model_nparams_and_flops
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from dtcp.checkpoint.huggingface import weight_files
from dtcp.forward import wrap_forward
from dtcp.huggingface.config_fields import values_in_layers
from dtcp.huggingface.install import has_mixers
from dtcp.huggingface.own_errors import own_errors
from dtcp.huggingface.small_config import small_config
from dtcp.huggingface.stage_trial import stage_cut
from dtcp.huggingface.stages import StageCut, UncutError
from dtcp.huggingface.version import too_old
from dtcp.parallelize import load_hf, parallelize_hf
from dtcp.parallelize.tensor_parallel import is_experts, separate_gate_and_up
from dtcp.parallelize.tied_parameters import (
    TiedParameters,
    find_tied_parameters,
    restore_tied_parameters,
)
from dtcp.softmax.default import device_type_of
from dtcp.softmax.mixer import name_kernel

SEED = 0
"""Of the weights of a config without any, where debug.seed is none: the same on every mesh."""

BYTE_VOCABULARY = 272
"""Of tiny models: bytes and two marks, filled up to a multiple of 16."""

_CORRECT = "correct its config.json"


@functools.lru_cache(maxsize=4)
def read_config(source: str) -> Any:
    """The config of transformers that a folder or file holds, or a tiny one of a model type.

    Raises:
        ValueError: neither such a file nor such a model type, or one that transformers refuses; or
            a transformers that is too old.
    """
    from transformers import AutoConfig

    for sentence in too_old():
        raise ValueError(sentence)
    path, remedy = Path(source), "name another one as --model.hf"
    if not path.exists():
        return small_config(source, {"vocab_size": BYTE_VOCABULARY}, remedy).config
    with own_errors(f"transformers reads the config of --model.hf {source}", remedy):
        return AutoConfig.from_pretrained(path)


@functools.lru_cache(maxsize=4)
def _cut_of(source: str) -> StageCut:
    """Proved once: a trial takes a second or so."""
    with torch.device("meta"):
        return stage_cut(HuggingFaceConfig(source=source).build())


def weights_folder(source: str) -> Path | None:
    """The folder that has weights beside its config; None for a file or a model type.

    Raises:
        ValueError: a folder without them, whose model would start from nothing.
    """
    folder = Path(source)
    if not folder.is_dir():
        return None
    try:
        weight_files(folder)
    except ValueError as error:
        raise ValueError(f"{error} ({source}/config.json starts from drawn weights.)") from error
    return folder


@dataclass(kw_only=True, slots=True)
class HuggingFaceConfig(BaseModel.Config):
    """torchtitan's config of a model of transformers.

    Args:
        source: a folder, a config.json, or a model type.
        seed: of weights that are drawn; the Trainer takes it over from debug.seed.
    """

    source: str
    seed: int = SEED

    @property
    def vocab_size(self) -> int:
        return read_config(self.source).get_text_config().vocab_size

    @property
    def num_layers(self) -> int:
        return read_config(self.source).get_text_config().num_hidden_layers

    def expert_counts(self) -> set[int]:
        """How many experts its layers choose from; read off a model without storage."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(deepcopy(read_config(self.source)))
        return {each.num_experts for each in model.modules() if is_experts(each)}

    def build(self, **_: Any) -> Any:
        """The model, as torchtitan's Trainer calls it to check, fill and run it."""
        from transformers import AutoModelForCausalLM

        config = deepcopy(read_config(self.source))
        # That of --training.dtype, in which the Trainer builds: files name the dtype they were
        # written in.
        with own_errors(f"transformers builds the model of --model.hf {self.source}", _CORRECT):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", dtype=torch.get_default_dtype()
            )
        model.init_weights = functools.partial(self.fill, model, find_tied_parameters(model))
        model.verify_module_protocol = _accept_submodules
        return model

    def fill(
        self, model: Any, tied: TiedParameters, *, buffer_device: torch.device | None = None
    ) -> None:
        """Give a model, or a pipeline stage of it, its weights.

        Args:
            tied: the names of each weight of it that has several.
        """
        # The Trainer has moved each name of a shared parameter off the meta device by itself.
        restore_tied_parameters(model, tied)
        if not has_mixers(model):
            # A seed checkpoint is of a model that was not parallelized, and for those that are.
            separate_gate_and_up(model)
        device = buffer_device or next(model.parameters()).device
        load_hf(model, weights_folder(self.source) or self._drawn(model), device=device)

    @property
    def hidden_size(self) -> int:
        return read_config(self.source).get_text_config().hidden_size

    def stage_cut(self) -> StageCut:
        """Where its model is cut into pipeline stages.

        Raises:
            UncutError: where it is not.
        """
        return _cut_of(self.source)

    def stage_refusal(self) -> str:
        """Why this model is not cut into pipeline stages; nothing where it is."""
        try:
            self.stage_cut()
        except UncutError as error:
            return error.why
        return ""

    def _drawn(self, model: Any) -> dict[str, Tensor]:
        """Weights as transformers draws them, of the whole model on this host."""
        from transformers import AutoModelForCausalLM

        dtype = next(model.parameters()).dtype
        with torch.random.fork_rng(), torch.device("cpu"):
            torch.manual_seed(self.seed)
            plain = AutoModelForCausalLM.from_config(deepcopy(read_config(self.source)))
        return plain.to(dtype).state_dict()

    def to_dict(self) -> dict[str, Any]:
        """As torchtitan prints and saves a config."""
        return {"source": self.source, "hf": read_config(self.source).to_dict()}

    def update_from_config(self, *, config: Any, **_: Any) -> None:
        """Take the seed over: positions and masks come with the batch."""
        self.seed = SEED if config.debug.seed is None else config.debug.seed

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        config = read_config(self.source).get_text_config()
        # None in a model without attention; some have another number in each layer.
        of_layers = values_in_layers(config, "num_attention_heads")
        heads = of_layers[0] if len(of_layers) == 1 and isinstance(of_layers[0], int) else 0
        widths = values_in_layers(config, "head_dim")
        head_dim = widths[0] if len(widths) == 1 else config.hidden_size // max(heads, 1)
        return get_dense_model_nparams_and_flops(
            model,
            n_layers=config.num_hidden_layers,
            n_heads=heads,
            head_dims=2 * head_dim,
            seq_len=seq_len,
            enable_weight_tying=bool(getattr(config, "tie_word_embeddings", False)),
        )


def huggingface_spec(source: str) -> ModelSpec:
    """The ModelSpec of a model of transformers.

    Args:
        source: as for HuggingFaceConfig.
    Raises:
        ValueError: no such folder, file or model type; a folder without weights; a model with a
            balance loss.
    """
    config = read_config(source)
    _check_causal(source, config)
    weights_folder(source)
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            f"torchtitan's loss reads logits alone, got --model.hf {source} with "
            f"output_router_logits=True, which asks for a balance loss: set it to False, or train "
            f"by a Trainer of transformers (docs/trainers.md)."
        )
    return ModelSpec(
        name=config.model_type,
        flavor="of transformers",
        model=HuggingFaceConfig(source=source),
        parallelize_fn=_parallelize,
        pipelining_fn=hf_pipeline_stages,
        post_optimizer_build_fn=None,
        state_dict_adapter=HuggingFaceAdapter,
    )


def _check_causal(source: str, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"train.py trains causal language models, got --model.hf {source} of type "
            f"{config.model_type!r}, which has none: train it by a loop of your own, or by a "
            f"Trainer of transformers (docs/trainers.md)."
        )


class HuggingFaceAdapter(BaseStateDictAdapter):
    """Stands for the names that transformers gives weights in files; `save_hf` writes them."""

    fqn_to_index_mapping = None

    def __init__(self, model_config: Any, hf_assets_path: str | None) -> None:
        self.hf_assets_path = hf_assets_path

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError(_LOAD)

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError(_LOAD)

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> Any:
        raise NotImplementedError(_LOAD)


_LOAD = (
    "Weights of a model of transformers are those of its folder, got "
    "--checkpoint.initial_load_in_hf: name the folder as --model.hf FOLDER and leave it out."
)


def _accept_submodules() -> None:
    """Submodules are transformers' own, and meant to be."""


def _parallelize(
    model: nn.Module,
    *,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    compile_config: CompileConfig,
    ac_config: ActivationCheckpointingConfig,
    dump_folder: str,
    section: Section,
) -> nn.Module:
    mesh = mesh_with_section(parallel_dims, section)
    stage = vars(model).get(STAGE)
    parallelize_hf(
        model,
        mesh,
        section.attention_style(device_type_of(mesh.cp)),
        **options_of(training, parallelism, compile_config, ac_config),
        expert_exchange=section.expert_exchange,
        stage=stage,
    )
    name_kernel(model, section.kernel)
    if stage is None:
        wrap_forward(model, _logits_of_tokens)
    return model


def _logits_of_tokens(
    _: nn.Module, forward: Callable[..., Any], tokens: Tensor, **inputs: Any
) -> Tensor:
    """As torchtitan calls a model: tokens come first, and logits are all it gives."""
    return forward(input_ids=tokens, **inputs).logits
