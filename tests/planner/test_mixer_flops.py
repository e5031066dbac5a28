"""FLOPs of mixers are those of the keys that each query sees, however ranks share them out."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dtcp.distributed.mesh import Degrees
from dtcp.huggingface.small_config import small_config
from dtcp.mixer_metadata import batch_metadata
from dtcp.models import llama
from dtcp.parallelize import NoCheckpoint
from dtcp.planner.forecast import forecast
from dtcp.planner.mixer_flops import mixer_flops
from dtcp.planner.setup import Precision, Setup
from dtcp.planner.subject import FamilyModel, HuggingFaceModel
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention, UlyssesAttention
from dtcp.sparse.mixer import CompressedSparseAttention, Compression, Index, Prepool
from dtcp.sparse_latent import SparseLatentAttention

FP32 = Precision(torch.float32, torch.float32, torch.float32)
ROWS = Documents(((150, 42, 64), (256,)), 256)
ALIKE = Documents(((150, 106),) * 2, 256)


def causal_pairs(documents):
    return sum(length * (length + 1) // 2 for row in documents.lengths for length in row)


@pytest.mark.parametrize(
    ("layout", "documents"), [(HeadTail, ALIKE), (DocumentBalanced, ROWS)], ids=["rows", "line"]
)
@pytest.mark.parametrize(
    "attention",
    [RingAttention(), AllGatherAttention(), UlyssesAttention(), HybridAttention(inner_ranks=2)],
    ids=lambda style: type(style).__name__,
)
def test_ranks_compute_together_what_one_device_would(attention, layout, documents):
    config = llama.tiny()
    setup = Setup(Degrees(cp=4), documents, layout, attention, NoCheckpoint(), FP32)
    stated = forecast(FamilyModel("tiny", "llama", config), setup, ranks=range(4))
    forward = 2 * causal_pairs(documents) * config.num_heads * 2 * config.head_dim
    total = [sum(rank.mixers[0].forward_flops for rank in stated.ranks)]
    total.append(sum(rank.mixers[0].backward_flops for rank in stated.ranks))
    assert total == [forward, forward * 5 // 2]
    assert sum(rank.flops for rank in stated.ranks) == config.num_layers * sum(total)


def matmuls(subject, **degrees):
    setup = Setup(Degrees(**degrees), ROWS, checkpoint=NoCheckpoint())
    return sum(forecast(subject, setup, ranks=[0]).matmul_flops.values())


def test_ranks_of_tp_share_the_matmuls_of_a_rank_without():
    """What DTensor tries on whole tensors was counted: 5.8 times too many with tp 8."""
    subject = FamilyModel("tiny", "llama", llama.tiny())
    assert 2 * matmuls(subject, cp=2, tp=2) == matmuls(subject, cp=2)


def test_experts_of_transformers_compute_as_much_on_ranks_of_their_own():
    """Without ep their products were not counted, and a search preferred to have none."""
    subject = HuggingFaceModel("moe", small_config("qwen3_moe", {}).config)
    assert matmuls(subject, cp=2) == matmuls(subject, cp=2, ep=2)


class Counted(TorchDispatchMode):
    """FLOPs of the ops of mixers that are called inside, by name."""

    def __init__(self):
        super().__init__()
        self.by_op = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dtcp":
            self.by_op[func.name().partition("::")[2]] = mixer_flops(func, args)
        return func(*args, **(kwargs or {}))


def test_latents_are_counted_by_the_widths_of_their_heads_and_made_where_they_arrive():
    small = small_config("deepseek_v3", {"first_k_dense_replace": 2}).config
    documents, ranks = Documents(((150, 42, 64),), 256), range(2)
    setup = Setup(Degrees(cp=2), documents, HeadTail, AllGatherAttention(), NoCheckpoint(), FP32)
    stated = forecast(HuggingFaceModel("deepseek_v3", small), setup, ranks=ranks)
    # Each token of a document reads those up to it; a rank makes the keys of its own tokens, too.
    start = torch.tensor([0] * 150 + [150] * 42 + [192] * 64)
    keys = 0
    for rank in ranks:
        own = HeadTail(256, 2).token_indices(rank).tolist()
        keys += len({key for token in own for key in range(start[token], token + 1)})
    width = small.qk_nope_head_dim + small.v_head_dim
    heads = small.num_attention_heads
    pairs = 2 * causal_pairs(documents) * heads * (width + small.qk_rope_head_dim)
    made = 2 * keys * heads * width * small.kv_lora_rank
    layers = small.num_hidden_layers
    forward = sum(each.count * each.forward_flops for x in stated.ranks for each in x.mixers)
    backward = sum(each.count * each.backward_flops for x in stated.ranks for each in x.mixers)
    assert forward == layers * (pairs + made)
    assert backward == layers * (pairs * 5 // 2 + 3 * made)


def test_picked_latents_are_values_without_their_rotary_keys():
    heads, content, rotary, latent, number, length = 2, 6, 4, 12, 5, 32
    mixer = SparseLatentAttention()
    metadata = batch_metadata(mixer, Documents.single(1, length))
    selected = torch.full((1, length, number), -1, dtype=torch.int32)
    widths = ((1, length, heads, content + rotary), (1, length, latent), (1, length, rotary))
    q, rows, key = (torch.randn(x, requires_grad=True) for x in widths)
    with Counted() as counted:
        up = torch.randn(heads, content + 3, latent)
        mixer(q, rows, key, up, selected, metadata).sum().backward()
    pairs = sum(min(n, number) for n in range(1, length + 1))
    forward = 2 * pairs * heads * (latent + rotary + latent)
    assert counted.by_op["sparse_attention"] == forward
    assert counted.by_op["sparse_attention_backward"] == forward * 5 // 2


@pytest.mark.parametrize("selected", [None, 3])
def test_sparse_attention_reads_its_window_and_the_entries_in_sight(selected):
    window, ratio, heads, dim, documents = 5, 4, 2, 8, ROWS
    mixer = CompressedSparseAttention(window, Compression(ratio, selected=selected), scale=1.0)
    q, keys = torch.randn(2, 256, heads, dim, requires_grad=True), torch.randn(2, 256, dim)

    def pooled(width):
        value, gate = torch.randn(2, 2, 256, width)
        return Prepool(value, gate, torch.randn(ratio, width), lambda x, position_ids: x)

    index = None
    if selected is not None:
        index = Index(torch.randn(2, 256, 3, 6), torch.rand(2, 256, 3), pooled(6))
    with Counted() as counted:
        options = {"sink": torch.zeros(heads), "tokens": pooled(dim), "index": index}
        mixer(q, keys, batch_metadata(mixer, documents), **options).sum().backward()
    seen = [n for row in documents.lengths for length in row for n in range(1, length + 1)]
    most = max(seen) if selected is None else selected
    pairs = sum(min(n, window) + min(n // ratio, most) for n in seen)
    assert counted.by_op["sparse_attention"] == 4 * pairs * heads * dim
    assert counted.by_op["sparse_attention_backward"] == 4 * pairs * heads * dim * 5 // 2
    if selected is not None:
        # Whole tiles are scored.
        scored = sum(n // ratio for n in seen if n // ratio > selected)
        assert 2 * scored * 3 * 6 <= counted.by_op["select_entries"] <= 2 * 512 * 64 * 3 * 6
