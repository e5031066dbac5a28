"""Gemma 4 on one device against the published model, and its checkpoints' names and settings."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from dtcp.compile import EagerIsland
from dtcp.mixer_metadata import batch_metadata
from dtcp.models.gemma4 import (
    PRESETS,
    Gemma4,
    LayerType,
    MoEConfig,
    config_from_hf,
    config_to_hf,
    from_hf,
    tiny,
    tiny_e,
    tiny_moe,
    to_hf,
)
from dtcp.parallelize.plans.gemma4 import gemma4_context_plan, gemma4_tensor_plan
from dtcp.sequence.block_runs import vision_blocks
from dtcp.sequence.documents import Documents
from dtcp.sequence.key_intervals import KeyIntervals
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.masks import BlockBidirectional, Causal, Coords, SlidingWindow
from dtcp.softmax import AllGatherAttention, RingAttention, UlyssesAttention
from dtcp.softmax.mixer import GatherSharedKV, KeysFromValues
from dtcp.softmax.style import AttentionStyle
from tests.harness.hf_gemma4 import SHAPE, VARIANTS, published, truth


@pytest.mark.parametrize("variant", VARIANTS)
def test_gemma4_equals_the_published_model(variant):
    """Logits and all gradients, in fp64; packed documents against each document alone."""
    expected = truth(variant)
    model = Gemma4(expected.config).double()
    model.load_state_dict(expected.weights)
    types = expected.mm_token_type_ids
    block = None if types is None else vision_blocks(types)
    documents = expected.documents
    position_ids = expected.position_ids
    attn_metadata = batch_metadata(model, documents, block=block, position_ids=position_ids)

    logits = model(expected.input_ids, position_ids, attn_metadata)
    logits.backward(expected.grad_logits)
    real = documents.document() >= 0
    assert_close(logits[real], expected.logits[real])
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert_close(grads, {name: expected.gradients[name] for name in grads})


@pytest.mark.parametrize("variant", VARIANTS)
def test_gemma4_names_and_settings_round_trip_through_files(variant, tmp_path):
    """What transformers writes we read, and what we write it reads, with the same logits."""
    theirs = published(VARIANTS[variant]).float()
    theirs.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    config = config_from_hf(theirs.config.to_dict())
    ours = from_hf(written, config)
    again = Gemma4ForCausalLM(Gemma4TextConfig(**config_to_hf(config)))
    missing, unknown = again.load_state_dict(to_hf(ours, config), strict=False)
    assert missing == ["lm_head.weight"] and unknown == []
    text = theirs.model.language_model if config.vision_blocks else theirs.model
    assert_close(dict(again.model.state_dict()), dict(text.state_dict()), rtol=0, atol=0)
    assert config_from_hf(again.config.to_dict()) == config


def test_gemma4_reads_the_settings_of_published_files():
    """There global layers have fields of their own; saved again, settings are by layer."""
    saved = Gemma4TextConfig(**SHAPE, attention_k_eq_v=True).to_dict()
    by_layer = saved.pop("per_layer_config")
    fields = {"global_head_dim": 32, "num_global_key_value_heads": 2}
    expected = config_from_hf({**saved, "per_layer_config": by_layer})
    assert config_from_hf({**saved, **fields}) == expected
    inside = {"model_type": "gemma4", "text_config": {**saved, **fields}}
    assert config_from_hf(inside) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_gemma4_presets_have_the_published_shapes(name):
    config = PRESETS[name]
    with torch.device("meta"):
        ours = Gemma4(config).state_dict()
        theirs = Gemma4ForCausalLM(Gemma4TextConfig(**config_to_hf(config))).state_dict()
    theirs.pop("lm_head.weight")
    shapes = {name: x.shape for name, x in to_hf(ours, config).items()}
    assert shapes == {name: x.shape for name, x in theirs.items()}


def test_gemma4_meta_build_with_init_weights_fills_every_parameter():
    for config in (tiny(), tiny_moe(), tiny_e()):
        with torch.device("meta"):
            model = Gemma4(config)
        model.to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.fill_(torch.nan)
        model.init_weights()
        assert all(x.isfinite().all() for x in (*model.parameters(), *model.buffers()))
        assert model.lm_head.weight is model.embedding.weight
        assert not model.embedding.weight[0].any()


def test_vision_blocks_of_gemma4_are_numbered_in_whole_rows():
    types = torch.tensor([[0, 1, 1, 0, 2, 1, 0, 3], [1, 0, 0, 1, 1, 0, 2, 2]])
    expected = [[-1, 0, 0, -1, 1, 1, -1, -1], [0, -1, -1, 1, 1, -1, 2, 2]]
    assert vision_blocks(types).tolist() == expected


def _coords() -> Coords:
    return Coords.of(Documents.single(1, 32))


REFUSED: list[tuple[Any, str]] = [
    (
        lambda: Gemma4(tiny_e()).forward(
            None, torch.zeros(1, 4), {}, inputs_embeds=torch.ones(1, 4, 128)
        ),
        "looked up by token, got input_ids=None",
    ),
    (
        lambda: batch_metadata(Gemma4(replace(tiny(), vision_blocks=True)), Documents.single(1, 8)),
        "coords.block=None.*mm_token_type_ids",
    ),
    (lambda: config_from_hf(_settings(attention_dropout=0.1)), "attention_dropout=0.1"),
    (
        lambda: config_from_hf(_settings(use_bidirectional_attention="all")),
        "use_bidirectional_attention=all",
    ),
    (lambda: config_from_hf(_settings(attention_bias=True)), "attention_bias=True"),
    (
        lambda: config_from_hf(
            _settings(per_layer_config={1: {"head_dim": 8}, 3: {"head_dim": 16}})
        ),
        "one head shape for each type",
    ),
    (lambda: gemma4_tensor_plan(tiny(), tp=3), "num_heads=8 with tp=3"),
    (lambda: replace(tiny(), num_heads=6), "num_heads=6, num_kv_heads=4"),
    (lambda: replace(tiny_e(), num_shared_layers=6), "num_shared_layers=6 of 6"),
    (lambda: replace(tiny_e(), num_shared_layers=8), "num_shared_layers=8 of 6"),
    (lambda: MoEConfig(num_experts=4, top_k=5, hidden_dim=8), "top_k=5 of num_experts=4"),
    (
        lambda: Gemma4(tiny()).forward(torch.zeros(1, 4).long(), torch.arange(4), {}),
        r"a position for each token, got position_ids.shape=\(4,\)",
    ),
    (lambda: replace(tiny(), per_layer_dim=4), "per_layer_vocab_size=0"),
    (
        lambda: from_hf({"model.layers.0.self_attn.q_a_proj.weight": torch.ones(1)}, tiny()),
        "knows every parameter.*q_a_proj",
    ),
    (
        lambda: gemma4_context_plan(
            replace(tiny(), vision_blocks=True, longest_vision_block=3), RING
        )["layers.0.attention.mixer"].rank_metadata(HeadTail(32, 2), 0, _images_of(5)),
        r"sees 4 tokens to the left and 4 to the right.*widen the halo",
    ),
    (lambda: UlyssesAttention().check_values_only(), "RingAttention or AllGatherAttention"),
    (
        lambda: GatherSharedKV(Causal()).make_metadata(_coords(), Contiguous(32, 2)),
        "unclaimed GatherSharedKV",
    ),
]
RING = RingAttention()


def test_a_plan_gives_all_layers_the_options_of_the_strategy():
    """Windows and shared keys, too, which have strategies of their own."""
    options = {
        "boundary": EagerIsland(),
        "ranks_per_node": 2,
        "tile": 64,
        "kernel": "triton",
        "reduce_dtype": torch.float32,
    }
    assert options.keys() == {each.name for each in fields(AttentionStyle)}
    for config in (tiny(), tiny_e()):
        plan = gemma4_context_plan(config, AllGatherAttention(**options))
        assert len({type(style) for style in plan.values()}) == 2
        for style in plan.values():
            assert {name: getattr(style, name) for name in options} == options


def test_a_kernel_that_takes_wide_heads_alone_computes_the_layers_that_have_them():
    """In their own strategy, and where layers share their keys."""
    for config in (tiny(), tiny_e()):
        config = replace(
            config,
            sliding_heads=replace(config.sliding_heads, head_dim=256),
            global_heads=replace(config.global_heads, head_dim=512),
        )
        plan = gemma4_context_plan(config, AllGatherAttention(kernel="ffpa"))
        for layer in range(config.num_layers):
            wide = config.heads(layer).head_dim == 512
            assert plan[f"layers.{layer}.attention.mixer"].kernel == ("ffpa" if wide else "auto")


def test_a_kernel_that_takes_no_windows_computes_global_layers_alone():
    config = tiny()
    plan = gemma4_context_plan(config, AllGatherAttention(kernel="cudnn"))
    for layer, layer_type in enumerate(config.layer_types):
        expected = "cudnn" if layer_type == LayerType.GLOBAL else "auto"
        assert plan[f"layers.{layer}.attention.mixer"].kernel == expected


def _settings(**changed: Any) -> dict[str, Any]:
    return {**Gemma4TextConfig(**SHAPE).to_dict(), **changed}


def _images_of(length: int) -> KeyIntervals:
    block = torch.full((1, 32), -1)
    block[0, 8 : 8 + length] = 0
    mask = SlidingWindow(5) & (Causal() | BlockBidirectional())
    return KeyIntervals.of(mask, Coords.of(Documents.single(1, 32), block=block))


@pytest.mark.parametrize(("call", "match"), REFUSED)
def test_what_gemma4_cannot_honour_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_gemma4_warns_of_replicated_kv_heads():
    with pytest.warns(UserWarning, match="tp=4 does not divide the 2 kv heads of global"):
        gemma4_tensor_plan(tiny(), tp=4)


def test_gemma4_shares_keys_computed_from_values_too():
    """Then keys are computed once, where values were gathered, and not inside attention."""
    model = Gemma4(replace(tiny(), num_shared_layers=3))
    assert not any(isinstance(block.attention.mixer, KeysFromValues) for block in model.layers)
    assert [block.attention.exchange is not None for block in model.layers] == [
        layer in (1, 2) for layer in range(6)
    ]
