"""Checks whole rows for a transformers model, whichever function shards them.

One device sees a whole row, and would raise or count other positions; of several ranks only one
would, or none.
"""

from functools import partial
from typing import Any

from dtcp.huggingface.images import IMAGES, image_arguments
from dtcp.huggingface.padding_ids import check_counted_ids
from dtcp.huggingface.pooled_head import check_last_tokens, check_pad_token, last_token_mixer
from dtcp.huggingface.positions import check_longest
from dtcp.huggingface.row_heads import check_pooled_rows
from dtcp.huggingface.token_ids import IDS, check_ids
from dtcp.mixer_metadata import ROW_CHECK
from dtcp.rows import Rows


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
    check_ids({key: ids}, model, upwards=not any(x in IMAGES for x in image_arguments(model)))
    check_counted_ids(ids, documents, model)
    pooling = last_token_mixer(model)
    if pooling is not None:
        check_pad_token(model, pooling)
        check_last_tokens(ids, documents, pooling.pad_token_id)
