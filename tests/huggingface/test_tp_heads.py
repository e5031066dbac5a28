"""Heads of transformers' models over tp where transformers has no plan: exact, and a part of all.

Every model is held against itself on one device, in fp64, by loss and all gradients.
"""

import re
import tempfile
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dtcp.check.checked_hf import CheckedHuggingFaceModel
from dtcp.check.parity import CheckOptions, compare
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.parallelize import Compile, parallelize_hf, save_hf
from dtcp.parallelize.plans.heads_by_trial import styles_by_trial
from dtcp.parallelize.plans.huggingface_tensor_plan import hf_tensor_plan
from dtcp.parallelize.plans.recurrent_heads import ROWS
from dtcp.parallelize.tensor_parallel import HeadsOfLayer, LocalParams, Segment, SegmentRows
from tests.harness.hf_models import build
from tests.harness.spmd import spmd
from tests.huggingface.test_hf_families import assert_step_equal, checked_family
from tests.huggingface.test_huggingface import assert_same_step
from tests.huggingface.test_latents import SMALL
from tests.huggingface.test_lora import adapted, on_mesh_of
from tests.huggingface.test_save_hf import assert_saved, in_a_folder

MLA = ("longcat_flash", "minicpm3", "bailing_hybrid")
RECURRENT = ("mamba2", "bamba", "falcon_h1", "qwen3_next", "kimi_linear", "mamba", "jamba", "lfm2")


QUIET = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
ANY = {
    "stablelm": {},
    "opt": {"dropout": 0.0},
    "phi3": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": QUIET,
    "gpt_bigcode": QUIET,
    "gptj": QUIET,
    "bloom": {},
    "falcon": {"alibi": True},
    "mpt": {},
    "minimax": {},
    "mimo_v2_flash": {},
    "qwen2_moe": {},
    "modernbert": {},
    "apertus": {},
    "chameleon": {},
}
"""Sizes of its own; biases and feed-forwards in no module; fused by part, with fewer keys than
ranks of tp 4; weights the other way round; one key for all queries; feed-forwards with parameters
in between; fused by head, with slopes; in groups, with slopes; by part, with slopes; lightning
attention; sinks; shared experts; gated; logits that are written over."""

BERT = {
    "is_decoder": True,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MAMBA2 = {"num_heads": 4, "head_dim": 16, "state_size": 6, "n_groups": 1, "chunk_size": 16}
JAMBA = {
    "mamba_d_state": 6,
    "mamba_dt_rank": 5,
    "num_experts": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
BAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 6,
    "mamba_chunk_size": 16,
    "attn_layer_indices": [1],
}
GROUPS = {"n_groups": 2}, {"n_groups": 4, "num_heads": 8, "head_dim": 8}
"""Of Mamba-2's heads: as many as ranks of tp, and more; else all heads are one."""


def kept(model, pattern):
    """How many numbers a rank keeps of the parameters whose names match, and how many there are."""
    local = whole = 0
    for name, p in model.named_parameters():
        if re.search(pattern, name):
            local += (p.to_local() if isinstance(p, DTensor) else p).numel()
            whole += p.numel()
    return local, whole


@pytest.mark.slow_where(lambda kind, pattern: kind != "mamba2")
@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("t5", r"Attention\.|DenseReluDense\."),
        ("bart of two sequences", r"_attn\.[qkv]_proj|_attn\.out_proj\.weight|fc1|fc2\.weight"),
        ("longcat_flash", r"(q_b|kv_b|o)_proj"),
        ("mamba2", r"mixer\."),
        ("bamba", r"mamba\."),
        ("qwen3_next", r"linear_attn\.(in_proj|conv1d|out_proj|A_log|dt_bias)"),
        ("kimi_linear", r"layers\.0\.self_attn\.([qkvbo]_proj|g_b_proj|conv1d)"),
        ("mamba", r"mixer\."),
        ("lfm2", r"layers\.0\.conv\.(?!out_proj\.bias)"),
    ],
)
@spmd(ranks=2)
def test_tp_rank_keeps_its_heads(mesh, kind, pattern):
    mesh = ParallelMesh.from_degrees(Degrees(tp=2), "cpu")
    local, whole = kept(parallelize_hf(checked_family(kind).build(), mesh), pattern)
    assert 2 * local == whole > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*MLA, "bert"])
@spmd(ranks=4)
def test_tp_of_split_heads_equals_one_device(mesh, kind):
    """Packed rows on cp 2 x tp 2; test_encoder_decoder.py has t5 and bart."""
    assert_step_equal(kind, Degrees(cp=2, tp=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "targets", "change"),
    [
        ("deepseek_v3", ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), SMALL),
        ("bamba", ("in_proj", "q_proj", "down_proj"), BAMBA),
        ("jamba", ("in_proj", "x_proj", "out_proj"), JAMBA),
        ("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), {}),
        ("gpt2", ("c_attn", "c_proj", "c_fc"), {}),
        ("opt", ("q_proj", "v_proj", "out_proj", "fc1", "fc2"), ANY["opt"]),
        ("bert", ("query", "value", "dense"), BERT),
    ],
)
@spmd(ranks=4)
def test_lora_on_split_heads_equals_one_device(mesh, kind, targets, change):
    models = [adapted(kind, targets, **change) for _ in range(2)]
    assert_same_step(models[0], *on_mesh_of(models[1], Degrees(cp=2, tp=2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("deepseek_v3", SMALL),
        ("mamba2", MAMBA2),
        ("phi3", {}),
        ("gpt2", {}),
        ("opt", ANY["opt"]),
        ("bert", BERT),
    ],
)
@spmd(ranks=2)
def test_saved_split_heads_are_what_transformers_writes(mesh, kind, change):
    def body(folder):
        plain, model = build(kind, **change), build(kind, **change)
        parallelize_hf(model, ParallelMesh.from_degrees(Degrees(tp=2), "cpu"))
        if dist.get_rank() == 0:
            assert_saved(model, plain, folder)
        else:
            save_hf(model, Path(tempfile.mkdtemp()) / "ours")

    in_a_folder(body)


def test_heads_that_tp_does_not_divide_are_whole_and_said_to_be(caplog):
    """The rest of a block is split all the same."""
    model = checked_family("t5").build()
    with caplog.at_level("WARNING", "dtcp.parallelize.plans"):
        plan = hf_tensor_plan(model, 8)
    said = {each.partition(" is whole on each of 8")[0] for each in caplog.messages}
    part = "encoder.block.0.layer"
    assert "encoder.block.*.layer.*.SelfAttention" in said and len(said) == 3
    assert plan[f"{part}.0.SelfAttention.q"] == LocalParams()
    assert isinstance(plan[f"{part}.1.DenseReluDense.wi"], ColwiseParallel)


class Attention(nn.Module):
    """Attention with four heads, of queries that are normalized over all heads or not at all."""

    def __init__(self, *, normed):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8) if normed else nn.Identity()

    def forward(self, x):
        projected = self.norm(self.query(x)), self.key(x), self.value(x)
        q, k, v = (each.unflatten(-1, (-1, 2)).transpose(1, 2) for each in projected)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return self.out(attend(self, q, k, v, None)[0].flatten(2))


@pytest.mark.parametrize(("normed", "tp", "splits"), [(0, 2, True), (1, 2, False), (0, 8, False)])
def test_layers_of_heads_are_found_by_running_them(normed, tp, splits):
    """No rank has all that a norm of all heads reads; nor a part of a head."""
    styles = styles_by_trial(Attention(normed=normed), tp, [])
    ups = ("query", "key", "value")
    assert isinstance(styles.pop("out", None), RowwiseParallel) is splits
    around = {"": HeadsOfLayer(enters=False, readers=ups)}
    assert styles == ({**around, **dict.fromkeys(ups, ROWS)} if splits else {})


class Fused(nn.Module):
    """Attention whose layer makes queries, keys and values of one product, in one of the orders."""

    def __init__(self, order, kv_heads=4):
        super().__init__()
        self.order, self.num_heads, self.kv_heads, self.head_dim = order, 4, kv_heads, 2
        self.qkv, self.out = nn.Linear(8, 8 + 4 * kv_heads), nn.Linear(8, 8)

    def forward(self, x):
        qkv = self.qkv(x)
        if self.order == "by part":
            sizes = [each * self.head_dim for each in (self.num_heads, *2 * [self.kv_heads])]
            q, k, v = (each.unflatten(-1, (-1, 2)) for each in qkv.split(sizes, dim=-1))
        else:
            queries = self.num_heads // self.kv_heads
            groups = qkv.unflatten(-1, (self.kv_heads, queries + 2, self.head_dim))
            q, k, v = groups.split([queries, 1, 1], dim=-2)
            q, k, v = (each.flatten(2, 3) for each in (q, k, v))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return self.out(attend(self, q, k, v, None)[0].flatten(2))


PARTS = {
    ("by part", 4): (Segment(8, 2), Segment(8, 2), Segment(8, 2)),
    ("by part", 1): (Segment(8, 2), Segment(2, 1), Segment(2, 1)),
    ("by head", 4): None,
    ("in groups", 2): None,
}


@pytest.mark.parametrize(("order", "kv_heads"), PARTS)
def test_rows_of_fused_heads_are_found_by_running_them(order, kv_heads):
    """With the sizes that the module reads of itself; None: one stretch of rows for each rank."""
    styles = styles_by_trial(Fused(order, kv_heads), 2, [])
    parts = PARTS[order, kv_heads]
    assert styles["qkv"] == (ROWS if parts is None else SegmentRows(segments=parts))
    sizes = {"num_heads": 2} | ({} if kv_heads == 1 else {"kv_heads": kv_heads // 2})
    assert styles[""] == HeadsOfLayer(sizes=sizes, enters=False, readers=("qkv",))
    assert styles_by_trial(Fused(order, kv_heads), 8, []) == {}


@pytest.mark.parametrize(
    ("width", "bias", "between", "split"),
    [
        (48, True, nn.GELU(), True),
        (48, False, nn.GELU(), True),
        (7, False, nn.GELU(), False),
        (48, True, nn.Softmax(-1), False),
    ],
)
def test_feed_forward_is_split_where_its_parts_add_up(width, bias, between, split):
    """One that normalizes what it has widened does not; 7 channels cannot be divided."""
    layers = nn.Linear(4, width, bias), between, nn.Linear(width, 4, bias)
    styles = styles_by_trial(nn.Sequential(*layers), 2, [])
    assert isinstance(styles.get("0"), ColwiseParallel) is bool(styles) is split


class AlsoHidden(nn.Module):
    """A feed-forward that hands on what it reads first, as routers do that read the one before."""

    def __init__(self, alone):
        super().__init__()
        self.alone = alone
        self.first, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        hidden = self.first(x)
        out = self.down(self.up(hidden).sigmoid())
        return out if self.alone else (out, hidden)


@pytest.mark.parametrize("alone", [True, False])
def test_layers_whose_output_is_handed_on_beside_what_narrows_stay_whole(alone):
    """Their gradient of that is whole on every rank, and that of the parts is a part."""
    assert bool(styles_by_trial(AlsoHidden(alone), 2, [])) is alone


class Outside(nn.Module):
    """Attention whose layers another module calls, or the one that they are in."""

    def __init__(self, inside):
        super().__init__()
        self.inside, self.attention = inside, Attention(normed=False)

    def forward(self, x):
        if self.inside:
            return x + self.attention(x)
        own = self.attention
        projected = (own.query(x), own.key(x), own.value(x))
        q, k, v = (each.unflatten(-1, (-1, 2)).transpose(1, 2) for each in projected)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return x + own.out(attend(self, q, k, v, None)[0].flatten(2))


@pytest.mark.parametrize("inside", [True, False])
def test_layers_that_their_module_does_not_call_stay_whole(inside):
    """It would not see to what they read."""
    assert bool(styles_by_trial(Outside(inside), 2, [])) is inside


class Block(nn.Module):
    """A block whose layers that widen are in the block itself, with a module between or without."""

    def __init__(self, between):
        super().__init__()
        self.attn = Attention(normed=False)
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.between = between

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.down(self.between(self.gate(x).sigmoid() * self.up(x)))


@pytest.mark.parametrize("between", [nn.Identity(), nn.PReLU(), nn.LayerNorm(16)])
def test_layers_in_a_block_are_split_where_all_else_is_handed_what_is_whole(between):
    parts = ("gate", "up", "down")
    styles = styles_by_trial(Block(between), 2, [], parts)
    is_split = isinstance(between, nn.Identity)
    assert styles.keys() == ({"", *parts} if is_split else set())
    if is_split:
        assert styles[""] == HeadsOfLayer(enters=False, readers=("gate", "up"))


class Scaled(nn.Module):
    """A feed-forward with something in the branch that ranks share out that reads no token."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("one", torch.ones(1))
        if kind == "parameter":
            self.alpha = nn.Parameter(torch.ones(1))
        if kind == "module":
            self.alpha = nn.LayerNorm(1)
        if kind == "places":
            self.alpha = nn.Embedding(64, 1)

    def forward(self, x, position_ids):
        hidden = self.up(x).sigmoid()
        if self.kind == "parameter":
            hidden = hidden * self.alpha
        if self.kind == "module":
            hidden = hidden * self.alpha(self.one)
        if self.kind == "places":
            hidden = hidden * self.alpha(position_ids).view(1, -1, 1)
        return self.down(hidden)


@pytest.mark.parametrize("kind", ["", "parameter", "module", "places"])
def test_layers_beside_what_every_rank_has_whole_stay_whole(kind):
    """A rank's gradient of that would be a part of it, which nobody sums."""
    assert bool(styles_by_trial(Scaled(kind), 2, [])) is (kind == "")


def test_experts_that_read_weights_of_a_module_inside_read_local_ones():
    plan = hf_tensor_plan(CheckedHuggingFaceModel("dbrx").build(), 2)
    assert plan["transformer.blocks.0.ffn.experts"] == LocalParams()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ANY)
@spmd(ranks=4)
def test_tp_of_any_heads_equals_one_device(mesh, kind):
    assert_equal_on(kind, Degrees(cp=2, tp=2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["phi3", "bloom"])
@spmd(ranks=4)
def test_tp_of_more_ranks_than_keys_equals_one_device(mesh, kind):
    assert_equal_on(kind, Degrees(tp=4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["phi3", "falcon", "gpt2", "gptj"])
@spmd(ranks=2)
def test_compiled_tp_of_any_heads_equals_one_device(mesh, kind):
    assert assert_equal_on(kind, Degrees(tp=2), Compile("aot_eager")).graphs.breaks == 0


def assert_equal_on(kind, degrees, compile=None):
    checked = CheckedHuggingFaceModel(kind, ANY[kind])
    mesh = ParallelMesh.from_degrees(degrees, "cpu")
    result = compare(checked, CheckOptions(degrees), mesh, compile)
    assert {name: x for name, x in result.errors.items() if not x <= 1e-5} == {}
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("stablelm", r"self_attn\."),
        ("phi3", r"self_attn\.|mlp\."),
        ("gpt2", r"(attn|mlp)\..*(weight|c_attn\.bias|c_fc\.bias)"),
        ("bloom", r"query_key_value|dense\.weight|h_to_4h|4h_to_h\.weight"),
        ("falcon", r"query_key_value|dense|h_to_4h|4h_to_h"),
        ("mpt", r"attn\.|ffn\."),
        ("minimax", r"layers\.0\.self_attn\."),
        ("qwen2_moe", r"shared_expert\."),
    ],
)
@spmd(ranks=2)
def test_tp_rank_keeps_half_of_any_heads(mesh, kind, pattern):
    mesh = ParallelMesh.from_degrees(Degrees(tp=2), "cpu")
    model = CheckedHuggingFaceModel(kind, ANY[kind]).build()
    local, whole = kept(parallelize_hf(model, mesh), pattern)
    assert 2 * local == whole > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", RECURRENT)
@spmd(ranks=4)
def test_tp_of_recurrent_heads_equals_one_device(mesh, kind):
    assert_step_equal(kind, Degrees(cp=2, tp=2))


@pytest.mark.slow
@pytest.mark.parametrize("change", GROUPS)
@spmd(ranks=4)
def test_tp_of_mamba2_in_groups_equals_one_device(mesh, change):
    """With two groups, a rank of tp 4 shares B and C, and its norm, with another."""
    checked = CheckedHuggingFaceModel("mamba2", change)
    for degrees in (Degrees(cp=2, tp=2), Degrees(tp=4)):
        result = compare(
            checked, CheckOptions(degrees), ParallelMesh.from_degrees(degrees, "cpu"), None
        )
        assert {name: x for name, x in result.errors.items() if not x <= 1e-5} == {}
