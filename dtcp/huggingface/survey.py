"""Where and how tokens meet in a model of transformers, found by running it on a few tokens.

Attention calls are recorded, with the mask that the model's own code made for them, while each
token attends only to itself; so are the kernels of recurrent layers. If tokens still meet anywhere,
it is neither through the registry nor through a known kernel, and is refused by name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from dtcp.huggingface import registry
from dtcp.huggingface.distance_bias import noting_bias_tables
from dtcp.huggingface.encoder_decoder import encoder_name
from dtcp.huggingface.expert_capacity import surveyed_capacity, unlimited_capacity, unread_capacity
from dtcp.huggingface.metadata_as_mask import metadata_for_masks
from dtcp.huggingface.mixing_probe import calls, probe_length
from dtcp.huggingface.own_attention import implementations, own_attentions, use_own, use_registry
from dtcp.huggingface.pooled_head import PooledHead
from dtcp.huggingface.positions import Positions
from dtcp.huggingface.quantized import quantized_layers, run_in_training_mode
from dtcp.huggingface.recorder import Recorder, SurveyedAttention, survey_mask
from dtcp.huggingface.recurrent_layers import SurveyedMixer, noting_kernels
from dtcp.huggingface.rotary_lengths import keeping_frequencies
from dtcp.huggingface.router_logits import without_router_logits
from dtcp.huggingface.row_heads import RowHead, dropped_in_heads
from dtcp.huggingface.survey_probe import SurveyProbe, most_positions
from dtcp.huggingface.token_dropouts import DropoutCalls, SurveyedDropout
from dtcp.huggingface.unread_adapters import noting_unread_adapters
from dtcp.huggingface.unsuited import unsuited

FROM_ZERO = Positions()


@dataclass(frozen=True)
class Survey:
    """Attention that mixers can carry out; and, in sentences, what cannot be sharded here.

    Args:
        recurrent: the mixers of recurrent layers.
        capacity: those of routers whose experts have a capacity.
        positions: how the positions of its tokens reach the model.
        givers: layers that hand on a mask and no metadata.
        base_unread: whether the model inside of the model receives no metadata.
        images: the name of the language model in a model that takes images.
        encoder: the name of the encoder in a model that has a decoder, too.
        hides_padding: whether it hides tokens with the id of padding where it is given no mask.
        own_masks: layers that are handed a mask of its model's own, which hides nothing.
        reads_types: whether its masks go by the types of tokens, which mixers do not.
        uncounted_padding: whether it counts positions without tokens of the id of padding.
        dropouts: modules that drop channels of tokens.
        sees_prompt: whether tokens of type 0, a prompt's, see each other in its masks.
        row_heads: what reads whole rows.
    """

    attentions: tuple[SurveyedAttention, ...]
    refused: tuple[str, ...]
    pooled_head: PooledHead | None = None
    recurrent: tuple[SurveyedMixer, ...] = ()
    positions: Positions = FROM_ZERO
    givers: tuple[str, ...] = ()
    base_unread: bool = False
    images: str = ""
    encoder: str = ""
    hides_padding: bool = False
    own_masks: tuple[str, ...] = ()
    capacity: tuple[SurveyedMixer, ...] = ()
    reads_types: bool = False
    uncounted_padding: bool = False
    dropouts: tuple[SurveyedDropout, ...] = ()
    sees_prompt: bool = False
    row_heads: tuple[RowHead, ...] = ()

    def check(self) -> None:
        """Raise if anything is refused.

        Raises:
            ValueError: listing all that is refused.
        """
        if self.refused:
            raise ValueError(
                "A model is context-parallel if all of its mixing can be, got\n  "
                + "\n  ".join(self.refused)
            )


def survey(model: Any) -> Survey:
    """Run a model of transformers on a row of tokens and note where and how tokens meet.

    The model is left as it was.

    Args:
        model: on a real device, unsharded.
    """
    refused = [*unsuited(model), *unread_capacity(model)]
    if refused:
        return Survey((), tuple(refused))
    most = most_positions(model)
    memory_len = probe_length(model, longer=True, most=most) if encoder_name(model) else 0
    recorder = Recorder(model, refused, memory_len)
    probe, dropouts = SurveyProbe(model, recorder), DropoutCalls(model, memory_len)
    with _survey_mode(model, recorder), dropouts.noted(), calls(model) as running:
        try:
            with noting_unread_adapters(model, refused):
                probe.run()
            refused += dropouts.refused()
            names = (each.name for each in dropouts.surveyed())
            refused += dropped_in_heads(model, probe.row_heads, names)
        except registry.UnreadAttentionError:
            raise
        except Exception as error:  # noqa: BLE001
            # The model's code, on rows it may not be made for, may raise anything: this is what
            # stopped the survey, and the reader needs to know which module raised it.
            refused.append(_stopped(model, running, error))
    return Survey(
        attentions=tuple(recorder.attentions.values()),
        refused=tuple(dict.fromkeys(refused)),
        pooled_head=probe.pooled_head,
        recurrent=tuple(recorder.recurrent.values()),
        positions=probe.positions,
        givers=tuple(recorder.givers),
        base_unread=recorder.base_unread,
        images=probe.images,
        encoder=probe.encoder,
        hides_padding=recorder.hides_padding,
        own_masks=tuple(recorder.own_masks),
        capacity=surveyed_capacity(model),
        reads_types=probe.reads_types,
        uncounted_padding=probe.uncounted_padding,
        dropouts=dropouts.surveyed(),
        sees_prompt=probe.sees_prompt,
        row_heads=probe.row_heads,
    )


def _stopped(model: nn.Module, running: list[str], error: Exception) -> str:
    """Why a model that cannot be run on a few tokens is refused."""
    name = running[-1] if running else ""
    kind, device = type(model.get_submodule(name)).__name__, next(model.parameters()).device
    said = " ".join(str(error).split())[:200]
    return (
        f"{name or 'the model'} ({kind}): cannot be run on a few tokens on {device} "
        f"({type(error).__name__}: {said}), so how tokens meet in it is not known: run it where "
        f"its kernels can be, or write it with a mixer (docs/add_a_model.md)."
    )


@contextmanager
def _survey_mode(model: Any, recorder: Recorder) -> Iterator[None]:
    registry.register_attention(survey_mask)
    before = {module: module.training for module in model.modules()}
    implementation = model.config._attn_implementation
    own = [module for module in own_attentions(model) if "forward" not in vars(module)]
    registry.set_attention(model, registry.SURVEY_IMPLEMENTATION)
    for module in own:
        use_registry(model, module)
    hooks = [m.register_forward_pre_hook(recorder.see, with_kwargs=True) for m in before]
    config = model.config.get_text_config()
    try:
        with (
            without_router_logits(config),
            noting_kernels(model, recorder),
            metadata_for_masks(config, recorder),
            noting_bias_tables(model),
            unlimited_capacity(model),
            keeping_frequencies(model),
            run_in_training_mode(quantized_layers(model).values()),
        ):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in own:
            use_own(model, module)
        for each in implementations(model):
            each._attn_implementation = implementation
        model.set_attn_implementation(implementation)
        for module, training in before.items():
            module.training = training
