"""Models whose masks depend on token types, which mixers' masks do not: HRM and its prefixes."""

from collections.abc import Mapping
from typing import Any

from dtcp.huggingface.images import TOKEN_TYPES

READS_TYPES = "dtcp_reads_types"
"""Set on such a model."""
TYPES = TOKEN_TYPES[1]


def embeds_types(model: Any) -> bool:
    """Whether a model looks types up in a table, which may be shorter than two."""
    return hasattr(model.config.get_text_config(), "type_vocab_size")


def without_types(rows: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The rows of a batch without all-zero types, for a model whose masks depend on them.

    Raises:
        ValueError: tokens of several types.
    """
    types = rows.get(TYPES)
    if not getattr(model, READS_TYPES, False) or types is None:
        return dict(rows)
    if types.any():
        check_no_types(model, rows)
    return {key: x for key, x in rows.items() if key != TYPES}


def check_no_types(model: Any, inputs: Mapping[str, Any]) -> None:
    """Refuse token types where masks depend on them: queries would see less than they should.

    Raises:
        ValueError: as above.
    """
    if getattr(model, READS_TYPES, False) and inputs.get(TYPES) is not None:
        raise ValueError(
            f"Masks of mixers go by documents and not by types of tokens, got {TYPES} for a "
            f"{type(model).__name__}, whose masks do: leave them out, for causal attention, or "
            f"write the model with PrefixLM masks (docs/add_a_model.md)."
        )
