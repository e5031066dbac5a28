"""A config of torchtitan's own as one of ours: its model, data and schedule, our attention.

python train.py --module llama3 --config llama3_debugmodel
    --parallelism.context_parallel_degree 4 --tokenizer.folder ... (and the rest as ever)
"""

from dataclasses import replace

from dtcp.torchtitan.loss import TokenLoss
from dtcp.torchtitan.parallelize import parallelize_decoder

from torchtitan import trainer as titan
from torchtitan.config.override import OverrideConfig, derive
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.model_spec import ModelSpec

from dtcp.pretrain.checkpoint import Checkpoints
from dtcp.pretrain.progress import Progress
from dtcp.pretrain.trainer import Trainer, Validation

ATTENTION_OVERRIDE = "dtcp.torchtitan.overrides.context_parallel_attention"


def adopt(config: titan.Trainer.Config) -> Trainer.Config:
    """Put our parts where torchtitan has its own; a config that is ours is returned as it is.

    Raises:
        ValueError: the model is none that our attention can be put into.
    """
    if isinstance(config, Trainer.Config):
        return config
    return derive(
        config,
        Trainer.Config,
        model_spec=adopt_model(config.model_spec),
        override=OverrideConfig(imports=[*config.override.imports, ATTENTION_OVERRIDE]),
        parallelism=replace(config.parallelism, spmd_backend="partial_dtensor"),
        training=replace(config.training, disable_cuda_graphs=True),
        checkpoint=derive(config.checkpoint, Checkpoints.Config),
        metrics=derive(config.metrics, Progress.Config),
        validator=derive(config.validator, Validation.Config),
        # The chunked one crashes on torch 2.11's CPU; ours works in chunks by itself.
        loss=TokenLoss.Config(),
    )


def adopt_model(spec: ModelSpec | None) -> ModelSpec:
    """The spec of a decoder of torchtitan, parallelized our way."""
    if spec is None or not isinstance(spec.model, Decoder.Config):
        name = "none" if spec is None else spec.name
        raise ValueError(
            f"Our attention goes into decoders of torchtitan, got the model {name}: write a "
            f"config that returns dtcp.pretrain.trainer.Trainer.Config."
        )
    return replace(spec, parallelize_fn=parallelize_decoder)
