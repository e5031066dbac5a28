"""Rotary frequencies by the longest position of a batch, held against one device."""

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import causal_lm_loss, install_mixers, shard_hf_batch, survey
from dtcp.huggingface.rotary_lengths import _LAST, rotary_by_length
from dtcp.huggingface.whole_rows import WholeRows
from dtcp.metadata import BatchMetadata
from dtcp.mixer_metadata import batch_metadata
from dtcp.parallelize import Compile, FullCheckpoint, SelectiveCheckpoint, parallelize_hf
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.softmax import RingAttention, UlyssesAttention
from tests.harness.hf_models import EXPERTS, WINDOWS, build
from tests.harness.parity import assert_gradients, gradients, summed
from tests.harness.spmd import spmd
from tests.huggingface.test_huggingface import BOUND, one_device

GRAPHS = Compile("aot_eager")
LIMIT = 32
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [1.0, 3.0, 6.0, 9.0],
    "original_max_position_embeddings": LIMIT,
    "factor": 4.0,
}
MSCALE = {"short_mscale": 1.1, "long_mscale": 1.4}
NTK = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
KINDS: dict[str, dict[str, Any]] = {
    # Its config has another limit, which goes before that of its rope_parameters.
    "phi3": {"rope_parameters": LONG, "original_max_position_embeddings": LIMIT},
    "llama": {"rope_parameters": NTK, "max_position_embeddings": LIMIT},
    "phimoe": {
        **EXPERTS,
        "num_local_experts": 4,
        "router_jitter_noise": 0.0,
        "input_jitter_noise": 0.0,
        "rope_parameters": LONG | MSCALE,
    },
    "gemma3_text": {
        **WINDOWS,
        "query_pre_attn_scalar": 16,
        "max_position_embeddings": LIMIT,
        "rope_parameters": {"full_attention": NTK, "sliding_attention": LONG},
    },
}
STEPS = ((24,), (60,), (44,), (24, 20, 16), (20, 40), (12,))
"""Documents of a row in each step: short, longest, less long, a long row of short ones, .."""
Step = tuple[Tensor, dict[str, Tensor]]


def a_batch(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    documents = Documents((lengths,), sum(lengths))
    generator = torch.Generator().manual_seed(len(lengths))
    input_ids = torch.randint(1, 64, (1, sum(lengths)), generator=generator)
    position_ids = documents.position_ids()
    return {"input_ids": input_ids, "labels": input_ids.clone(), "position_ids": position_ids}


@cache
def expected_steps(kind: str) -> list[Step]:
    """Loss and gradients of each step of the unmodified model, one after the other."""
    model, steps = build(kind, **KINDS[kind]), []
    for lengths in STEPS:
        model.zero_grad()
        loss = one_device(model, a_batch(lengths))
        steps.append((loss, gradients(model)))
    return steps


def assert_steps(kind, degrees, *, layout=HeadTail, attention=None, **options):
    expected = expected_steps(kind)
    model = build(kind, **KINDS[kind])
    mesh = ParallelMesh.from_degrees(degrees, "cpu")
    parallelize_hf(model, mesh, attention or RingAttention(), **options)
    for lengths, (expected_loss, expected_grads) in zip(STEPS, expected, strict=True):
        model.zero_grad()
        loss = causal_lm_loss(model, a_batch(lengths), mesh, layout)
        loss.backward()
        assert_close(summed(loss, mesh), expected_loss, rtol=BOUND, atol=0.0)
        assert_gradients(model, expected_grads, BOUND)


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_a_row_by_itself_would_have_other_frequencies(kind):
    whole, half = (build(kind, **KINDS[kind]).model.rotary_emb for _ in range(2))
    x, positions = torch.zeros(1, 60, 32, dtype=torch.float64), torch.arange(60)[None]
    for layer_type in whole.rope_type if isinstance(whole.rope_type, dict) else [None]:
        of = {} if layer_type is None else {"layer_type": layer_type}
        cos, _ = whole(x, positions, **of)
        own, _ = half(x[:, :30], positions[:, :30], **of)
        assert not torch.allclose(cos[:, :30], own, rtol=0.01)


@pytest.mark.slow_where(lambda kind: kind in ("phimoe", "gemma3_text"))
@pytest.mark.parametrize("kind", KINDS)
@spmd(ranks=2)
def test_batches_of_changing_length_equal_the_unmodified_model(mesh, kind):
    """By shards that each have other longest positions, and under checkpoints."""
    assert_steps(kind, Degrees(cp=2), layout=Contiguous, activation_checkpoint=FullCheckpoint())


@pytest.mark.slow_where(lambda kind: kind != "llama")
@pytest.mark.parametrize("kind", KINDS)
@spmd(ranks=2)
def test_compiled_blocks_take_the_same_frequencies(mesh, kind):
    assert_steps(kind, Degrees(cp=2), attention=UlyssesAttention(), compile=GRAPHS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@spmd(ranks=3)
def test_more_ranks_take_the_same_frequencies(mesh, kind):
    assert_steps(kind, Degrees(cp=3))


@pytest.mark.slow_where(lambda kind: kind != "phi3")
@pytest.mark.parametrize("kind", KINDS)
@spmd(ranks=4)
def test_cp_beside_tp_takes_the_same_frequencies(mesh, kind):
    assert_steps(kind, Degrees(cp=2, tp=2), activation_checkpoint=SelectiveCheckpoint())


@spmd(ranks=4)
def test_each_batch_rank_goes_by_its_own_rows(mesh):
    """As under DDP of transformers: one rank's row is long, the other's is short."""
    mesh, rows = ParallelMesh.from_degrees(Degrees(dp_shard=2, cp=2), "cpu"), ((24,), (60,))
    references = [build("phi3", **KINDS["phi3"]) for _ in rows]
    tokens = [sum(lengths) - 1 for lengths in rows]
    expected, total = torch.zeros((), dtype=torch.float64), {}
    for model, lengths, count in zip(references, rows, tokens, strict=True):
        share = count / sum(tokens)
        expected += share * one_device(model, a_batch(lengths))
        for name, grad in gradients(model).items():
            total[name] = total.get(name, 0) + share * grad
    model = parallelize_hf(build("phi3", **KINDS["phi3"]), mesh)
    loss = causal_lm_loss(model, a_batch(rows[mesh.rank("batch")]), mesh)
    loss.backward()
    assert_close(summed(loss, mesh), expected, rtol=BOUND, atol=0.0)
    assert_gradients(model, total, BOUND)


def logits_of(model: Any, rows: dict[str, Tensor], mesh: ParallelMesh) -> Tensor:
    local, sharded = shard_hf_batch(rows, mesh, model=model)
    local.pop("padding_mask", None)
    logits = model(**local, attn_metadata=sharded.attn_metadata).logits
    return sharded.gather(logits, replicated_loss=True)


@pytest.mark.parametrize("kind", ["phi3", "llama"])
@spmd(ranks=3)
def test_padding_of_the_batch_counts_and_that_of_the_layout_does_not(mesh, kind):
    """A row as long as the limit, which three ranks lengthen past it; then one padded past it."""
    mesh = ParallelMesh.from_degrees(Degrees(cp=3), "cpu")
    plain, model = (build(kind, **KINDS[kind]) for _ in range(2))
    parallelize_hf(model, mesh)
    full = torch.ones(1, LIMIT, dtype=torch.int64)
    padded = torch.nn.functional.pad(full, (0, 9))
    with torch.no_grad():
        for mask in (full, padded, full):
            input_ids = torch.arange(1, 1 + mask.shape[1])[None] * mask
            expected = plain(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
            actual = logits_of(model, {"input_ids": input_ids, "attention_mask": mask}, mesh)
            real = mask.bool()
            assert_close(actual[real], expected[real], rtol=BOUND, atol=BOUND)


@pytest.mark.slow_where(lambda kind: kind != "llama")
@pytest.mark.parametrize("kind", ["phi3", "llama"])
@spmd(ranks=2)
def test_every_way_in_takes_the_batch_frequencies(mesh, kind):
    """Two forwards before their backwards; a graph of the whole model; a model without a head."""
    mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    plain, model = (build(kind, **KINDS[kind]) for _ in range(2))
    parallelize_hf(model, mesh)
    rows = [{"input_ids": a_batch(lengths)["input_ids"]} for lengths in ((60,), (24,))]
    expected = [plain(**each, use_cache=False).logits for each in rows]
    actual = [logits_of(model, each, mesh) for each in rows]
    for outputs in (expected, actual):
        sum(logits.square().mean() for logits in reversed(outputs)).backward()
    assert_gradients(model, gradients(plain), BOUND)
    compiled = torch.compile(model, backend="aot_eager")
    base = parallelize_hf(build(kind, head="", **KINDS[kind]), mesh)
    with torch.no_grad():
        for each, logits in zip(rows, expected, strict=True):
            assert_close(logits_of(compiled, each, mesh), logits, rtol=BOUND, atol=BOUND)
            local, sharded = shard_hf_batch(each, mesh, model=base)
            hidden = base(**local, attn_metadata=sharded.attn_metadata).last_hidden_state
            of_base = build(kind, head="", **KINDS[kind])(**each, use_cache=False)
            whole = of_base.last_hidden_state
            assert_close(sharded.gather(hidden), whole, rtol=BOUND, atol=BOUND)


@spmd(ranks=2)
def test_numbers_of_tokens_of_rows_padded_on_the_left_are_those_of_one_device(mesh):
    """A row whose tokens alone would be short. In eager attention it is NaN, behind padding."""
    mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    plain, model = (build("phi3", **KINDS["phi3"]) for _ in range(2))
    rows = WholeRows(parallelize_hf(model, mesh), mesh)
    mask = (torch.arange(40) >= 12).long()[None]
    input_ids = torch.arange(1, 41)[None] * mask
    tokens = input_ids.roll(-12, 1)
    expected = plain(input_ids=tokens, use_cache=False).logits[:, :27].log_softmax(-1)
    expected = expected.gather(2, tokens[:, 1:28, None])[..., 0]
    actual = rows(input_ids=input_ids, attention_mask=mask, labels=input_ids, fused_lm_head=True)[
        "log_probs"
    ]
    assert_close(actual[:, 12:], expected, rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_frequencies_are_chosen_without_a_look_at_the_device(kind):
    """On the meta device, which holds no numbers to look at: short, long, less long, short."""
    model, plain = (build(kind, **KINDS[kind]) for _ in range(2))
    install_mixers(model)
    rotary, own = model.model.rotary_emb.to("meta"), plain.model.rotary_emb
    for last in (10, 60, 40, 10):
        vars(rotary)[_LAST] = last
        x, positions = torch.zeros(1, 4, 32), torch.arange(last - 3, last + 1)[None]
        cos, _ = rotary(x.to("meta"), positions.to("meta") // 2)
        own(x, positions)
        assert cos.shape == (1, 4, 8)
        assert int(getattr(rotary, "max_seq_len_cached", 0)) == int(own.max_seq_len_cached)


@pytest.mark.parametrize("kind", KINDS)
def test_a_survey_leaves_frequencies_as_they_were(kind):
    """Of a model that it runs on more positions than frequencies are kept for."""
    change = {**KINDS[kind], "max_position_embeddings": 4}
    model = build(kind, **change)
    before = [x.clone() for x in model.buffers()]
    assert survey(model).refused == ()
    assert_close(list(model.buffers()), before)
    assert [m.max_seq_len_cached for m in rotary_by_length(model).values()] == [4]


def test_a_call_without_the_longest_position_is_refused():
    model = build("phi3", **KINDS["phi3"])
    install_mixers(model)
    ids = torch.ones(1, 8, dtype=torch.int64)
    metadata = batch_metadata(model, Documents.single(1, 8))
    rows = {"input_ids": ids, "position_ids": torch.arange(8)[None]}
    assert model(**rows, attn_metadata=metadata).logits.shape[:2] == (1, 8)
    with pytest.raises(ValueError, match=r"Phi3Model go by the longest position .*shard_hf_batch"):
        model(**rows, attn_metadata=BatchMetadata({key: metadata[key] for key in metadata}))
    with pytest.raises(ValueError, match="a call of Phi3RotaryEmbedding outside of the model"):
        model.model.rotary_emb(torch.zeros(1, 8, 32), rows["position_ids"])


@spmd(ranks=2)
def test_ranks_whose_padding_has_other_positions_are_refused(mesh):
    mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    model = parallelize_hf(build("phi3", **KINDS["phi3"]), mesh)
    ids, mask = torch.ones(1, 40, dtype=torch.int64), (torch.arange(40) < 20).long()[None]
    position_ids = torch.arange(40)[None].where((mask == 1) | (mesh.rank("cp") == 0), 0)
    rows = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
    with pytest.raises(ValueError, match="cp rank 1 has other labels, positions or other keys"):
        shard_hf_batch(rows, mesh, model=model)


class OwnRotary(nn.Module):
    """As code outside of transformers has it: nothing around its forward."""

    def __init__(self, config):
        super().__init__()
        self.config, self.rope_type = config, "longrope"

    def forward(self, x, position_ids):
        return x, x


def test_frequencies_that_no_batch_tells_are_refused():
    """Of an embedding in a layer, of one that is not transformers', and of positions of images."""
    model = build("phi3", **KINDS["phi3"])
    model.model.layers[1].self_attn.rotary_emb = deepcopy(model.model.rotary_emb)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.rotary_emb .*longest position"):
        install_mixers(model)
    model = build("phi3", **KINDS["phi3"])
    model.model.rotary_emb = OwnRotary(model.config)
    with pytest.raises(ValueError, match=r"model\.rotary_emb \(OwnRotary\).*longest position"):
        install_mixers(model)
    model = build("phi3", **KINDS["phi3"])
    model.model.rotary_emb = nn.Identity()
    with pytest.raises(ValueError, match=r"rope_type='longrope'.*code that is not transformers'"):
        install_mixers(model)
