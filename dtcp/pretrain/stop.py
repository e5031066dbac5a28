"""SIGTERM and Ctrl-C: all ranks stop after the same step, with everything saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch
from torch import distributed as dist

from dtcp.pretrain.report import is_of_peers

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The last is what a terminal sends that is closed."""


class StopRequest:
    """Signals that this rank received, and what the ranks have agreed on.

    A signal may reach one rank alone, and none in the same step, so ranks tell each other before
    every step: 4 bytes, summed up on the host while the step before it runs.

    Args:
        timeout: of the exchange, as long as any step may take.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.signal = 0
        """The signal that all ranks stop for; 0 as long as there is none."""
        self.received = 0
        """The signal that this rank received; 0 as long as there was none."""
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None
        # On an accelerator's own group the host would have to wait for the device.
        on_host = dist.get_backend() in ("gloo", "fake")
        self._group = None if on_host else dist.new_group(backend="gloo", timeout=timeout)
        self._before = {
            number: signal.signal(number, self._hear)
            for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }

    def agreed(self) -> bool:
        """Whether to stop here; called by every rank before every step.

        A signal that one rank receives during a step is known to all after the next one.
        """
        self.settle()
        if not self.signal:
            self._flag = torch.tensor([self.received], dtype=torch.int32)
            self._work = dist.all_reduce(
                self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True
            )
        return self.signal != 0

    def settle(self) -> None:
        """Finish the exchange that is under way, before the ranks part."""
        if self._work is not None:
            self._work.wait()
            self.signal, self._work = int(self._flag), None

    @contextmanager
    def asked_of_all(self) -> Iterator[None]:
        """Inside, a peer that is gone once this rank was asked to stop is no failure.

        The peer was asked as well, before it had a handler, and ended at once: nothing is lost.
        """
        try:
            yield
        except RuntimeError as error:
            if self.received and is_of_peers(error):
                raise SystemExit(128 + self.received) from error
            raise

    def close(self) -> None:
        """Restore the handlers that signals had before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
