"""Models of transformers whose rows may hold several answers to one prompt, which they share.

Such a row is a document per prompt: the prompt, and then a block per answer, which sees the prompt
and itself. That is so for a model that reads nothing but positions and keys: anything that counts
tokens of the row, or reads them in their order, would find another answer before this one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.huggingface.recorder import SurveyedAttention
from dtcp.huggingface.rotary_lengths import rotary_by_length
from dtcp.huggingface.router_logits import is_balanced
from dtcp.huggingface.survey import Survey
from dtcp.labels import IGNORED
from dtcp.sequence.documents import Documents
from dtcp.sequence.masks import BlockBidirectional, Causal
from dtcp.sequence.prefix_masks import Prefix
from dtcp.token_dropout import TokenDropout, any_drops

ANSWERS_TO_A_PROMPT = Causal() & (Prefix() | BlockBidirectional())
"""What tokens see in such a row; in one without answers, what they see under Causal()."""
BALANCED = (
    "the balance loss of its experts counts a prompt once per answer, and shared prompts count "
    "once: set output_router_logits = False"
)
DROPPED = (
    "what a token loses to dropout differs between the answers, and shared prompts lose it once: "
    "set its rates to 0.0"
)
_SHARES = "dtcp_shares_prompts"


def shares_prompts(model: Any) -> bool:
    """Whether a model with mixers was placed with shared_prompts=True."""
    return _SHARES in vars(model)


def let_prompts_be_shared(model: Any) -> None:
    """Note that a model's mixers have the mask of answers that share a prompt."""
    vars(model)[_SHARES] = True


def check_counted_once(model: nn.Module, *, balanced: bool) -> None:
    """Refuse a call in which tokens of a prompt would not count once per answer.

    Args:
        model: or what holds it, as of peft.
        balanced: whether the call asks for the balance loss of experts.
    Raises:
        ValueError: such a call, or dropout in training mode.
    """
    dropped = (x for x in model.modules() if isinstance(x, TokenDropout))
    for found, why in ((balanced, BALANCED), (any_drops(dropped), DROPPED)):
        if found:
            raise ValueError(
                f"Prompts that are shared count once, got a {type(model).__name__} placed with "
                f"shared_prompts=True: {why}, or leave shared_prompts out."
            )


def surveyed_with_prompts(model: Any, survey: Survey) -> Survey:
    """The survey, with attention by which answers share a prompt.

    Raises:
        ValueError: the model would read answers in their order; names what would.
    """
    refused = tuple(_refused(model, survey))
    if refused:
        raise ValueError(
            "Answers share a prompt where layers read keys by a causal mask and nothing of the "
            "row, got shared_prompts=True for a model of which\n  "
            + "\n  ".join(refused)
            + "\nLeave shared_prompts out."
        )
    masked = tuple(replace(each, mask=ANSWERS_TO_A_PROMPT) for each in survey.attentions)
    return replace(survey, attentions=masked)


def _refused(model: Any, survey: Survey) -> Iterator[str]:
    """Why answers cannot share a prompt in this model, in clauses."""
    for each in survey.attentions:
        problem = _problem_of(each)
        if problem:
            yield f"{each.name} {problem}"
    for mixer in survey.recurrent:
        yield f"{mixer.name} ({mixer.kind.__name__}) reads tokens in the order of the row"
    for capacity in survey.capacity:
        yield f"{capacity.name} has experts with a capacity, which tokens of a prompt fill once"
    yield from (f"{head.mixer} reads whole rows" for head in survey.row_heads)
    if survey.pooled_head is not None:
        yield f"{survey.pooled_head.name} reads the last token of a row"
    if survey.images:
        yield f"{survey.images} reads images of whole rows"
    if survey.encoder:
        yield f"{survey.encoder} reads a sequence of its own"
    if survey.reads_types or survey.hides_padding or survey.uncounted_padding:
        yield f"{type(model).__name__} reads types, or padding, off the tokens of a row"
    if rotary_by_length(model):
        yield f"{type(model).__name__} chooses rotary frequencies by the longest position of rows"
    if is_balanced(model):
        yield f"{type(model).__name__} has experts: {BALANCED}"


def _problem_of(attention: SurveyedAttention) -> str:
    """Why an attention module cannot read answers that share a prompt; empty if it can."""
    if attention.num_selected or attention.blocks or attention.window:
        return "picks keys, or compresses them, in the order of the row"
    if attention.by_distance:
        return "adds a bias by distance in the row"
    if attention.mask != Causal():
        return f"has the mask {attention.mask}"
    return ""


def with_answers(rows: Mapping[str, Any], documents: Documents, model: Any) -> dict[str, Any]:
    """Rows with `prefix` and `block`, and with positions and shifted labels that go by them.

    Rows that have neither are documents without a prompt, each the one answer.

    Args:
        rows: what a model reads, and maybe labels, shifted already.
        model: with mixers; for one whose prompts are not shared nothing is changed.
    Raises:
        ValueError: one of the two alone, or a prefix for a model that would not read it.
    """
    given = {key: rows.get(key) for key in ("prefix", "block")}
    prefix, block = given.values()
    if not shares_prompts(model):
        if prefix is not None:
            raise ValueError(
                f"Answers share a prompt in a model that was placed so, got prefix of shape "
                f"{tuple(prefix.shape)} for a {type(model).__name__}: pass shared_prompts=True to "
                f"parallelize_hf."
            )
        return dict(rows)
    shape = (documents.batch, documents.seq_len)
    if prefix is None and block is None:
        return {**rows, **{key: torch.zeros(shape, dtype=torch.int64) for key in given}}
    if prefix is None or block is None:
        raise ValueError(
            f"Answers that share a prompt come with its length and their numbers, got "
            f"prefix of type {type(prefix).__name__} and block of type {type(block).__name__}: "
            f"give both, [B, S], or none."
        )
    if prefix.shape != shape or block.shape != shape:
        return dict(rows)  # for the batch to refuse
    return {**rows, **_counted_by_answer(rows, documents, prefix.cpu(), block.cpu())}


def _counted_by_answer(
    rows: Mapping[str, Any], documents: Documents, prefix: Tensor, block: Tensor
) -> dict[str, Any]:
    """The positions of tokens, each answer's counted on from its prompt; and labels, if any."""
    places, counted = torch.arange(documents.seq_len), documents.position_ids()
    starts = (counted == 0) | (block.diff(dim=1, prepend=block[:, :1]) != 0)
    in_block = places - torch.where(starts, places, 0).cummax(1).values
    out = {"position_ids": torch.where(block >= 0, prefix + in_block, counted)}
    labels = rows.get("labels")
    if isinstance(labels, Tensor):
        # What follows an answer is the next one, which it does not go on with.
        ends = starts[:, 1:] & (block[:, :-1] >= 0)
        ends = torch.nn.functional.pad(ends, (0, 1))
        out["labels"] = labels.masked_fill(ends.to(labels.device), IGNORED)
    return out
