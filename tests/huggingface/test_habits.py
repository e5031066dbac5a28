"""What users of transformers do by habit, with a model on a mesh: done right, or refused."""

from copy import deepcopy

import pytest
import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import WholeRows, causal_lm_loss, shard_hf_batch
from dtcp.parallelize import parallelize_hf
from tests.harness.hf_models import build
from tests.harness.spmd import spmd

IDS = torch.arange(1, 17)[None]


@pytest.mark.parametrize(
    ("method", "argument", "remedy"),
    [
        ("save_pretrained", "folder", r"save_hf\(model, folder\) on every rank"),
        ("push_to_hub", "name", r"save_hf\(model, folder\) on every rank, and upload"),
        ("resize_token_embeddings", 80, "before parallelize_hf"),
    ],
)
@spmd(ranks=2)
def test_a_method_that_needs_whole_weights_is_refused_on_every_rank(
    mesh, method, argument, remedy, tmp_path
):
    """torch's error was met by one rank alone; the others went on, and waited for it."""
    model = parallelize_hf(build("llama"), ParallelMesh.from_degrees(Degrees(cp=2), "cpu"))
    with pytest.raises(ValueError, match=f"got {method} of a .*LlamaForCausalLM whose .*{remedy}"):
        getattr(model, method)(tmp_path / argument if method == "save_pretrained" else argument)
    assert not list(tmp_path.iterdir())


@spmd(ranks=2)
def test_whole_weights_of_ones_own_are_saved(mesh, tmp_path):
    """Named or in their place."""
    model = parallelize_hf(build("llama"), ParallelMesh.from_degrees(Degrees(cp=2), "cpu"))
    whole = {key: x.full_tensor() for key, x in model.state_dict().items()}
    # It takes away what it has written.
    model.save_pretrained(tmp_path, dist.get_rank() == 0, dict(whole))
    dist.barrier()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_close(loaded.state_dict(), whole)


@spmd(ranks=1)
def test_a_model_that_no_axis_shards_is_saved_as_ever(mesh, tmp_path):
    """So is its copy, with weights of its own."""
    model = parallelize_hf(build("llama"), ParallelMesh.from_degrees(Degrees(), "cpu"))
    copy = deepcopy(model)
    with torch.no_grad():
        copy.lm_head.weight.zero_()
    for each, folder in ((model, tmp_path / "model"), (copy, tmp_path / "copy")):
        each.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        assert_close(loaded.state_dict(), each.state_dict())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@spmd(ranks=2)
def test_an_optimizer_made_after_an_evaluation_steps_the_models_weights(mesh, mode):
    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    model = parallelize_hf(build("qwen3"), on)
    batch = {"input_ids": IDS, "labels": IDS}
    with mode():
        evaluated = causal_lm_loss(model, batch, on)
        rows = WholeRows(model, on)(**batch)
    dist.all_reduce(evaluated)
    assert_close(rows.loss, evaluated)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    causal_lm_loss(model, batch, on).backward()
    expected = [(p - 0.1 * p.grad).full_tensor().detach() for p in model.parameters()]
    optimizer.step()
    assert_close([p.detach().full_tensor() for p in model.parameters()], expected)


@spmd(ranks=1)
def test_a_key_that_no_model_reads_is_refused_with_what_to_do(mesh):
    """The remedy of other batches, an argument that this function lacks, was named here, too."""
    on = ParallelMesh.from_degrees(Degrees(), "cpu")
    model = parallelize_hf(build("llama"), on)
    batch = {"input_ids": IDS, "labels": IDS, "length": IDS}
    with pytest.raises(ValueError, match=r"\['length'\]: leave it out; .*ShardedBatch\.shard"):
        causal_lm_loss(model, batch, on)


@spmd(ranks=2)
def test_what_shard_hf_batch_gives_is_what_the_model_takes(mesh):
    """Of rows that no layout divides, too: their padding_mask was an argument too many."""
    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    alone, model = build("qwen3"), parallelize_hf(build("qwen3"), on)
    ids = IDS[:, :-1]
    local, sharded = shard_hf_batch({"input_ids": ids}, on, model=model)
    assert local["padding_mask"].shape == (1, 8)
    other = {**local, "padding_mask": ~local["padding_mask"]}
    with pytest.raises(ValueError, match="another padding_mask"):
        model(**other, attn_metadata=sharded.attn_metadata)
    logits = model(**local, attn_metadata=sharded.attn_metadata).logits
    # Its norms are computed in fp32.
    assert_close(sharded.gather(logits).float(), alone(ids).logits.float())


@spmd(ranks=2)
def test_a_layer_put_into_a_sharded_model_is_refused(mesh):
    """Each rank would have a gradient of its own tokens; after a batch without it, too."""
    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    model, batch = parallelize_hf(build("llama"), on), {"input_ids": IDS, "labels": IDS}
    causal_lm_loss(model, batch, on)
    model.lm_head = torch.nn.Linear(32, 64, bias=False).double()
    with pytest.raises(ValueError, match=r"got lm_head.weight .*sharded before it had this weight"):
        causal_lm_loss(model, batch, on)
    model.lm_head.requires_grad_(False)
    assert causal_lm_loss(model, batch, on).isfinite()


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        ("model.layers.0.self_attn", "scaling", 0.7),
        ("model.layers.1.self_attn", "attn_logit_softcapping", None),
        ("model.layers.0.self_attn", "sliding_window", 3),
    ],
)
@spmd(ranks=1)
def test_attention_that_is_changed_after_its_survey_is_refused(mesh, owner, name, value):
    """Its mixer went on with the numbers that the survey had read."""
    on = ParallelMesh.from_degrees(Degrees(), "cpu")
    model = parallelize_hf(build("gemma2"), on)
    setattr(model.get_submodule(owner), name, value)
    with pytest.raises(ValueError, match=r"layer \d attends as it did .*change a model before"):
        causal_lm_loss(model, {"input_ids": IDS, "labels": IDS}, on)


@spmd(ranks=1)
def test_a_balance_loss_that_a_model_does_not_have_is_refused(mesh):
    """It ended in an AttributeError of the config."""
    on = ParallelMesh.from_degrees(Degrees(), "cpu")
    model = parallelize_hf(build("llama"), on)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="LlamaForCausalLM, which has none: set it to False"):
        causal_lm_loss(model, {"input_ids": IDS, "labels": IDS}, on)
