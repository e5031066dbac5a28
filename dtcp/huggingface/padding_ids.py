"""Models of transformers that read off token ids which tokens are padding, even without a mask.

Some count positions without them (M2M100), some make a mask of them if they are given none
(T5Gemma). A shard does not have the tokens before it, so this is read while rows are whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dtcp.sequence.documents import Documents

_RULE = "dtcp_padding_ids"


@dataclass(frozen=True)
class PaddingIds:
    """How a model treats tokens with the padding id.

    Args:
        token: the id.
        hidden: its masks hide them where no mask is given.
        uncounted: positions are counted without them.
    """

    token: int
    hidden: bool
    uncounted: bool


def padding_token(model: Any, *, decoder: bool = False) -> int | None:
    """The padding id of a model's text config; None if it has none, or no such field."""
    token: int | None = getattr(model.config.get_text_config(decoder=decoder), "pad_token_id", None)
    return token


def install_padding_ids(model: Any, *, hidden: bool, uncounted: bool) -> None:
    """Record how a model treats padding, for the batches that are sharded for it."""
    token = padding_token(model, decoder=True)
    vars(model)[_RULE] = (
        PaddingIds(token, hidden, uncounted)
        if token is not None and (hidden or uncounted)
        else None
    )


def padding_ids(model: Any) -> PaddingIds | None:
    """The rule of a model of parallelize_hf; None if only the batch says what is padding."""
    return getattr(model, _RULE, None)


def with_padding_of_ids(given: Mapping[str, Any], model: Any, part: str) -> dict[str, Any]:
    """Rows with the mask that their model would make for them, if it would.

    Args:
        given: input_ids and what tells documents.
        part: whose rows they are, as an error names them: "encoder" or "decoder".
    Raises:
        ValueError: an encoder's padding, which its own layers would hide and a decoder would not.
    """
    rule, ids = padding_ids(model), given.get("input_ids")
    if rule is None or not rule.hidden or ids is None or given.get("attention_mask") is not None:
        return dict(given)
    is_padding = ids == rule.token
    if not bool(is_padding.any()):
        return dict(given)
    row, token = is_padding.nonzero()[0].tolist()
    middle = is_padding[:, :-1] & ~is_padding[:, 1:]
    if part == "encoder" or bool(middle.any()):
        raise ValueError(
            f"{type(model).__name__} hides tokens with the id of padding where it is given no "
            f"mask, got input_ids[{row}, {token}]={rule.token} of its {part}: pad on the right, "
            f"and say so by an attention_mask (decoder_attention_mask) with zeros there."
        )
    return {**given, "attention_mask": (~is_padding).long()}


def check_counted_ids(ids: Tensor | None, documents: Documents, model: Any) -> None:
    """Refuse padding before a token of its document, where a model counts no position for it.

    Args:
        ids: [B, S]; None where a batch has embeddings.
    Raises:
        ValueError: such a token, by row and place.
    """
    rule = padding_ids(model)
    if rule is None or not rule.uncounted or ids is None:
        return
    document, is_padding = documents.document(), ids.cpu() == rule.token
    within = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
    wrong = is_padding[:, :-1] & ~is_padding[:, 1:] & within
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{type(model).__name__} counts positions without tokens of the id of padding, got "
            f"input_ids[{row}, {token}]={rule.token} before a token of its document: pad on the "
            f"right."
        )
