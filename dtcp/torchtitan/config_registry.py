"""The runnable configs, one function each: python train.py --config NAME.

A config is torchtitan's, with a `dtcp` section. Its name states the model and, where it is not
the default one, the mesh. Any value can be set on the command line: --section.key VALUE.
"""

from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.config.configs import CommConfig, DebugConfig
from torchtitan.config.override import OverrideConfig
from torchtitan.models.llama3 import model_registry as titan_llama3
from torchtitan.models.qwen3 import model_registry as titan_qwen3
from torchtitan.protocols.model_spec import ModelSpec

from dtcp.torchtitan.adopt import ATTENTION, adopt_model
from dtcp.torchtitan.checkpoint import Checkpoints
from dtcp.torchtitan.data import PackedDocuments
from dtcp.torchtitan.loss import TokenLoss
from dtcp.torchtitan.model_spec import llama
from dtcp.torchtitan.progress import Progress
from dtcp.torchtitan.section import Section
from dtcp.torchtitan.tokenizer import Tokenizer
from dtcp.torchtitan.trainer import Trainer, Validation
from models.llama import tiny

_SHAPE = tiny(vocab_size=272)
"""Bytes, two marks, and what fills up to a multiple of 16."""


def llama_tiny() -> Trainer.Config:
    """The default: cp 2 x tp 2 on four ranks, a ring over head-tail shards, compiled."""
    return _tiny(llama("tiny", _SHAPE), "llama_tiny")


def titan_llama3_tiny() -> Trainer.Config:
    """torchtitan's own llama3 debug model, two layers of it, with our attention: cp 2 x tp 2."""
    return _titan(titan_llama3("debugmodel"), "titan_llama3_tiny")


def titan_qwen3_tiny() -> Trainer.Config:
    """torchtitan's own qwen3 debug model, two layers of it, with our attention: cp 2 x tp 2."""
    return _titan(titan_qwen3("debugmodel", attn_backend="flex"), "titan_qwen3_tiny")


def _titan(spec: ModelSpec, name: str) -> Trainer.Config:
    spec.model.layers = spec.model.layers[:2]
    config = _tiny(adopt_model(spec), name)
    config.override = OverrideConfig(imports=[ATTENTION])
    return config


def _tiny(spec: ModelSpec, name: str) -> Trainer.Config:
    """Minutes on two CPU cores: the standard library as text, a byte a token, in float32."""
    return Trainer.Config(
        model_spec=spec,
        dump_folder=f"outputs/{name}",
        # Only a tokenizer of torchtitan's own would read from here.
        hf_assets_path=".",
        tokenizer=Tokenizer.Config(),
        dataloader=PackedDocuments.Config(),
        loss=TokenLoss.Config(),
        optimizer=default_adamw(lr=2e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=10, min_lr_factor=0.1),
        training=TrainingConfig(
            local_batch_size=4,
            seq_len=1024,
            steps=150,
            mixed_precision_param="float32",
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(
            context_parallel_degree=2,
            tensor_parallel_degree=2,
            spmd_backend="partial_dtensor",
        ),
        compile=CompileConfig(enable=True, components=["model"]),
        activation_checkpoint=None,
        checkpoint=Checkpoints.Config(
            enable=True,
            interval=50,
            keep_latest_k=2,
            initial_load_model_only=False,
            # The last step is a step to go on from.
            last_save_model_only=False,
        ),
        validator=Validation.Config(
            enable=True,
            freq=50,
            steps=4,
            dataloader=PackedDocuments.Config(part="validation"),
        ),
        metrics=Progress.Config(log_freq=1, enable_tensorboard=True, disable_color_printing=True),
        # A first step compiles, on slow machines for minutes, while other ranks wait.
        comm=CommConfig(init_timeout_seconds=1800, train_timeout_seconds=600, trace_buf_size=0),
        debug=DebugConfig(seed=0, enable_structured_logging=False),
        dtcp=Section(),
    )
