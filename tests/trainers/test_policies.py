"""TRL's GRPOTrainer on a mesh: rows that others generate, and rewards, are those of one process."""

import re
import warnings
from asyncio import CancelledError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from torch.testing import assert_close
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.huggingface.left_padding import left_padding, moved_back, moved_to_right
from dtcp.huggingface.whole_rows import WholeRows
from dtcp.parallelize import parallelize_hf
from dtcp.trainers import MeshTrainerMixin
from dtcp.trainers.policy import PolicyRows, _asked_by_first_rank, _LogOfFirstRanks
from dtcp.trainers.policy_arguments import arguments_by_name, check_policy
from tests.harness.hf_models import build
from tests.harness.run_script import run_forked
from tests.harness.spmd import spmd

ONE_RANK = ParallelMesh(Degrees(), None, *[None] * 7)
EVERY = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo", "gspo")
CORRECTED = ("corrected", "corrected_tokens")
SERVER, SYNCED = {"use_vllm": True, "vllm_mode": "server"}, {"sync_weights": len}
BOUND = 1e-5


class MeshGRPOTrainer(MeshTrainerMixin, GRPOTrainer):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peers", "on_mesh"),
    [
        # Every loss over cp, adapters and references too; the loader's part beside dp.
        (1, {"cp": (*EVERY, "synced", "adapted", "shared", *CORRECTED), "cp_tp": ("dapo",)}),
        (2, {"dp": ("bnpo", "vespo"), "dp_cp": ("unbalanced",)}),
    ],
    ids=["one process", "two processes"],
)
def test_policy_on_a_mesh_learns_and_logs_what_trls_own_processes_do(tmp_path, peers, on_mesh):
    """Logs, completions, and what each weight has become after steps on old rollouts."""
    path, cases = tmp_path / "plain.pt", dict.fromkeys(sum(on_mesh.values(), ()))
    script = "tests/trainers/policies.py"
    plain = run_forked(script, str(path), "plain", *cases, ranks=0 if peers == 1 else peers)
    assert plain.code == 0, plain.errors[-3000:]
    for axes, own in on_mesh.items():
        ranks = 4 if "_" in axes else 2
        ended = run_forked(script, str(path), axes, *own, ranks=ranks)
        assert ended.code == 0, ended.output[-3000:]
        assert re.findall(r"^(\w+): at most", ended.printed, re.M) == list(own)


def rows_padded_on_the_left():
    """Prompts of 6 and 3 tokens, and completions of 4 and 6."""
    mask = torch.zeros(2, 12, dtype=torch.int64)
    mask[0, :10] = mask[1, 3:] = 1
    ids = torch.randint(1, 64, mask.shape, generator=torch.Generator().manual_seed(3)) * mask
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_rows_padded_on_the_left_are_moved_to_the_right_and_back():
    rows = rows_padded_on_the_left() | {"margin": torch.ones(2)}
    padding = left_padding(rows)
    assert padding.tolist() == [0, 3]
    moved = moved_to_right(rows, padding)
    assert moved["input_ids"].shape == (2, 10)  # no longer than the longest
    assert moved["attention_mask"].sum(1).tolist() == [10, 9]
    assert left_padding(moved) is None
    assert moved["input_ids"][1, :9].equal(rows["input_ids"][1, 3:])
    assert moved["margin"] is rows["margin"]
    back = moved_back({"ids": moved["input_ids"]}, padding, 12)
    assert back["ids"].equal(rows["input_ids"])


@spmd(ranks=2)
def test_policy_gets_the_log_probs_and_gradients_of_rows_padded_on_the_left(mesh):
    """At a temperature; prompts have no loss, and completions lie in the same columns."""
    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    reference, rows = build("qwen3"), rows_padded_on_the_left()
    rows_model = WholeRows(parallelize_hf(build("qwen3"), on), on, temperature=0.7)
    out = rows_model(**rows, fused_lm_head=True)
    expected = torch.zeros_like(out.log_probs)
    entropy = torch.zeros_like(out.entropy)
    for row, (first, last) in enumerate([(0, 10), (3, 12)]):
        ids = rows["input_ids"][row, first:last]
        log_probs = (reference(ids[None]).logits[0, :-1] / 0.7).log_softmax(-1)
        picked = log_probs.gather(-1, ids[1:, None])[:, 0]
        has_loss = rows["labels"][row, first + 1 : last] != -100
        expected[row, first : last - 1] = picked * has_loss
        entropy[row, first : last - 1] = -(log_probs.exp() * log_probs).sum(-1) * has_loss
    assert_close(out.log_probs, expected, rtol=BOUND, atol=BOUND)
    assert_close(out.entropy, entropy, rtol=BOUND, atol=BOUND)
    assert out.label_mask.equal(rows["labels"][:, 1:] != -100)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    out.log_probs.backward(cotangent.to(out.log_probs))
    expected.backward(cotangent.to(expected))
    for (name, p), its in zip(
        rows_model.module.named_parameters(), reference.parameters(), strict=True
    ):
        difference = (p.grad.full_tensor() - its.grad).abs().max()
        assert difference <= BOUND * its.grad.abs().max(), name


@spmd(ranks=4)
def test_first_rank_of_a_group_alone_asks_for_rollouts_and_all_have_them(mesh):
    on = ParallelMesh.from_degrees(Degrees(cp=2, tp=2), "cpu")
    asked = []

    def ask(prompts):
        asked.append(prompts)
        return {"completion_ids": [torch.rand(1).item() for _ in prompts]}

    found = _asked_by_first_rank(ask, on)(["a", "b"])
    assert len(asked) == (dist.get_rank() == 0)
    everyone = [None] * 4
    dist.all_gather_object(everyone, found)
    assert everyone == [everyone[0]] * 4

    class SaysNothing(Exception):
        def __str__(self):
            raise ConnectionError

    def fail(failure):
        raise failure

    for failure, said in {
        ConnectionError("no server"): "ConnectionError: no server",
        CancelledError(): "CancelledError",  # no Exception
        SaysNothing(): "SaysNothing",
    }.items():
        kind, match = type(failure), None
        if dist.get_rank():
            kind, match = RuntimeError, f"got its {said}: mend rollout_func"
        with pytest.raises(kind, match=match):
            _asked_by_first_rank(fail, on)(failure)
    # A rollout that cannot be pickled fails there, too, and nobody waits.
    kind = RuntimeError if dist.get_rank() else Exception
    with pytest.raises(kind, match=r"pickle.*lambda|lambda.*pickle"):
        _asked_by_first_rank(lambda prompts: lambda: None, on)(["a"])


def test_what_is_logged_of_completions_is_the_first_ranks_of_each_group():
    grid = SimpleNamespace(mesh=torch.arange(8).view(1, 2, 2, 2))
    mesh = SimpleNamespace(degrees=Degrees(dp_shard=2, cp=2, tp=2), device_mesh=grid)
    log = _LogOfFirstRanks(mesh, 3)
    log.extend(range(16))
    assert list(log) == [1, 8, 9]
    with pytest.raises(ValueError, match="got 9 values of 8 ranks: give log_extra as many"):
        log.extend(range(9))


@pytest.mark.parametrize(
    ("options", "change", "match"),
    [
        ({"rollout_func": None}, {}, "rollout_func=None: give one that asks a server"),
        ({"tools": [len]}, {}, "tools=.*several turns"),
        ({"environment_factory": dict}, {}, "environment_factory=.*several turns"),
        ({"reward_funcs": torch.nn.Linear(1, 1)}, {}, "reward_funcs=a Linear: give a function"),
        ({}, {"use_vllm": True}, "vllm_mode='colocate': set 'server'"),
        ({}, SERVER, "use_vllm=True: give sync_weights="),
        (SYNCED, SERVER | {"vllm_server_port": 80}, "vllm_server_port=80: leave it out, and say"),
        (SYNCED, SERVER | {"loss_type": "vespo"}, "vllm_importance_sampling_mode='sequence_mask'"),
        ({}, {"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32=True: leave it False"),
        ({}, {"use_adaptive_entropy": True}, "use_adaptive_entropy=True: leave it out, for a"),
    ],
)
def test_policy_asked_for_what_a_mesh_does_not_do_is_refused(tmp_path, options, change, match):
    with pytest.raises(ValueError, match=match):
        policy(tmp_path, change, **options)


class TakesPlaces(GRPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class ChoosesArguments(GRPOTrainer):
    def __init__(self, model, chosen, **kwargs):
        super().__init__(model, args=chosen, **kwargs)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy=True: leave it out, for a"),
        (SERVER, "use_vllm=True: give sync_weights="),
    ],
)
def test_arguments_by_place_and_those_a_class_chooses_are_refused_alike(
    tmp_path, monkeypatch, change, match
):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    import tiny

    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], **change)
    options = {"rollout_func": len, "mesh": ONE_RANK}
    placed = type("Placed", (MeshTrainerMixin, TakesPlaces), {})
    with pytest.raises(ValueError, match=match):
        placed(build("llama"), len, args, **options)
    chosen = type("Chosen", (MeshTrainerMixin, ChoosesArguments), {})
    options |= {"train_dataset": Dataset.from_dict({"prompt": tiny.texts(1)})}
    with pytest.raises(ValueError, match=match):
        chosen(
            tiny.build("windows"),
            chosen=args,
            reward_funcs=len,
            processing_class=tiny.tokenizer(),
            **options,
        )


def test_arguments_by_place_have_the_names_of_the_class_that_takes_them():
    class Own(GRPOTrainer):
        def __init__(self, model, *args, **kwargs):
            super().__init__(model, *args, **kwargs)

    class Folder(GRPOTrainer):
        def __init__(self, folder, *args, **kwargs):
            super().__init__(*args, **kwargs)

    expected = {"model": 1, "reward_funcs": 2, "args": 3}
    for each in (GRPOTrainer, TakesPlaces, Own):
        assert arguments_by_name(each.__mro__, (1, 2), {"args": 3}) == expected
    assert arguments_by_name(Folder.__mro__, (1,), {"args": 3}) == {"folder": 1, "args": 3}
    with pytest.raises(
        ValueError, match=r"got 2 arguments by place, of which 1 have one \(folder\)"
    ):
        arguments_by_name(Folder.__mro__, (1, 2), {})


def test_policy_of_another_trl_is_refused_in_a_sentence():
    args = SimpleNamespace(use_vllm=False)
    with pytest.raises(ImportError, match=r"as TRL 1\.16 has it, got trl=.* has no entropy_coef"):
        check_policy(MeshGRPOTrainer, {"args": args, "rollout_func": len}, None)


def test_weights_for_who_generates_are_refused_where_nobody_does(tmp_path):
    mixed = type("Mixed", (MeshTrainerMixin, Trainer), {})
    with pytest.raises(ValueError, match="got sync_weights with Mixed: leave it out"):
        mixed(build("llama"), mesh=ONE_RANK, sync_weights=len)


def policy(folder, change=(), model=None, **options):
    args = GRPOConfig(str(folder), use_cpu=True, bf16=False, report_to=[], **dict(change))
    given = {"reward_funcs": len, "rollout_func": len, "mesh": ONE_RANK, **options}
    return MeshGRPOTrainer(model or build("llama"), args=args, **given)


def test_policy_whose_reference_would_be_a_copy_of_sharded_adapters_is_refused(tmp_path):
    adapted = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    model = parallelize_hf(adapted, ONE_RANK)
    with pytest.raises(ValueError, match=r"The reference of adapters is a copy .* as it was built"):
        policy(tmp_path, {"beta": 0.1}, model)


def test_policy_counts_the_rows_of_batch_ranks_and_not_of_processes(tmp_path):
    """TRL counts cp and tp ranks, too: prompts would be dealt whose completions nobody asks for."""
    mesh = SimpleNamespace(size=lambda axis: 2)
    given = {"per_device_train_batch_size": 8, "steps_per_generation": 3, "num_generations": 8}
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], **given)
    args.generation_batch_size = 192  # of eight processes
    counted = (
        r"information: .* generation_batch_size=192, .* 2 batch ranks generate 48 .*: set steps"
    )
    with pytest.warns(UserWarning, match=counted):
        PolicyRows._count_generated_rows(SimpleNamespace(args=args, mesh=mesh))
    assert args.generation_batch_size == 48
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        PolicyRows._count_generated_rows(SimpleNamespace(args=args, mesh=mesh))
    args.num_generations = 32
    with pytest.raises(ValueError, match="num_generations=32 with 48 rows of 2 batch ranks"):
        PolicyRows._count_generated_rows(SimpleNamespace(args=args, mesh=mesh))
