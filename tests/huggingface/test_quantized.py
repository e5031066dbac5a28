"""Frozen quantized weights under adapters (QLoRA), held against the same model on one device."""

import json
import logging
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import save_file
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dtcp.distributed.mesh import Degrees
from dtcp.huggingface import WholeRows, install_mixers
from dtcp.huggingface.quantized import quantized_layers, quantized_problems, whole_in_words
from dtcp.huggingface.survey import survey
from dtcp.parallelize import FSDP, Compile, FullCheckpoint, load_hf, save_hf
from dtcp.parallelize.load_hf import fill_hf
from dtcp.parallelize.save_hf import ONE_FILE
from dtcp.softmax import UlyssesAttention
from dtcp.trainers import load_weights
from tests.harness.hf_models import build
from tests.harness.spmd import spmd
from tests.huggingface.test_huggingface import PACKED, a_batch, assert_same_step, one_device
from tests.huggingface.test_lora import DENSE, on_mesh_of
from tests.huggingface.test_picked_latents import SMALL


class ByteLinear(nn.Module):
    """A linear layer whose weight is bytes, with a scale for each output."""

    def __init__(self, linear, *, in_buffer=False):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        stored = (weight / scale + 128).round().to(torch.uint8)
        if in_buffer:
            self.register_buffer("weight", stored)
            self.register_buffer("scale", scale)
        else:
            self.weight = nn.Parameter(stored, requires_grad=False)
            self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, (self.weight.to(x.dtype) - 128) * self.scale.to(x.dtype), self.bias)


class OneScale(ByteLinear):
    """Rounds its input by one scale of all tokens."""

    def forward(self, x):
        scale = x.detach().abs().max() / 127
        return super().forward(x + ((x / scale).round() * scale - x).detach())


class Cut(ByteLinear):
    """Hands no gradient back."""

    def forward(self, x):
        return super().forward(x.detach())


def quantized(make=ByteLinear, *, kind="llama", names=DENSE, in_buffer=False, **change):
    """A model of fp64 with bytes for the weights of its layers."""
    model = build(kind, **change)
    for name, module in list(model.named_modules()):
        if name.endswith(names):
            module.requires_grad_(False)
            model.set_submodule(name, make(module, in_buffer=in_buffer))
    return model


class LoRA(nn.Module):
    """B(A(x)) beside a layer, by hand: peft knows no layer of ours."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"own": nn.Linear(base.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"own": nn.Linear(4, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["own"](self.lora_A["own"](x))


def adapted(**options):
    model = quantized(**options).requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name in quantized_layers(model):
            model.set_submodule(name, LoRA(model.get_submodule(name)).double())
    return model


def assert_adapters_alone_are_trained(model, degrees, **options):
    reference = adapted()
    assert_same_step(reference, *on_mesh_of(model, degrees, **options))
    layers = quantized_layers(model).values()
    weights = [x for layer in layers for x in layer.parameters()]
    assert len(weights) > 10 and not any(isinstance(x, DTensor) for x in weights)
    trained = {name for name, x in reference.named_parameters() if x.grad is not None}
    assert trained and all("lora" in name for name in trained)


FIRST = "model.layers.*.self_attn.q_proj"

CELLS = [
    (Degrees(cp=2), {}),
    (Degrees(cp=2), {"attention": UlyssesAttention()}),
    (Degrees(cp=2), {"compile": Compile("aot_eager")}),
    (Degrees(tp=2), {}),
]


@pytest.mark.parametrize(("degrees", "options"), CELLS)
@spmd(ranks=2)
def test_adapters_over_quantized_weights_equal_one_device(mesh, degrees, options):
    assert_adapters_alone_are_trained(adapted(), degrees, **options)


@pytest.mark.parametrize("degrees", [Degrees(cp=2, dp_shard=2), Degrees(cp=2, tp=2)])
@spmd(ranks=4)
def test_adapters_over_quantized_weights_on_two_axes_equal_one_device(mesh, degrees):
    assert_adapters_alone_are_trained(adapted(), degrees)


@pytest.mark.parametrize("degrees", [Degrees(cp=2), Degrees(tp=2)])
@spmd(ranks=2)
def test_weights_in_buffers_and_what_is_trained_beside_them_equal_one_device(mesh, degrees):
    """Of feed-forwards alone, beside attention that is split, and norms that learn."""
    names = ("gate_proj", "down_proj")
    models = [quantized(names=names, in_buffer=True) for _ in range(2)]
    assert_same_step(models[0], *on_mesh_of(models[1], degrees))


@spmd(ranks=2)
def test_mixed_precision_does_not_cast_quantized_weights(mesh):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, parallel_mesh = on_mesh_of(adapted(), Degrees(cp=2), fsdp=FSDP(mixed_precision=policy))
    before = [x.clone() for layer in quantized_layers(model).values() for x in layer.parameters()]
    batch = a_batch(PACKED)
    loss = WholeRows(model, parallel_mesh)(**batch).loss
    loss.backward()
    after = [x for layer in quantized_layers(model).values() for x in layer.parameters()]
    assert_close(after, before, rtol=0, atol=0)
    assert {x.dtype for x in after} == {torch.uint8, torch.float64}
    assert_close(loss.double(), one_device(adapted(), batch), rtol=0.01, atol=0)


@spmd(ranks=2)
def test_ranks_with_other_quantized_weights_are_refused(mesh):
    model = adapted()
    layer = next(iter(quantized_layers(model).values()))
    layer.weight.data += dist.get_rank()
    with pytest.raises(ValueError, match="weights differ"):
        on_mesh_of(model, Degrees(cp=2))
    fewer = adapted(names=DENSE[dist.get_rank() :])  # on rank 1
    with pytest.raises(ValueError, match="weights differ"):
        on_mesh_of(fewer, Degrees(cp=2))


@spmd(ranks=2)
def test_a_quantized_model_is_not_saved_or_filled_whole(mesh):
    model, _ = on_mesh_of(adapted(), Degrees(cp=2))
    with pytest.raises(ValueError, match=r"save_hf writes weights .* save its adapters"):
        save_hf(model, "anywhere")
    with pytest.raises(ValueError, match=r"load_hf fills weights .* from_pretrained"):
        load_hf(model, "anywhere", device="cpu")


def test_a_folder_of_quantized_weights_is_refused_by_name(tmp_path):
    """With scales beside them, that a model of numbers has no use for."""
    save_file({"model.norm.weight": torch.ones(32), "scales": torch.ones(1)}, tmp_path / ONE_FILE)
    said = r"quantized ones \(new: scales, ..\): dequantize them"
    for config, match in (({"quant_method": "new"}, said), (None, "scales")):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        with pytest.raises(ValueError, match=match):
            fill_hf(build("llama"), tmp_path)


@spmd(ranks=2)
def test_quantized_weights_on_the_meta_device_are_refused(mesh):
    with pytest.raises(ValueError, match=r"where they were loaded, got .*q_proj.* on meta"):
        on_mesh_of(adapted().to("meta"), Degrees(cp=2))


def test_the_bytes_of_whole_layers_are_said():
    model = quantized()
    # Per block 2 x 32 x 32 and 2 x 16 x 32 of attention, 3 x 48 x 32 of the feed-forward, less
    # k_proj, which is none of DENSE; and a scale of 8 bytes for each output.
    rows = 32 + 16 + 32 + 2 * 48 + 32
    weights = 2 * 32 * 32 + 16 * 32 + 3 * 48 * 32
    size = f"{2 * (weights + 8 * rows) / 2**20:.3f} MiB"
    assert f"12 layers with quantized weights (ByteLinear; {FIRST}, ..)" in whole_in_words(model)
    assert size in whole_in_words(model) and not whole_in_words(build("llama"))


@spmd(ranks=2)
def test_whole_layers_are_said_once(mesh):
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("dtcp.parallelize.plans").addHandler(handler)
    on_mesh_of(quantized(), Degrees(cp=2))
    assert sum("whole and frozen on each rank" in x for x in said) == 1


def trained_scale(model):
    next(iter(quantized_layers(model).values())).scale.requires_grad_(True)


def head_of_bytes(model):
    model.lm_head = ByteLinear(model.lm_head)


def table_of_bytes(model):
    model.model.layers[0].mlp.table = nn.Parameter(torch.zeros(3, dtype=torch.int8), False)


def unknown_method(model):
    model.quantization_method = "brand_new"
    for name in quantized_layers(model):
        layer = model.get_submodule(name)
        model.set_submodule(name, nn.Linear(layer.in_features, layer.out_features).double())


def threshold(model):
    layer = next(iter(quantized_layers(model).values()))
    layer.state = torch.nn.Module()
    layer.state.threshold = 6.0


@pytest.mark.parametrize(
    ("make", "change", "match"),
    [
        (ByteLinear, trained_scale, r"q_proj \(ByteLinear\).* trains \['scale'\]: freeze them"),
        (ByteLinear, head_of_bytes, r"lm_head \(ByteLinear\).* is the model's head.*skip_modules"),
        (ByteLinear, table_of_bytes, r"mlp \(LlamaMLP\) .*, table of torch.int8, .*a buffer"),
        (ByteLinear, unknown_method, r"quantized \(brand_new\) in no linear layer that is known"),
        (ByteLinear, threshold, r"beyond threshold=6.0 .* llm_int8_threshold=0.0"),
        (OneScale, None, r"other numbers where another token is larger"),
        (Cut, None, r"hands no gradient back"),
    ],
)
def test_quantized_weights_that_are_not_whole_and_frozen_linear_layers_are_refused(
    make, change, match
):
    model = quantized(make)
    if change is not None:
        change(model)
    with pytest.raises(ValueError, match=match):
        install_mixers(model)


@pytest.mark.parametrize("layer", ["kv_b_proj", "weights_proj"])
def test_quantized_layers_whose_weights_are_read_are_refused(layer):
    """Of attention to tokens that an indexer picks, which reads them by itself here."""
    model = quantized(kind="deepseek_v32", names=(layer,), **SMALL)
    refused = survey(model).refused
    assert any(f".{layer} (quantized): this layer is not called" in x for x in refused)


def test_layers_are_tried_where_they_are_whatever_device_new_tensors_are_on():
    """Under torch.set_default_device("cuda") the host's generator was an error of torch."""
    model = quantized()
    with torch.device("meta"):
        assert list(quantized_problems(model)) == []


def test_a_survey_leaves_quantized_layers_as_they_were():
    """bitsandbytes sets its dtype in the first call, and repacks weights in eval mode."""

    class Noting(ByteLinear):
        dtype = None

        def forward(self, x):
            assert self.training
            self.dtype = self.dtype or x.dtype
            return super().forward(x)

    model = quantized(Noting).eval()
    layers = quantized_layers(model).values()
    assert not survey(model).refused
    assert all(layer.dtype is None and not layer.training for layer in layers)


# bitsandbytes computes in fp32 at the most (on a CPU it leaves outputs of fp64 as memory was); what
# is around is fp64, and errors are those of fp32 relative to a gradient's largest value.

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes, of the extra `test`, is not installed"
)
FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
STORED = {
    "nf4": {**FOUR, "bnb_4bit_quant_type": "nf4"},
    "double": {**FOUR, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {**FOUR, "bnb_4bit_quant_type": "fp4"},
    "in bf16": {**FOUR, "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "outliers": {"load_in_8bit": True},
}


def from_bitsandbytes(stored):
    """A model as transformers loads it."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    config = BitsAndBytesConfig(**STORED[stored])
    with tempfile.TemporaryDirectory() as folder:
        plain = build("llama", **sizes).float()
        plain.config.save_pretrained(folder)
        save_file(plain.state_dict(), f"{folder}/{ONE_FILE}", metadata={"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, attn_implementation="eager", dtype=torch.float32
        )


def qlora(stored, *, kbit=False, **config):
    """As peft makes it, with what is not quantized in fp64."""
    model = from_bitsandbytes(stored)
    if kbit:
        model = prepare_model_for_kbit_training(model)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        options = {"r": 4, "target_modules": [*DENSE], "init_lora_weights": False}
        model = get_peft_model(model, LoraConfig(**options | config))
    for x in model.parameters():
        if type(x) is nn.Parameter:
            x.data = x.data.double()
    return model.train()


@needs_bitsandbytes
@pytest.mark.slow_where(
    lambda stored, degrees, options: options or stored not in ("double", "int8")
)
@pytest.mark.parametrize(
    ("stored", "degrees", "options"),
    [
        *((stored, Degrees(cp=2), {}) for stored in STORED if stored != "outliers"),
        ("double", Degrees(tp=2), {}),
        ("double", Degrees(cp=2), {"compile": Compile("aot_eager")}),
        ("int8", Degrees(cp=2), {"compile": Compile("aot_eager")}),
        ("nf4", Degrees(cp=2), {"activation_checkpoint": FullCheckpoint()}),
        ("nf4", Degrees(cp=2), {"attention": UlyssesAttention()}),
    ],
)
@spmd(ranks=2)
def test_bitsandbytes_equals_one_device(mesh, stored, degrees, options):
    assert_same_step(qlora(stored), *on_mesh_of(qlora(stored), degrees, **options))


@needs_bitsandbytes
@pytest.mark.slow_where(lambda degrees: degrees.tp == 1)
@pytest.mark.parametrize("degrees", [Degrees(cp=2, dp_shard=2), Degrees(cp=2, tp=2)])
@spmd(ranks=4)
def test_bitsandbytes_as_peft_prepares_it_equals_one_device(mesh, degrees):
    """Gradient checkpointing, whose embeddings ask for gradients; and a head that is trained."""
    models = [qlora("double", kbit=True, modules_to_save=["lm_head"]) for _ in range(2)]
    assert_same_step(models[0], *on_mesh_of(models[1], degrees))


@needs_bitsandbytes
@spmd(ranks=2)
def test_adapters_over_bitsandbytes_are_saved_as_peft_loads_them(mesh):
    model, parallel_mesh = on_mesh_of(qlora("nf4"), Degrees(cp=2))
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, src=0)
    save_hf(model, folder[0])
    loaded = PeftModel.from_pretrained(from_bitsandbytes("nf4"), folder[0], is_trainable=True)
    expected = dict(qlora("nf4").named_parameters())
    trained = [(name, x) for name, x in loaded.named_parameters() if "lora" in name]
    for name, x in trained:
        assert_close(x.double(), expected[name], rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora" in name:
                x.mul_(2.0)
    load_weights(model, Path(folder[0]))
    for name, _ in trained:
        assert_close(model.get_parameter(name).full_tensor(), expected[name])
    with pytest.raises(ValueError, match=r"merge_and_unload.* save the adapters"):
        model.merge_and_unload()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


@needs_bitsandbytes
@spmd(ranks=2)
def test_an_evaluation_of_bitsandbytes_leaves_gradients_as_they_are(mesh):
    """On CPUs with AVX512-BF16 it packed the weights, and no gradient went through any more."""
    model, parallel_mesh = on_mesh_of(qlora("nf4"), Degrees(cp=2))
    model.eval()
    with torch.no_grad():
        WholeRows(model, parallel_mesh)(**a_batch(PACKED))
    model.train()
    assert_same_step(qlora("nf4"), model, parallel_mesh)


@needs_bitsandbytes
def test_bitsandbytes_that_looks_at_other_tokens_or_is_trained_is_refused():
    import bitsandbytes

    model = from_bitsandbytes("nf4")
    layer = model.model.layers[0].self_attn.q_proj
    model.set_submodule(
        "model.layers.0.self_attn.q_proj",
        bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False),
    )
    with pytest.raises(ValueError, match=r"q_proj \(Linear8bitLt\).* trains \['weight'\]"):
        install_mixers(model)
    with pytest.raises(ValueError, match=r"threshold=6.0.* llm_int8_threshold=0.0"):
        install_mixers(from_bitsandbytes("outliers"))
