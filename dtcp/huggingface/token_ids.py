"""Checks, on the host, that a transformers model has embeddings for all token ids."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dtcp.sequence.arguments import WHOLE_NUMBERS, check_tensor

IDS = ("input_ids", "decoder_input_ids")


def check_ids(batch: Mapping[str, Any], model: Any, *, upwards: bool = True) -> None:
    """Refuse ids that the model's embedding has no row for.

    One device would raise; of several ranks one would, and the others would wait for it; and an
    embedding split by vocabulary would give zeros.

    Args:
        batch: maybe input_ids and decoder_input_ids, [B, S].
        upwards: whether ids beyond the embedding are wrong; some models mark images by such.
    Raises:
        TypeError: ids that are no whole numbers.
        ValueError: an id out of range, with its row and token.
    """
    for key in IDS:
        ids = batch.get(key)
        if not isinstance(ids, Tensor) or not ids.numel():
            continue
        named: dict[str, Any] = {key: ids}
        check_tensor("A batch", shape="[B, S]", dtypes=WHOLE_NUMBERS, **named)
        size = _rows(model.get_decoder() if key == IDS[1] else model)
        least, most = (int(x) for x in ids.aminmax())
        if least >= 0 and (size is None or most < size or not upwards):
            continue
        wrong = (ids < 0) | (ids >= (most + 1 if size is None or not upwards else size))
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"Tokens are rows of an embedding, from 0 to {'its last' if size is None else size - 1}"
            f", got {key}[{row}, {token}]={ids[row, token].item()} for {type(model).__name__}: "
            f"take the tokenizer of this model, and mark padding in the attention_mask."
        )


def _rows(model: Any) -> int | None:
    """Rows of a model's embedding of tokens; None where it is not known."""
    embedding = model.get_input_embeddings()
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None
