"""Prefetching: a thread makes the next one while the last one is used."""

import weakref
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

T = TypeVar("T")
Made = tuple[list[T], BaseException | None]
"""The answer to a request: an item, or an error, or neither at the end."""


class Prefetcher(Iterator[T]):
    """The items of an iterable, each made in a thread while the one before it is used.

    What the iterable raises is raised where its item would have come, and nothing follows. It is
    read one item further than was asked for, so keep a position in it with each item. One thread
    makes all items, so that torch keeps the threads that it computes with.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._requests: SimpleQueue[bool] = SimpleQueue()
        self._made: SimpleQueue[Made[T]] = SimpleQueue()
        parts = (iter(items), self._requests, self._made)
        # A daemon, so that a data source that hangs keeps no process from its end.
        thread = Thread(target=_serve, args=parts, daemon=True, name="prefetch")
        thread.start()
        self._started = self._ended = False
        weakref.finalize(self, self._requests.put, False).atexit = False
        weakref.finalize(thread, end, weakref.ref(thread), self._requests)

    def start(self) -> None:
        """Have the first item made before anybody takes it."""
        if not self._started:
            self._requests.put(True)
            self._started = True

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        self.start()
        items, error = self._made.get()
        if not items:
            self._ended = True
            raise error or StopIteration
        self._requests.put(True)
        return items[0]


def end(thread: "weakref.ref[Thread]", requests: "SimpleQueue[bool]", seconds: float = 5.0) -> None:
    """Let a thread end before Python does, which stops daemons by force: in torch that aborts.

    Args:
        seconds: to wait for the item in hand; a source that hangs is left behind.
    """
    if (running := thread()) is not None:
        requests.put(False)
        running.join(seconds)


def _serve(items: Iterator[T], requests: "SimpleQueue[bool]", made: "SimpleQueue[Made[T]]") -> None:
    """Make an item for each request, up to one that says to stop."""
    while requests.get():
        answer: Made[T] = ([], None)
        try:
            answer = ([next(items)], None)
        except StopIteration:
            pass
        # Held back, never swallowed: who asks for the item raises it.
        except BaseException as error:  # noqa: BLE001
            answer = ([], error)
        made.put(answer)
        if not answer[0]:
            return
        del answer  # no second batch in memory while this waits
