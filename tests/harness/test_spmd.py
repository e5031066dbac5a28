"""The rank pool: ranks are real, failures are reported, nothing hangs."""

import os
import time

import pytest
import torch
from torch import distributed as dist

from tests.harness import spmd as pool
from tests.harness.patience import patience_after
from tests.harness.spmd import RankError, run_ranks, spmd


@spmd(ranks=(1, 2, 3, 4))
def test_mesh_spans_exactly_the_ranks_asked_for(mesh, ranks):
    total = torch.ones(())
    dist.all_reduce(total)
    assert mesh.size() == dist.get_world_size() == ranks == total.item()
    assert mesh.mesh_dim_names == ("cp",)


@pytest.mark.parametrize("shift", [1, 2])
@spmd(ranks=2)
def test_parameters_reach_every_rank(mesh, shift):
    assert shift in (1, 2)


@spmd(axes={"cp": 2, "tp": 2})
def test_axes_are_named_and_the_last_is_fastest(mesh):
    assert mesh["cp"].get_local_rank() == dist.get_rank() // 2
    assert mesh["tp"].get_local_rank() == dist.get_rank() % 2


@spmd(ranks=2)
def test_seeds_are_equal_on_all_ranks(mesh):
    mine = torch.randn(3)
    zeroth = mine.clone()
    dist.broadcast(zeroth, 0)
    torch.testing.assert_close(mine, zeroth, rtol=0, atol=0)


@spmd(ranks=2)
def test_unwritten_memory_is_nan(mesh):
    assert torch.empty(1000).isnan().all()


def rank_plus(mesh, number):
    return mesh.get_local_rank() + number


def raise_on_rank_1(mesh):
    if mesh.get_local_rank() == 1:
        raise KeyError("lost my way")
    dist.all_reduce(torch.ones(()))


def die_on_rank_1(mesh):
    if mesh.get_local_rank() == 1:
        os._exit(7)
    dist.all_reduce(torch.ones(()))


def abort_on_rank_1(mesh):
    if mesh.get_local_rank() == 1:
        os.abort()
    dist.all_reduce(torch.ones(()))


def sleep_on_rank_1(mesh, asleep):
    if mesh.get_local_rank() == 1:
        asleep.touch()
        time.sleep(1000)


def skip_for_a_lack(mesh):
    pytest.importorskip("no_such_module")


def return_a_lambda(mesh):
    return lambda: None


def test_values_come_back_in_rank_order():
    assert run_ranks(rank_plus, 3, 10) == [10, 11, 12]
    assert run_ranks(rank_plus, 2, number=20) == [20, 21]


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (
            raise_on_rank_1,
            "rank 1 of 2 raised(.|\n)*KeyError: 'lost my way'"
            "(.|\n)*rank 0 of 2 was still running when another rank had failed",
        ),
        (die_on_rank_1, "rank 1 of 2 died with exit code 7"),
        (
            abort_on_rank_1,
            "rank 1 of 2 died with exit code -6(.|\n)* in abort_on_rank_1\n"
            "(.|\n)*one after another:(.|\n)*test_spmd.abort_on_rank_1$",
        ),
        (
            skip_for_a_lack,
            "rank 0, 1 of 2 raised(.|\n)*could not import 'no_such_module'",
        ),
        (return_a_lambda, "rank 0, 1 of 2 raised(.|\n)*pickle"),
    ],
)
def test_failure_on_a_rank_is_reported_and_the_pool_goes_on(fn, match, monkeypatch):
    # After which the other rank waits for ever.
    monkeypatch.setattr(pool, "GRACE", 0.2 if fn is raise_on_rank_1 else 600.0)
    with pytest.raises(RankError, match=match):
        run_ranks(fn, 2)
    assert run_ranks(rank_plus, 2, 0) == [0, 1]


def test_rank_that_hangs_is_found_by_the_clock(tmp_path, monkeypatch):
    asleep = tmp_path / "asleep"
    monkeypatch.setattr(pool, "Patience", patience_after(asleep.exists))
    monkeypatch.setattr(pool, "GRACE", 600.0)  # that it has to say where
    with pytest.raises(RankError, match=r"rank 1 of 2 was still running after 1 s(.|\n)*sleep_on"):
        run_ranks(sleep_on_rank_1, 2, asleep, timeout=1)


def test_rank_that_died_between_tests_is_replaced():
    assert run_ranks(rank_plus, 2, 0) == [0, 1]
    pool.pool_of(2).workers[1].process.kill()
    pool.pool_of(2).workers[1].process.join()
    assert run_ranks(rank_plus, 2, 0) == [0, 1]


def test_function_without_a_name_is_refused():
    with pytest.raises(ValueError, match="sends a function by name"):
        run_ranks(lambda mesh: None, 2)


def test_ranks_and_axes_together_are_refused():
    with pytest.raises(ValueError, match="takes ranks or axes"):
        spmd(ranks=2, axes={"cp": 2})
