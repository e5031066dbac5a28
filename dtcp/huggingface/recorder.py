"""Records each call in which tokens would meet, during a survey in which none do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.huggingface.attention_problems import BY_DISTANCE, BY_PADDING, problems_of
from dtcp.huggingface.block_attention import BLOCK_INDICES
from dtcp.huggingface.compressed_attention import window_of
from dtcp.huggingface.metadata_as_mask import mask_argument, mask_index, metadata_of_config
from dtcp.huggingface.mixing_probe import own_operands
from dtcp.huggingface.read_mask import read_block_mask
from dtcp.huggingface.recurrent_layers import SurveyedMixer
from dtcp.huggingface.registry import RECORDER, fixed_arguments
from dtcp.mixer import Mixer
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.masks import Bidirectional, Causal, Mask
from dtcp.softmax.mixer import CrossAttention, SoftmaxAttention
from dtcp.sparse.mixer import CompressedSparseAttention, Compression
from dtcp.sparse_blocks import SparseBlockAttention
from dtcp.sparse_latent import SparseLatentAttention


@dataclass(frozen=True)
class SurveyedAttention:
    """One attention module, and the mixer it needs.

    Args:
        name: of the module in its model.
        scale: of scores; None for D ** -0.5.
        softcap: of scores; 0 for none.
        sink: whether calls bring sinks.
        cross: whether its keys are those of an encoder's tokens.
        num_selected: tokens that an indexer picks for each query; 0 where queries read all.
        window: keys that a query reads where keys are values and shared by all heads; else 0.
        compression: how entries are made that it reads beside them; None for the window alone.
        blocks: the class and arguments of the mixer that reads picked blocks of tokens; else empty.
        by_distance: whether its scores have a bias that goes by distance in the row.
        arguments: those of its calls that must not change (`fixed_arguments`).
    """

    name: str
    mask: Mask
    scale: float | None
    softcap: float
    sink: bool
    cross: bool = False
    num_selected: int = 0
    window: int = 0
    compression: Compression | None = None
    blocks: tuple[type[SparseBlockAttention], *tuple[int, ...]] | tuple[()] = ()
    by_distance: bool = False
    arguments: tuple[Any, ...] = ()

    def mixer(self) -> Mixer:
        if self.window:
            assert self.scale is not None
            return CompressedSparseAttention(self.window, self.compression, scale=self.scale)
        if self.blocks:
            kind, *numbers = self.blocks
            return kind(*numbers, scale=self.scale)
        if self.num_selected:
            return SparseLatentAttention(scale=self.scale)
        if self.cross:
            return CrossAttention(scale=self.scale, softcap=self.softcap)
        return SoftmaxAttention(self.mask, scale=self.scale, softcap=self.softcap)


class Recorder:
    """Records each attention call, and makes no token see another.

    Args:
        memory_len: tokens of the encoder's row, another number than the decoder's; 0 without one.
    """

    def __init__(self, model: Any, refused: list[str], memory_len: int = 0) -> None:
        self.memory_len = memory_len
        self.memory: dict[str, tuple[Tensor, Tensor]] = {}
        self.names = {module: name for name, module in model.named_modules()}
        self.base = None if model.base_model is model else model.base_model
        self.refused = refused
        self.config = model.config.get_text_config()
        self.sdpa = getattr(model, "_supports_sdpa", False)
        self.base_unread = False
        self.attentions: dict[str, SurveyedAttention] = {}
        self.recurrent: dict[str, SurveyedMixer] = {}
        self.givers: dict[str, None] = {}
        self.made_masks = False
        self.made: dict[int, Tensor] = {}
        self.padding: list[Tensor] = []
        self.hides_padding = False
        self.own_masks: dict[str, None] = {}
        self.block: Tensor | None = None
        self.of_blocks: dict[str, None] = {}
        self.varies = False
        self._given: dict[str, None] = {}

    def see(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Look at the call of any module, to see which ones the metadata reach.

        Returns:
            other arguments for the call: the model inside a model always receives the metadata.
        """
        if module is self.base and "attn_metadata" not in kwargs:
            self.base_unread = True
            return args, {**kwargs, "attn_metadata": self}
        if kwargs.get("attn_metadata") is not self or mask_index(module) is None:
            return None
        self._given[self.names[module]] = None
        mask = mask_argument(module, args, kwargs)
        if isinstance(mask, Tensor):
            setattr(mask, RECORDER, self)
        return None

    def note_unread(self, module: nn.Module) -> None:
        """Record that a module that mixes receives no metadata, but a module around it does."""
        name = self.names[module]
        around = (each for each in self._given if name.startswith(f"{each}."))
        self.givers[max(around, key=len, default="")] = None

    def note_own_mask(self, layer: nn.Module, mask: Tensor) -> None:
        """Record that a recurrent layer gets a mask that the model made: all ones, or not."""
        if bool(mask.all()):
            self.made_masks, self.own_masks[self.names[layer]] = True, None
        else:
            self.own_masks.pop(self.names[layer], None)

    def note_kernel(
        self, layer: nn.Module, name: str, kind: type[Mixer], arguments: Mapping[str, Any]
    ) -> None:
        """Note what a recurrent layer calls."""
        name = f"{self.names[layer]}.{name}"
        now = SurveyedMixer(name, kind, tuple(arguments.items()))
        if self.recurrent.setdefault(name, now) != now:
            self._refuse_twice(layer, self.recurrent[name], now)

    def record(
        self,
        module: nn.Module,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Any,
        arguments: dict[str, Any],
    ) -> Tensor:
        """Record an attention call, and return its result without mixing."""
        mask = self._as_made(mask)
        q, k, v = (x.transpose(1, 2) for x in qkv)
        if arguments.get("relative_bias") is not None:
            # If tokens meet on the way to the bias, this makes them meet in queries.
            q = q + arguments["relative_bias"].relative.mean(-1, keepdim=True)
        name = self.names[module]
        known_mask = self._meaning(name, mask)
        self.varies |= varies(q, 1) or varies(k, 1)
        if mask is None and getattr(module, "is_causal", None) is False:
            known_mask = Bidirectional()
        if arguments.get("pooled") is not None:
            # The indexer picks nothing ahead of a query; there is no mask of pairs.
            known_mask = Causal()
        if self.block is not None:
            known_mask = self._with_blocks(name, mask)
        cross = k.shape[1] != q.shape[1] and k.shape[1] == self.memory_len
        merged = self.memory_len > 0 and k.shape[1] == q.shape[1] + self.memory_len
        seen = {"cross": cross, "merged": merged}
        config = getattr(module, "config", self.config)
        problems = problems_of(module, q, k, known_mask, arguments, config=config, **seen)
        if self.sdpa and getattr(module, "is_causal", None) is False and _hides_ahead(mask):
            problems.append(BY_PADDING)
        self.refused += [f"{name} ({type(module).__name__}): {problem}" for problem in problems]
        if known_mask is not None and not problems:
            self._note(name, module, known_mask, arguments, cross=cross)
        if cross:
            # Keys and values are looked at on their own.
            self.memory[name] = k.detach(), v.detach()
            return q.mean(-1, keepdim=True).expand(*q.shape[:-1], v.shape[-1]).contiguous()
        return own_operands(q, k, v)

    def _as_made(self, mask: Any) -> Any:
        """The mask as a function made it: a model may pass on a slice that is all of it."""
        if hasattr(mask, _FUNCTION):
            self.made[mask.data_ptr()] = mask
        elif isinstance(mask, Tensor):
            made = self.made.get(mask.data_ptr())
            if made is not None and (made.shape, made.stride()) == (mask.shape, mask.stride()):
                return made
        return mask

    def _meaning(self, name: str, mask: Any) -> Mask | None:
        """What the mask of a module's call lets it see; None if that is not known."""
        self.made_masks |= getattr(mask, _MADE, False)
        hidden = getattr(mask, _HIDDEN, None)
        if hidden is not None:
            # It should hide just what was given as padding.
            if not any(hidden.shape == x.shape and torch.equal(hidden, x) for x in self.padding):
                return None
            self.hides_padding = True
        known, reads_blocks = self._read(mask)
        if reads_blocks:
            self.of_blocks[name] = None
        if known is None and _adds_nothing(mask):
            # Of the model's own making, for all keys and without positions.
            self.made_masks, self.own_masks[name] = True, None
        # A module that the probe runs again by itself may get another mask.
        is_own = name in self.own_masks and (not self.padding or _adds_nothing(mask))
        return Bidirectional() if is_own else known

    def _note(
        self, name: str, module: nn.Module, mask: Mask, arguments: dict[str, Any], *, cross: bool
    ) -> None:
        now = SurveyedAttention(
            name,
            mask,
            scale=arguments.get("scaling"),
            softcap=arguments.get("softcap") or 0.0,
            sink=arguments.get("s_aux") is not None,
            cross=cross,
            num_selected=arguments.get("num_selected") or 0,
            by_distance=any(arguments.get(key) is not None for key in BY_DISTANCE),
            arguments=fixed_arguments(arguments),
        )
        compressed = arguments.get("compressed")
        if compressed is not None:
            now = replace(now, window=window_of(mask), compression=compressed.compression)
        picked = arguments.get(BLOCK_INDICES)
        if picked is not None:
            now = replace(now, blocks=(picked.kind, *picked.numbers))
        before = self.attentions.setdefault(name, now)
        if self.block is not None:
            before = self.attentions[name] = replace(before, mask=mask)
        if before != now:
            self._refuse_twice(module, before, now)

    def _read(self, mask: Any) -> tuple[Mask | None, bool]:
        """A mask made by a function, read once for all layers; and whether it reads blocks."""
        if not hasattr(mask, _FUNCTION):
            return None, False
        if not hasattr(mask, _READ):
            block = torch.full((1, mask.shape[-1]), -1) if self.block is None else self.block
            setattr(mask, _READ, read_block_mask(getattr(mask, _FUNCTION), block))
        return getattr(mask, _READ)

    def _with_blocks(self, name: str, dense: Any) -> Mask | None:
        """The mask that was read without images, as it is where tokens of images are marked."""
        before = self.attentions[name].mask if name in self.attentions else None
        if before is None or dense is None or self.block is None:
            return before
        documents = Documents(((self.block.shape[1],),), self.block.shape[1])
        coords = Coords.of(documents, block=self.block)
        known, reads_blocks = self._read(dense)
        if known is None or (name in self.of_blocks and not reads_blocks):
            return None
        return known if torch.equal(known.visible(coords, coords), dense[:, 0].cpu()) else None

    def _refuse_twice(self, module: nn.Module, before: object, now: object) -> None:
        self.refused.append(
            f"{self.names[module]} ({type(module).__name__}): called twice, as {before} and as "
            f"{now}: give each use a module of its own."
        )


def _hides_ahead(mask: Any) -> bool:
    """Whether a dense mask lets no token see one behind it in its row."""
    is_dense = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape[-1] > 1
    return is_dense and not bool(mask.triu(1).any())


def _adds_nothing(mask: Any) -> bool:
    """Whether a mask not made by a function adds zero to all scores of a row alike."""
    is_plain = (
        isinstance(mask, Tensor) and not hasattr(mask, _FUNCTION) and mask.is_floating_point()
    )
    return is_plain and mask.ndim == 4 and mask.shape[-2] == 1 and not bool(mask.any())


def varies(x: Tensor, dim: int) -> bool:
    """Whether the entries of a dim differ by more than rounding."""
    first = x.narrow(dim, 0, 1)
    return float((x - first).abs().max()) > 1e-5 * float(x.abs().max())


_FUNCTION, _READ = "dtcp_mask_function", "dtcp_mask"
_MADE, _HIDDEN = "dtcp_made", "dtcp_hidden"


def survey_mask(*, mask_function: Callable[..., Any], **arguments: Any) -> Tensor:
    """A dense mask of a few tokens, as sdpa takes it, with the function it is of as attribute."""
    from transformers.masking_utils import sdpa_mask

    arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    dense = sdpa_mask(mask_function=mask_function, **arguments)
    assert dense is not None
    # One of the model's own making, for it is called without: ones say nothing; any other would be
    # as long as a shard.
    own_mask = arguments.get("attention_mask")
    setattr(dense, _FUNCTION, mask_function)
    setattr(dense, _MADE, own_mask is not None)
    setattr(dense, _HIDDEN, None if own_mask is None or bool(own_mask.all()) else own_mask == 0)
    setattr(dense, RECORDER, metadata_of_config(arguments.get("config")))
    return dense
