"""Unmodified models of transformers on a mesh, held against themselves on one device."""

import logging
import tempfile
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Shard
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dtcp.compile import EagerIsland, count_graphs
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import (
    causal_lm_loss,
    documents_of_hf_batch,
    install_mixers,
    shard_hf_batch,
    survey,
)
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.mixer import ClaimedMixer
from dtcp.parallelize import (
    FSDP,
    Compile,
    NoCheckpoint,
    SelectiveCheckpoint,
    load_hf,
    parallelize_hf,
)
from dtcp.parallelize.plans.huggingface_tensor_plan import hf_tensor_plan
from dtcp.parallelize.tensor_parallel import LocalParams
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import Causal, SlidingWindow
from dtcp.softmax import AllGatherAttention, RingAttention, UlyssesAttention
from tests.harness.hf_models import MODELS, SHAPE, build, config_of
from tests.harness.parity import assert_gradients, gradients, summed
from tests.harness.spmd import spmd

GRAPHS = Compile("aot_eager")
BOUND = 1e-5
"""Relative error: the models' own norms, softmax and rotary tables are fp32 in a model of fp64."""

IDS = torch.zeros(1, 8, dtype=torch.int64)
SEQ_LEN = 48
PACKED = ((20, 9, 19), (48,))
PADDED = ((43,), (48,))

RING = RingAttention()
Rows = tuple[tuple[int, ...], ...]
Step = tuple[Tensor, dict[str, Tensor]]


def a_batch(rows: Rows) -> dict[str, Tensor]:
    """Two rows as a collator of transformers makes them."""
    documents = Documents(rows, SEQ_LEN)
    input_ids = torch.randint(
        1, 64, (len(rows), SEQ_LEN), generator=torch.Generator().manual_seed(3)
    )
    batch = {"input_ids": input_ids, "labels": input_ids.clone()}
    if rows == PADDED:
        filled = (documents.document() >= 0).long()
        return {**batch, "attention_mask": filled}
    return {**batch, "position_ids": documents.position_ids()}


def one_device(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The unmodified model's loss, each document a row of its own; fills the gradients.

    Packed rows are no reference: GPT-OSS of transformers 5.23 lets their documents see each other.
    What stands behind the end of a document is seen by none of its tokens, in a causal model.
    """
    documents = [
        document
        for row, lengths in enumerate(documents_of_hf_batch(batch).lengths)
        for document in batch["input_ids"][row, : sum(lengths)].split(lengths)
    ]
    ids = pad_sequence(documents, batch_first=True)
    labels = pad_sequence([document[1:] for document in documents], True, -100)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return loss.detach()


@cache
def expected_step(kind: str, rows: Rows, change: tuple[tuple[str, Any], ...]) -> Step:
    """Loss and gradients of the unmodified model: once for all tests that a rank runs on them."""
    reference = build(kind, **dict(change))
    loss = one_device(reference, a_batch(rows))
    return loss, gradients(reference)


def on_mesh(
    model: nn.Module, mesh: ParallelMesh, batch: dict[str, Tensor], layout: type = HeadTail
) -> Tensor:
    """The same on a mesh: each batch rank takes its rows, each cp rank its tokens."""
    mine = slice(mesh.rank("batch"), None, mesh.size("batch"))
    rows = {key: x[mine] for key, x in batch.items()}
    local, sharded = shard_hf_batch(rows, mesh, layout, model=model)
    labels = local.pop("labels")
    logits = model(**local, attn_metadata=sharded.attn_metadata).logits
    share = token_mean_loss(logits, labels, global_token_count(labels, mesh.loss))
    share.backward()
    return summed(share, mesh)


def assert_parity(
    kind,
    degrees,
    *,
    rows=PACKED,
    layout=HeadTail,
    attention=RING,
    change=None,
    ranks_per_node=0,
    **options,
):
    """Assert that loss and all gradients are those of the unmodified model, on one device."""
    change = change or {}
    model, expected = build(kind, **change), expected_step(kind, rows, tuple(change.items()))
    mesh = ParallelMesh.from_degrees(degrees, "cpu", ranks_per_node=ranks_per_node)
    parallelize_hf(model, mesh, attention, **options)
    styles = [m.style for m in model.modules() if isinstance(m, ClaimedMixer)]
    assert {style.ranks_per_node for style in styles} <= {ranks_per_node}
    return assert_step_is(expected, model, mesh, rows=rows, layout=layout)


def assert_same_step(reference, model, mesh):
    expected = one_device(reference, a_batch(PACKED))
    return assert_step_is((expected, gradients(reference)), model, mesh)


def assert_step_is(expected: Step, model, mesh, *, rows=PACKED, layout=HeadTail):
    expected_loss, expected_grads = expected
    # What is nowhere in the loss would be compared with nothing.
    assert all(grad.any() for grad in expected_grads.values())
    with count_traffic() as traffic:
        actual = on_mesh(model, mesh, a_batch(rows), layout)
    assert_close(actual, expected_loss, rtol=BOUND, atol=0.0)
    assert_gradients(model, expected_grads, BOUND)
    return traffic


@pytest.mark.parametrize("kind", MODELS)
@spmd(ranks=2)
def test_packed_rows_equal_the_unmodified_model(mesh, kind):
    assert assert_parity(kind, Degrees(cp=2)).received > 0


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
@spmd(ranks=1)
def test_packed_rows_on_one_rank_equal_the_unmodified_model(mesh, kind):
    """Without traffic; windows, softcaps, sinks and experts among them."""
    assert assert_parity(kind, Degrees()).received == 0


@spmd(ranks=2)
def test_padding_equals_the_unmodified_model(mesh):
    """Where some layers have windows, and all have sinks."""
    assert_parity("gpt_oss", Degrees(cp=2), rows=PADDED)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
@spmd(ranks=2)
def test_every_strategy_equals_one_device(mesh, kind):
    for attention in (AllGatherAttention(), UlyssesAttention()):
        assert_parity(kind, Degrees(cp=2), attention=attention, layout=Contiguous)


@pytest.mark.slow_where(lambda ranks: ranks == 4)
@spmd(ranks=(3, 4))
def test_more_ranks_equal_one_device(mesh, ranks):
    assert_parity("gpt_oss", Degrees(cp=ranks))


@pytest.mark.slow
@spmd(ranks=4)
def test_two_tier_mesh_equals_one_device_and_brings_less_between_nodes(mesh):
    """Two kv heads on four ranks: Ulysses copies them."""
    rank, between = mesh.get_local_rank(), {}
    for attention in (UlyssesAttention(), RING):
        for nodes in (0, 2):
            of = {"attention": attention, "layout": DocumentBalanced, "ranks_per_node": nodes}
            between[nodes] = assert_parity("gpt_oss", Degrees(cp=4), **of).crossing(rank, 2)[1]
        far = torch.tensor([between[0], between[2]])
        dist.all_reduce(far)
        assert far[1] < far[0]


@pytest.mark.slow_where(lambda kind: kind != "gpt_oss")
@pytest.mark.parametrize("kind", ["qwen3", "gpt_oss", "gemma2", "mixtral"])
@spmd(ranks=4)
def test_cp_beside_tp_equals_one_device(mesh, kind):
    """As of gemma3_text and qwen3_moe below, whose weights are loaded there."""
    assert_parity(kind, Degrees(cp=2, tp=2))


@pytest.mark.slow
@spmd(ranks=4)
def test_cp_beside_tp_compiled_equals_one_device(mesh):
    assert_parity("gpt_oss", Degrees(cp=2, tp=2), compile=GRAPHS)


@spmd(ranks=4)
def test_cp_beside_data_parallel_equals_one_device(mesh):
    """Experts, and a head that is the embedding."""
    tied = {"tie_word_embeddings": True}
    assert_parity("qwen3_moe", Degrees(dp_shard=2, cp=2), change=tied)


@pytest.mark.slow_where(lambda kind, **_: kind == "gpt_oss")
@pytest.mark.parametrize(
    ("kind", "graphs", "checkpoint"),
    [
        ("gemma3_text", 2, NoCheckpoint()),
        ("gpt_oss", 2, NoCheckpoint()),
        ("qwen3_moe", 1, SelectiveCheckpoint()),
    ],
)
@spmd(ranks=2)
def test_compiled_is_one_graph_a_kind_of_layer_and_equals_one_device(
    mesh, kind, graphs, checkpoint
):
    """A layer with another mask reads other metadata, and so is another graph."""
    with count_graphs() as counted:
        assert_parity(kind, Degrees(cp=2), compile=GRAPHS, activation_checkpoint=checkpoint)
    assert (counted.graphs, counted.breaks) == (graphs, 0)


@spmd(ranks=2)
def test_island_in_a_compiled_block_equals_one_device(mesh):
    with count_graphs() as counted:
        island = AllGatherAttention(boundary=EagerIsland())
        assert_parity("llama", Degrees(cp=2), attention=island, compile=GRAPHS)
    assert (counted.graphs, counted.breaks) == (2, 1)


@pytest.mark.parametrize("kind", MODELS)
def test_survey_reads_every_mask_off_the_models_own(kind):
    """And leaves the model as it was."""
    model = build(kind)
    names = list(model.state_dict())
    surveyed = survey(model)
    windowed = Causal() & SlidingWindow(7)
    expected = {"mistral": [windowed] * 2}.get(kind, [Causal()] * 2)
    if kind in ("gemma2", "gemma3_text", "gpt_oss"):
        expected = [windowed, Causal()]
    assert [each.mask for each in surveyed.attentions] == expected
    assert {each.softcap for each in surveyed.attentions} == {5.0 if kind == "gemma2" else 0.0}
    assert {each.sink for each in surveyed.attentions} == {kind == "gpt_oss"}
    assert surveyed.refused == ()
    assert (model.training, model.config._attn_implementation) == (True, "eager")
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("llama", {"attention_dropout": 0.1}, r"model\.layers\.0\.self_attn .*dropout=0\.1"),
        ("doge", {}, r"layers\.0\.self_attn .*its meaning is not known"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact = False"),
        ("gpt_neox", {"attention_dropout": 0.1}, r"layers\.0\.attention .*dropout=0\.1"),
        ("gemma", {"use_bidirectional_attention": True}, r"layers\.0\.self_attn .*is_causal=False"),
        ("gpt_neox_japanese", {}, "GPTNeoXJapaneseForCausalLM .*keeps 'eager'"),
    ],
)
def test_what_nobody_can_give_is_refused_by_name(kind, change, match):
    with pytest.raises(ValueError, match=match):
        install_mixers(build(kind, **change))


@spmd(ranks=(1, 2))
def test_balance_loss_of_experts_is_that_of_all_tokens(mesh, ranks):
    """Padding is routed nowhere; the model's own loss of one shard is not there."""
    asked = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    reference, model = build("mixtral", **asked), build("mixtral", **asked)
    mesh = ParallelMesh.from_degrees(Degrees(cp=ranks), "cpu")
    parallelize_hf(model, mesh)
    batch = a_batch(PADDED)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    out = reference(**inputs, use_cache=False)
    flat = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = F.cross_entropy(*flat) + 0.5 * out.aux_loss
    expected.backward()
    loss = causal_lm_loss(model, {**batch, "labels": labels}, mesh)
    loss.backward()
    assert_close(summed(loss, mesh), expected.detach(), rtol=BOUND, atol=0.0)
    assert_gradients(model, gradients(reference), BOUND)


class Pooled(nn.Module):
    """A layer that pools windows of 128 tokens: of fewer it makes nothing."""

    def forward(self, x):
        windows = x.shape[1] // 128
        return x[:, : windows * 128].unflatten(1, (windows, 128)).mean(2)


class WithPooled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.pooled = layer, Pooled()

    def forward(self, x):
        return self.layer(x) + self.pooled(x).sum(1, keepdim=True)


def test_a_layer_that_gives_nothing_for_so_few_tokens_is_refused_too():
    """Windows of 128 tokens are longer than what is run: nothing is pooled, and nothing moves."""
    model = build("llama")
    layer = model.model.layers[1]
    layer.mlp = WithPooled(layer.mlp)
    assert any("layers.1.mlp.pooled" in each for each in survey(model).refused)


def test_cross_attention_is_refused_by_name():
    """Queries of the sequence meet the keys of five other tokens."""
    model = build("llama")
    attention = model.model.layers[1].self_attn

    def crossed(hidden_states, attention_mask=None, **arguments):
        heads = (
            project(x).unflatten(-1, (-1, 8)).transpose(1, 2)
            for project, x in (
                (attention.q_proj, hidden_states),
                (attention.k_proj, hidden_states[:, :5]),
                (attention.v_proj, hidden_states[:, :5]),
            )
        )
        named = attention.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS[named]
        out, weights = attend(attention, *heads, None, scaling=attention.scaling, **arguments)
        return attention.o_proj(out.flatten(2)), weights

    attention.forward = crossed
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn .*meet 5 keys \(cross-attention"):
        install_mixers(model)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"labels": IDS}, r"with=\['labels'\]"),
        ({"attention_mask": IDS}, r"with=\['attention_mask'\]"),
        ({"output_attentions": True}, r"with=\['output_attentions'\]"),
        ({"use_cache": True}, "use_cache=True"),
        ({"position_ids": None}, r"without=\['position_ids'\]"),
        ({"attn_metadata": None}, r"without=\['attn_metadata'\]"),
    ],
)
def test_call_that_has_no_sharded_form_is_refused(change, match):
    model = build("llama")
    install_mixers(model)
    right = {"input_ids": IDS, "position_ids": IDS, "attn_metadata": {}}
    with pytest.raises(ValueError, match=match):
        model(**{**right, **change})


@pytest.mark.parametrize("mask", [[[0, 1, 1, 1]], [[1, 0, 1, 1]]])
def test_padding_anywhere_but_on_the_right_is_refused(mask):
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "attention_mask": torch.tensor(mask)}
    with pytest.raises(ValueError, match="pad on the right"):
        documents_of_hf_batch(batch)


@spmd(ranks=2)
def test_attention_whose_norms_read_all_heads_is_split(mesh):
    """Ranks hand each other their squares."""
    reference, model = build("olmo2"), build("olmo2")
    mesh = ParallelMesh.from_degrees(Degrees(tp=2), "cpu")
    parallelize_hf(model, mesh)
    assert_same_step(reference, model, mesh)
    attention, feed_forward = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert attention.q_proj.weight.placements == attention.q_norm.weight.placements == (Shard(0),)
    assert feed_forward.up_proj.weight.placements == (Shard(0),)


def test_attention_without_a_style_is_whole_and_said_to_be(caplog):
    """Its heads meet in pairs. The feed-forward is split."""
    with caplog.at_level("WARNING", "dtcp.parallelize.plans"):
        plan = hf_tensor_plan(build("diffllama"), 2)
    said = [each.partition(":")[0] for each in caplog.messages]
    assert said == ["model.layers.*.self_attn is whole on each of 2 tp ranks"]
    assert plan["model.layers.0.self_attn.q_proj"] == LocalParams()
    assert plan["model.layers.0.mlp.up_proj"] == LocalParams(Shard(0))


@spmd(ranks=2)
def test_experts_that_do_not_divide_are_whole_and_said_to_be(mesh):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("dtcp.parallelize.plans").addHandler(handler)
    assert_parity("qwen3_moe", Degrees(tp=2), change={"moe_intermediate_size": 25})
    assert [f"layers.{i}.mlp.experts is whole" in said[i] for i in range(2)] == [True] * 2
    assert "tp=2 does not divide its 25 channels" in said[0]


@spmd(ranks=2)
def test_checkpoint_of_split_experts_is_whole_and_another_shape_refused(mesh):
    whole, name = build("qwen3_moe"), "model.layers.1.mlp.experts.gate_up_proj"
    model = parallelize_hf(build("qwen3_moe"), ParallelMesh.from_degrees(Degrees(tp=2), "cpu"))
    folders = [tempfile.mkdtemp() if mesh.get_local_rank() == 0 else "" for _ in range(2)]
    dist.broadcast_object_list(folders)
    expected = whole.get_parameter(name)
    dcp.save(model.state_dict(), checkpoint_id=folders[0])
    loaded = {name: torch.zeros(4, 2, 24, 32, dtype=torch.float64)}
    dcp.load(loaded, checkpoint_id=folders[0])
    assert torch.equal(loaded[name].flatten(1, 2), expected)
    dcp.save({name: expected.detach()}, checkpoint_id=folders[1])
    with pytest.raises(dcp.api.CheckpointException, match="Size mismatch"):
        dcp.load({name: model.get_parameter(name)}, checkpoint_id=folders[1])


@pytest.mark.slow_where(lambda kind: kind == "qwen3_moe")
@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3_moe"])
@spmd(ranks=4)
def test_model_built_on_meta_is_filled_and_equals_one_device(mesh, kind):
    """No rank ever holds it whole; buffers of no checkpoint are there too."""
    reference, mesh = build(kind), ParallelMesh.from_degrees(Degrees(cp=2, tp=2), "cpu")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(kind)).double().train()
    parallelize_hf(model, mesh)
    weights = dict(reference.named_parameters())  # a weight that is shared, once
    with pytest.raises(ValueError, match=r"no use for .*more"):
        load_hf(model, {**weights, "more": torch.zeros(1)}, device="cpu")
    name = "model.layers.0.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=rf"got {name} of \(32, 16\)"):
        load_hf(model, {**weights, name: weights[name].T}, device="cpu")
    load_hf(model, weights, device="cpu")
    assert_same_step(reference, model, mesh)


@spmd(ranks=2)
def test_ranks_with_different_weights_are_refused(mesh):
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += mesh.get_local_rank()
    with pytest.raises(ValueError, match="seed all ranks alike"):
        parallelize_hf(model, ParallelMesh.from_degrees(Degrees(cp=2), "cpu"))


@spmd(ranks=2)
def test_what_transformers_keeps_in_fp32_is_not_rounded(mesh):
    """A router whose choice bf16 would change: seen by its forward as it is, trained in fp32."""
    shape = {**SHAPE, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("ernie4_5_moe", **shape))
    router = model.model.layers[1].mlp.gate
    weight, seen = router.weight.detach().clone(), []
    mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    bf16 = FSDP(mixed_precision=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    parallelize_hf(model, mesh, fsdp=bf16)
    router.register_forward_pre_hook(lambda module, _: seen.append(module.weight.detach().clone()))
    on_mesh(model, mesh, a_batch(PACKED))
    assert_close(seen, [weight], rtol=0, atol=0)
    assert router.weight.grad.full_tensor().any()


@pytest.mark.parametrize("compile", [GRAPHS, None])
@spmd(ranks=1)
def test_loop_over_experts_is_kept_out_of_graphs(mesh, compile):
    model = build("mixtral", experts_implementation="eager")
    model = parallelize_hf(model, ParallelMesh.from_degrees(Degrees(), "cpu"), compile=compile)
    assert model.config._experts_implementation == ("grouped_mm" if compile else "eager")


def test_batch_without_labels_has_no_loss():
    with pytest.raises(ValueError, match="has labels, not shifted"):
        causal_lm_loss(nn.Module(), {"input_ids": IDS}, ParallelMesh(Degrees(), None, *[None] * 7))
