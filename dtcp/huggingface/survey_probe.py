"""The runs of a survey: a model of transformers on rows that show how tokens meet in it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.huggingface.encoder_decoder import DECODER_TOKENS, encoder_name
from dtcp.huggingface.images import (
    TOKEN_TYPES,
    blocks_of_types,
    image_arguments,
    language_model_name,
)
from dtcp.huggingface.mixing_probe import (
    differs_elsewhere,
    find_mixing,
    probe_ids,
    probe_length,
    tensors,
)
from dtcp.huggingface.padding_ids import padding_token
from dtcp.huggingface.pooled_head import PooledHead, find_pooled_head, outputs_of_rows
from dtcp.huggingface.positions import (
    DECODER_KEY,
    KEY,
    Positions,
    call_with_positions,
    longest,
    position_readers,
    reading_positions,
    takes_positions,
)
from dtcp.huggingface.recorder import Recorder, varies
from dtcp.huggingface.row_heads import RowHead, find_row_heads
from dtcp.huggingface.token_types import TYPES, embeds_types


class SurveyProbe:
    """Runs a model, and keeps what the runs show of it as a whole; the rest is in the recorder.

    Args:
        recorder: records attention calls and refusals while the model runs; already installed.
    """

    def __init__(self, model: Any, recorder: Recorder) -> None:
        self.model, self.recorder = model, recorder
        self.seq_len = probe_length(model, most=most_positions(model))
        self.input_ids = probe_ids(model, self.seq_len)
        self.position_ids = torch.arange(self.seq_len, device=self.input_ids.device)[None]
        self.encoder = encoder_name(model)
        self.memory_ids = probe_ids(model, recorder.memory_len)
        memory = torch.arange(recorder.memory_len, device=self.input_ids.device)[None]
        self.memory_position_ids = memory
        self.positions = Positions()
        self.uncounted_padding = False
        self.pooled_head: PooledHead | None = None
        self.row_heads: tuple[RowHead, ...] = ()
        self.images = ""
        self.reads_types = False
        self.sees_prompt = False

    def run(self) -> None:
        """Run the model and add to the recorder what is found."""
        model, refuse = self.model, self.recorder.refused.append
        name = type(model).__name__
        # Dropout shows in training mode only, and hides mixing: the probe runs in eval mode.
        model.train()
        if _differ(self.uncounted, self.uncounted):
            refuse(
                f"{name} is random in training (a dropout, or noise), which would depend on the "
                f"mesh: set it to 0.0 in the config."
            )
        model.eval()
        positions = self.find_positions()
        if positions is None:
            refuse(
                f"{name} does not count the positions of a row from 0, as the batches of "
                f"shard_hf_batch do: write it with mixers (docs/add_a_model.md)."
            )
        self.positions = positions or Positions(taken=takes_positions(model))
        with reading_positions(model, self.positions):
            self.uncounted_padding = positions is not None and self.leaves_out_padding()
            self.find_mixing()
            if not self.positions.taken and not self.recorder.refused and self.counts():
                refuse(
                    f"{name} takes no position_ids: it counts positions from the start of its "
                    f"input, and a shard does not start where its row does."
                )
            if self.recorder.made_masks:
                self.look_at_padding()
            self.images, refused = language_model_name(model), self.recorder.refused
            if self.images and not refused:
                self.look_at_images()
            elif self.recorder.of_blocks and not self.images:
                refuse(
                    f"{name} reads blocks of tokens in its masks, and takes no images that would "
                    f"show which: write it with mixers (docs/add_a_model.md)."
                )
            elif TYPES in image_arguments(model) and not (refused or embeds_types(model)):
                self.reads_types = self.masks_change_by_types()

    def call(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Run the model, which counts positions by itself unless position_ids are given.

        In a model with an encoder the rows are the decoder's; the encoder reads its own.
        """
        kwargs |= {"use_cache": False, "attn_metadata": self.recorder}
        run = partial(self.model, input_ids=input_ids)
        if self.encoder:
            own = {DECODER_TOKENS[0]: input_ids}
            run = partial(self.model, input_ids=self.memory_ids, **own)
            if KEY in kwargs:
                kwargs[DECODER_KEY] = kwargs[KEY]
                kwargs[KEY] = self.memory_position_ids
        if KEY in kwargs:
            return call_with_positions(self.model, self.positions, run, **kwargs)
        return run(**kwargs)

    def uncounted(self) -> Any:
        return self.call(self.input_ids)

    def counted(self) -> Any:
        return self.call(self.input_ids, position_ids=self.position_ids)

    def find_positions(self) -> Positions | None:
        """How to give the model the positions that it would count; None if that is not known."""
        taken, readers = takes_positions(self.model), position_readers(self.model)
        padding = padding_token(self.model)
        offsets = dict.fromkeys([1, 2, 1 + (padding or 0)]) if taken else ()
        counted = [Positions(offset, readers) for offset in offsets if readers]
        # PaliGemma counts from 1, in its own forward.
        counted += [Positions(1)] if taken else []
        first = Positions(taken=True)
        if not taken:
            first = Positions(0, readers, taken=False, encoder=self.encoder)
        for each in (first, *counted):
            self.positions = each
            with reading_positions(self.model, each):
                try:
                    if not _differ(self.uncounted, self.counted):
                        return each
                except (IndexError, RuntimeError):
                    # A table of positions that is too short for this offset.
                    continue
        return None

    def leaves_out_padding(self) -> bool:
        """Whether the model counts positions without tokens of the id of padding."""
        padding = padding_token(self.model, decoder=True)
        if padding is None or not self.positions.readers:
            return False
        ids = self.input_ids, self.memory_ids
        self.input_ids, self.memory_ids = (x.clone() for x in ids)
        self.input_ids[:, :1] = self.memory_ids[:, :1] = padding
        differ = _differ(self.uncounted, self.counted)
        self.input_ids, self.memory_ids = ids
        return differ

    def find_mixing(self) -> None:
        """Note the modules in which tokens meet, and the head of a model that pools."""
        model, seq_len = self.model, self.seq_len
        with torch.no_grad():
            of_rows = outputs_of_rows(self.counted(), seq_len, self.recorder.memory_len)
        if of_rows:
            self.pooled_head = find_pooled_head(model, self.call_rows, seq_len)
        known = bool(of_rows and (self.pooled_head or self.encoder))
        find = partial(find_mixing, model, self.counted, seq_len, pools=known)
        mixing = find()
        if (mixing or of_rows) and not (
            self.encoder or self.pooled_head or language_model_name(model)
        ):
            attentions = self.recorder.attentions
            heads, mixing = find_row_heads(model, find, self.call_rows, seq_len, attentions)
            self.row_heads = () if mixing else tuple(heads)
        if of_rows and not (self.pooled_head or self.row_heads):
            self.recorder.refused.append(_unknown_outputs(model, of_rows))
        if self.encoder:
            mixing += find_mixing(model, self.counted, self.recorder.memory_len, pools=True)
            mixing += self.mixing_before_keys()
        self.recorder.refused += [
            f"{name or 'the model'} ({type(model.get_submodule(name)).__name__}): tokens meet in "
            f"it, and not through the attention registry: write it with a mixer "
            f"(docs/add_a_model.md)."
            for name in dict.fromkeys(mixing)
        ]

    def mixing_before_keys(self) -> list[str]:
        """Names of cross attention whose keys are not of one token of the encoder each."""
        memory_ids, length = self.memory_ids, self.recorder.memory_len

        def operands(tokens: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
            index = torch.tensor(tokens, dtype=torch.int64, device=memory_ids.device)
            self.memory_ids = memory_ids.index_copy(1, index, memory_ids.roll(1, 1)[:, index])
            with torch.no_grad():
                self.counted()
            self.memory_ids = memory_ids
            return dict(self.recorder.memory)

        before, mixing = operands(()), []
        for tokens in ((length // 2,), (0, length - 1)):
            for name, parts in operands(tokens).items():
                pairs = zip(before[name], parts, strict=True)
                if any(differs_elsewhere(a, b, length, tokens) for a, b in pairs):
                    mixing.append(name)
        return mixing

    def call_rows(self, input_ids: Tensor, **kwargs: Any) -> Any:
        counted = self.position_ids[:, : input_ids.shape[1]].expand(len(input_ids), -1)
        return self.call(input_ids, position_ids=counted, **kwargs)

    def counts(self) -> bool:
        """Whether tokens of one id at one position differ: then something unknown counts them."""
        same = self.input_ids[:, :1].expand_as(self.input_ids).contiguous()
        self.recorder.varies = False
        memory = self.memory_ids, self.memory_position_ids
        self.memory_ids = self.input_ids[:, :1].expand_as(memory[0]).contiguous()
        self.memory_position_ids = torch.zeros_like(memory[1])
        with torch.no_grad():
            out = self.call(same, position_ids=torch.zeros_like(self.position_ids))
        self.memory_ids, self.memory_position_ids = memory
        dims = [(x, dim) for x in tensors(out) for dim in range(x.ndim)]
        return self.recorder.varies or any(
            varies(x, dim)
            for x, dim in dims
            if x.is_floating_point() and x.shape[dim] == self.seq_len
        )

    def look_at_padding(self) -> None:
        """See whether a model that makes masks of its own makes them from its tokens."""
        padding = padding_token(self.model)
        if padding is None:
            return
        input_ids, memory_ids = self.input_ids.clone(), self.memory_ids.clone()
        input_ids[:, self.seq_len // 2 :] = padding
        memory_ids[:, self.seq_len // 2 :] = padding
        self.recorder.padding = [input_ids == padding, memory_ids == padding]
        with torch.no_grad():
            self.call(input_ids, position_ids=self.position_ids)
            if self.encoder:
                before, self.memory_ids = self.memory_ids, memory_ids
                self.call(self.input_ids, position_ids=self.position_ids)
                self.memory_ids = before
        if self.recorder.hides_padding and not self.encoder:
            refuse = self.recorder.refused.append
            refuse(
                f"{type(self.model).__name__} makes a mask of its ids, which hides those of "
                f"padding, and a shard has ids of its own alone: give it no pad_token_id."
            )

    def look_at_images(self) -> None:
        """See how masks change where tokens are marked as image tokens, or as a prompt's."""
        images, prompt = torch.zeros_like(self.input_ids), torch.ones_like(self.input_ids)
        images[:, 3:8] = images[:, 10:15] = 1
        prompt[:, :8] = 0
        known, keys = [*self.recorder.refused], image_arguments(self.model)
        self.run_with_types(images)
        if self.recorder.refused == known or TYPES not in keys:
            return
        unread, self.recorder.refused[:] = self.recorder.refused[len(known) :], known
        self.run_with_types(prompt, prompts=True)
        self.sees_prompt = self.recorder.refused == known
        if not self.sees_prompt:
            self.recorder.refused[len(known) :] = unread

    def run_with_types(self, types: Tensor, *, prompts: bool = False) -> None:
        """Run a model that takes images on tokens of several types."""
        self.recorder.block = blocks_of_types(types.cpu(), prompts=prompts)
        keys = [key for key in TOKEN_TYPES if key in image_arguments(self.model)]
        with torch.no_grad():
            self.call(self.input_ids, position_ids=self.position_ids, **dict.fromkeys(keys, types))

    def masks_change_by_types(self) -> bool:
        """Whether a mask is another one where tokens are of several types (HRM's prefixes)."""
        types, refused = torch.zeros_like(self.input_ids), self.recorder.refused
        types[:, :5] = 1
        known = list(refused)
        with torch.no_grad():
            self.call(self.input_ids, position_ids=self.position_ids, **{TYPES: types})
        changes = refused != known
        refused[:] = known
        return changes


def _unknown_outputs(model: nn.Module, outputs: list[Tensor]) -> str:
    """Why a model is refused that gives outputs without a token dim."""
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
    # Kernels may sum in another order from run to run: that does not count.
    return any(
        a.shape != b.shape or float((a - b).abs().max()) > 1e-4 * float(a.abs().max())
        for a, b in pairs
    )


def most_positions(model: Any) -> int | None:
    """How many positions a model has learned, wherever it counts from."""
    return longest(model, None, language_model_name(model))
