"""The runnable configs, one function each: python train.py --config NAME.

A config is torchtitan's, with a `dtcp` section. Its name states the model and, where it is not
the default one, the mesh. Any value can be set on the command line: --section.key VALUE.
"""

from dataclasses import replace
from pathlib import Path

from dtcp.torchtitan.hf_model import BYTE_VOCABULARY
from dtcp.torchtitan.loss import TokenLoss
from dtcp.torchtitan.model_spec import llama, spec_of
from dtcp.torchtitan.section import Section

from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.config.configs import CommConfig, DebugConfig
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models.llama3 import model_registry as titan_llama3
from torchtitan.models.qwen3 import model_registry as titan_qwen3
from torchtitan.protocols.model_spec import ModelSpec

from dtcp.models import deepseek_v4, gemma4, qwen3_5
from dtcp.models.llama import PRESETS, tiny
from dtcp.parallelize.plans.families import DEEPSEEK_V4, GEMMA4, QWEN3_5
from dtcp.pretrain.adopt import adopt_model
from dtcp.pretrain.checkpoint import Checkpoints
from dtcp.pretrain.data import PackedDocuments
from dtcp.pretrain.progress import Progress
from dtcp.pretrain.tokenizer import Tokenizer
from dtcp.pretrain.trainer import Trainer
from dtcp.pretrain.validation import Validation

BYTE_SHAPE = tiny(vocab_size=BYTE_VOCABULARY)


def llama_tiny() -> Trainer.Config:
    """The default: cp 2 x tp 2 on four ranks, a ring over balanced documents, compiled.

    Command: make train (python train.py). Hardware: any two CPU cores, no download.
    Expect: two to four minutes; the loss falls from 5.6 to about 2.5 nats per byte in 120 steps.
    """
    return _tiny(llama("tiny", BYTE_SHAPE), "llama_tiny")


def llama_tiny_fsdp2_cp2() -> Trainer.Config:
    """Two rows on ranks 0 and 1, two on 2 and 3; weights over all four."""
    config = _tiny(llama("tiny", BYTE_SHAPE), "llama_tiny_fsdp2_cp2")
    config.training.local_batch_size = 2
    return _on(config, data_parallel_shard_degree=2, context_parallel_degree=2)


def llama_tiny_fsdp4() -> Trainer.Config:
    """No context parallelism: each of four ranks has a row of its own."""
    config = _tiny(llama("tiny", BYTE_SHAPE), "llama_tiny_fsdp4")
    config.training.local_batch_size = 1
    return _on(config, data_parallel_shard_degree=4)


def llama_tiny_hsdp2_cp2() -> Trainer.Config:
    """Two replicas, each on two ranks that share weights and rows."""
    config = _tiny(llama("tiny", BYTE_SHAPE), "llama_tiny_hsdp2_cp2")
    config.training.local_batch_size = 2
    return _on(config, data_parallel_replicate_degree=2, context_parallel_degree=2)


def llama_tiny_cp4_hybrid() -> Trainer.Config:
    """Four ranks per row: pairs exchange heads, and a ring runs between the pairs."""
    config = _tiny(llama("tiny", BYTE_SHAPE), "llama_tiny_cp4_hybrid")
    config.dtcp.strategy = "hybrid"
    return _on(config, context_parallel_degree=4)


def llama_tiny_cp4_per_document() -> Trainer.Config:
    """Four ranks per row, each document balanced by itself; one row per batch, as that needs."""
    config = _tiny(llama("tiny", BYTE_SHAPE), "llama_tiny_cp4_per_document")
    config.dtcp.layout, config.dtcp.strategy = "per_document", "all_gather"
    config.training.local_batch_size, config.training.global_batch_size = 1, 4
    return _on(config, context_parallel_degree=4)


def llama_tiny_island() -> Trainer.Config:
    """As the default, with attention in eager mode between the compiled halves of a block."""
    config = _tiny(llama("tiny", BYTE_SHAPE), "llama_tiny_island")
    config.dtcp.boundary = "eager_island"
    return config


def qwen3_tiny() -> Trainer.Config:
    """Qwen3's shape: norms on query and key heads, wide heads, the head tied to the embedding."""
    shape = replace(BYTE_SHAPE, head_dim=32, rope_theta=1e6, norm_eps=1e-6, tied=True)
    return _tiny(llama("qwen3_tiny", shape), "qwen3_tiny")


def qwen3_5_tiny() -> Trainer.Config:
    """Qwen3.5, dense: three layers of the gated delta rule and one of attention, cp 2 x tp 2.

    Command: python train.py --config qwen3_5_tiny. Hardware: any two CPU cores, no download.
    """
    return _tiny(spec_of(QWEN3_5, "tiny", qwen3_5.tiny(BYTE_VOCABULARY)), "qwen3_5_tiny")


def qwen3_5_moe_tiny() -> Trainer.Config:
    """The same with eight experts, of which a byte visits two, and one that all share."""
    shape = qwen3_5.tiny(BYTE_VOCABULARY, experts=True)
    return _tiny(spec_of(QWEN3_5, "moe-tiny", shape), "qwen3_5_moe_tiny")


def gemma4_tiny() -> Trainer.Config:
    """Gemma 4's shape: windows by a halo, global layers whose keys are computed from values.

    Command: python train.py --config gemma4_tiny. Hardware: any two CPU cores, no download.
    Expect: minutes, the first of them for compiling one graph per kind of layer; the loss
        starts at 5.6 nats per byte and falls from the first step on.
    """
    return _tiny(spec_of(GEMMA4, "tiny", gemma4.tiny(BYTE_VOCABULARY)), "gemma4_tiny")


def gemma4_tiny_moe() -> Trainer.Config:
    """The same with experts beside the dense feed-forward part."""
    return _tiny(spec_of(GEMMA4, "tiny-moe", gemma4.tiny_moe(BYTE_VOCABULARY)), "gemma4_tiny_moe")


def gemma4_tiny_e() -> Trainer.Config:
    """The same with per-layer embeddings, and keys that the last layers share."""
    return _tiny(spec_of(GEMMA4, "tiny-e", gemma4.tiny_e(BYTE_VOCABULARY)), "gemma4_tiny_e")


def deepseek_v4_tiny() -> Trainer.Config:
    """DeepSeek-V4 with every kind of its layers, on cp 2 x tp 2; predicts two tokens ahead.

    Command: python train.py --config deepseek_v4_tiny. Hardware: any two CPU cores, no download.
    Expect: the loss, a tenth of it that of the second token, falls from 6.2. Eager, for its blocks
        are of five kinds, minutes to compile on two cores: --compile.enable where it pays.
        `dtcp.strategy` is not read: its attention is carried out in one way.
    """
    shape = deepseek_v4.tiny(vocab_size=BYTE_VOCABULARY)
    config = _tiny(spec_of(DEEPSEEK_V4, "tiny", shape), "deepseek_v4_tiny")
    config.training.local_batch_size = 2
    config.compile.enable = False
    return config


def llama3_8b_128k() -> Trainer.Config:
    """Continue Llama 3.1 8B on rows of 131,072 tokens.

    Command: torchrun --nproc-per-node 8 train.py --config llama3_8b_128k, in a folder that holds
        Llama-3.1-8B (weights and tokenizer from Hugging Face) and texts (text or JSONL).
    Hardware: one node of eight 80 GB GPUs, cp 8; more nodes add rows (dp_shard takes the rest).
    Expect (worked out, not yet measured): per GPU, 16 GB for weights, gradients and AdamW's state
        (16 bytes per parameter, over 8 ranks), 4.3 GB for block inputs of 16,384 tokens, 8.4 GB for
        logits and their gradient. Each layer receives at most 0.5 GB for attention in each
        direction, less what causality and documents spare. The loss starts where the published
        model is on the texts, near 2 nats per token on web text.
    """
    weights = Path("Llama-3.1-8B").absolute()
    config = _tiny(llama("llama3.1-8b", PRESETS["llama3.1-8b"]), "llama3_8b_128k")
    config.tokenizer = Tokenizer.Config(folder=str(weights))
    texts = PackedDocuments.Config(dataset="folder", dataset_path="texts")
    config.dataloader = texts
    config.validator.dataloader = replace(texts, part="validation")
    config.validator.freq = 100
    config.optimizer = default_adamw(lr=2e-5)
    config.lr_scheduler = LRSchedulersContainer.Config(warmup_steps=50, min_lr_factor=0.1)
    config.training = TrainingConfig(
        local_batch_size=1, seq_len=131_072, steps=1000, disable_cuda_graphs=True
    )
    config.activation_checkpoint = FullAC.Config()
    config.checkpoint = replace(
        config.checkpoint,
        interval=100,
        initial_load_path=str(weights),
        initial_load_in_hf=True,
        initial_load_model_only=True,
    )
    config.dtcp.device = "accelerator"
    return _on(config, context_parallel_degree=8)


def titan_llama3_tiny() -> Trainer.Config:
    """torchtitan's own llama3 debug model, two layers of it, with our attention: cp 2 x tp 2."""
    return _titan(titan_llama3("debugmodel"), "titan_llama3_tiny")


def titan_qwen3_tiny() -> Trainer.Config:
    """torchtitan's own qwen3 debug model, two layers of it, with our attention: cp 2 x tp 2."""
    return _titan(titan_qwen3("debugmodel", attn_backend="flex"), "titan_qwen3_tiny")


def _titan(spec: ModelSpec, name: str) -> Trainer.Config:
    spec.model.layers = spec.model.layers[:2]
    return _tiny(adopt_model(spec), name)


def _on(config: Trainer.Config, **degrees: int) -> Trainer.Config:
    """The config on another mesh; dp_shard takes the ranks that are left."""
    config.parallelism = ParallelismConfig(spmd_backend="partial_dtensor", **degrees)
    return config


def _tiny(spec: ModelSpec, name: str) -> Trainer.Config:
    """Minutes on two CPU cores: the standard library as text, one token per byte, in float32."""
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
            steps=120,
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
            interval=40,
            keep_latest_k=2,
            initial_load_model_only=False,
            # The last step is a step to go on from.
            last_save_model_only=False,
        ),
        validator=Validation.Config(
            enable=True,
            freq=40,
            steps=4,
            dataloader=PackedDocuments.Config(part="validation"),
        ),
        metrics=Progress.Config(log_freq=1, enable_tensorboard=True, disable_color_printing=True),
        # A first step compiles, on slow machines for minutes, while other ranks wait.
        comm=CommConfig(init_timeout_seconds=1800, train_timeout_seconds=600, trace_buf_size=0),
        debug=DebugConfig(seed=0, enable_structured_logging=False),
        dtcp=Section(),
    )
