"""train.py on a model of transformers: the losses, a resume on another mesh, and the export."""

import json
import re
import shutil
from copy import deepcopy
from functools import partial

from dtcp.torchtitan.hf_model import SEED, HuggingFaceConfig, huggingface_spec, read_config
from dtcp.torchtitan.section import Section

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.parallelize import parallelize_hf
from dtcp.pretrain.batches import BatchPreparation, batch_documents
from dtcp.pretrain.data import PackedDocuments
from dtcp.pretrain.options import parse
from dtcp.pretrain.tokenizer import Tokenizer
from dtcp.sequence.documents import Documents
from tests.harness.run_script import run_forked
from tests.harness.spmd import spmd
from tests.harness.train_run import PATIENT, losses

ROWS, SEQ_LEN = 2, 128
SETTINGS = {
    "--training.seq_len": SEQ_LEN,
    "--training.local_batch_size": ROWS,
    "--training.steps": 4,
    "--lr_scheduler.warmup_steps": 0,
    "--parallelism.tensor_parallel_degree": 1,
    "--checkpoint.interval": 2,
}
SWITCHES = ("--compile.no-enable", "--validator.no-enable", "--checkpoint.export_hf")


def train(source, folder, *arguments, ranks=2, **changes):
    settings = {**SETTINGS, **{f"--{key.replace('__', '.')}": x for key, x in changes.items()}}
    words = [f"{word}" for pair in settings.items() for word in pair]
    where = ("--model.hf", f"{source}", "--dump_folder", f"{folder}")
    ended = run_forked("train.py", *where, *words, *SWITCHES, *PATIENT, *arguments, ranks=ranks)
    assert ended.code == 0, ended.output[-3000:]
    return losses(ended.output), ended.output


def first_loss(source) -> float:
    """Of the unmodified model on the rows that train.py reads first, each document by itself."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(read_config(source))
    tokenizer = Tokenizer.Config().build(tokenizer_path=".")
    build = partial(PackedDocuments.Config().build, dp_world_size=1, dp_rank=0)
    loader = build(tokenizer=tokenizer, seq_len=SEQ_LEN, local_batch_size=ROWS)
    batch, labels = next(iter(loader))
    each = []
    for row, lengths in enumerate(batch_documents(batch).lengths):
        used = sum(lengths)
        pairs = zip(
            batch["input"][row, :used].split(lengths),
            labels[row, :used].split(lengths),
            strict=True,
        )
        for tokens, targets in pairs:
            logits = model(input_ids=tokens[None], use_cache=False).logits[0]
            each.append(F.cross_entropy(logits, targets, reduction="none")[targets >= 0])
    return float(torch.cat(each).mean())


@pytest.mark.slow
def test_trainer_of_torchtitan_trains_resumes_and_exports_a_model_of_transformers(tmp_path):
    found, _ = train("gemma3_text", tmp_path / "run")
    assert list(found) == [1, 2, 3, 4] and found[4] < found[1]
    assert_close(found[1], first_loss("gemma3_text"), rtol=0, atol=1e-5)

    exported = tmp_path / "run/hf"
    plain = AutoModelForCausalLM.from_pretrained(exported)
    assert json.loads((exported / "config.json").read_text())["model_type"] == "gemma3_text"
    # Filled with the exported weights, torchtitan's model goes on where the run ended.
    again, _ = train(exported, tmp_path / "more", ranks=2, training__steps=1)
    assert 0 < again[1] < found[1]
    assert plain.config.num_hidden_layers == read_config("gemma3_text").num_hidden_layers

    shutil.rmtree(tmp_path / "run/checkpoint/step-4")
    other = {
        "parallelism__context_parallel_degree": 1,
        "parallelism__data_parallel_shard_degree": 2,
        "training__local_batch_size": ROWS // 2,
    }
    resumed, output = train("gemma3_text", tmp_path / "run", **other)
    assert "step-2" in output and list(resumed) == [3, 4]
    assert_close(list(resumed.values()), [found[3], found[4]], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3_moe"])
def test_stages_train_resume_and_export_as_a_run_without_them_does(tmp_path, kind):
    """A tied head; experts. Each run goes on from a step of the other, the export starts both."""
    pp = {"parallelism__pipeline_parallel_degree": 2, "parallelism__context_parallel_degree": 1}
    whole, said = train(kind, tmp_path / "whole")
    staged, output = train(kind, tmp_path / "staged", **pp)
    assert "stages      1 + 1 layers, 1F1B of 2 micro-batches" in output
    assert ("copied      model.embed_tokens.weight" in output) == (kind == "gemma3_text")
    counts = [re.search(r"([\d,]+) parameters", text)[1] for text in (said, output)]
    assert counts[0] == counts[1]
    assert_close(list(staged.values()), list(whole.values()), rtol=0, atol=2e-5)
    norms = [list(map(float, re.findall(r"grad +(\S+)", text))) for text in (said, output)]
    assert_close(norms[1], norms[0], rtol=1e-4, atol=0)
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / x / "hf") for x in ("whole", "staged")
    ]
    assert_close(*(x.state_dict() for x in models), rtol=1e-3, atol=1e-4)
    for name, before, how in (("on_stages", "whole", pp), ("on_none", "staged", {})):
        shutil.copytree(tmp_path / before, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoint/step-4")
        resumed, output = train(kind, tmp_path / name, **how)
        assert "step-2" in output
        assert_close(list(resumed.values()), [whole[3], whole[4]], rtol=0, atol=2e-5)
    one = {"training__steps": 1}
    again = [train(tmp_path / "staged/hf", tmp_path / f"{len(x)}", **x, **one)[0] for x in ({}, pp)]
    assert_close(again[1][1], again[0][1], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_run_that_goes_on_drops_what_an_unbroken_one_drops(tmp_path):
    """Built on the meta device, on tp, and then on another mesh."""
    config = deepcopy(read_config("gpt2"))
    config.resid_pdrop, config.embd_pdrop, config.attn_pdrop = 0.3, 0.2, 0.0
    config.save_pretrained(tmp_path)
    source = tmp_path / "config.json"
    mesh = {"parallelism__tensor_parallel_degree": 2, "parallelism__context_parallel_degree": 1}
    found, _ = train(source, tmp_path / "run", **mesh)
    shutil.rmtree(tmp_path / "run/checkpoint/step-4")
    copied = shutil.copytree(tmp_path / "run", tmp_path / "other")
    resumed, output = train(source, tmp_path / "run", **mesh)
    assert "step-2" in output and resumed == {3: found[3], 4: found[4]}
    elsewhere, _ = train(source, copied)
    assert_close(list(elsewhere.values()), [found[3], found[4]], rtol=0, atol=2e-5)
    other, _ = train(source, tmp_path / "seed", **mesh, debug__seed=1, training__steps=1)
    assert abs(other[1] - found[1]) > 1e-4


@pytest.mark.slow
def test_seed_checkpoint_of_experts_starts_a_run_of_any_mesh(tmp_path):
    """It is of a model that was not parallelized, and has the form of those that are."""
    alone = {"parallelism__context_parallel_degree": 1, "training__steps": 1}
    train("qwen3_moe", tmp_path / "run", "--checkpoint.create_seed_checkpoint", ranks=1, **alone)
    ep = {"parallelism__expert_parallel_degree": 2, "training__steps": 1}
    found, output = train("qwen3_moe", tmp_path / "run", **ep)
    assert "checkpoint/step-0" in output
    drawn, _ = train("qwen3_moe", tmp_path / "other", training__steps=1)
    assert_close(found[1], drawn[1], rtol=0, atol=1e-5)


def test_weights_have_the_dtype_of_the_setting_and_not_that_of_the_config(tmp_path):
    """The Trainer builds a model in the dtype of --training.dtype, as torch's default one."""
    config = deepcopy(read_config("llama"))
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                model = HuggingFaceConfig(source=str(tmp_path / "config.json")).build()
        finally:
            torch.set_default_dtype(torch.float32)
        assert {x.dtype for x in model.parameters()} == {dtype}
        model.to_empty(device="cpu").init_weights()
        assert {x.dtype for x in model.parameters()} == {dtype}
        assert all(x.isfinite().all() for x in model.parameters())


def test_trainer_of_torchtitan_refuses_what_it_would_not_carry_out(tmp_path):
    config = read_config("mixtral")
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "output_router_logits": True}))
    with pytest.raises(ValueError, match="output_router_logits=True, which asks for a balance"):
        huggingface_spec(str(path))
    for source, hint in {"mistrl": "did you mean mistral", "/no/such/folder": "correct it"}.items():
        with pytest.raises(ValueError, match=rf"transformers knows, got '{source}': {hint}"):
            huggingface_spec(source)
    with pytest.raises(ValueError, match=r"got --dtcp.verify 2 with --model.hf llama: leave"):
        parse(["--model.hf", "llama", "--dtcp.verify", "2"])
    both = ("--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_model_only")
    with pytest.raises(ValueError, match=r"initial_load_in_hf with --model.hf llama: name"):
        parse(["--model.hf", "llama", *both])


def test_a_config_that_transformers_cannot_read_or_build_is_one_sentence(tmp_path):
    """Whatever class of error transformers has for it, by the name of what was given."""
    with pytest.raises(ValueError, match=rf"reads the config of --model.hf {tmp_path}, got"):
        parse(["--model.hf", f"{tmp_path}"])
    path = tmp_path / "config.json"
    for text in ("{", "[]", '{"model_type": "llama", "hidden_size": "wide"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"reads the config of --model.hf {path}, got"):
            parse(["--model.hf", f"{path}"])
    config = deepcopy(read_config("llama"))
    config.hidden_act = "none"
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"builds the model of --model.hf {path}, got"):
        parse(["--model.hf", f"{path}"]).check()


@spmd(ranks=1)
def test_a_document_longer_than_the_learned_positions_is_refused(mesh):
    """One rank would look up what is not there, and the others wait for it."""
    mesh = ParallelMesh.from_degrees(Degrees(), "cpu")
    config = deepcopy(read_config("gpt2"))
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    model = parallelize_hf(AutoModelForCausalLM.from_config(config), mesh)
    preparation = BatchPreparation(mesh, Section(layout="contiguous"), model, training=True)
    most = config.n_positions
    for length in (most, most + 1):
        documents = Documents.single(1, length)
        tokens = torch.zeros(1, length, dtype=torch.int64)
        batch = {"input": tokens, "positions": documents.position_ids(), "documents": documents}
        if length == most:
            preparation.prepared(batch, tokens)
            continue
        with pytest.raises(ValueError, match=rf"got one of {length} in row 0 .* with {most}"):
            preparation.prepared(batch, tokens)
