"""Counts of what ops did: sums, differences, threads, and work that fails."""

import contextlib
from threading import Thread

from dtcp.distributed.ledger import LEDGER, Ledger, OpCount, Traffic, count_traffic, traffic_since


def test_counts_add_up_and_subtract():
    a, b = OpCount(1, 20, 300), OpCount(2, 30, 400)
    assert a + b == OpCount(3, 50, 700)
    assert (a + b) - b == a


def test_ledger_counts_by_op_from_any_thread():
    ledger = Ledger()

    def record():
        for _ in range(1000):
            ledger.record("x", sent=1, received=2)

    threads = [Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.snapshot() == {"x": OpCount(4000, 4000, 8000)}


def test_traffic_is_what_was_counted_inside():
    LEDGER.record("dtcp::test", received=5)
    start = LEDGER.snapshot()
    with count_traffic() as traffic:
        LEDGER.record("dtcp::test", received=7)
        LEDGER.record("dtcp::other", sent=1)
    assert traffic["dtcp::test"] == OpCount(1, 0, 7)
    assert traffic["dtcp::nothing"] == OpCount()
    assert (traffic.calls, traffic.sent, traffic.received) == (2, 1, 7)
    assert traffic_since(start) == Traffic(traffic.by_op)


def test_traffic_of_work_that_fails_is_counted():
    with contextlib.suppress(KeyError), count_traffic() as traffic:
        LEDGER.record("dtcp::test")
        raise KeyError
    assert traffic.calls == 1
