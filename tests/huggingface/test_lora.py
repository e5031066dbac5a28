"""LoRA of peft on FSDP x TP x CP, held against the same adapted model on one device."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from safetensors.torch import load_file
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from dtcp import causal_lm_loss
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import install_mixers
from dtcp.huggingface.survey import survey
from dtcp.parallelize import Compile, FullCheckpoint, parallelize_hf, save_hf
from dtcp.parallelize.plans.adapters import adapted_model
from dtcp.parallelize.plans.huggingface_tensor_plan import hf_tensor_plan
from dtcp.trainers import load_weights
from tests.harness.hf_models import build
from tests.harness.spmd import spmd
from tests.huggingface.test_huggingface import (
    PACKED,
    a_batch,
    assert_same_step,
    on_mesh,
    one_device,
)

ATTENTION = ("q_proj", "v_proj", "o_proj")
DENSE = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def adapted(kind="llama", targets=DENSE, model=None, config=None, **change):
    """A model of fp64 with adapters that count; the same wherever it is built."""
    model = model or build(kind, **change)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        options = {"r": 4, "target_modules": [*targets], "init_lora_weights": False}
        return get_peft_model(model, LoraConfig(**options | (config or {}))).double()


def on_mesh_of(model, degrees, **options):
    mesh = ParallelMesh.from_degrees(degrees, "cpu")
    return parallelize_hf(model, mesh, **options), mesh


@pytest.mark.parametrize("degrees", [Degrees(cp=2), Degrees(tp=2)])
@spmd(ranks=2)
def test_lora_equals_one_device(mesh, degrees):
    reference = adapted()
    assert_same_step(reference, *on_mesh_of(adapted(), degrees))
    frozen = [p for p in reference.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen) and len(frozen) > 10


@pytest.mark.slow_where(lambda kind, targets: kind != "llama")
@pytest.mark.parametrize(("kind", "targets"), [("llama", DENSE), ("qwen3_moe", ATTENTION)])
@spmd(ranks=4)
def test_lora_on_cp_beside_tp_and_fsdp_equals_one_device(mesh, kind, targets):
    degrees = Degrees(cp=2, tp=2)
    assert_same_step(adapted(kind, targets), *on_mesh_of(adapted(kind, targets), degrees))


@pytest.mark.slow
@spmd(ranks=4)
def test_lora_of_a_hybrid_equals_one_device(mesh):
    """In projections around a convolution, of attention and of feed-forwards."""
    targets = ("q_proj", "in_proj", "w1", "w2")
    degrees = Degrees(cp=2, tp=2)
    assert_same_step(adapted("lfm2", targets), *on_mesh_of(adapted("lfm2", targets), degrees))


@pytest.mark.slow
@spmd(ranks=2)
def test_lora_compiled_and_checkpointed_equals_one_device(mesh):
    options = {"compile": Compile("aot_eager"), "activation_checkpoint": FullCheckpoint()}
    assert_same_step(adapted(), *on_mesh_of(adapted(), Degrees(cp=2), **options))


@pytest.mark.parametrize("lora", [True, False])
@spmd(ranks=2)
def test_gradient_checkpointing_of_transformers_equals_one_device(mesh, lora):
    """As a user switches it on, before or after the call."""
    models = [adapted() if lora else build("llama") for _ in range(2)]
    model, parallel_mesh = on_mesh_of(models[1], Degrees(cp=2))
    model.gradient_checkpointing_enable()
    ran = []
    norm = next(x for name, x in model.named_modules() if name.endswith("0.input_layernorm"))
    norm.register_forward_pre_hook(lambda *_: ran.append(1))
    assert_same_step(models[0], model, parallel_mesh)
    assert len(ran) == 2  # once more in the backward pass


@spmd(ranks=2)
def test_frozen_subset_equals_one_device(mesh):
    models = [build("llama") for _ in range(2)]
    for model in models:
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[0].requires_grad_(False)
    assert_same_step(models[0], *on_mesh_of(models[1], Degrees(cp=2)))


@pytest.mark.parametrize("degrees", [Degrees(cp=2), Degrees(tp=2)])
@spmd(ranks=2)
def test_lora_is_saved_as_peft_loads_it(mesh, degrees):
    model, _ = on_mesh_of(adapted(), degrees)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                (p.to_local() if isinstance(p, DTensor) else p).mul_(2.0)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, src=0)
    save_hf(model, folder[0])
    loaded = PeftModel.from_pretrained(build("llama"), folder[0]).double()
    expected = adapted()
    with torch.no_grad():
        for p in expected.parameters():
            if p.requires_grad:
                p.mul_(2.0)
    assert_close(loaded.state_dict(), expected.state_dict())
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


TIED = {"tie_word_embeddings": True}


def averaged(model):
    """Adapters that are the mean of two, whose weights peft leaves as transposed views."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model.add_adapter("other", model.peft_config["default"])
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "mean")
    model.set_adapter("mean")
    return model.double()


@pytest.mark.parametrize(
    ("config", "change", "then"),
    [
        ({"modules_to_save": ["lm_head"]}, TIED, None),
        ({"trainable_token_indices": [3, 5]}, TIED, None),
        ({"modules_to_save": ["mlp"]}, {}, None),
        ({"layer_replication": [[0, 2], [0, 2]]}, {}, None),
        ({}, {}, averaged),
    ],
    ids=["head", "tokens", "parts", "layers", "mean"],
)
@spmd(ranks=2)
def test_layers_that_peft_puts_around_others_train_as_on_one_device(mesh, config, change, then):
    """A head that was tied, tokens of tied weights that are trained alone, copies of layers and of
    their parts, which have configs of their own, averaged adapters."""
    models = [adapted(targets=ATTENTION, config=config, **change) for _ in range(2)]
    reference, model = models if then is None else map(then, models)
    assert_same_step(reference, *on_mesh_of(model, Degrees(cp=2)))


@pytest.mark.parametrize("resized", [False, True])
@spmd(ranks=2)
def test_adapters_are_saved_with_the_embeddings_that_peft_saves(mesh, resized):
    """One that is adapted, or of another size than that of the model that was adapted."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, src=0)
    base, ours, theirs = (f"{folder[0]}/{name}" for name in ("base", "ours", "theirs"))
    if dist.get_rank() == 0:
        build("llama").save_pretrained(base)
    dist.barrier()

    def made():
        model = build("llama")
        model.config.name_or_path = model.name_or_path = base
        if resized:
            with torch.random.fork_rng():
                torch.manual_seed(2)  # of the rows that are new
                model.resize_token_embeddings(72, mean_resizing=False)
        return adapted(model=model, targets=ATTENTION if resized else ("embed_tokens",))

    model, _ = on_mesh_of(made(), Degrees(cp=2))
    save_hf(model, ours)
    load_weights(model, Path(ours))
    dist.barrier()  # the folder goes when all have read it
    if dist.get_rank() == 0:
        made().save_pretrained(theirs)
        files = [load_file(f"{path}/adapter_model.safetensors") for path in (ours, theirs)]
        assert any("embed_tokens" in name and "lora" not in name for name in files[0])
        assert_close(*files)
        shutil.rmtree(folder[0])
    dist.barrier()


@spmd(ranks=2)
def test_each_adapter_is_loaded_from_where_peft_keeps_it(mesh):
    """The active one was given the default one's weights, and the others none."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, src=0)
    model, _ = on_mesh_of(averaged(adapted()), Degrees(cp=2))
    save_hf(model, folder[0])
    expected = {name: x.full_tensor() for name, x in model.state_dict().items()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(2.0 if "lora" in name else 1.0)
    load_weights(model, Path(folder[0]))
    assert_close({name: x.full_tensor() for name, x in model.state_dict().items()}, expected)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


def test_adapters_that_do_something_around_the_model_are_refused():
    """AdaLoRA adds a loss where the model gives one, which it does not on a mesh."""
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10)
    with pytest.raises(ValueError, match=r"got \['default'\] of AdaLoraModel, .*: use LoRA"):
        adapted_model(get_peft_model(build("llama"), config))


@spmd(ranks=2)
def test_hooks_of_weights_that_shards_replace_are_refused(mesh):
    """As those that keep the gradient of some tokens of an embedding, or of peft's OSF."""
    model = build("llama")
    match = "a refusal on rank 1: see"
    if dist.get_rank() == 1:  # alone, and the other rank does not wait for it
        model.model.embed_tokens.weight.register_hook(lambda grad: 0 * grad)
        match = r"on 1 of these, model.embed_tokens.weight first, which"
    with pytest.raises(ValueError, match=match):
        on_mesh_of(model, Degrees(cp=2))


def test_lora_on_the_weight_of_a_router_is_refused_under_tp():
    """Which peft adds to the weight before its layer is called."""
    config = LoraConfig(r=4, target_modules=["q_proj", "gate"])
    model = get_peft_model(build("qwen3_moe"), config)
    with pytest.raises(ValueError, match=r"added to weight of model.layers.0.mlp.gate before"):
        hf_tensor_plan(model.get_base_model(), 2)


def test_adapters_that_begin_at_a_token_of_the_row_are_refused():
    """Which peft's wrapper looks for in the ids that it is called with: those of a shard."""
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5]
    )
    with pytest.raises(
        ValueError, match=r"got alora_invocation_tokens={'default': \[5\]}, .* LoRA"
    ):
        adapted_model(get_peft_model(build("llama"), config))


@spmd(ranks=2)
def test_adapters_in_fp32_beside_a_base_in_bf16_train(mesh):
    """As peft makes them: the two are gathered in their own dtypes."""
    model = build("llama").to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=list(DENSE)))
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    model, parallel_mesh = on_mesh_of(model, Degrees(cp=2))
    loss = on_mesh(model, parallel_mesh, a_batch(PACKED))
    expected = one_device(build("llama").to(torch.bfloat16), a_batch(PACKED))
    assert_close(loss.double(), expected.double(), rtol=0.05, atol=0.0)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("targets", "options"),
    [(("embed_tokens",), {}), (("q_proj",), {"use_dora": True})],
)
def test_lora_target_that_tp_cannot_split_is_refused(targets, options):
    config = LoraConfig(r=4, target_modules=list(targets), **options)
    model = get_peft_model(build("llama"), config)
    with pytest.raises(ValueError, match="Tensor parallelism splits LoRA on linear layers"):
        hf_tensor_plan(model.get_base_model(), 2)


@pytest.mark.parametrize(
    ("kind", "layer", "rank"),
    [("mamba", "dt_proj", 4), ("jamba", "dt_proj", 4), ("jamba", "conv1d", 64)],
)
def test_lora_on_a_layer_whose_weight_alone_is_read_is_refused(kind, layer, rank):
    """On one device, too, the adapter would be left out."""
    change = {"jamba": {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1}}
    config = LoraConfig(r=rank, target_modules=["in_proj", layer])
    model = build(kind, **change.get(kind, {}))
    inject_adapter_in_model(config, model)
    refused = survey(model).refused
    assert refused and all(f".{layer} (an adapter): " in each for each in refused)
    assert "reads the weight of this layer" in refused[0] and "leave it out" in refused[0]


def test_lora_on_the_head_is_split_as_the_head_is():
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["lm_head"]))
    plan = hf_tensor_plan(model.get_base_model(), 2)
    assert str(plan["lm_head.lora_B.default"]) == str(plan["lm_head.base_layer"])


@pytest.mark.parametrize(
    ("attribute", "value", "match"),
    [
        ("quantization_method", "bitsandbytes", r"\(bitsandbytes\) in no linear .* without quant"),
        ("hf_device_map", {"model": 0, "lm_head": "cpu"}, r"several devices \(0, cpu\)"),
    ],
)
def test_lora_on_a_base_that_no_rank_has_whole_is_refused(attribute, value, match):
    """As bitsandbytes and device_map="auto" leave it."""
    model = build("llama")
    setattr(model, attribute, value)
    with pytest.raises(ValueError, match=match):
        install_mixers(model)


@spmd(ranks=2)
def test_prompts_before_the_row_are_refused(mesh):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(build("llama"), config)
    with pytest.raises(ValueError, match=r"got \['default'\], which learn tokens before the row"):
        on_mesh_of(model, Degrees(cp=2))


@spmd(ranks=2)
def test_lora_that_no_mesh_would_train_is_refused(mesh):
    """Around a model that is sharded already, or on experts as one weight."""
    mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    late = get_peft_model(parallelize_hf(build("llama"), mesh), LoraConfig(target_modules=DENSE))
    ids = torch.arange(1, 33)[None]
    with pytest.raises(ValueError, match=r"lora_A.default.weight of a PeftModel .* before"):
        causal_lm_loss(late, {"input_ids": ids, "labels": ids}, mesh)
    targets = {"target_parameters": ["experts.gate_up_proj"], "target_modules": []}
    experts = get_peft_model(build("qwen3_moe"), LoraConfig(**targets))
    with pytest.raises(ValueError, match=r"adapters on .*experts.*: leave experts out"):
        parallelize_hf(experts, mesh)
