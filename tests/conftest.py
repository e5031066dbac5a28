"""Order, seeds and the end of the rank pool."""

import gc

import pytest
import torch

from tests.harness import forkserver, rank, spmd


def ranks_of(item: pytest.Item) -> int:
    """Ranks the test needs; 0 where it runs in this process."""
    mark = item.get_closest_marker("spmd")
    if mark is None:
        return 0
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return int(params.get("ranks", mark.args[0]))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests without ranks first, then by world size; `slow_where` becomes `slow`.

    Of several workers (pytest -n 2 --dist loadgroup) one gets all tests of a file that need no
    ranks, whose fixtures are made once; those with ranks go to whichever is free.
    """
    items.sort(key=ranks_of)
    for item in items:
        if not ranks_of(item):
            file = item.path.relative_to(item.config.rootpath)
            item.add_marker(pytest.mark.xdist_group(str(file)))
        condition = item.get_closest_marker("slow_where")
        if condition is not None and condition.args[0](**item.callspec.params):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse a pytest in which pytest-xdist's groups are lost without a word, as in 9.2.0.

    Then let collectors pass over all that was imported and collected.
    """
    grouped = getattr(session.config.option, "loadgroup", False)
    lost = [item for item in session.items if not ranks_of(item) and "@" not in item.nodeid]
    if grouped and lost:
        raise pytest.UsageError(
            f"Files go to workers as wholes, got {lost[0].nodeid} without its group: install "
            f"constraints.txt's pytest and pytest-xdist."
        )
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """End the ranks; none were started where no test asked for any."""
    for pool in spmd.pools().values():
        pool.stop()


@pytest.fixture(scope="session", autouse=True)
def fork_server(request: pytest.FixtureRequest) -> None:
    """Let the ranks' server import while the tests without ranks run."""
    if any(map(ranks_of, request.session.items)):
        forkserver.warm_up()


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """Give each test the same seeds and default dtype, in this process too."""
    torch.set_num_threads(1)
    rank.fresh_state()
