"""DeepSeek-V4 against the published implementation, its checkpoints' names, and its own parts."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from dtcp.labels import look_ahead, shift_labels
from dtcp.mixer_metadata import batch_metadata
from dtcp.models.deepseek_v4 import (
    PRESETS,
    DeepseekV4,
    DeepseekV4Config,
    TailRope,
    TopKRouter,
    config_from_hf,
    config_to_hf,
    from_hf,
    tiny,
    to_hf,
)
from dtcp.parallelize.keep_dtype import keep_dtype_names
from dtcp.parallelize.plans.deepseek_v4 import deepseek_v4_keep_dtype
from dtcp.sequence.documents import Documents
from tests.harness import hf_deepseek_v4 as published
from tests.harness.parity import gradients

DOCUMENTS = Documents(((37, 3, 49), (70, 26)), 96)
"""Unaligned with every window; shorter than all of them; padding in a row."""


def pair(**change):
    """Theirs and ours, of the same weights."""
    theirs = published.build(**change)
    config = config_from_hf(theirs.config.to_dict())
    ours = DeepseekV4(config).double()
    ours.load_state_dict(from_hf(theirs.state_dict(), config))
    return theirs, ours, config


def test_deepseek_v4_equals_the_published_model():
    """Logits and all gradients, in fp64; packed documents against each document alone."""
    theirs, ours, config = pair()
    input_ids = torch.randint(config.vocab_size, (2, 96))
    real = (DOCUMENTS.document() >= 0)[..., None]
    grad = torch.randn(2, 96, config.vocab_size).double() * real

    expected = published.one_by_one(theirs, input_ids, DOCUMENTS)
    expected.backward(grad)
    attn_metadata = batch_metadata(ours, DOCUMENTS)
    actual = ours(input_ids, DOCUMENTS.position_ids(), attn_metadata)
    actual.backward(grad)

    assert_close(actual * real, expected)
    assert_close(gradients(ours), from_hf(gradients(theirs), config))
    frozen = {name for name, p in ours.named_parameters() if p.grad is None}
    assert frozen == {name for name, _ in ours.named_parameters() if ".indexer." in name}


def test_deepseek_v4_checkpoint_is_read_by_transformers_and_back(tmp_path):
    """Under the official names, on disk, with the settings beside it; what transformers keeps in
    fp32 when it loads as bf16 is what a plan keeps."""
    from transformers import DeepseekV4ForCausalLM

    theirs, ours, config = pair()
    on_disk = to_hf(ours.state_dict(), config)
    assert "layers.1.attn.indexer.compressor.ape" in on_disk
    assert on_disk["layers.0.ffn.gate.tid2eid"].dtype == torch.int32
    save_file(on_disk, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))

    loaded = DeepseekV4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    weights = {name: x.to(torch.float64) for name, x in theirs.state_dict().items()}
    for name, x in loaded.state_dict().items():
        # Some of theirs are always fp32.
        assert_close(x.to(torch.float64), weights[name], rtol=1e-6, atol=1e-6)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert config_from_hf(settings) == config == config_from_hf(loaded.config.to_dict())
    again = from_hf(load_file(tmp_path / "model.safetensors"), config)
    assert_close(again, dict(ours.state_dict()), rtol=0, atol=0)

    rounded = DeepseekV4ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {n for n, x in from_hf(rounded.state_dict(), config).items() if x.dtype == torch.float32}
    in_plan = keep_dtype_names(ours, deepseek_v4_keep_dtype(config))
    assert set(in_plan) == kept & set(dict(ours.named_parameters()))


def test_deepseek_v4_names_survive_the_round_trip_with_mtp():
    config = tiny(64)
    weights = dict(DeepseekV4(config).state_dict())
    theirs = to_hf(weights, config)
    assert "mtp.0.ffn.experts.7.w3.weight" in theirs and "mtp.0.hc_head_fn" in theirs
    assert_close(from_hf(theirs, config), weights, rtol=0, atol=0)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_deepseek_v4_presets_have_the_published_sizes():
    """The number of parameters, and of layers of each kind."""
    sizes = {}
    for name in ("deepseek-v4-flash", "deepseek-v4-pro"):
        config = PRESETS[name]
        with torch.device("meta"):
            model = DeepseekV4(config)
        total = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("mtp."))
        ratios = config.compress_ratios[: config.num_layers]
        sizes[name] = (round(total / 1e9), *(ratios.count(r) for r in (0, 4, 128)))
    assert sizes == {"deepseek-v4-flash": (284, 2, 21, 20), "deepseek-v4-pro": (1573, 0, 30, 31)}


def test_right_padding_changes_nothing_and_left_padding_is_refused():
    config = replace(tiny(64), window=8)
    model = DeepseekV4(config).double()
    input_ids = torch.randint(64, (1, 50))
    whole = Documents.single(1, 50)
    expected = model(input_ids, whole.position_ids(), batch_metadata(model, whole))
    padded, longer = Documents(((50,),), 77), nn.functional.pad(input_ids, (0, 27), value=5)
    actual = model(longer, padded.position_ids(), batch_metadata(model, padded))
    assert_close(actual[:, :50], expected)
    left = torch.arange(77) < 27
    with pytest.raises(ValueError, match="padded on the right"):
        Documents.from_padded(None, left[None])


def test_a_rotation_back_undoes_the_rotation():
    x, position_ids = torch.randn(2, 5, 3, 16).double(), torch.randint(1000, (2, 5))
    rope = TailRope(8, 160_000.0, PRESETS["deepseek-v4-flash"].yarn)
    rotated = rope(x, position_ids)
    assert_close(rope(rotated, position_ids, back=True), x)
    assert_close(rotated[..., :8], x[..., :8], rtol=0, atol=0)
    assert not torch.allclose(rotated, x)


def test_the_router_balances_outside_of_autograd():
    """Its bias rises for experts with too few tokens; it changes the choice, not the weights."""
    router = TopKRouter(replace(tiny(64), experts_per_token=1, num_experts=4))
    with torch.no_grad():
        router.weight.zero_()[2] = 1
    x, ids = torch.ones(6, 64), torch.zeros(6, dtype=torch.int64)
    index, weight = router(x, ids)
    assert index.flatten().tolist() == [2] * 6 and router.load.tolist() == [0, 0, 6, 0]
    assert weight.requires_grad and not router.bias.requires_grad
    router.balance(router.load.clone(), 0.5)
    assert router.bias.tolist() == [0.5, 0.5, -0.5, 0.5] and not router.load.any()
    for _ in range(20):
        router(x, ids)
        router.balance(router.load.clone(), 0.5)
    assert router(x, ids)[0].flatten().tolist() != [2] * 6
    assert_close(router(x, ids)[1], torch.full((6, 1), 1.5))
    router.eval()
    router.load.zero_()
    router(x, ids)
    assert not router.load.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compress_ratios": (0, 4, 16, 4)}, "one compress ratio per layer"),
        ({"output_groups": 3}, "equally many heads in each output group"),
        ({"rope_dim": 7}, "rotates pairs"),
        ({"rope_dim": 34}, "no wider than a head"),
        ({"experts_per_token": 9}, "experts_per_token=9 of num_experts=8"),
        ({"tied": True}, "head of its own, got tied=True"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(tiny(), **change)


def test_embeddings_without_ids_are_refused():
    config: DeepseekV4Config = tiny(64)
    model, documents = DeepseekV4(config), Documents.single(1, 8)
    for embeddings in (torch.randn(1, 8, 64), None):
        with pytest.raises(TypeError, match="look experts up by token"):
            model(embeddings, documents.position_ids(), {})


def test_ids_for_another_number_of_tokens_ahead_are_refused():
    model, documents = DeepseekV4(tiny(64)), Documents.single(1, 8)
    for depths, seq_len in ((2, 8), (1, 16)):
        ids = torch.zeros(1, depths, seq_len, dtype=torch.int64)
        with pytest.raises(ValueError, match="as far ahead as it has MTP layers"):
            model(ids[:, 0, :8], documents.position_ids(), {}, ids)


def test_metadata_of_other_rows_is_refused():
    model, position_ids = DeepseekV4(tiny(64)), torch.arange(8).expand(2, -1)
    for rows, match in ((1, r"got some for \(1, 8\) tokens"), (3, r"give \[B, L\] = \(3, 8\)")):
        attn_metadata = batch_metadata(model, Documents.single(rows, 8))
        with pytest.raises(ValueError, match=match):
            model(torch.zeros(2, 8, dtype=torch.int64), position_ids, attn_metadata)


def test_a_step_in_bfloat16_gives_finite_gradients():
    """Streams, routers and softmaxes compute in fp32; what comes out is bfloat16 again."""
    model, documents = DeepseekV4(tiny(64)).bfloat16(), Documents(((30, 50),), 80)
    model.init_weights()
    ids = torch.randint(64, (1, 80))
    ahead = look_ahead(ids, shift_labels(ids, documents), documents, depths=1)["mtp_input_ids"]
    attn_metadata = batch_metadata(model, documents)
    logits = model(ids, documents.position_ids(), attn_metadata, ahead)
    sum(x.float().square().mean() for x in logits).backward()
    assert all(x.dtype == torch.bfloat16 for x in logits)
    grads = gradients(model)
    assert len(grads) > 100 and all(bool(x.isfinite().all()) for x in grads.values())


def test_experts_take_tokens_in_the_dtype_that_autocast_gives_them():
    model, documents = DeepseekV4(tiny(64)), Documents.single(1, 16)
    model.init_weights()
    ids, position_ids = torch.randint(64, (1, 16)), documents.position_ids()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, position_ids, batch_metadata(model, documents))
    assert_close(logits.float(), model(ids, position_ids, batch_metadata(model, documents)), **BF16)
    logits.float().sum().backward()
    assert model.layers[0].mixture.experts.gate.grad.any()


BF16 = {"rtol": 0.0, "atol": 0.1}


def test_checkpoints_of_another_kind_are_refused():
    settings = config_to_hf(tiny(64))
    with pytest.raises(ValueError, match="reads scoring_func"):
        config_from_hf({**settings, "scoring_func": "softmax"})
    with pytest.raises(ValueError, match=r"got attention_dropout=0\.1"):
        config_from_hf({**settings, "attention_dropout": 0.1})
    with pytest.raises(ValueError, match="by YaRN"):
        config_from_hf({**settings, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    with pytest.raises(ValueError, match="dequantize"):
        from_hf({"layers.0.attn.wq_a.scale": torch.ones(1)}, tiny(64))
