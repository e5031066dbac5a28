"""Qwen3.5 on one device: transformers' model is the truth, its checkpoints are read and written.

On ranks: test_parity_qwen3_5.py.
"""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface.mixing_probe import find_mixing, mixers_without_mixing
from dtcp.labels import look_ahead, shift_labels
from dtcp.mixer_metadata import batch_metadata
from dtcp.models.qwen3_5 import PRESETS, Qwen35, config_from_hf, config_to_hf, from_hf, to_hf
from dtcp.parallelize import parallelize, qwen3_5_plan
from dtcp.recurrent import CausalConvCP, GatedDeltaCP
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.softmax import RingAttention
from tests.harness import hf_qwen3_5
from tests.harness.parity import ROWS, SEQ_LEN, gradients
from tests.harness.spmd import run_ranks, spmd
from tests.models.test_parity_qwen3_5 import DENSE, EXPERTS

AHEAD = replace(DENSE, num_mtp_layers=1)


def model_of(config: Any, weights: dict[str, Tensor] | None = None) -> Qwen35:
    torch.manual_seed(2)
    model = Qwen35(config).double()
    if weights is not None:
        model.load_state_dict(weights)
    return model


def test_positions_of_images_rotate_as_theirs():
    """Time, height and width, each for frequencies of its own."""
    theirs = hf_qwen3_5.build(DENSE)
    ours = model_of(DENSE, from_hf(theirs.state_dict(), DENSE))
    documents = Documents(ROWS, SEQ_LEN)
    input_ids = torch.randint(64, (len(ROWS), SEQ_LEN))
    position_ids = torch.randint(40, (3, len(ROWS), SEQ_LEN))
    real = (documents.document() >= 0)[..., None]
    expected = hf_qwen3_5.logits(theirs, input_ids, ROWS, position_ids)
    actual = ours(input_ids, position_ids, batch_metadata(ours, documents))
    assert_close(actual * real, expected * real)
    text = position_ids[:1].expand(3, -1, -1)
    attn_metadata = batch_metadata(ours, documents)
    assert_close(
        ours(input_ids, position_ids[0], attn_metadata), ours(input_ids, text, attn_metadata)
    )


@pytest.mark.parametrize("config", [DENSE, EXPERTS, replace(DENSE, tied=True)])
def test_every_form_of_a_checkpoint_is_the_same_model(config, tmp_path):
    """Ours to theirs, fused and expert by expert, through a file of theirs, and back."""
    theirs, ours = hf_qwen3_5.build(config), model_of(config)
    state = ours.state_dict()
    fused = to_hf(state, config)
    written = {name for name, _ in theirs.named_parameters(remove_duplicate=not config.tied)}
    assert set(fused) == written - ({"lm_head.weight"} if config.tied else set())
    for form in (fused, to_hf(state, config, per_expert=True)):
        again = from_hf(form, config)
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], state[name]) for name in state)

    theirs.load_state_dict(fused, strict=False)
    theirs.save_pretrained(tmp_path)
    import safetensors.torch

    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    read = config_from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert read == config
    loaded = from_hf(weights, read)
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_vision_checkpoint_gives_its_language_model():
    state = model_of(AHEAD).state_dict()
    theirs = {
        name.replace("model.", "model.language_model."): x
        for name, x in to_hf(state, AHEAD).items()
    }
    theirs["model.visual.blocks.0.weight"] = torch.zeros(1)
    assert from_hf(theirs, AHEAD).keys() == state.keys()
    assert from_hf(theirs, DENSE).keys() == model_of(DENSE).state_dict().keys()


def test_part_of_a_checkpoint_is_no_model():
    """Not what one file of several holds: names that are missing stay missing."""
    tied = replace(DENSE, tied=True)
    assert set(from_hf({"model.norm.weight": torch.ones(1)}, tied)) == {"norm.weight"}
    form = to_hf(model_of(EXPERTS).state_dict(), EXPERTS, per_expert=True)
    lost = next(name for name in form if name.endswith("experts.1.up_proj.weight"))
    del form[lost]
    with pytest.raises(ValueError, match="merge the files"):
        from_hf(form, EXPERTS)


def test_presets_are_the_published_shapes():
    """Parameters in billions, without the MTP layer, are what their names say."""
    sizes = {}
    for name, config in PRESETS.items():
        assert config_from_hf(config_to_hf(config)) == config
        if not name.startswith("tiny"):
            with torch.device("meta"):
                model = Qwen35(replace(config, num_mtp_layers=0))
            sizes[name] = round(sum(p.numel() for p in model.parameters()) / 1e9, 1)
    assert sizes == {
        "qwen3.5-0.8b": 0.8,
        "qwen3.5-2b": 1.9,
        "qwen3.5-4b": 4.2,
        "qwen3.5-9b": 9.0,
        "qwen3.5-27b": 26.9,
        "qwen3.5-35b-a3b": 34.7,
        "qwen3.5-122b-a10b": 122.1,
        "qwen3.5-397b-a17b": 396.3,
    }


def ahead_of_theirs(theirs: Any, ours: Qwen35, input_ids: Tensor) -> Tensor:
    """One document's logits of the token after the next, by their modules."""
    module = hf_qwen3_5.modeling("qwen3_5")
    weights = to_hf(ours.state_dict(), ours.config)
    config = theirs.config

    def norm(name: str) -> Any:
        rms_norm = module.Qwen3_5RMSNorm(config.hidden_size, eps=config.rms_norm_eps).double()
        rms_norm.load_state_dict({"weight": weights[name]})
        return rms_norm

    layer = module.Qwen3_5DecoderLayer(config, config.layer_types.index("full_attention")).double()
    stem = "mtp.layers.0."
    inside = {n.removeprefix(stem): x for n, x in weights.items() if n.startswith(stem)}
    layer.load_state_dict(inside)
    length = input_ids.shape[1]
    hidden = theirs.model(input_ids, use_cache=False).last_hidden_state
    embedded = theirs.model.embed_tokens(torch.roll(input_ids, -1, dims=1))
    pair = (norm("mtp.pre_fc_norm_embedding.weight")(embedded),)
    pair += (norm("mtp.pre_fc_norm_hidden.weight")(hidden),)
    x = torch.cat(pair, dim=-1) @ weights["mtp.fc.weight"].T
    angles = theirs.model.rotary_emb(x, torch.arange(length).expand(3, 1, -1))
    mask = torch.full((1, 1, length, length), -torch.inf, dtype=x.dtype).triu(1)
    x = layer(x, position_embeddings=angles, attention_mask=mask)
    return theirs.lm_head(norm("mtp.norm.weight")(x))


def test_the_mtp_layer_predicts_from_the_hidden_state_and_the_next_token():
    theirs = hf_qwen3_5.build(AHEAD)
    ours = model_of(AHEAD)
    theirs.load_state_dict(to_hf(ours.state_dict(), AHEAD), strict=False)
    input_ids = torch.randint(64, (1, 13))
    after = torch.roll(input_ids, -1, dims=1)[:, None]
    attn_metadata = batch_metadata(ours, Documents.single(1, 13))
    logits, further = ours(input_ids, torch.arange(13)[None], attn_metadata, mtp_input_ids=after)
    with hf_qwen3_5.TrueFP64():
        assert_close(logits, theirs(input_ids, use_cache=False).logits)
        assert_close(further, ahead_of_theirs(theirs, ours, input_ids))


def losses_ahead(model: Any, batch: dict[str, Tensor], attn_metadata: Any) -> Tensor:
    """Sums of both losses over local tokens."""
    names = ("input_ids", "position_ids", "mtp_input_ids")
    ids, position_ids, after = (batch[name] for name in names)
    both = model(ids, position_ids, attn_metadata, mtp_input_ids=after)
    both = [x.full_tensor() if isinstance(x, DTensor) else x for x in both]
    targets = (batch["labels"], batch["mtp_labels"][:, 0])
    return sum(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        for logits, labels in zip(both, targets, strict=True)
    )


def both_losses(mesh: Any, degrees: Degrees, layout: type[SequenceLayout]) -> None:
    """Of the MTP layer and of the model, against one device: every gradient."""
    documents = Documents(ROWS, SEQ_LEN)
    torch.manual_seed(5)
    input_ids = torch.randint(64, (len(ROWS), SEQ_LEN))
    labels = shift_labels(input_ids, documents)
    batch = {
        "input_ids": input_ids,
        "position_ids": torch.randint(40, (3, len(ROWS), SEQ_LEN)),
        "labels": labels,
        **look_ahead(input_ids, labels, documents, depths=1),
    }
    reference, model = model_of(AHEAD), model_of(AHEAD)
    losses_ahead(reference, batch, batch_metadata(reference, documents)).backward()
    axes = ParallelMesh.from_degrees(degrees, "cpu")
    parallelize(model, axes, qwen3_5_plan(AHEAD, axes, RingAttention()))
    mine = slice(axes.rank("batch"), None, axes.size("batch"))
    own = {key: x[:, mine] if key == "position_ids" else x[mine] for key, x in batch.items()}
    documents = Documents(ROWS[mine], SEQ_LEN)
    local, sharded = shard_batch(own, axes, layout, model=model, documents=documents)
    losses_ahead(model, local, sharded.attn_metadata).backward()
    assert_close(gradients(model), gradients(reference))


@pytest.mark.slow_where(lambda degrees, **_: degrees.tp > 1)
@pytest.mark.parametrize(
    ("degrees", "layout"),
    [(Degrees(cp=3), HeadTail), (Degrees(cp=2, tp=2), Contiguous)],
)
def test_both_losses_of_ranks_equal_one_device(degrees, layout):
    """With FSDP, the head and the embedding used twice, and positions of three axes."""
    run_ranks(both_losses, degrees.world, degrees, layout)


def refuse(mesh: Any) -> None:
    axes = ParallelMesh.from_degrees(Degrees(tp=2), "cpu")
    odd = replace(DENSE, delta=replace(DENSE.delta, key_heads=1))
    with pytest.raises(ValueError, match=r"delta.key_heads=1 with tp=2"):
        qwen3_5_plan(odd, axes, RingAttention())


def test_heads_that_tp_does_not_divide_are_refused():
    run_ranks(refuse, 2)


def test_tokens_meet_in_mixers_only():
    """By running it: a changed token changes no other's output once mixers mix nothing."""
    model, seq_len = model_of(EXPERTS).eval(), 37
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ids = torch.arange(seq_len)[None]
    attn_metadata = batch_metadata(model, Documents.single(1, seq_len))
    with mixers_without_mixing(model) as names:
        assert find_mixing(model, lambda: model(ids, ids, attn_metadata), seq_len) == []
    assert len(names) == 5
    assert len(find_mixing(model, lambda: model(ids, ids, attn_metadata), seq_len)) == 5


def test_bad_input_is_one_error_that_says_what_to_change():
    model, documents = model_of(DENSE), Documents.single(1, 8)
    ids, attn_metadata = torch.zeros(1, 8, dtype=torch.int64), batch_metadata(model, documents)
    for shape in ((4, 1, 8), (2, 1, 8), (8,)):
        with pytest.raises(ValueError, match="for time, height and width"):
            model(ids, torch.zeros(shape), attn_metadata)
    with pytest.raises(ValueError, match="metadata of its own batch"):
        model(ids[:, :7], torch.arange(7)[None], attn_metadata)
    with pytest.raises(ValueError, match="num_mtp_layers=0"):
        model(ids, torch.arange(8)[None], attn_metadata, mtp_input_ids=ids[:, None])
    for change, message in (
        ({"num_mtp_layers": 2}, "choose 0 or 1"),
        ({"rotary_dim": 32}, "head_dim=16"),
        ({"num_heads": 3}, "multiple of num_kv_heads"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(DENSE, **change)
    with pytest.raises(ValueError, match="1 to num_experts"):
        replace(EXPERTS.feed_forward, top_k=9)
    with pytest.raises(ValueError, match="sections sum"):
        model_of(replace(DENSE, rope_sections=(1, 1, 1)))(ids, torch.arange(8)[None], attn_metadata)
    with pytest.raises(ValueError, match="hidden_act"):
        config_from_hf({**config_to_hf(DENSE), "hidden_act": "gelu"})
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        config_from_hf({**config_to_hf(DENSE), "attention_dropout": 0.1})
    layer_types = ["full_attention", "linear_attention", "linear_attention"]
    with pytest.raises(ValueError, match="layer_types"):
        config_from_hf({**config_to_hf(DENSE), "layer_types": layer_types})
    with pytest.raises(ValueError, match="knows every parameter"):
        from_hf({"model.layers.0.linear_attn.in_proj_qkvz.weight": ids}, DENSE)


@spmd(ranks=1)
def test_a_plan_gives_convolutions_the_nodes_of_the_delta_rule(mesh):
    axes, delta = ParallelMesh.from_degrees(Degrees(), "cpu"), GatedDeltaCP(ranks_per_node=2)
    plan = qwen3_5_plan(DENSE, axes, RingAttention(), delta=delta).cp
    styles = [style for name, style in plan.items() if ".delta." in name]
    assert {type(style) for style in styles} == {GatedDeltaCP, CausalConvCP}
    assert {style.ranks_per_node for style in styles} == {2}
