"""Where and how tokens meet in a model of transformers, found by running it on a few tokens.

Attention calls are recorded, with the mask that the model's own code made for them, while each
token attends to itself alone. Whatever lets tokens meet all the same does not go through the
registry, and is refused by name.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.huggingface import registry
from dtcp.huggingface.mixing_probe import (
    calls,
    find_mixing,
    own_value,
    probe_ids,
    probe_length,
    tensors,
)
from dtcp.huggingface.pooled_head import PooledHead, find_pooled_head, outputs_of_rows
from dtcp.huggingface.read_mask import read_mask
from dtcp.sequence.masks import Bidirectional, Mask
from dtcp.softmax.mixer import SoftmaxAttention

HARMLESS = ("position_ids", "use_cache", "is_causal", "sliding_window", "output_router_logits")
"""Arguments of an attention call that repeat what mask, positions and the model's call say."""

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

_RECURRENT = "GatedDeltaNet"
"""Known by its name: where fla is installed, transformers runs it by kernels that need a GPU."""


@dataclass(frozen=True)
class SurveyedAttention:
    """One attention module, and what its mixer has to be.

    Args:
        name: of the module in its model.
        scale: of scores; None for D ** -0.5.
        softcap: of scores; 0 for none.
        sink: whether calls bring sinks.
    """

    name: str
    mask: Mask
    scale: float | None
    softcap: float
    sink: bool

    def mixer(self) -> SoftmaxAttention:
        return SoftmaxAttention(self.mask, scale=self.scale, softcap=self.softcap)


@dataclass(frozen=True)
class Survey:
    """Attention that mixers can carry out; and, in sentences, what has no sharded form here."""

    attentions: tuple[SurveyedAttention, ...]
    refused: tuple[str, ...]
    pooled_head: PooledHead | None = None

    def check(self) -> None:
        """Stop where something is refused.

        Raises:
            ValueError: all that is refused.
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
    refused = [*_unsuited(model)]
    if refused:
        return Survey((), tuple(refused))
    recorder = _Recorder({module: name for name, module in model.named_modules()}, refused)
    pooled_head = None
    with _survey_mode(model), calls(model) as running:
        try:
            pooled_head = _probe(model, recorder)
        except registry.UnreadAttentionError:
            raise
        except Exception as error:  # noqa: BLE001
            # Code of others, on rows it may not be made for: whatever it raises, this is what
            # stopped the survey, and the module that raised it is what the reader has to know.
            refused.append(_stopped(model, running, error))
    return Survey(tuple(recorder.attentions.values()), tuple(dict.fromkeys(refused)), pooled_head)


def _probe(model: Any, recorder: "_Recorder") -> PooledHead | None:
    """Run a model and note in the recorder what is found; return its head if it pools."""
    seq_len = probe_length(model)
    input_ids = probe_ids(model, seq_len)
    position_ids = torch.arange(seq_len, device=input_ids.device)[None]
    arguments = {"position_ids": position_ids, "use_cache": False, "attn_metadata": recorder}
    run = partial(model, input_ids=input_ids, **arguments)
    # Dropout shows in training mode only, and hides mixing: the probe runs in eval mode.
    model.train()
    if _differ(run, run):
        recorder.refused.append(
            f"{type(model).__name__} is random in training (a dropout, or noise), which would "
            f"depend on the mesh: set it to 0.0 in the config."
        )
    model.eval()
    if _differ(run, partial(run, position_ids=None)):
        recorder.refused.append(
            f"{type(model).__name__} does not count the positions of a row from 0, as the batches "
            f"of shard_hf_batch do: write it with mixers (docs/add_a_model.md)."
        )
    with torch.no_grad():
        of_rows = outputs_of_rows(run(), seq_len)
    pooled_head = None
    if of_rows:
        pooled_head = find_pooled_head(model, partial(_run_rows, model, arguments), seq_len)
        if pooled_head is None:
            recorder.refused.append(_unknown_outputs(model, of_rows))
    recorder.refused += [
        f"{name or 'the model'} ({type(model.get_submodule(name)).__name__}): tokens meet in it, "
        f"and not through the attention registry: write it with a mixer (docs/add_a_model.md)."
        for name in find_mixing(model, run, seq_len, pools=bool(of_rows))
    ]
    return pooled_head


def _stopped(model: nn.Module, running: list[str], error: Exception) -> str:
    """What refuses a model that cannot be run on a few tokens."""
    name = running[-1] if running else ""
    kind, device = type(model.get_submodule(name)).__name__, next(model.parameters()).device
    said = " ".join(str(error).split())[:200]
    return (
        f"{name or 'the model'} ({kind}): cannot be run on a few tokens on {device} "
        f"({type(error).__name__}: {said}), so how tokens meet in it is not known: run it where "
        f"its kernels can be, or write it with a mixer (docs/add_a_model.md)."
    )


def _run_rows(model: Any, arguments: dict[str, Any], input_ids: Tensor) -> object:
    position_ids = arguments["position_ids"].expand(len(input_ids), -1)
    return model(input_ids=input_ids, **{**arguments, "position_ids": position_ids})


def _unknown_outputs(model: nn.Module, outputs: list[Tensor]) -> str:
    """What refuses a model that gives outputs of no token."""
    return (
        f"{type(model).__name__}: gives outputs of shapes {[tuple(x.shape) for x in outputs]} for "
        f"a row of tokens, and not those of one module for its last token, so each rank would give "
        f"those of its shard: parallelize the model without its head, gather the hidden states "
        f"(ShardedBatch.gather) and pool them (docs/not_supported.md)."
    )


def _differ(*runs: Callable[[], object]) -> bool:
    """Whether two runs of a model give different outputs; each starts from a seed of its own."""
    outputs = []
    with torch.no_grad(), torch.random.fork_rng():
        for seed, run in enumerate(runs):
            torch.manual_seed(seed)
            outputs.append([x for x in tensors(run()) if x.is_floating_point()])
    pairs = zip(*outputs, strict=True)
    # Kernels may sum in another order from run to run: that much is no difference.
    return any(float((a - b).abs().max()) > 1e-4 * float(a.abs().max()) for a, b in pairs)


class _Recorder:
    """Notes each attention call, in which no token sees another."""

    def __init__(self, names: dict[nn.Module, str], refused: list[str]) -> None:
        self.names, self.refused = names, refused
        self.attentions: dict[str, SurveyedAttention] = {}

    def record(
        self,
        module: nn.Module,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Any,
        arguments: dict[str, Any],
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        name = self.names[module]
        known_mask: Mask | None = getattr(mask, _MASK, None)
        if mask is None and getattr(module, "is_causal", None) is False:
            known_mask = Bidirectional()
        problems = _problems(q, k, known_mask, arguments)
        self.refused += [f"{name} ({type(module).__name__}): {problem}" for problem in problems]
        if known_mask is not None and not problems:
            self._note(name, module, known_mask, arguments)
        return own_value(v, q.shape[2]) if k.shape[1] == q.shape[1] else torch.zeros_like(q)

    def _note(self, name: str, module: nn.Module, mask: Mask, arguments: dict[str, Any]) -> None:
        sink, softcap = arguments.get("s_aux") is not None, arguments.get("softcap") or 0.0
        now = SurveyedAttention(name, mask, arguments.get("scaling"), softcap, sink)
        before = self.attentions.setdefault(name, now)
        if before != now:
            self.refused.append(
                f"{name} ({type(module).__name__}): called twice, as {before} and as {now}: give "
                f"each use a module of its own."
            )


def _problems(q: Tensor, k: Tensor, mask: Mask | None, arguments: dict[str, Any]) -> list[str]:
    problems = []
    known = ("scaling", "dropout", "s_aux", "softcap", *HARMLESS)
    unknown = [
        key
        for key, value in arguments.items()
        if key not in known and value is not None and value is not False
    ]
    if k.shape[1] != q.shape[1]:
        problems.append(
            f"{q.shape[1]} queries meet {k.shape[1]} keys (cross-attention, or a cache): only "
            f"attention of a sequence to itself is sharded."
        )
    elif mask is None:
        problems.append(
            "its mask is not one interval of keys around a token, or not made by "
            "transformers.masking_utils of positions alone: its meaning is not known."
        )
    if arguments.get("dropout"):
        problems.append(
            f"dropout={arguments['dropout']} in training would depend on the mesh: set "
            f"config.attention_dropout = 0.0."
        )
    if unknown:
        problems.append(f"it is called with {unknown}, which no mixer honours.")
    return problems


_MASK = "dtcp_mask"


def survey_mask(*, mask_function: Callable[..., Any], **arguments: Any) -> Tensor:
    """A dense mask of a few tokens, as sdpa takes it, with the Mask it stands for as attribute."""
    from transformers.masking_utils import sdpa_mask

    arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    dense = sdpa_mask(mask_function=mask_function, **arguments)
    assert dense is not None
    # One of the model's own making, for it is called without: it would be as long as a shard.
    is_own = arguments.get("attention_mask") is not None
    setattr(dense, _MASK, None if is_own else read_mask(mask_function))
    return dense


@contextmanager
def _survey_mode(model: Any) -> Iterator[None]:
    registry.register_attention(survey_mask)
    before = {module: module.training for module in model.modules()}
    implementation = model.config._attn_implementation
    registry.set_attention(model, registry.SURVEY_IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        for module, training in before.items():
            module.training = training


def _unsuited(model: Any) -> Iterator[str]:
    """What refuses a model before it is run, in sentences."""
    name = type(model).__name__
    if next(model.parameters()).is_meta:
        yield (
            f"{name} is on the meta device, where nothing can be run: install_mixers and "
            f"parallelize_hf survey a narrow copy of it."
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        yield (
            f"{name} takes no position_ids: it counts positions from the start of its input, and a "
            f"shard does not start where its row does."
        )
    if getattr(model.config, "output_router_logits", False):
        yield (
            f"{name} adds a balance loss over all tokens of a batch (output_router_logits): set "
            f"config.output_router_logits = False."
        )
    kinds = {part: type(module).__name__ for part, module in model.named_modules()}
    recurrent = next((part for part, kind in kinds.items() if kind.endswith(_RECURRENT)), None)
    if recurrent is not None:
        yield (
            f"{recurrent} ({kinds[recurrent]}): hands a state from token to token, which is no "
            f"attention: dtcp.models.qwen3_5 has such layers and a plan for them, and "
            f"dtcp.cp_utils.apply_cp shards those of transformers."
        )
    for part, module in model.named_modules():
        rate = getattr(module, "p", 0.0) if isinstance(module, _DROPOUT) else 0.0
        if rate:
            yield (
                f"{part} ({type(module).__name__}): dropout={rate} in training would depend on "
                f"the mesh: set it to 0.0 in the config."
            )
    if getattr(model.config, "router_jitter_noise", 0.0):
        yield (
            f"{name} routes by noise of its own on each rank (router_jitter_noise): set "
            f"config.router_jitter_noise = 0.0."
        )
    for kind in _rope_types(getattr(model.config, "rope_parameters", None)):
        if kind in LENGTH_DEPENDENT_ROPE:
            yield (
                f"{name} chooses rotary frequencies by the longest position it sees "
                f"(rope_type={kind!r}), and ranks see different ones: use another rope_type."
            )


def _rope_types(parameters: Any) -> Iterator[str]:
    if isinstance(parameters, dict):
        for key, value in parameters.items():
            if key == "rope_type":
                yield value
            yield from _rope_types(value)
