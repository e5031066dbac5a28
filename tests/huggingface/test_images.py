"""Language models that read images, on a mesh, held against themselves on one device."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.masking_utils import blockwise_overlay, causal_mask_function, or_masks

from dtcp.check.true_fp64 import TrueFP64
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import causal_lm_loss, shard_hf_batch, survey
from dtcp.huggingface.images import IMAGES
from dtcp.huggingface.plain_torch import without_gpu_kernels
from dtcp.huggingface.read_mask import read_block_mask
from dtcp.parallelize import Compile, SelectiveCheckpoint, parallelize_hf
from dtcp.sequence.masks import BlockBidirectional, Causal, SlidingWindow
from tests.harness.hf_models import WINDOWS
from tests.harness.parity import assert_gradients, gradients, summed
from tests.harness.spmd import spmd
from tests.huggingface.image_configs import CONFIGS, IMAGE, TOKENS
from tests.huggingface.test_huggingface import assert_same_step

SEQ_LEN, ROWS = 24, 2


def build(kind, **change):
    text = {**CONFIGS[kind]["text_config"], **change}
    config = AutoConfig.for_model(kind, **{**CONFIGS[kind], "text_config": text})
    with torch.random.fork_rng(), torch.no_grad(), without_gpu_kernels():
        torch.manual_seed(0)
        # What reads nothing, padding, is NaN in GLM-5-Next's eager attention, of models in fp64.
        attention = "sdpa" if kind == "glm5_next" else "eager"
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
        model = model.double()
        if getattr(model.config.get_text_config(), "num_experts", 0):
            # torch 2.13 has no grouped matmul in fp64.
            model.set_experts_implementation("batched_mm")
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def a_batch(kind):
    """Two rows, the second one with padding; the image of each crosses the border of a shard."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(1, 59, (ROWS, SEQ_LEN), generator=generator)
    for row, first in enumerate((10, 4)):
        input_ids[row, first : first + TOKENS] = IMAGE
    types = (input_ids == IMAGE).long()
    mask = torch.ones_like(input_ids)
    mask[1, 22:] = 0
    batch = {"input_ids": input_ids, "labels": input_ids.clone(), "attention_mask": mask}
    if kind in ("qwen3_vl", "qwen4_exp", "hy_v4_vl", "minimax_m3_vl", "glm5_next"):
        # HY-V4 ends each row of an image with a token of its own, and has an image for a video's.
        across, deep = (2, 1) if kind == "hy_v4_vl" else (4, 2)
        shape = ROWS * 4 * across, 3 * deep * 16
        pixels = torch.randn(shape, generator=generator, dtype=torch.float64)
        grid = torch.tensor([[1, 4, across]] * ROWS)
        images = {"pixel_values": pixels, "image_grid_thw": grid}
        # MiniMax-M3 finds images by the ids of their tokens alone.
        marked = {} if kind == "minimax_m3_vl" else {"mm_token_type_ids": types}
        return {**batch, **images, **marked}
    if kind.startswith("gemma4"):
        # Patches with their places: 4 x 4 that are pooled by 2 x 2, or 2 x 2.
        across = 4 if kind == "gemma4" else 2
        places = torch.cartesian_prod(torch.arange(across), torch.arange(across)).flip(1)
        shape = ROWS, across**2, 3 * (16 // across) ** 2
        pixels = torch.rand(shape, generator=generator, dtype=torch.float64)
        images = {"pixel_values": pixels, "image_position_ids": places.expand(ROWS, -1, -1)}
        return {**batch, **images, "mm_token_type_ids": types}
    pixels = torch.randn(ROWS, 3, 64, 64, generator=generator, dtype=torch.float64)
    if kind in ("mistral3", "mistral_large4"):
        return {**batch, "pixel_values": pixels, "image_sizes": torch.tensor([[64, 64]] * ROWS)}
    if kind == "paligemma":
        # Of what is no prompt: each has the image, and text behind it.
        types = (torch.arange(SEQ_LEN) >= torch.tensor([[16], [11]])).long()
    return {**batch, "pixel_values": pixels, "token_type_ids": types}


def one_device(model, batch):
    """The unmodified model on whole rows; fills the gradients."""
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    is_token = batch["attention_mask"][:, 1:] == 1
    labels = batch["labels"][:, 1:].where(is_token, -100)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return loss.detach()


@pytest.mark.slow_where(lambda kind, ranks: (kind, ranks) not in (("gemma3", 2), ("qwen3_vl", 2)))
@pytest.mark.parametrize("kind", CONFIGS)
@spmd(ranks=(2, 3))
def test_images_in_text_equal_one_device(mesh, ranks, kind):
    """Loss and the gradients of language model, projector and vision tower."""
    assert_step_equal(kind, Degrees(cp=ranks))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "gemma4"])
@spmd(ranks=4)
def test_images_beside_tp_equal_one_device(mesh, kind):
    assert_step_equal(kind, Degrees(cp=2, tp=2))


@pytest.mark.slow
@spmd(ranks=2)
def test_lora_of_a_model_that_counts_its_images_equals_one_device(mesh):
    """By peft's plain wrapper, whose forward says nothing of images."""
    assert_step_equal("qwen3_vl", Degrees(cp=2), make=adapted, trained="language_model")


@spmd(ranks=2)
def test_text_whose_frequencies_go_by_the_longest_position_equals_one_device(mesh):
    """Rows of which each shard has another, beyond what the frequencies are made for."""
    assert_step_equal("gemma3", Degrees(cp=2), make=with_dynamic_frequencies)


def with_dynamic_frequencies(kind):
    ntk = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    of_layers = dict.fromkeys(WINDOWS["layer_types"], ntk)
    return build(kind, max_position_embeddings=SEQ_LEN // 2, rope_parameters=of_layers)


@pytest.mark.slow_where(lambda kind, ranks: ranks == 4)
@pytest.mark.parametrize("kind", ["mistral_large4", "glm5_next"])
@spmd(ranks=(2, 4))
def test_layers_that_share_latents_and_choices_equal_one_device(mesh, ranks, kind):
    """Mistral Large 4, and GLM-5-Next with pools of tokens; of packed documents of text."""
    whole = [Degrees(cp=2)] if ranks == 2 else [Degrees(cp=2, tp=2), Degrees(cp=4)]
    pools = kind == "glm5_next"
    if pools and ranks == 4:
        whole.append(Degrees(dp_shard=2, cp=2))
    for degrees in whole:
        reference, model = build(kind), build(kind)
        mesh = ParallelMesh.from_degrees(degrees, "cpu")
        compiled = Compile("aot_eager") if pools and ranks == 2 else None
        checkpoint = SelectiveCheckpoint()
        parallelize_hf(model, mesh, compile=compiled, activation_checkpoint=checkpoint)
        assert_same_step(reference, model, mesh)


def adapted(kind):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=r".*language_model.*\.[qv]_proj")
        config.init_lora_weights = False
        return get_peft_model(build(kind), config).double()


@pytest.mark.slow_where(lambda kind: kind != "gemma4")
@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "gemma4_unified", "minimax_m3_vl"])
@spmd(ranks=2)
def test_packed_documents_with_images_equal_rows_of_their_own(mesh, kind):
    assert_step_equal(kind, Degrees(cp=2), packed=True)


def packed_row(batch):
    """The documents of all rows in one, and positions that start again."""
    images = {key: x for key, x in batch.items() if key in IMAGES}
    tokens = {key: x.reshape(1, -1) for key, x in batch.items() if key not in images}
    positions = torch.arange(SEQ_LEN).repeat(ROWS)[None]
    return {**tokens, **images, "position_ids": positions}


def assert_step_equal(kind, degrees, *, make=build, trained="vis", packed=False):
    reference, model, batch = make(kind), make(kind), a_batch(kind)
    if packed:
        batch["attention_mask"][:] = 1
    mesh = ParallelMesh.from_degrees(degrees, "cpu")
    parallelize_hf(model, mesh)
    # Norms, and a tower that pools, would compute in fp32.
    with TrueFP64():
        expected = one_device(reference, batch)
        share = causal_lm_loss(model, packed_row(batch) if packed else batch, mesh)
        share.backward()
    assert_close(summed(share, mesh), expected, rtol=1e-5, atol=0.0)
    expected_grads = gradients(reference)
    assert_gradients(model, expected_grads, 1e-6, floor=1.0)
    assert any(trained in name for name in expected_grads)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
@spmd(ranks=4)
def test_images_on_a_part_of_the_batch_ranks_equal_one_device(mesh, kind):
    """Ranks without any have no gradients of the vision tower, and sum those of the others."""
    reference, model, batch = build(kind), build(kind), a_batch(kind)
    text = batch["input_ids"][1]
    text[text == IMAGE] = 5
    types = {key: (batch["input_ids"] == IMAGE).long() for key in batch if "type_ids" in key}
    if kind == "paligemma":
        types = {}  # its types tell prompts, not images
    images = {key: x[: len(x) // ROWS] for key, x in batch.items() if key in IMAGES}
    batch = {**batch, **types, **images, "labels": batch["input_ids"].clone()}
    expected = one_device(reference, batch)
    mesh = ParallelMesh.from_degrees(Degrees(dp_shard=2, cp=2), "cpu")
    parallelize_hf(model, mesh)
    rank = mesh.rank("batch")
    mine = {key: x[rank : rank + 1] for key, x in batch.items() if key not in images}
    share = causal_lm_loss(model, {**mine, **(images if rank == 0 else {})}, mesh)
    share.backward()
    assert_close(summed(share, mesh), expected, rtol=1e-5, atol=0.0)
    # What no image reads has zeros here, and no gradient on one device.
    zeros = {name: torch.zeros_like(grad) for name, grad in gradients(model).items()}
    assert_gradients(model, zeros | gradients(reference), 1e-6, floor=1.0)


@pytest.mark.slow
@spmd(ranks=2)
def test_text_alone_and_compiled_images_train_in_one_model(mesh):
    reference, model, batch = build("gemma3"), build("gemma3"), a_batch("gemma3")
    mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    parallelize_hf(model, mesh, compile=Compile("aot_eager"))
    text = {key: batch[key] for key in ("input_ids", "labels", "attention_mask")}
    text["input_ids"] = text["input_ids"] % 59
    for each in (batch, text):
        expected = one_device(reference, each)
        loss = summed(causal_lm_loss(model, each, mesh), mesh)
        assert_close(loss, expected, rtol=1e-5, atol=0.0)


def test_survey_reads_which_layers_see_an_image_as_a_whole():
    """Gemma 4 does in the windows alone, and its unified form beyond their windows, too."""
    image, window = BlockBidirectional(), SlidingWindow(3)
    of_image = Causal() | image
    masks = {
        "gemma3": [of_image & window, of_image],
        "gemma4": [of_image & window, Causal()],
        "gemma4_unified": [(Causal() & window) | image, of_image],
    }
    for kind, expected in masks.items():
        assert [each.mask for each in survey(build(kind)).attentions] == expected
    assert {each.mask for each in survey(build("qwen3_vl")).attentions} == {Causal()}


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((-1, 0, 0, -1, 1, 1), (Causal() | BlockBidirectional(), True)),
        ((-1, 3, 3, -1, 7, 7), (Causal() | BlockBidirectional(), True)),
        ((-1, 0, 0, -1, 0, 0), (None, False)),
        ((0, 1, 1, 0, 2, 2), (None, False)),
    ],
)
def test_a_table_is_read_as_blocks_if_it_says_the_same(numbers, expected):
    """Images that see one another, and text that sees what comes behind it, are something else."""
    block = torch.tensor([[-1, 0, 0, -1, 1, 1]])
    function = or_masks(causal_mask_function, blockwise_overlay(torch.tensor([numbers])))
    assert read_block_mask(function, block) == expected


@spmd(ranks=1)
def test_packed_documents_with_positions_of_images_are_refused(mesh):
    model, batch = build("qwen3_vl"), a_batch("qwen3_vl")
    mesh = ParallelMesh.from_degrees(Degrees(), "cpu")
    parallelize_hf(model, mesh)
    del batch["attention_mask"]
    batch["position_ids"] = torch.arange(SEQ_LEN).remainder(16).expand(ROWS, -1)
    with pytest.raises(ValueError, match=r"one document in a row, got several in rows \[0, 1\]"):
        shard_hf_batch(batch, mesh, model=model)
    # transformers takes these for those of all axes.
    batch["position_ids"] = torch.arange(SEQ_LEN).expand(ROWS, -1)
    with pytest.raises(ValueError, match=r"position_ids of shape \(2, 24\) beside images: leave"):
        shard_hf_batch(batch, mesh, model=model)
    embeds = {**batch, "input_ids": None, "inputs_embeds": torch.zeros(ROWS, SEQ_LEN, 32)}
    with pytest.raises(ValueError, match="give input_ids"):
        shard_hf_batch(embeds, mesh, model=model)


def test_pools_without_the_tokens_behind_the_last_are_refused():
    """The first queries read nothing: zeros of sdpa, in eager attention a mean over all tokens."""
    model = build("glm5_next", index_kpool_always_select_tail=False)
    with pytest.raises(ValueError, match=r"picks pools of 3 tokens and no others.*first 2 queries"):
        survey(model).check()
