"""Checks whole rows for a transformers model, whichever function shards them.

One device sees a whole row, and would raise or count other positions; of several ranks only one
would, or none.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from dtcp.huggingface.images import IMAGES, image_arguments
from dtcp.huggingface.padding_ids import check_counted_ids
from dtcp.huggingface.pooled_head import check_last_tokens, check_pad_token, last_token_mixer
from dtcp.huggingface.positions import check_longest
from dtcp.huggingface.row_heads import check_pooled_rows
from dtcp.mixer_metadata import ROW_CHECK
from dtcp.rows import Rows
from dtcp.sequence.arguments import WHOLE_NUMBERS, check_tensor

IDS = ("input_ids", "decoder_input_ids")


def install_row_checks(model: Any, *, two_sequences: bool) -> None:
    """Check rows before they are sharded for a model with mixers.

    Args:
        two_sequences: whether it has an encoder and a decoder, for each of which rows are cut.
    """
    own, of_decoder = (partial(_check_rows, model, key) for key in IDS)
    if two_sequences:
        vars(model.get_encoder())[ROW_CHECK] = own
        vars(model.get_decoder())[ROW_CHECK] = of_decoder
    else:
        vars(model)[ROW_CHECK] = own


def _check_rows(model: Any, key: str, rows: Rows) -> None:
    """Refuse rows whose tokens, positions or padding a model would not read as one device does.

    Args:
        key: what a model calls the ids of this sequence.
    """
    ids, documents = rows.tokens.get(IDS[0]), rows.documents
    check_longest(rows, model)
    check_pooled_rows(model, documents, documents.seq_len)
    if ids is None:
        return
    # Some models mark the tokens of images by ids beyond their embedding.
    _check_ids(key, ids, model, upwards=not any(x in IMAGES for x in image_arguments(model)))
    check_counted_ids(ids, documents, model)
    pooling = last_token_mixer(model)
    if pooling is not None:
        check_pad_token(model, pooling)
        check_last_tokens(ids, documents, pooling.pad_token_id)


def _check_ids(key: str, ids: Tensor, model: Any, *, upwards: bool) -> None:
    """Refuse ids that the model's embedding has no row for.

    One device would raise; of several ranks one would, and the others would wait for it; and an
    embedding split by vocabulary would give zeros.

    Args:
        ids: [B, S].
        upwards: whether ids beyond the embedding are wrong.
    Raises:
        TypeError: ids that are no whole numbers.
        ValueError: an id out of range, with its row and token.
    """
    if not ids.numel():
        return
    named: dict[str, Any] = {key: ids}
    check_tensor("A batch", shape="[B, S]", dtypes=WHOLE_NUMBERS, **named)
    size = _num_embeddings(model.get_decoder() if key == IDS[1] else model)
    least, most = (int(x) for x in ids.aminmax())
    if least >= 0 and (size is None or most < size or not upwards):
        return
    wrong = (ids < 0) | (ids >= (most + 1 if size is None or not upwards else size))
    row, token = wrong.nonzero()[0].tolist()
    raise ValueError(
        f"Tokens are rows of an embedding, from 0 to {'its last' if size is None else size - 1}"
        f", got {key}[{row}, {token}]={ids[row, token].item()} for {type(model).__name__}: "
        f"take the tokenizer of this model, and mark padding in the attention_mask."
    )


def _num_embeddings(model: Any) -> int | None:
    """Rows of a model's embedding of tokens; None where it is not known."""
    embedding = model.get_input_embeddings()
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None
