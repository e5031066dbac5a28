"""What a trainer gets for whole rows, and its gradients, held against one device in fp64."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.testing import assert_close

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface.whole_rows import WholeRows
from dtcp.labels import IGNORED
from dtcp.parallelize import parallelize_hf
from tests.harness.hf_models import build
from tests.harness.parity import assert_gradients, gradients
from tests.harness.spmd import spmd

BOUND = 1e-5
"""Relative error: the models' own norms, softmax and rotary tables are fp32 in a model of fp64."""
SEQ_LEN = 24
LENGTHS = (24, 17)
SMOOTHED = {"label_smoothing": 0.1, "z_loss": 0.01}


def padded_rows() -> dict[str, torch.Tensor]:
    """Two rows, one padded, whose first tokens have no loss, as a prompt's have none."""
    ids = torch.randint(1, 64, (2, SEQ_LEN), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(SEQ_LEN) < torch.tensor(LENGTHS)[:, None]).long()
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :4] = IGNORED
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def on_mesh(kind, degrees, **options):
    """A plain model, and the same one on a mesh, called with whole rows."""
    mesh = ParallelMesh.from_degrees(degrees, "cpu")
    model = parallelize_hf(build(kind), mesh)
    return build(kind), WholeRows(model, mesh, **options)


def whole_logits(model, rows):
    """By the unmodified model, row by row: where padding is longer than a window, it gives NaN."""
    logits = [
        model(ids[None, :length]).logits[0]
        for ids, length in zip(rows["input_ids"], LENGTHS, strict=True)
    ]
    return torch.nn.utils.rnn.pad_sequence(logits, batch_first=True)


def log_probs_of(model, rows):
    """Of each next token, and its logits."""
    logits = whole_logits(model, rows)[:, :-1]
    labels = rows["labels"][:, 1:]
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return picked.where(labels != IGNORED, 0), logits, labels != IGNORED


@pytest.mark.slow_where(lambda kind: kind == "gpt_oss")
@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
@spmd(axes={"cp": 2, "tp": 2})
def test_trainer_gets_the_loss_and_gradients_of_one_device(mesh, kind):
    """Smoothed, with a z-loss and, of experts, the balance loss of all tokens."""
    reference, model = on_mesh(kind, Degrees(cp=2, tp=2), **SMOOTHED)
    rows = padded_rows()
    _, logits, has_loss = log_probs_of(reference, rows)
    labels = rows["labels"][:, 1:].flatten()
    expected = F.cross_entropy(logits.flatten(0, 1), labels, label_smoothing=0.1)
    expected = expected + 0.01 * logits[has_loss].logsumexp(-1).square().mean()
    balanced = {}
    if kind == "qwen3_moe":
        out = reference(
            rows["input_ids"], attention_mask=rows["attention_mask"], output_router_logits=True
        )
        expected = expected + reference.config.router_aux_loss_coef * out.aux_loss
        balanced = {"output_router_logits": True}
    out = model(**rows, **balanced)
    assert_close(out.loss, expected.double(), rtol=BOUND, atol=0.0)
    expected.backward()
    out.loss.backward()
    assert_gradients(model.module, gradients(reference), BOUND)


@pytest.mark.parametrize("kind", ["gemma2", "qwen3"])
@pytest.mark.slow_where(lambda kind: kind == "qwen3")
@spmd(axes={"cp": 2, "tp": 2})
def test_trainer_that_never_holds_logits_gets_the_same_gradients(mesh, kind):
    """Of a head whose logits are capped, and of one whose weight is the embedding's."""
    capped = {"final_logit_softcapping": 6.0} if kind == "gemma2" else {}
    degrees = ParallelMesh.from_degrees(Degrees(cp=2, tp=2), "cpu")
    reference, model = build(kind, **capped), parallelize_hf(build(kind, **capped), degrees)
    rows = padded_rows()
    _, logits, has_loss = log_probs_of(reference, rows)
    expected = F.cross_entropy(logits.flatten(0, 1), rows["labels"][:, 1:].flatten())
    rows_model = WholeRows(model, degrees, linear_head=True)
    widths = []
    model.lm_head.register_forward_hook(lambda *args: widths.append(args[-1].shape[1]))
    loss = rows_model(**rows).loss
    assert widths == [1]
    assert_close(loss, expected, rtol=BOUND, atol=0.0)
    expected.backward()
    loss.backward()
    assert_gradients(rows_model.module, gradients(reference), BOUND)
    # Logits are there where they are asked for.
    assert rows_model(input_ids=rows["input_ids"]).logits.shape == (2, SEQ_LEN, 64)


@spmd(ranks=1)
def test_trainer_of_a_head_that_its_config_does_not_tell_is_refused(mesh):
    _, rows_model = on_mesh("llama", Degrees(), linear_head=True)
    rows_model.module.lm_head.register_forward_hook(lambda *args: 2 * args[-1])
    with pytest.raises(ValueError, match=r"scale=1\.0 and softcap=0\.0 .*linear_head=False"):
        rows_model(**padded_rows())


@spmd(ranks=1)
def test_head_that_trains_more_than_it_multiplies_by_is_refused(mesh):
    """Its adapter, or a scale of each logit, does nothing in the first step."""
    adapted = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["lm_head"]))
    scaled = build("llama")
    scaled.lm_head.logit_scale = torch.nn.Parameter(torch.ones(64))
    mesh = ParallelMesh.from_degrees(Degrees(), "cpu")
    for model, name in ((adapted, "lora_A"), (scaled, "logit_scale")):
        with pytest.raises(ValueError, match=rf"which trains .*{name}.*linear_head=False"):
            WholeRows(parallelize_hf(model, mesh), mesh, linear_head=True)
    copied = get_peft_model(build("llama"), LoraConfig(r=4, modules_to_save=["lm_head"]))
    WholeRows(parallelize_hf(copied, mesh), mesh, linear_head=True)


def total_error(grads, exact):
    """Of all gradients together, relative."""
    errors = [(x.double() - grads[name].double()).square().sum() for name, x in exact.items()]
    return (sum(errors) / sum(x.double().square().sum() for x in exact.values())).sqrt()


@pytest.mark.parametrize("linear_head", [False, True])
@pytest.mark.parametrize("kind", ["gpt_oss", "lfm2"])
@pytest.mark.slow_where(lambda kind, linear_head: (kind, linear_head) != ("lfm2", True))
@spmd(ranks=2)
def test_trainer_under_autocast_is_as_near_to_fp32_as_one_device(mesh, kind, linear_head):
    """As bf16=True has it: attention, a convolution and the head compute in bf16."""
    parallel_mesh = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    exact, single, model = (build(kind).float() for _ in range(3))
    parallelize_hf(model, parallel_mesh)
    options = {"linear_head": linear_head, "autocast": torch.bfloat16}
    rows_model = WholeRows(model, parallel_mesh, **options)
    ids = padded_rows()["input_ids"][:1]
    exact(ids, labels=ids).loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        expected = single(ids, labels=ids).loss
    expected.backward()
    loss = rows_model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=2**-7, atol=0.0)
    grads, single_grads, exact_grads = map(gradients, (model, single, exact))
    exact_grads = {name: x for name, x in exact_grads.items() if x is not None}
    grads = {name: x.reshape(exact_grads[name].shape) for name, x in grads.items() if x is not None}
    error, single_error = (total_error(x, exact_grads) for x in (grads, single_grads))
    assert 0 < error <= 1.5 * single_error
    assert rows_model(input_ids=ids).logits.dtype == torch.float32


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2"])
@pytest.mark.slow_where(lambda kind, ranks: (kind, ranks) != ("gpt_oss", 2))
@spmd(ranks=(2, 3))
def test_trl_gets_log_probs_of_whole_rows_and_their_gradients(mesh, ranks, kind):
    """As a preference loss reads them, and what is logged beside: entropy, accuracy, logits."""
    reference, model = on_mesh(kind, Degrees(cp=ranks))
    rows = padded_rows()
    log_probs, logits, has_loss = log_probs_of(reference, rows)
    out = model(**rows, fused_lm_head=True, use_cache=False)
    assert_close(out.log_probs, log_probs, rtol=BOUND, atol=1e-12)
    probability = logits.softmax(-1)
    expected = {
        "entropy": -(probability * probability.log()).sum(-1),
        "mean_logits": logits.mean(-1),
        "log_sum_sq_probs": probability.square().sum(-1).log(),
    }
    for name, value in expected.items():
        assert_close(out[name], value.detach().where(has_loss, 0), rtol=1e-4, atol=1e-9)
    assert torch.equal(out.label_mask, has_loss)
    top1 = logits.argmax(-1) == rows["labels"][:, 1:]
    assert torch.equal(out.is_top1, top1 & has_loss)
    for each in (out.log_probs, log_probs):
        chosen, rejected = each.sum(1)
        (-F.logsigmoid(0.5 * (chosen - rejected))).backward()
    assert_gradients(model.module, gradients(reference), BOUND)


@spmd(axes={"tp": 2})
def test_trainer_gets_whole_logits_where_it_asks_for_them(mesh):
    reference, model = on_mesh("gemma2", Degrees(tp=2))
    rows = padded_rows()
    whole = whole_logits(reference, rows)
    filled = rows["attention_mask"] > 0
    model.gathers_logits = True
    for out in (model(**rows), model(**{k: x for k, x in rows.items() if k != "labels"})):
        difference = (out.logits[filled] - whole[filled]).abs().max()
        assert difference <= BOUND * whole.abs().max()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"use_cache": True}, "a call with a cache"),
        ({"cache": object()}, "a call with a cache"),
        ({"cache_params": object()}, "a call with a cache"),
        ({"shift_labels": torch.ones(2, SEQ_LEN)}, "collators give them that cut rows for ranks"),
        ({"attention_mask": torch.ones(2, SEQ_LEN).tril().flip(1).long()}, "pad on the right"),
        ({"position_ids": torch.arange(12, 12 + SEQ_LEN)[None]}, "count each document from 0"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"fused_lm_head": True, "labels": None}, "fused_lm_head=True with Llama"),
    ],
)
@spmd(ranks=1)
def test_trainer_that_calls_its_model_otherwise_is_refused(mesh, change, match):
    _, model = on_mesh("llama", Degrees())
    with pytest.raises(ValueError, match=match):
        model(**{**padded_rows(), **change})


@spmd(ranks=1)
def test_trainer_that_generates_on_the_mesh_is_refused(mesh):
    _, model = on_mesh("llama", Degrees())
    with pytest.raises(ValueError, match="generate"):
        model.module.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2)


@spmd(ranks=2)
def test_trainer_whose_collator_cuts_rows_for_cp_ranks_is_refused(mesh):
    """Each rank brings its half of the row: other tokens on every rank."""
    _, model = on_mesh("llama", Degrees(cp=2))
    ids = padded_rows()["input_ids"].chunk(2, dim=1)[mesh.get_local_rank()]
    with pytest.raises(ValueError, match="ranks of a cp and tp group read the same rows"):
        model(input_ids=ids, labels=ids)
