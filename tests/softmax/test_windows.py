"""The bytes of Gemma 4's layers are those of the formulas that benchmarks/windows.py prints."""

from typing import Any

import pytest
import torch

from benchmarks.window_bytes import all_gather, needed_tokens, ours, total, whole_chunk_ring
from dtcp.batch import shard_batch
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.models.gemma4 import PRESETS, Gemma4, Gemma4Config, LayerType
from dtcp.parallelize import gemma4_plan, parallelize
from dtcp.sequence.coords import Coords
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.sequence.masks import Causal, SlidingWindow
from dtcp.softmax import HaloAttention, RingAttention
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.softmax.moves import AttentionShape
from tests.harness.hf_gemma4 import truth
from tests.harness.spmd import run_ranks

ROWS, SEQ_LEN = 2, 64


def moved(mesh: Any, config: Gemma4Config, layout: type[SequenceLayout]) -> tuple[int, int]:
    """Bytes that a step of a model received: forward, backward."""
    on = ParallelMesh.from_degrees(Degrees(cp=mesh.size()), "cpu")
    model = Gemma4(config)
    model.init_weights()
    parallelize(model, on, gemma4_plan(config, on, RingAttention()))
    documents = Documents.single(ROWS, SEQ_LEN)
    batch = {
        "input_ids": torch.randint(config.vocab_size, (ROWS, SEQ_LEN)),
        "position_ids": documents.position_ids(),
    }
    local, sharded = shard_batch(batch, on, layout, model=model, documents=documents)
    with count_traffic() as forward:
        logits = model(local["input_ids"], local["position_ids"], sharded.attn_metadata)
    with count_traffic() as backward:
        logits.sum().backward()
    return forward.received, backward.received


@pytest.mark.parametrize(
    ("variant", "ranks", "layout"),
    [
        ("dense", 2, HeadTail),
        ("dense", 4, Contiguous),
        ("e", 2, Contiguous),
        ("shared_values", 4, HeadTail),
    ],
)
def test_gemma4_receives_what_the_formula_says(variant, ranks, layout):
    """Backward: keys once more, and gradients home; gradients alone where keys are kept."""
    config = truth(variant).config
    traffic = run_ranks(moved, ranks, config, layout)
    cut, every = layout(SEQ_LEN, ranks), range(config.num_layers)
    stated = [[ROWS * ours(config, cut, i, r, element=4) for i in every] for r in range(ranks)]
    assert [forward for forward, _ in traffic] == [sum(layers) for layers in stated]
    kept = [config.gives_shared_kv(i) or config.layer_types[i] is LayerType.SLIDING for i in every]
    again = [1 if each else 2 for each in kept]
    home = sum(n * times for layers in stated for n, times in zip(layers, again, strict=True))
    assert sum(backward for _, backward in traffic) == home


@pytest.mark.parametrize("layout", [Contiguous(96, 4), HeadTail(96, 4), HeadTail(96, 6)])
@pytest.mark.parametrize("window", [5, 17, 40])
def test_the_windows_formula_is_the_strategys(layout, window):
    shape = AttentionShape(1, 4, 2, 8, 8, 2)
    coords = Coords.of(Documents.single(1, 96))
    style, mask = HaloAttention(window), Causal() & SlidingWindow(window)
    for rank in range(layout.num_shards):
        stated = style.received(SoftmaxAttention(mask), coords, layout, rank, shape).forward
        assert stated == needed_tokens(layout, rank, window - 1) * shape.key_row


def test_a_window_costs_the_same_however_long_the_sequence_and_many_the_ranks():
    config = PRESETS["gemma4-31b"]
    layer = config.layer_types.index(LayerType.SLIDING)
    for layout in (Contiguous, HeadTail):
        segments = 1 if layout is Contiguous else 2
        for seq_len, ranks in ((2**17, 8), (2**20, 8), (2**20, 64)):
            received = {
                ours(config, layout(seq_len, ranks), layer, rank) for rank in range(1, ranks)
            }
            assert max(received) == segments * 1023 * 2 * 16 * 256 * 2


def test_gemma4_31b_receives_a_fraction_of_what_others_do():
    """GB of the rank that receives most, at 128K on 8 ranks."""
    config = PRESETS["gemma4-31b"]
    layout = Contiguous(2**17, 8)
    assert total(config, layout, ours).most <= 5.6e9
    assert 22e9 < total(config, layout, whole_chunk_ring).most < 23e9
    assert 103e9 < total(config, layout, all_gather).most < 104e9
    # Balanced, most ranks have two halos a window: more bytes, and none waits for the last rank.
    assert total(config, HeadTail(2**17, 8), ours).most <= 6.1e9
