"""Images in text: rows arrive whole, and are sharded where the language model begins.

The vision tower runs on all images on every rank, and its tokens are put in their places by the
model's own code, which sees whole rows. After that, embeddings, positions and whatever else has an
entry per token are sharded as the batch was; image tokens cross shards like any others.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dtcp.distributed.mesh import ParallelMesh
from dtcp.distributed.same_rows import numbers_of_ranks
from dtcp.forward import wrap_forward
from dtcp.metadata import AttentionMetadata, BatchMetadata
from dtcp.mixer import ClaimedMixer, Mixer
from dtcp.rows import pad_end
from dtcp.sequence.block_runs import vision_blocks
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout
from dtcp.style import MixerStyle

CUT = "dtcp_cut"
"""The mixer's name in its language model."""

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""Arguments that say for each token whether it belongs to an image."""

IMAGES = (
    *("pixel_values", "pixel_values_videos", "pixel_attention_mask", "image_sizes"),
    *("image_grid_thw", "video_grid_thw", "second_per_grid_ts"),
    *("image_position_ids", "video_position_ids", "num_frames_per_video"),
)
"""Arguments with images and videos, which have no token dim."""

PER_LAYER = ("per_layer_inputs", "ple_input_ids")
"""Arguments of a language model with per-layer embeddings of tokens, or the ids to look up."""


@dataclass(frozen=True, eq=False)
class CutMetadata(AttentionMetadata):
    """Which tokens of whole rows a shard has: token_index [L].

    Args:
        in_part: whether some batch ranks have images, and others have none.
    """

    token_index: Tensor
    in_part: bool = False


class CutRows(Mixer):
    """Shard what belongs to whole rows as the batch was sharded. Nothing is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.set_metadata_key()

    def forward(self, x: Tensor, attn_metadata: BatchMetadata, dim: int = 1) -> Tensor:
        """S tokens in dim -> L of them."""
        metadata: CutMetadata = self.own(attn_metadata)
        return x.index_select(dim, metadata.token_index.to(x.device))

    def shard_len(self, attn_metadata: BatchMetadata) -> int:
        """L."""
        metadata: CutMetadata = self.own(attn_metadata)
        return len(metadata.token_index)

    def forward_without_mixing(self, *args: Any, **kwargs: Any) -> Tensor:
        return args[0]

    def whole_row_metadata(self, coords: Coords) -> CutMetadata:
        return CutMetadata(torch.arange(coords.document.shape[1]))


class ContextParallelCutRows(ClaimedMixer, CutRows):
    """A CutRows that a style has taken over."""

    carry_out = CutRows.forward


@dataclass
class CutRowsCP(MixerStyle):
    """Whole rows sharded in any layout that is the same for all rows. Traffic per rank: none."""

    claims: ClassVar[Mapping[type[Mixer], type[ClaimedMixer]]] = {CutRows: ContextParallelCutRows}
    layouts: ClassVar[tuple[type[SequenceLayout], ...]] = (SequenceLayout,)

    def make_metadata(
        self, mixer: Mixer, coords: Coords, layout: SequenceLayout, rank: int
    ) -> AttentionMetadata:
        self.check(mixer, layout)
        return CutMetadata(layout.token_indices(rank))


def language_model_name(model: Any) -> str:
    """The name of the language model inside of a model that takes images; empty without one."""
    if "pixel_values" not in inspect.signature(type(model).forward).parameters:
        return ""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "language_model" and hasattr(module, "layers"):
            return str(name)
    return ""


def image_arguments(model: Any) -> tuple[str, ...]:
    """What a model may be called with besides its tokens."""
    taken = inspect.signature(type(model).forward).parameters
    return tuple(key for key in (*IMAGES, *TOKEN_TYPES) if key in taken)


def counts_images(model: Any) -> bool:
    """Whether a model computes positions on several axes, from the images of whole rows."""
    return hasattr(getattr(model, "base_model", model), "get_rope_index")


def blocks_of_types(types: Tensor, *, prompts: bool) -> Tensor:
    """Blocks of tokens that see each other, by the types of tokens: [B, S], -1 for those in none.

    Args:
        prompts: whether they are the prompts of documents, of type 0, as PaliGemma has it: images
            and the text behind them. Else each image is one.
    """
    return torch.where(types == 0, 0, -1) if prompts else vision_blocks(types)


def install_image_inputs(model: nn.Module, name: str, *, prompts: bool) -> None:
    """Let the language model inside a model shard whole rows."""
    text = model.get_submodule(name)
    text.add_module(CUT, CutRows())
    wrap_forward(text, _on_shard)
    vars(model)[_TEXT], vars(model)[_PROMPTS] = name, prompts
    wrap_forward(model, _with_gradients_alike)


_TEXT, _PROMPTS = "dtcp_text", "dtcp_prompts"
"""Where a model that takes images keeps its language model's name, and `Survey.sees_prompt`."""


def _with_gradients_alike(
    model: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Let a rank without images take part in summing the vision tower's gradients, with zeros.

    FSDP sums the gradients that a rank has: other ranks would exchange buffers of another size.
    """
    metadata, knows = kwargs.get("attn_metadata"), isinstance(model, FSDPModule)
    if knows and hasattr(model, _UNUSED) and isinstance(metadata, BatchMetadata):
        cut = model.get_submodule(f"{vars(model)[_TEXT]}.{CUT}")
        getattr(model, _UNUSED)(cut.own(metadata).in_part, recurse=False)
    return forward(*args, **kwargs)


_UNUSED = "set_reduce_scatter_unused_params"
"""The method that tells FSDP so, from torch 2.13 on."""


def agreed_on_images(metadata: BatchMetadata, mesh: ParallelMesh, *, images: bool) -> BatchMetadata:
    """The metadata of a batch, with whether only some of the batch ranks have images.

    Traffic per rank: a number from each batch rank, for a model that takes images.

    Raises:
        NotImplementedError: images in part, and FSDP of a torch that sums no gradients of a part.
    """
    known = {key: each for key in metadata if isinstance(each := metadata[key], CutMetadata)}
    if not known or mesh.batch is None:
        return metadata
    have = numbers_of_ranks(torch.tensor(int(images)), [mesh.batch])
    in_part = 0 < int(have.sum()) < len(have)
    if in_part and not hasattr(FSDPModule, _UNUSED):
        raise NotImplementedError(
            f"FSDP of this torch sums gradients that all ranks have, got images on "
            f"{int(have.sum())} of {len(have)} batch ranks with torch {torch.__version__}: use "
            f"torch 2.13, or deal rows with images to all batch ranks or to none."
        )
    key, own = next(iter(known.items()))
    return metadata.replaced(key, replace(own, in_part=in_part))


def _on_shard(text: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    cut, metadata, embeds = (
        text.get_submodule(CUT),
        kwargs["attn_metadata"],
        kwargs["inputs_embeds"],
    )
    if embeds.shape[1] == cut.shard_len(metadata):
        return forward(*args, **kwargs)
    tokens = ("inputs_embeds", "position_ids", "visual_pos_masks", *PER_LAYER)
    whole = {key: kwargs.get(key) for key in tokens}
    dims = {"position_ids": -1}
    kwargs |= {key: cut(x, metadata, dims.get(key, 1)) for key, x in whole.items() if x is not None}
    layers, mask = kwargs.get("deepstack_visual_embeds"), whole["visual_pos_masks"]
    if layers is not None and mask is not None:
        # Number the image tokens in order: the numbers in a shard say which it has.
        numbers = mask.flatten().cumsum(0).view(mask.shape) - 1
        mine = cut(numbers, metadata)[kwargs["visual_pos_masks"]]
        kwargs["deepstack_visual_embeds"] = [x[mine] for x in layers]
    return forward(*args, **kwargs)


def whole_row_inputs(
    rows: Mapping[str, Any], documents: Documents, model: nn.Module
) -> dict[str, Tensor]:
    """What a model with images is called with, padded to the length of the rows: [B, S].

    Raises:
        ValueError: tokens without ids; packed documents, or positions of one axis, where the model
            counts the positions of a row's images.
    """
    if rows.get("input_ids") is None:
        raise ValueError(
            f"Tokens of images take the places of their ids, got images with keys {sorted(rows)}: "
            f"give input_ids."
        )
    whole = {"input_ids": rows["input_ids"]}
    whole |= {key: rows[key] for key in TOKEN_TYPES if rows.get(key) is not None}
    padded = {key: pad_end(x, documents.seq_len - x.shape[1], 0, dim=1) for key, x in whole.items()}
    if not counts_images(model):
        return {**padded, "position_ids": documents.position_ids()}
    packed = [row for row, lengths in enumerate(documents.lengths) if len(lengths) > 1]
    if packed:
        raise ValueError(
            f"A model that counts the positions of images on several axes takes one document in a "
            f"row, got several in rows {packed[:4]}: leave them unpacked, padded on the right."
        )
    if rows.get("position_ids") is not None:
        raise ValueError(
            f"A model that counts the positions of images on several axes does so by itself, got "
            f"position_ids of shape {tuple(rows['position_ids'].shape)} beside images: leave them "
            f"out."
        )
    return padded


def with_blocks(rows: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Rows with the blocks of image tokens that masks read; rows of text have none."""
    if "block" in rows or not any(isinstance(m, CutRows) for m in model.modules()):
        return dict(rows)
    types = next((rows[key] for key in TOKEN_TYPES if rows.get(key) is not None), None)
    tokens = rows["input_ids"] if rows.get("input_ids") is not None else rows["inputs_embeds"]
    none = torch.full(tokens.shape[:2], -1)
    prompts = vars(model).get(_PROMPTS, False)
    return {
        **rows,
        "block": none if types is None else blocks_of_types(types.cpu(), prompts=prompts),
    }
