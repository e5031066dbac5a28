"""What a pipeline stage of each family computes: some layers, and the ends where it has them.

A stage is the family's model without the modules that other stages hold, which are None in it. The
first one embeds tokens and the last one scores them; between them travels the residual stream.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dtcp.torchtitan.attention import add_mixers

from torch import Tensor
from torch.distributed.tensor import DTensor

from dtcp.models.inputs import check_model_inputs
from dtcp.parallelize.plans.families import DEEPSEEK_V4, LLAMA, QWEN3_5, Family


@dataclass(frozen=True)
class StageForward:
    """How a model is cut into stages.

    Args:
        forward: of a stage: itself, then what its model takes, the residual stream in the place of
            token ids behind the first one.
        layers: the name of their list.
        first, last: the modules of the first stage and of the last one, outside of layers.
        ahead: those that the last one has besides where the model predicts further ahead.
        stream: shape of what layers hand on for each token, by the model's config.
        over_tp: whether the stream is a DTensor on the axis tp.
        reads_ids: whether layers read `token_ids`, too, which all stages then get.
        prepare: done to a model before its masks are read.
    """

    forward: Callable[..., Tensor | tuple[Tensor, ...]]
    layers: str = "layers"
    first: tuple[str, ...] = ("embedding",)
    last: tuple[str, ...] = ("norm", "lm_head")
    ahead: tuple[str, ...] = ()
    stream: Callable[[Any], tuple[int, ...]] = lambda config: (config.shape.dim,)
    over_tp: bool = False
    reads_ids: bool = False
    prepare: Callable[[Any], Any] = lambda _: None

    def last_of(self, model: Any) -> tuple[str, ...]:
        """The modules of a model's last stage, outside of layers."""
        return (*self.last, *(self.ahead if getattr(model, "mtp_depths", 0) else ()))


def _llama(stage: Any, x: Tensor, position_ids: Tensor, attn_metadata: Any) -> Tensor:
    if stage.embedding is not None:
        check_model_inputs("Llama", x, position_ids, stage.config.vocab_size)
        x = stage.embedding(x)
    for block in stage.layers:
        x = block(x, position_ids, attn_metadata)
    return x if stage.lm_head is None else stage.lm_head(stage.norm(x))


def _qwen3_5(
    stage: Any,
    x: Tensor,
    position_ids: Tensor,
    attn_metadata: Any,
    mtp_input_ids: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    angles = stage.config.rope.angles(position_ids)
    if stage.stage.index == 0:
        check_model_inputs("Qwen35", x, position_ids, stage.config.vocab_size, axes=3)
        x = stage.embedding(x)
    for block in stage.layers:
        x = block(x, angles, attn_metadata)
    if stage.lm_head is None:
        return x
    hidden = stage.norm(x)
    if mtp_input_ids is None:
        return stage.lm_head(hidden)
    further = stage.ahead(hidden, stage.embedding(mtp_input_ids[:, 0]), angles, attn_metadata)
    return stage.lm_head(hidden), stage.lm_head(further)


def _deepseek_v4(
    stage: Any,
    x: Tensor,
    position_ids: Tensor,
    attn_metadata: Any,
    token_ids: Tensor,
    mtp_input_ids: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    if stage.stage.index == 0:
        check_model_inputs("DeepseekV4", x, position_ids, stage.config.vocab_size)
        streams = stage.embedding(x)[:, :, None].expand(-1, -1, stage.config.streams, -1)
        x = streams.contiguous()  # to be sent, where no layer comes first
    for block in stage.layers:
        x = block(x, token_ids, position_ids, attn_metadata)
    if stage.lm_head is None:
        return x
    logits = [stage.lm_head(stage.norm(stage.head(x)))]
    if mtp_input_ids is None:
        return logits[0]
    for depth, ids in zip(stage.mtp, mtp_input_ids.unbind(1), strict=True):
        x = depth.join(x, stage.embedding(ids))
        x = depth.block(x, ids, position_ids, attn_metadata)
        logits.append(stage.lm_head(depth.norm(depth.head(x))))
    return tuple(logits)


def _decoder(stage: Any, x: Tensor, positions: Tensor, attention_masks: Any) -> Tensor:
    """torchtitan's own forward does without modules; between stages travel plain tensors."""
    sharded = stage.stage.sharded
    if sharded is not None and stage.tok_embeddings is None:
        x = DTensor.from_local(x, sharded.device_mesh, sharded.placements, run_check=False)
    out: Tensor = type(stage).forward(stage, x, positions, attention_masks)
    if sharded is None or stage.lm_head is not None:
        return out
    if not isinstance(out, DTensor) or out.placements != sharded.placements:
        raise TypeError(
            f"A stage hands on what is sharded over tp as {sharded.placements}, got "
            f"{getattr(out, 'placements', type(out))} from {type(stage).__name__}: set the degree "
            f"of pp or tp to 1."
        )
    return out.to_local()


DECODER_STAGE = StageForward(
    _decoder,
    over_tp=True,
    first=("tok_embeddings",),
    stream=lambda config: (config.dim,),
    prepare=add_mixers,
)
"""Of torchtitan's own decoders."""

FAMILY_STAGES: Mapping[Family, StageForward] = {
    LLAMA: StageForward(_llama),
    QWEN3_5: StageForward(_qwen3_5, ahead=("embedding", "ahead")),
    DEEPSEEK_V4: StageForward(
        _deepseek_v4,
        last=("head", "norm", "lm_head"),
        ahead=("embedding", "mtp"),
        stream=lambda config: (config.shape.streams, config.shape.dim),
        reads_ids=True,
    ),
}
"""Of dtcp's own families; those without are not cut."""
