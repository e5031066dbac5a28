"""The real Trainers of transformers and TRL on a mesh, by the examples; and what they refuse."""

import json
import re
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments
from trl import (
    BEMACallback,
    DistillationTrainer,
    DPOTrainer,
    RewardTrainer,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from dtcp import TokenDropout
from dtcp.distributed.gathered import free_gathered
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface import WholeRows, shard_hf_batch
from dtcp.huggingface.install import has_mixers
from dtcp.parallelize import Compile, parallelize_hf
from dtcp.parallelize.compile import has_compiled_blocks
from dtcp.trainers import MeshTrainerMixin
from dtcp.trainers.arguments import (
    check_launch,
    check_parts_of_loss,
    check_reference,
    check_training_arguments,
    computes_on_rows,
)
from dtcp.trainers.cached_reference import with_reference_log_probs
from dtcp.trainers.repeated_rows import ignore_repeated
from dtcp.trainers.saved import save_optimizer
from tests.harness.hf_models import build
from tests.harness.run_script import run_forked
from tests.harness.spmd import run_ranks, spmd

ONE_RANK = ParallelMesh(Degrees(), None, *[None] * 7)
KINDS = ("windows and sinks", "windows", "hybrid", "experts")


class MeshTrainer(MeshTrainerMixin, Trainer):
    pass


def run_example(name, folder, kinds_by_ranks):
    """As one process without a mesh, then on ranks, which compare themselves with it."""
    losses = folder / "alone.json"
    every = [kind for kinds in kinds_by_ranks.values() for kind in kinds]
    alone = run_forked(f"examples/{name}.py", str(losses), *every, ranks=0)
    assert alone.code == 0, alone.errors[-3000:]
    for ranks, kinds in kinds_by_ranks.items():
        ended = run_forked(f"examples/{name}.py", str(losses), *kinds, ranks=ranks)
        assert ended.code == 0, ended.errors[-3000:]
        said = re.findall(
            r"^(\S.*): losses|on the mesh: \d|resumed on another: \d|logits \d", ended.printed, re.M
        )
        assert [each for each in said if each] == list(kinds)
        assert len(said) == 4 * len(kinds), ended.printed
    return json.loads(losses.read_text())


def test_trainer_on_two_ranks_trains_saves_and_resumes_as_one_process(tmp_path):
    """With windows and sinks, padded rows, accumulation, clipping and evaluation."""
    losses = run_example("hf_trainer", tmp_path, {2: KINDS[:1]})
    assert [each["step"] for each in losses[KINDS[0]]] == [1, 2, 2, 3, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "on_two", "on_four"),
    [
        # Windows and sinks: above.
        ("hf_trainer", ("windows", "experts"), "hybrid"),
        ("trl_sft", KINDS[:3], "experts"),
        # Windows: among the preferences of test_options.py.
        ("trl_dpo", KINDS[2:], "windows and sinks"),
        ("trl_lora", ("windows and sinks", *KINDS[2:]), "windows"),
        # Whole models, and adapters beside a head of their own.
        ("trl_reward", KINDS[::3], "experts with adapters"),
    ],
    ids=["hf_trainer", "trl_sft", "trl_dpo", "trl_lora", "trl_reward"],
)
def test_trainer_of_an_example_trains_saves_and_resumes_as_one_process(
    tmp_path, name, on_two, on_four
):
    """Cp beside tp, and dp beside cp, on four ranks; cp, and dp, on two of the other kinds."""
    run_example(name, tmp_path, {4: (on_four,), 2: on_two})


@pytest.mark.slow
def test_trainer_of_adapters_over_quantized_weights_trains_as_one_process(tmp_path):
    pytest.importorskip("bitsandbytes")
    run_example("hf_qlora", tmp_path, {4: ["windows"], 2: ["hybrid"]})


@pytest.mark.slow
def test_trainer_of_ones_own_trains_saves_and_resumes_as_one_process():
    ended = run_forked("examples/own_loop.py", ranks=4)
    assert ended.code == 0, ended.errors[-3000:]
    assert len(re.findall("from one process, logits", ended.printed)) == len(KINDS)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"torch_compile_mode": "max-autotune"}, "blocks are compiled one by one"),
        ({"ddp_find_unused_parameters": True}, "ddp_find_unused_parameters=True: leave it out"),
        ({"ddp_static_graph": True}, "ddp_static_graph=True: leave it out"),
        ({"save_on_each_node": True}, "one rank writes, into a folder that all ranks read"),
        ({"enable_jit_checkpoint": True}, "a signal reaches ranks at different steps"),
        ({"bf16_full_eval": True}, "weights stay as they are trained"),
        ({"neftune_noise_alpha": 5.0}, "noise would depend on the mesh"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True: choose"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True: leave it"),
        ({"train_sampling_strategy": "batch_rebalance"}, "not to batch ranks"),
        ({"debug": "underflow_overflow"}, "a rank has shards"),
    ],
)
def test_trainer_refuses_arguments_that_a_mesh_would_ignore(tmp_path, change, match):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **change)
    with pytest.raises(ValueError, match=match):
        check_training_arguments(args, ONE_RANK)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"even_batches": False}, "even_batches=False: leave it True, for a rank without"),
        ({"split_batches": True}, "split_batches=True: leave it False, .* weigh losses by them"),
    ],
)
def test_trainer_whose_batch_ranks_would_count_rows_otherwise_is_refused(tmp_path, change, match):
    two = SimpleNamespace(size=lambda axis: 2)
    args = arguments(tmp_path, accelerator_config=change)
    with pytest.raises(ValueError, match=match):
        check_training_arguments(args, two)


def test_trainer_with_an_optimizer_that_knows_no_shards_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got optim='adafactor': set one of adamw_torch, .*sgd"):
        MeshTrainer(build("llama"), arguments(tmp_path, optim="adafactor"), mesh=ONE_RANK)


@pytest.mark.parametrize(("rank", "kept"), [(0, 2), (1, 1), (2, 0)])
def test_trainer_ignores_rows_that_a_loader_repeats_at_its_end(rank, kept):
    """Nine rows, dealt to three ranks by two: the last six are three, and the first three again."""
    mesh = SimpleNamespace(size=lambda axis: 3, rank=lambda axis: rank)
    loader = SimpleNamespace(total_batch_size=6)
    state = SimpleNamespace(in_dataloader=True, remainder=3, active_dataloader=loader)
    labels = torch.arange(1, 9).view(2, 4)
    for ended in (False, True):
        batch = {"labels": labels}
        state.end_of_dataloader = ended
        ignore_repeated(batch, state, mesh)
        real = kept if ended else 2
        assert batch["labels"][:real].equal(labels[:real])
        assert (batch["labels"][real:] == -100).all()
    assert labels.min() == 1


def test_trainer_that_does_not_know_of_all_ranks_is_refused(tmp_path):
    """Started without torchrun's environment it would save on every rank, and deal no rows."""
    mesh = ParallelMesh(Degrees(cp=2), None, *[None] * 7)
    model = parallelize_hf(build("llama"), ONE_RANK)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="num_processes=1 for 2 ranks: start them by torchrun"):
        MeshTrainer(model, args, mesh=mesh)


@pytest.mark.parametrize("trainer", [RLOOTrainer, DistillationTrainer, ORPOTrainer])
def test_trl_trainer_that_generates_its_rows_is_refused(trainer):
    mixed = type("Mixed", (MeshTrainerMixin, trainer), {})
    with pytest.raises(TypeError, match=f"got {trainer.__name__}: let a plain model generate"):
        mixed(build("llama"), mesh=ONE_RANK)


def test_callback_that_would_copy_a_sharded_model_whole_is_refused(tmp_path):
    match = "got BEMACallback, which copies it whole: leave it out"
    with pytest.raises(TypeError, match=match):
        MeshTrainer(build("llama"), arguments(tmp_path), mesh=ONE_RANK, callbacks=[BEMACallback()])
    trainer = MeshTrainer(build("llama"), arguments(tmp_path), mesh=ONE_RANK)
    with pytest.raises(TypeError, match=match):
        trainer.add_callback(BEMACallback)


def test_trainer_that_would_predict_by_generating_is_refused(tmp_path):
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], predict_with_generate=True
    )
    with pytest.raises(ValueError, match="predict_with_generate=True: leave it False: save"):
        check_training_arguments(args, ONE_RANK)


def test_trl_trainer_that_would_move_activations_to_the_host_is_refused(tmp_path):
    args = SFTConfig(str(tmp_path), use_cpu=True, report_to=[], activation_offloading=True)
    with pytest.raises(ValueError, match="activation_offloading=True: recompute activations"):
        check_training_arguments(args, ONE_RANK)


def test_trainer_keeps_rows_on_the_host_unless_its_loss_is_computed_of_them():
    """A loss by transformers' own compute_loss reads the model's outputs alone."""

    class Own(MeshTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(**inputs).logits.mean() + inputs["labels"].sum()

    assert not computes_on_rows(MeshTrainer)
    assert computes_on_rows(Own)
    assert computes_on_rows(type("Mixed", (MeshTrainerMixin, DPOTrainer), {}))


def test_trl_reference_computed_beforehand_of_a_stream_is_refused():
    rows = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True with a stream"):
        with_reference_log_probs(SimpleNamespace(), rows, 1, lambda batch: batch)


def arguments(folder, **options):
    return TrainingArguments(str(folder), use_cpu=True, report_to=[], **options)


@pytest.mark.parametrize("given", ["model", "model_init"])
def test_trainer_puts_a_model_on_its_mesh_as_it_is_asked_to(tmp_path, given):
    asked = []

    def place(model, mesh, **options):
        asked.append(options)
        return parallelize_hf(model, mesh, **options)

    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    model = (
        {"model": build("llama")} if given == "model" else {"model_init": lambda: build("llama")}
    )
    trainer = MeshTrainer(**model, args=args, mesh=ONE_RANK, place=place)
    assert asked == [{"compile": Compile("aot_eager")}]
    assert has_mixers(trainer.model) and has_compiled_blocks(trainer.model)


def test_trainer_told_to_compile_takes_a_model_that_was_placed_so_and_no_other(tmp_path):
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    placed = parallelize_hf(build("llama"), ONE_RANK, compile=Compile("aot_eager"))
    assert MeshTrainer(placed, args, mesh=ONE_RANK).model is placed
    with pytest.raises(ValueError, match=r"LlamaForCausalLM that was placed without: pass compile"):
        MeshTrainer(parallelize_hf(build("llama"), ONE_RANK), args, mesh=ONE_RANK)


def test_trainer_of_no_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match="got model of type str: build it"):
        MeshTrainer("llama", arguments(tmp_path), mesh=ONE_RANK)


def test_trainer_with_an_optimizer_of_a_model_that_is_not_on_the_mesh_is_refused(tmp_path):
    mine, other = build("llama"), build("llama")
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="parameters of others: call parallelize_hf"):
        MeshTrainer(mine, arguments(tmp_path), mesh=ONE_RANK, optimizers=(optimizer, None))


def test_trl_trainer_that_would_copy_sharded_lora_is_refused():
    mixed = type("Mixed", (MeshTrainerMixin, DPOTrainer), {})
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"The reference of adapters is a copy .* as it was built"):
        mixed(parallelize_hf(model, ONE_RANK), mesh=ONE_RANK)


def test_trainer_without_a_reference_takes_lora_that_is_on_its_mesh(tmp_path):
    adapted = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    model = parallelize_hf(adapted, ONE_RANK)
    for trainer in (MeshTrainer, type("Mixed", (MeshTrainerMixin, SFTTrainer), {})):
        check_reference(trainer, {"model": model})
    assert MeshTrainer(model, arguments(tmp_path), mesh=ONE_RANK).model is model


def test_trainer_launched_with_a_parallelism_of_accelerate_is_refused():
    state = SimpleNamespace(fsdp_plugin=object(), deepspeed_plugin=None)
    accelerator = SimpleNamespace(num_processes=1, state=state)
    with pytest.raises(ValueError, match="got fsdp_plugin of a configuration of accelerate"):
        check_launch(accelerator, ONE_RANK)


def test_trainer_takes_dropout_of_adapters_and_refuses_that_of_attention(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], lora_dropout=0.05)
    trainer = MeshTrainer(
        get_peft_model(build("llama"), config), arguments(tmp_path), mesh=ONE_RANK
    )
    dropouts = [x for x in trainer.model.modules() if isinstance(x, TokenDropout)]
    assert dropouts and all(x.p == 0.05 for x in dropouts)
    disable_dropout_in_model(trainer.model)  # as TRL's trainers do once the model is on the mesh
    assert all(x.p == 0 for x in dropouts)
    with pytest.raises(ValueError, match=r"dropout=0.1 in training would depend"):
        MeshTrainer(build("llama", attention_dropout=0.1), arguments(tmp_path), mesh=ONE_RANK)


@pytest.mark.parametrize(
    ("trainer", "asked", "refused"),
    [
        (Trainer, {"smoothing": 0.1, "z_loss": 0.01}, None),
        (Trainer, {"smoothing": 0.1, "of_tokens": False}, None),
        (Trainer, {"z_loss": 0.01, "of_tokens": False}, "z_loss=0.01"),
        (Trainer, {"z_loss": 0.01, "compute_loss_func": print}, "z_loss=0.01"),
        (SFTTrainer, {"smoothing": 0.1}, None),
        (SFTTrainer, {"z_loss": 0.01}, "z_loss=0.01"),
        (DPOTrainer, {"smoothing": 0.1}, "label_smoothing_factor=0.1"),
        (RewardTrainer, {"smoothing": 0.1, "of_tokens": False}, "label_smoothing_factor=0.1"),
        (RewardTrainer, {"z_loss": 0.01, "of_tokens": False}, "z_loss=0.01"),
    ],
)
def test_parts_of_a_loss_that_a_trainer_does_not_compute_are_refused(trainer, asked, refused):
    """TRL's losses, those of rows and those of a function leave them out without a word."""
    mine = object.__new__(type("Mine", (MeshTrainerMixin, trainer), {}))
    mine.args = SimpleNamespace(label_smoothing_factor=asked.get("smoothing", 0.0))
    mine.compute_loss_func = asked.get("compute_loss_func")
    expected = (
        pytest.raises(ValueError, match=f"got {refused} with the own loss of Mine")
        if refused
        else nullcontext()
    )
    with expected:
        check_parts_of_loss(mine, asked.get("z_loss", 0.0), of_tokens=asked.get("of_tokens", True))


@spmd(ranks=1)
def test_trainer_smooths_labels_of_rows_as_transformers_does(mesh):
    whole = ParallelMesh.from_degrees(Degrees(), "cpu")
    head = {"head": "SequenceClassification", "num_labels": 3}
    plain, labels = build("llama", **head), torch.tensor([2, 0])
    rows = {"input_ids": torch.randint(1, 64, (2, 12))}
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, label_smoothing_factor=0.3)
        trainer = MeshTrainer(build("llama", **head), args, mesh=whole)
    loss = trainer.compute_loss(trainer.rows_model, {**rows, "labels": labels})
    log_probs = plain(**rows).logits.log_softmax(-1)
    expected = 0.7 * log_probs.gather(1, labels[:, None]).mean() + 0.3 * log_probs.mean()
    torch.testing.assert_close(loss, -expected)
    with pytest.raises(ValueError, match=r"label_smoothing=0.3, z_loss=0.0 with labels of rows"):
        trainer.rows_model(**rows, labels=labels)


def test_workers_of_a_loader_draw_the_random_numbers_of_their_batch_rank(tmp_path):
    """A collator that masks tokens at random masks the same ones on all ranks of a group."""
    args = arguments(tmp_path, dataloader_num_workers=2)
    rows = [{"input_ids": [1, 2]}] * 4
    trainer = MeshTrainer(build("llama"), args, mesh=ONE_RANK, train_dataset=rows)
    trainer.mesh = SimpleNamespace(rank={"batch": 5}.get)
    seeds = trainer.get_train_dataloader().base_dataloader.worker_init_fn.keywords
    assert seeds == {"num_workers": 2, "rank": 5}
    assert trainer.args is args


@spmd(ranks=1)
def test_trainer_given_the_tokens_of_another_world_is_refused(mesh):
    """Counted once more for each rank of a cp group, say, by a get_batch_samples of one's own."""
    whole = ParallelMesh.from_degrees(Degrees(), "cpu")
    with tempfile.TemporaryDirectory() as folder:
        trainer = MeshTrainer(parallelize_hf(build("llama"), whole), arguments(folder), mesh=whole)
    ids = torch.ones(1, 8, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids}
    (batch,), count = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    assert count == 7
    with pytest.raises(ValueError, match="num_items_in_batch=14 where there are 7"):
        trainer.training_step(trainer.rows_model, batch, 2 * count)


@spmd(ranks=2)
def test_trainer_frees_what_an_evaluation_has_left_gathered(mesh):
    """What steps or averages weights then would do so with copies, which FSDP throws away."""
    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    model = parallelize_hf(build("qwen3"), on)
    ids = torch.arange(1, 17)[None]
    rows = WholeRows(model, on)
    with torch.no_grad():
        rows(input_ids=ids, labels=ids)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    local, sharded = shard_hf_batch({"input_ids": ids}, on, model=model)
    with torch.no_grad():
        model(**local, attn_metadata=sharded.attn_metadata)
    assert not isinstance(model.lm_head.weight, DTensor)
    free_gathered(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())


def save_in_folders(mesh, folder):
    model = torch.nn.Linear(4, 4)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    save_optimizer(model, optimizer, Path(folder, "shared"))
    with pytest.raises(ValueError, match=r"which all hosts share, got .* without __1_0.distcp, "):
        save_optimizer(model, optimizer, Path(folder, f"of_rank_{dist.get_rank()}"))


def test_never_silent_hosts_that_save_parts_of_an_optimizer_in_folders_of_their_own(tmp_path):
    run_ranks(save_in_folders, 2, str(tmp_path))


def test_checkpoint_that_is_begun_anew_no_longer_says_that_it_is_whole(tmp_path, monkeypatch):
    """Where a run ends amid writing it, an old state would let another go on from a mixture."""
    trainer = MeshTrainer(build("llama"), arguments(tmp_path), mesh=ONE_RANK)
    state = tmp_path / "checkpoint-0" / "trainer_state.json"
    state.parent.mkdir()
    state.write_text("{}")

    def full_disk(*args, **kwargs):
        raise OSError("no room")

    monkeypatch.setattr(trainer, "save_model", full_disk)
    with pytest.raises(OSError, match="no room"):
        trainer._save_checkpoint(trainer.model, None)
    assert not state.exists()


def test_trainer_whose_own_loss_is_a_mean_is_not_told_otherwise(tmp_path):
    """It says so by itself; its loss is divided by micro-batches, and gets no count of tokens."""

    class Own(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = False

    batch = {"input_ids": torch.ones(1, 8, dtype=torch.int64)}
    batch["labels"] = batch["input_ids"]
    for base, count in ((Own, None), (Trainer, 7)):
        mixed = type("Mixed", (MeshTrainerMixin, base), {})
        trainer = mixed(build("llama"), arguments(tmp_path), mesh=ONE_RANK)
        assert trainer.model_accepts_loss_kwargs == (count is not None)
        assert trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)[1] == count
    rows = build("llama", head="SequenceClassification", num_labels=2)
    assert not MeshTrainer(rows, arguments(tmp_path), mesh=ONE_RANK).model_accepts_loss_kwargs
