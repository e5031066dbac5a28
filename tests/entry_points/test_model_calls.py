"""Row A9: models called with what they cannot read say so, before the first layer."""

import pytest
import torch

from dtcp.mixer_metadata import batch_metadata
from dtcp.sequence.documents import Documents
from tests.entry_points.test_lengths import FAMILIES, VOCABULARY
from tests.harness.row_ids import of_row

DOCUMENTS = Documents(((5, 7), (12,)), 12)
IDS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
POSITIONS = DOCUMENTS.position_ids()
CALLS = {
    "no metadata": ({"attn_metadata": None}, ValueError, "got none for "),
    "a dict": ({"attn_metadata": {}}, ValueError, "got none for "),
    "metadata of other rows": ({"attn_metadata": Documents.single(2, 10)}, ValueError, "got "),
    "no ids": ({"input_ids": None}, (ValueError, TypeError), "got (input_ids|neither)"),
    "a list": ({"input_ids": IDS.tolist()}, TypeError, "got input_ids of"),
    "ids of one dim": ({"input_ids": IDS[0]}, ValueError, r"got input_ids.shape=\(12,\)"),
    "ids of other rows": ({"input_ids": IDS[:1]}, ValueError, r"got position_ids.shape=\(2, 12\)"),
    "floats": ({"input_ids": IDS.double()}, TypeError, "got input_ids.*float64"),
    "unknown ids": (
        {"input_ids": IDS + VOCABULARY},
        ValueError,
        f"to {int(IDS.max()) + VOCABULARY} with vocab_size={VOCABULARY}",
    ),
    "negative ids": ({"input_ids": -IDS}, ValueError, f"input_ids from -{int(IDS.max())} to 0"),
    "no positions": ({"position_ids": None}, TypeError, "got position_ids of type NoneType"),
    "positions of one dim": (
        {"position_ids": POSITIONS[0]},
        ValueError,
        r"got position_ids.shape=\(12,\)",
    ),
    "fewer positions": (
        {"position_ids": POSITIONS[:, 1:]},
        ValueError,
        r"got position_ids.shape=\(2, 11\) for 2 rows of 12",
    ),
    "positions of two axes": (
        {"position_ids": POSITIONS.expand(2, 2, 12)},
        ValueError,
        r"got position_ids.shape=\(2, 2, 12\)",
    ),
}


@pytest.mark.parametrize("call", CALLS, ids=of_row("A9"))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_of_a_model_is_refused_by_name(family, call):
    change, error, match = CALLS[call]
    kind, config, _ = FAMILIES[family]
    assert config.vocab_size == VOCABULARY
    model = kind(config)
    known = {"input_ids": IDS, "position_ids": POSITIONS, "attn_metadata": DOCUMENTS, **change}
    if isinstance(known["attn_metadata"], Documents):
        known["attn_metadata"] = batch_metadata(model, known["attn_metadata"])
    with pytest.raises(error, match=match):
        model(**known)


@pytest.mark.parametrize("case", ["A9"])
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_of_one_row_are_those_of_all(family, case):
    kind, config, _ = FAMILIES[family]
    documents = Documents.single(2, 12)
    model = kind(config)
    metadata = batch_metadata(model, documents)
    one = model(IDS, documents.position_ids()[:1], metadata)
    assert torch.equal(one, model(IDS, documents.position_ids(), metadata))
