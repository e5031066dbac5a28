"""C1: torchtitan's own decoders are adopted as they are, or refused by name before ranks start."""

import functools
import importlib
from dataclasses import dataclass, fields, replace
from typing import Any

from dtcp.torchtitan import decoder_layers
from dtcp.torchtitan.attention import add_mixers

import pytest
import torch
from torch import distributed as dist
from torch.testing import assert_close
from torchtitan.components.lora import LoRAConverter
from torchtitan.models import _supported_models
from torchtitan.models.common.attention import FlexAttention, GQAttention, VarlenAttention
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.llama3.parallelize import parallelize_llama

from docs.torchtitan_tables import FAMILIES, families_table
from dtcp.batch import shard_batch
from dtcp.distributed.mesh import ParallelMesh
from dtcp.mixer_plan import apply_plan
from dtcp.pretrain.adopt import adopt, adopt_model
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import AllGatherAttention, RingAttention, UlyssesAttention
from tests.docs.blocks import ROOT
from tests.harness import titan_models as titan
from tests.harness.parity import gradients
from tests.harness.spmd import spmd

# Layers of Kimi are DeepSeek-V3's; a fused projection computes what three do.
SLOW = (titan.kimi_k2_7, titan.qwen3_unfused)
MODELS = [
    pytest.param(
        make.__name__, id=f"C1-{make.__name__}", marks=[pytest.mark.slow] if make in SLOW else []
    )
    for make in titan.EXACT
]
OWN_LAYERS = [pytest.param(f.__name__, id=f"C1-{f.__name__}") for f in titan.EXACT if f not in SLOW]


def spec_of(name):
    return titan.small(getattr(titan, name))


@pytest.mark.parametrize("name", MODELS)
def test_an_adopted_model_computes_what_torchtitans_own_does(name):
    logits, expected_grads = titan.titans_own(spec_of(name))
    actual, actual_gradients = titan.ours(adopt_model(spec_of(name)))
    assert_close(actual, logits)
    assert_close(actual_gradients, expected_grads)


@pytest.mark.slow_where(lambda name: name == "qwen3")
@pytest.mark.parametrize("name", MODELS)
@spmd(ranks=2)
def test_an_adopted_model_on_two_ranks_computes_what_one_does(mesh, name):
    check_on_ranks(mesh, name, RingAttention())


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN_LAYERS)
@spmd(ranks=2)
def test_an_adopted_model_by_all_gather_computes_what_one_does(mesh, name):
    check_on_ranks(mesh, name, AllGatherAttention())


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN_LAYERS)
@spmd(ranks=4)
def test_an_adopted_model_by_ulysses_computes_what_one_does(mesh, name):
    check_on_ranks(mesh, name, UlyssesAttention())


def check_on_ranks(mesh, name, style):
    expected, expected_grads = titan.titans_own(spec_of(name))
    model = titan.build(adopt_model(spec_of(name)))
    add_mixers(model)
    apply_plan(model, mesh, {"layers.*.attention.inner_attention.mixer": style})
    tokens, documents = titan.rows()
    whole = {"input_ids": tokens, "position_ids": documents.position_ids()}
    local, sharded = shard_batch(
        whole, ParallelMesh.of_sequence(mesh), HeadTail, model=model, documents=documents
    )
    with titan.settled():
        logits = model(
            local["input_ids"],
            positions=local["position_ids"],
            attention_masks=sharded.attn_metadata,
        )
        (logits * sharded.shard(titan.cotangent(expected))).sum().backward()
    assert_close(logits.detach(), sharded.shard(expected))
    actual = gradients(model)
    for gradient in actual.values():
        dist.all_reduce(gradient)
    assert_close(actual, expected_grads)


def test_C1_every_family_of_torchtitan_is_in_the_table():
    assert {name for name, _ in FAMILIES} == set(_supported_models)
    adopted = {name for name, flavors in FAMILIES if any(f.adopted for f in flavors())}
    compared = {make.__name__ for make in titan.EXACT}
    assert adopted <= compared and len(adopted) == 6
    assert families_table() in (ROOT / "docs/torchtitan.md").read_text(), (
        "python -m docs.torchtitan_tables"
    )


@pytest.mark.parametrize(
    "name", [*decoder_layers.MODELS, *decoder_layers.BLOCKS, *decoder_layers.ATTENTIONS]
)
def test_C1_every_field_of_what_is_read_is_known(name):
    module, _, owner = name.rpartition(".")
    config = getattr(importlib.import_module(f"torchtitan.models.{module}"), owner).Config
    tables = decoder_layers.MODELS | decoder_layers.BLOCKS | decoder_layers.ATTENTIONS
    assert {each.name for each in fields(config)} == set(tables[name].split())


class WindowedAttention(GQAttention):
    """Somebody's attention, with a window that torchtitan's mask code would not see."""

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        window: int = 8


class TransformedAttention(GQAttention):
    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        pass

    def forward(self, x_BLD: Any, attention_masks: Any, positions: Any = None) -> Any:
        return 2 * super().forward(x_BLD, attention_masks, positions)


class RenamedAttention(GQAttention):
    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        pass


class PrefixModel(Llama3Model):
    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        prefix: int = 4


class MaskedModel(Llama3Model):
    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        pass

    def get_attention_masks(self, positions: Any) -> Any:
        return super().get_attention_masks(positions)


class GatedBlock(Llama3TransformerBlock):
    @dataclass(kw_only=True, slots=True)
    class Config(Llama3TransformerBlock.Config):
        residual_scale: float = 1.0


class OwnFlex(FlexAttention):
    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        softcap: float = 30.0


class OwnFeedForward(FeedForward):
    @dataclass(kw_only=True, slots=True)
    class Config(FeedForward.Config):
        pass


def of_class(config, kind, **changes):
    """The same config of another class."""
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    return kind(**(values | changes))


def with_layer(**changes):
    """llama3 with something else in layer 1."""
    spec = titan.small(titan.llama3)
    layer = spec.model.layers[1]
    attention = layer.attention
    if "attention" in changes:
        kind = changes.pop("attention")
        changes["attention"] = of_class(attention, kind.Config)
    if "inner" in changes:
        inner = changes.pop("inner")
        changes["attention"] = replace(attention, inner_attention=inner)
    if "block" in changes:
        layer = of_class(layer, changes.pop("block").Config)
    if "feed_forward" in changes:
        kind = changes.pop("feed_forward")
        changes["feed_forward"] = of_class(layer.feed_forward, kind.Config)
    spec.model.layers[1] = replace(layer, **changes)
    return spec


def registry(family, flavor="debugmodel", **options):
    module = importlib.import_module(f"torchtitan.models.{family}")
    return module.model_registry(flavor, **options)


def two_windows():
    spec = registry("gpt_oss", attn_backend="flex")
    spec.model.layers[2].attention.sliding_window_size = 5
    return spec


def other_kernel_window():
    spec = registry("gpt_oss", attn_backend="varlen")
    spec.model.layers[0].attention.inner_attention = VarlenAttention.Config()
    return spec


def of_model(kind):
    spec = titan.small(titan.llama3)
    return replace(spec, model=of_class(spec.model, kind.Config))


REFUSED = {
    "window": (lambda: with_layer(attention=WindowedAttention), r"layers.1.attention .*'window'"),
    "transform": (
        lambda: with_layer(attention=TransformedAttention),
        r"TransformedAttention with its own \['forward'\]",
    ),
    "prefix": (lambda: of_model(PrefixModel), r"Fields of model .* got \['prefix'\]"),
    "masks": (lambda: of_model(MaskedModel), r"its own \['get_attention_masks'\]"),
    "block": (lambda: with_layer(block=GatedBlock), r"layers.1 .*'residual_scale'"),
    "kernel": (
        lambda: with_layer(inner=OwnFlex.Config()),
        r"layers.1.attention.inner_attention=.*OwnFlex",
    ),
    "kernel-options": (
        lambda: with_layer(inner=FlexAttention.Config(kernel_options={"BACKEND": "FLASH"})),
        "inner_attention.kernel_options=.*'FLASH'",
    ),
    "block-size": (
        lambda: with_layer(inner=FlexAttention.Config(block_size=64)),
        "inner_attention.block_size=64",
    ),
    "right-window": (
        lambda: with_layer(inner=VarlenAttention.Config(window_size=(-1, 3))),
        r"window_size=\(-1, 3\)",
    ),
    "feed-forward": (
        lambda: with_layer(feed_forward=OwnFeedForward),
        r"layers.1.feed_forward of .*OwnFeedForward.*per_token=\[OwnFeedForward.Config\]",
    ),
    "dist-gemm": (lambda: registry("llama3", tp_gemm_backend="dist_gemm"), "tp_gemm_backend"),
    "two-windows": (two_windows, r"sliding_window_size=\[5, 128\]"),
    "other-kernel-window": (other_kernel_window, r"sliding_window_size=128 and .*\(-1, 0\)"),
    "experts-by-deepep": (
        lambda: registry("qwen3", "debugmodel_moe", moe_comm_backend="deepep"),
        "routed_experts.token_dispatcher of .*DeepEPTokenDispatcher.*moe_comm_backend='standard'",
    ),
    "mtp": (lambda: registry("deepseek_v3", num_mtp_layers=1), "mtp_layers.*num_mtp_layers=0"),
    "vision-kimi": (lambda: registry("kimi_k2_7"), "without vision_encoder.*set it to None"),
    "vision-muse": (lambda: registry("muse_glimmer", "debugmodel_mm"), "without vision_encoder"),
    "flux": (lambda: registry("flux", "flux-debug"), "decoders of torchtitan, got the model flux"),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=f"C1-{case}") for case in REFUSED])
def test_what_a_layer_asks_and_nobody_reads_is_refused_by_name(case):
    make, says = REFUSED[case]
    with pytest.raises(ValueError, match=says):
        adopt_model(make())


def test_C1_qwen3_5_is_refused_for_its_recurrent_layers():
    with pytest.raises(ValueError, match=r"GatedDeltaNet.*qwen3_5_tiny"):
        adopt_model(registry("qwen3_5"))


WINDOWS = {
    (-1, 0): "Causal()",
    (-1, -1): "Bidirectional()",
    (7, 0): "And(left=Causal(), right=SlidingWindow(size=8, right=None))",
    (7, 2): "SlidingWindow(size=8, right=2)",
    (7, -1): "SlidingWindow(size=8, right=None)",
}


@pytest.mark.parametrize("window", [pytest.param(w, id=f"C1-{w[0]},{w[1]}") for w in WINDOWS])
def test_the_window_of_a_varlen_kernel_is_read(window):
    spec = adopt_model(with_layer(inner=VarlenAttention.Config(window_size=window)))
    first, second = (layer.attention.inner_attention.mask for layer in spec.model.layers)
    assert str(first) == "Causal()" and str(second) == WINDOWS[window]


def test_C1_a_layer_that_only_has_another_name_is_read():
    spec = adopt_model(with_layer(attention=RenamedAttention))
    assert str(spec.model.layers[1].attention.inner_attention.mask) == "Causal()"


def test_C1_a_part_that_somebody_vouches_for_is_taken():
    spec = with_layer(feed_forward=OwnFeedForward)
    assert adopt_model(spec, per_token=[OwnFeedForward.Config]).name == "llama3"


def test_C1_a_config_whose_model_somebody_vouched_for_is_adopted_as_it_is():
    config = llama3_debugmodel()
    spec = with_layer(feed_forward=OwnFeedForward)
    config.model_spec = adopt_model(spec, per_token=[OwnFeedForward.Config])
    assert adopt(config).model_spec is config.model_spec
    config.model_spec = spec
    with pytest.raises(ValueError, match=r"layers.1.feed_forward of .*OwnFeedForward"):
        adopt(config)


def with_lora(spec):
    lora = LoRAConverter.Config(rank=4).build()
    return replace(spec, model=lora.convert(spec.model))


def test_C1_lora_of_torchtitans_is_adopted_and_hides_nothing():
    spec = adopt_model(with_lora(titan.small(titan.gpt_oss)))
    first, second = (layer.attention.inner_attention.mask for layer in spec.model.layers)
    assert str(second) == "Causal()" and "SlidingWindow(size=9" in str(first)
    trained = {name for name, x in spec.model.build().named_parameters() if x.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    own = with_lora(with_layer(feed_forward=OwnFeedForward))
    with pytest.raises(ValueError, match=r"layers.1.feed_forward of .*OwnFeedForward"):
        adopt_model(own)
    assert adopt_model(own, per_token=[OwnFeedForward.Config]).name == "llama3"


def own_parallelize(model: Any, **_: Any) -> Any:
    """Somebody's, which freezes a layer or the like."""
    return model


@pytest.mark.parametrize(
    ("own", "name"),
    [
        (own_parallelize, "test_titan_models.own_parallelize"),
        (functools.partial(own_parallelize, x=1), "test_titan_models.own_parallelize"),
        (functools.partial(parallelize_llama, x=1), "parallelize.parallelize_llama"),
        (functools.wraps(parallelize_llama)(lambda model: model), "parallelize.parallelize_llama"),
    ],
)
def test_C1_a_function_of_somebodys_own_that_nobody_would_call_is_refused(own, name):
    spec = replace(titan.small(titan.llama3), parallelize_fn=own)
    with pytest.raises(ValueError, match=rf"{name} of llama3.*to None"):
        adopt_model(spec)
    assert adopt_model(replace(spec, parallelize_fn=None)).name == "llama3"


def test_C1_adopting_leaves_the_spec_as_it_was_and_twice_is_once():
    spec = titan.small(titan.gpt_oss)
    adopted = adopt_model(spec)
    assert type(spec.model.layers[0].attention.inner_attention) is FlexAttention.Config
    again = adopt_model(adopted)
    assert [x.attention.inner_attention for x in again.model.layers] == [
        x.attention.inner_attention for x in adopted.model.layers
    ]


def test_C1_a_mixer_takes_no_argument_that_it_does_not_know():
    spec = adopt_model(titan.small(titan.llama3))
    model = titan.build(spec)
    add_mixers(model)
    inner, q = model.layers["0"].attention.inner_attention, torch.zeros(1, 4, 2, 8)
    with pytest.raises(TypeError, match=r"score_mod"):
        inner(q, q, q, attention_masks=None, score_mod=abs)
    scale = inner.mixer.scale
    with pytest.raises(ValueError, match=r"scale=0.5"):
        inner(q, q, q, attention_masks=None, scale=0.5)
    with pytest.raises(ValueError, match=r"out_transform"):
        inner(q, q, q, attention_masks=None, scale=scale, out_transform=max)
