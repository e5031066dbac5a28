"""The dense decoder against the published implementations, and its checkpoints' names."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig as HFLlamaConfig
from transformers import LlamaForCausalLM, PretrainedConfig, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers import Qwen2Config as HFQwen2Config
from transformers import Qwen3Config as HFQwen3Config

from dtcp.mixer_metadata import batch_metadata
from dtcp.models.llama import PRESETS, Llama, config_from_hf, from_hf, tiny, to_hf
from dtcp.models.rope import Rope
from dtcp.sequence.documents import Documents

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "sdpa",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PUBLISHED = [
    (LlamaForCausalLM, HFLlamaConfig(**SHAPE, head_dim=8)),
    (LlamaForCausalLM, HFLlamaConfig(**SHAPE, head_dim=16, rope_parameters=LLAMA3_ROPE)),
    (LlamaForCausalLM, HFLlamaConfig(**SHAPE, tie_word_embeddings=True)),
    (Qwen2ForCausalLM, HFQwen2Config(**SHAPE)),
    (Qwen3ForCausalLM, HFQwen3Config(**SHAPE, head_dim=16)),
    (Qwen3ForCausalLM, HFQwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True)),
]
DOCUMENTS = [
    Documents.single(batch=2, seq_len=48),
    Documents(((5, 1, 30, 12), (48,)), seq_len=48),
]


def published(model_class: type[nn.Module], config: PretrainedConfig) -> nn.Module:
    """A random model of transformers in fp64, and its norms too, which are fp32 by themselves."""
    model = model_class(config).double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(len(module.weight), config.rms_norm_eps, dtype=torch.float64)
            model.set_submodule(name, norm)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def one_by_one(model: nn.Module, input_ids: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Logits of a published model that gets each document alone: [B, S, V]."""
    rows = [
        torch.cat([model(document[None]).logits[0] for document in row.split(lengths)])
        for row, lengths in zip(input_ids, documents.lengths, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("model_class", "hf_config"), PUBLISHED)
def test_llama_equals_the_published_model(model_class, hf_config, documents):
    """Logits and all gradients, in fp64; packed documents against each document alone."""
    theirs = published(model_class, hf_config)
    config = config_from_hf(hf_config.to_dict())
    ours = Llama(config).double()
    ours.load_state_dict(from_hf(theirs.state_dict(), config))
    input_ids = torch.randint(config.vocab_size, (documents.batch, documents.seq_len))
    grad = torch.randn(documents.batch, documents.seq_len, config.vocab_size).double()

    expected = one_by_one(theirs, input_ids, documents)
    expected.backward(grad)
    position_ids, attn_metadata = documents.position_ids(), batch_metadata(ours, documents)
    actual = ours(input_ids, position_ids, attn_metadata)
    actual.backward(grad)

    assert_close(actual, expected)
    grads = {name: p.grad for name, p in ours.named_parameters()}
    expected_grads = {name: p.grad for name, p in theirs.named_parameters()}
    assert_close(to_hf(grads, config), expected_grads)


@pytest.mark.parametrize(("model_class", "hf_config"), PUBLISHED)
def test_names_round_trip_to_the_published_state_dict(model_class, hf_config):
    theirs = model_class(hf_config)
    config = config_from_hf(hf_config.to_dict())
    state_dict = theirs.state_dict()
    if config.tied:
        del state_dict["lm_head.weight"]  # as in files on disk
    again = to_hf(from_hf(state_dict, config), config)
    assert_close(again, dict(state_dict), rtol=0, atol=0)


def test_foreign_parameter_is_refused():
    with pytest.raises(ValueError, match=r"knows every parameter.*mlp\.experts\.0\.w1"):
        from_hf({"model.layers.0.mlp.experts.0.w1": torch.ones(1)}, tiny())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "gpt2"}, "model_type=gpt2"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type=yarn"),
    ],
)
def test_foreign_setting_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        config_from_hf({**HFLlamaConfig(**SHAPE).to_dict(), **change})


def test_settings_of_transformers_4_are_read():
    config = HFLlamaConfig(**SHAPE).to_dict()
    scaling = dict(config.pop("rope_parameters")) | LLAMA3_ROPE
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling
    now = HFLlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE).to_dict()
    assert config_from_hf(config) == config_from_hf(now)


def test_documents_of_a_row_do_not_read_each_other():
    model = Llama(tiny())
    documents = Documents(((20, 12),), seq_len=32)
    position_ids, attn_metadata = documents.position_ids(), batch_metadata(model, documents)
    input_ids = torch.randint(512, (1, 32))
    changed = input_ids.clone()
    changed[0, :20] = torch.randint(512, (20,))

    logits = model(input_ids, position_ids, attn_metadata)
    assert_close(
        model(changed, position_ids, attn_metadata)[0, 20:], logits[0, 20:], rtol=0, atol=0
    )


def test_rope_of_bf16_tells_far_positions_apart():
    """Angles are fp32: in bf16, 4096 and 4097 are one number."""
    rope, x = Rope(head_dim=8), torch.ones(1, 1, 1, 8)
    for position in (4096, 4097):
        position_ids = torch.tensor([[position]])
        rotated = rope(x.bfloat16(), position_ids)
        assert rotated.dtype == torch.bfloat16
        assert_close(rotated.float(), rope(x, position_ids), rtol=2**-8, atol=2**-8)


def test_meta_build_with_init_weights_fills_every_parameter():
    for config in (tiny(), replace(tiny(), tied=True, qkv_bias=True)):
        with torch.device("meta"):
            model = Llama(config)
        model.to_empty(device="cpu")
        model.init_weights()
        assert all(p.isfinite().all() for p in model.parameters())
        assert (model.lm_head.weight is model.embedding.weight) == config.tied
        assert not list(model.buffers())


def test_presets_have_the_published_number_of_parameters():
    counts = {
        "llama3.1-8b": 8_030_261_248,
        "llama3.2-1b": 1_235_814_400,
        "qwen2.5-0.5b": 494_032_768,
        "qwen3-0.6b": 596_049_920,
        "qwen3-8b": 8_190_735_360,
    }
    for name, count in counts.items():
        with torch.device("meta"):
            model = Llama(PRESETS[name])
        assert sum(p.numel() for p in model.parameters()) == count


def test_uneven_groups_of_heads_are_refused():
    with pytest.raises(ValueError, match="num_heads=8, num_kv_heads=3"):
        replace(tiny(), num_kv_heads=3)
    with pytest.raises(ValueError, match="head_dim=5"):
        Llama(replace(tiny(), head_dim=5))
