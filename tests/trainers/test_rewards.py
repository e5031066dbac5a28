"""Rewards on a mesh: TRL's own code on every rank, and judges that the first ranks alone call."""

import asyncio
import inspect
import re
from collections import defaultdict
from contextlib import contextmanager
from threading import Thread
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from trl import GRPOTrainer

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.trainers.policy import PolicyRows
from tests.harness.spmd import spmd


class JudgedRows(PolicyRows, GRPOTrainer):
    """What TRL's code reads of a trainer while it judges."""

    def __init__(self, mesh, *judges):
        self.mesh, self.state = mesh, SimpleNamespace(global_step=0)
        self.args = SimpleNamespace(report_to=[])
        self.accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=False)
        self.reward_funcs = list(judges)
        self.reward_func_names = [judge.__name__ for judge in judges]
        self.reward_processing_classes, self.environments = [None] * len(judges), None
        self._pending_metrics, self._pending_extra_logs = defaultdict(list), defaultdict(list)

    def judged(self, rows=3):
        texts = [str(row) for row in range(rows)]
        with mock.patch("trl.trainer.grpo_trainer.gather", gathered), self.running_loop():
            return self._calculate_rewards(
                [{}] * rows, texts, texts, [[row] for row in range(rows)]
            )

    @contextmanager
    def running_loop(self):
        if not any(map(inspect.iscoroutinefunction, self.reward_funcs)):
            yield
            return
        self.async_loop = asyncio.new_event_loop()
        thread = Thread(target=self.async_loop.run_forever)
        thread.start()
        try:
            yield
        finally:
            self.async_loop.call_soon_threadsafe(self.async_loop.stop)
            thread.join()
            self.async_loop.close()


def gathered(own):
    """As accelerate does in ranks that it knows of."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.cat(parts)


@spmd(ranks=4)
def test_a_judge_is_asked_by_the_first_rank_of_a_group_and_all_have_what_it_said(mesh):
    """Functions, asynchronous ones, None, metrics and columns; judges that differ by rank."""
    rank, asked = dist.get_rank(), []

    def judge(prompts, completion_ids, log_metric, log_extra, **_):
        asked.append("judge")
        log_metric("score", torch.tensor(rank + 0.5))
        log_extra("who", [f"{rank}:{text}" for text in prompts])
        return [None if ids[0] == 2 else rank + ids[0] / 3 for ids in completion_ids]

    async def patient(completion_ids, **_):
        await asyncio.sleep(0)
        asked.append("patient")
        return [None if ids[0] == 1 else torch.tensor(rank) for ids in completion_ids]

    rows = JudgedRows(ParallelMesh.from_degrees(Degrees(cp=2, tp=2), "cpu"), judge, patient)
    own = list(rows.reward_funcs)
    rewards = rows.judged()
    assert asked == ([] if rank else ["judge", "patient"])
    assert rows.reward_funcs == own
    expected = torch.tensor([[0, 0], [1 / 3, torch.nan], [torch.nan, 0]])
    assert rewards.allclose(expected, equal_nan=True)
    assert rows._pending_metrics == {"score": [0.5]}
    assert rows._pending_extra_logs == {"who": ["0:0", "0:1", "0:2"]}

    asked.clear()
    rows = JudgedRows(ParallelMesh.from_degrees(Degrees(dp_shard=2, cp=2), "cpu"), judge, patient)
    rewards = rows.judged()
    assert asked == ([] if rank % 2 else ["judge", "patient"])
    expected = torch.tensor([0, 1 / 3, torch.nan, 2, 7 / 3, torch.nan])
    assert rewards[:, 0].allclose(expected, equal_nan=True)
    assert rows._pending_metrics == {"score": [rank // 2 * 2 + 0.5]}


class NoJudge(Exception):
    pass


class SaysNothing(Exception):
    def __str__(self):
        raise NoJudge


@pytest.mark.parametrize(
    ("is_async", "failure", "said"),
    [
        (False, NoJudge("no answer"), "NoJudge: no answer"),
        (True, NoJudge("no answer"), "NoJudge: no answer"),
        (True, asyncio.CancelledError(), "CancelledError"),  # no Exception
        (False, SaysNothing(), "SaysNothing"),
    ],
    ids=["called", "awaited", "cancelled", "says nothing"],
)
@spmd(ranks=2)
def test_a_judge_that_fails_ends_all_ranks_with_its_name_and_what_it_raised(
    mesh, is_async, failure, said
):
    """Ranks of its group, which do not call it, and those of others, whose judges go on."""
    rank = dist.get_rank()
    groups = {"cp": Degrees(cp=2), "batch": Degrees(dp_shard=2)}

    def judge(prompts, **_):
        if rank == failing:
            raise failure
        return [0.0] * len(prompts)

    async def patient(prompts, **kwargs):
        return judge(prompts, **kwargs)

    for failing, degrees in enumerate(groups.values()):
        rows = JudgedRows(ParallelMesh.from_degrees(degrees, "cpu"), patient if is_async else judge)
        name = rows.reward_func_names[0]
        if rank == failing:
            with pytest.raises(type(failure)) as raised:
                rows.judged()
            note = raised.value.__notes__[-1]
            assert note.startswith(f"Of {name!r}, which the first rank")
        else:
            match = re.escape(f"got {said} (of {name!r} on rank {failing}): mend the reward")
            with pytest.raises(RuntimeError, match=match):
                rows.judged()


@spmd(ranks=2)
def test_rewards_and_logs_that_a_group_cannot_have_are_refused_on_all_ranks(mesh):
    """Too few rewards, a column that is not pickled, and one of another length."""
    on = ParallelMesh.from_degrees(Degrees(cp=2), "cpu")
    rank = dist.get_rank()

    def few(prompts, **_):
        return [1.0]

    def deep(prompts, **_):
        return [[1.0]] * len(prompts)

    def words(prompts, **_):
        return ["good"] * len(prompts)

    def unpickled(prompts, log_extra, **_):
        log_extra("call", [lambda: None] * len(prompts))
        return [1.0] * len(prompts)

    for judge, match in {
        few: r"rewards of shape \[1\] of 3 completions: give a list of as many",
        deep: r"rewards of shape \[3, 1\] of 3 completions: give a list of as many",
        words: "str",
        unpickled: "pickle.*lambda|lambda.*pickle",
    }.items():
        kind = RuntimeError if rank else Exception
        with pytest.raises(kind, match=match):
            JudgedRows(on, judge).judged()

    def longer(prompts, log_extra, **_):
        log_extra("who", ["x"] * (len(prompts) + rank))
        return [1.0] * len(prompts)

    rows = JudgedRows(ParallelMesh.from_degrees(Degrees(dp_shard=2), "cpu"), longer)
    match = r"log_extra of 'who' with \[3, 4\] values on batch ranks: give"
    with pytest.raises(ValueError, match=match):
        rows.judged()
