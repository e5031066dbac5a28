"""B4, B5: one stored form of weights for every mesh, and every form that transformers writes."""

import tempfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import causal_lm_loss
from dtcp.models.deepseek_v4 import from_hf
from dtcp.parallelize import load_hf, parallelize_hf
from dtcp.parallelize.hf_files import WeightFiles
from tests.harness.hf_models import build, config_of
from tests.harness.spmd import spmd
from tests.models.test_deepseek_v4 import pair

IDS = torch.arange(1, 25)[None]
WHOLE = StateDictOptions(full_state_dict=True)


def on(degrees, kind):
    mesh = ParallelMesh.from_degrees(degrees, "cpu")
    model = parallelize_hf(build(kind), mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2), mesh


def stepped(degrees, kind):
    model, optimizer, mesh = on(degrees, kind)
    causal_lm_loss(model, {"input_ids": IDS, "labels": IDS}, mesh).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def whole_state(model, optimizer):
    weights, state = get_state_dict(model, optimizer, options=WHOLE)
    return weights, state["state"]


@pytest.mark.slow_where(lambda kind, before, **_: (kind == "gpt_oss") == (before.tp == 1))
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    ("before", "afters"),
    [
        (Degrees(tp=2), (Degrees(cp=2), Degrees(dp_shard=2))),
        (Degrees(cp=2), (Degrees(tp=2),)),
    ],
    ids=["tp2-cp2-fsdp2", "cp2-tp2"],
)
@spmd(ranks=2)
def test_B4_checkpoint_of_experts_goes_from_mesh_to_mesh(mesh, kind, before, afters):
    model, optimizer = stepped(before, kind)
    folder = [tempfile.mkdtemp() if mesh.get_local_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder[0])
    expected = whole_state(model, optimizer)

    for after in afters:
        model, optimizer, _ = on(after, kind)
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder[0])
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        assert_close(whole_state(model, optimizer), expected, rtol=0, atol=0)


def test_B4_form_on_one_device_is_that_of_every_mesh():
    model = parallelize_hf(build("qwen3_moe"), one())
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 2, 24, 32)
    ids = IDS % 64
    loss = causal_lm_loss(model, {"input_ids": ids, "labels": ids}, one())
    expected = build("qwen3_moe")(input_ids=ids, labels=ids).loss  # fp32
    assert_close(loss.float(), expected, rtol=1e-5, atol=0)


def empty(kind):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(kind)).double().train()
    return parallelize_hf(model, one())


@pytest.mark.parametrize(
    ("kind", "size"),
    [(kind, "20KB") for kind in ("qwen3_moe", "mixtral", "gpt_oss", "gemma3_text")]
    + [("qwen3", "1GB")],
)
def test_B5_folder_of_save_pretrained_is_read(kind, size, tmp_path):
    """Mixtral's and Qwen's experts are stored one by one; a tied head is stored once."""
    saved = build(kind)
    saved.save_pretrained(tmp_path, max_shard_size=size)
    loaded = load_hf(empty(kind), tmp_path, device="cpu").state_dict()
    for name, x in saved.state_dict().items():
        assert_close(loaded[name].reshape(x.shape), x, rtol=0, atol=0)


def test_B5_deepseek_v4_is_read_as_save_pretrained_writes_it(tmp_path):
    theirs, ours, config = pair()
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    weights = dict(WeightFiles(tmp_path))
    assert {"model.layers.0.attn.attn_sink", "head.weight"} < weights.keys()
    assert_close(from_hf(weights, config), from_hf(theirs.state_dict(), config), rtol=0, atol=0)
    ours.load_state_dict(from_hf(weights, config))


def changed(weights, change):
    name = "model.layers.1.self_attn.k_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "missing expert":
        del weights["model.layers.1.mlp.experts.2.up_proj.weight"]
    elif change == "missing experts":
        for name in [name for name in weights if "layers.1.mlp.experts" in name]:
            del weights[name]
    elif change == "extra layer":
        weights["model.layers.2.self_attn.k_proj.weight"] = weights[name]
    elif change == "NaN":
        weights[name][1, 1] = torch.nan
    elif change == "infinity in an expert":
        weights["model.layers.1.mlp.experts.2.up_proj.weight"][0, 0] = torch.inf
    elif change == "int8":
        weights[name] = weights[name].to(torch.int8)
    else:
        weights[name] = weights[name][:-1]
    return weights


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("missing", r"got none for \['model.layers.1.self_attn.k_proj.weight'\]"),
        ("missing expert", r"model.layers.1.mlp.experts.gate_up_proj"),
        ("missing experts", r"got none for \['model.layers.1.mlp.experts.gate_up_proj'"),
        ("extra layer", r"no use for \['model.layers.2.self_attn.k_proj.weight'\]"),
        ("NaN", r"got model.layers.1.self_attn.k_proj.weight with 1 entries of NaN"),
        ("infinity in an expert", r"got model.layers.1.mlp.experts.gate_up_proj with 1 entries"),
        ("int8", r"got model.layers.1.self_attn.k_proj.weight of dtype torch.int8"),
        ("shape", r"got model.layers.1.self_attn.k_proj.weight of \(15, 32\) for \(16, 32\)"),
    ],
)
def test_B5_weights_that_are_not_the_models_are_refused_by_name(change, match, tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path)
    weights = changed(dict(WeightFiles(tmp_path)), change)
    with pytest.raises(ValueError, match=match):
        load_hf(empty("qwen3_moe"), weights, device="cpu")


def test_B5_weights_that_differ_where_the_model_has_one_are_refused(tmp_path):
    """transformers unties them; the embedding was taken for the head, without a word."""
    weights = dict(build("qwen3").state_dict())
    load_hf(empty("qwen3"), weights, device="cpu")
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"embed_tokens.weight and lm_head.weight that differ"):
        load_hf(empty("qwen3"), weights, device="cpu")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("nothing", r"Weights are read from safetensors, got .* without any"),
        ("no folder", r"which is none: correct the path"),
        ("a shard is gone", r"model-00002-of-.*safetensors"),
        ("one file besides", r"got model.safetensors and model.safetensors.index.json of other"),
        ("a weight twice", r"A tensor is in one file of its folder, got lm_head.weight in model-"),
        ("a shard is cut", r"got .*model-00002-of-.*safetensors .*: copy it again"),
    ],
)
def test_B5_folders_with_files_gone_or_cut_are_refused(change, match, tmp_path):
    model = empty("llama")
    if change == "no folder":
        tmp_path = tmp_path / "none"
    elif change != "nothing":
        build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
        shard = sorted(tmp_path.glob("*.safetensors"))[1]
    if change == "one file besides":
        build("llama").save_pretrained(tmp_path / "other")
        (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    if change == "a weight twice":
        save_file({"lm_head.weight": torch.zeros(64, 32)}, shard)
    if change == "a shard is cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    if change == "a shard is gone":
        shard.unlink()
    with pytest.raises(ValueError, match=match):
        load_hf(model, tmp_path, device="cpu")


def one() -> ParallelMesh:
    return ParallelMesh(Degrees(), None, *[None] * 7)
