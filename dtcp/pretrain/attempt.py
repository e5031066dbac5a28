"""One start of the ranks, among all that their launcher makes: who is in it, and who was lost.

Ranks meet in the launcher's store. It outlives them, so what they write there belongs to an
attempt: torch (2.13) keeps the addresses of dead ranks in it, and a second start would dial them.
So rank 0 opens a store for the attempt, and torch's own rendezvous is sent there.
"""

import json
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore

from dtcp.pretrain.rendezvous import LOOPBACK, loopback_store

AGENT_STORE, ATTEMPT = "DTCP_AGENT_STORE", "DTCP_ATTEMPT"
"""Environment variables of a rank: the launcher's store, and the name of this attempt in it."""

BEAT = 2.0
"""Seconds between two signs of life of a rank."""

GONE = (DistNetworkError, DistStoreError)
"""What a store raises that cannot be reached."""


@dataclass(frozen=True)
class Peer:
    """A rank, as others name it."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def has_agent_store() -> bool:
    """Whether an agent of torch started this process, with a store that outlives the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def agent_address() -> tuple[str, int]:
    """Host and port of the launcher's store."""
    default = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    host, _, port = os.environ.get(AGENT_STORE, default).rpartition(":")
    return host, int(port)


def attempt_store(seconds: float = 10.0) -> Store:
    """A new connection to the launcher's store, to what belongs to this attempt there.

    Raises:
        DistNetworkError: it cannot be reached within that time.
    """
    host, port = agent_address()
    store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds))
    return PrefixStore(f"dtcp/{attempt_name()}", store)


def attempt_name() -> str:
    """What tells this start of the ranks from others of one launcher."""
    # Before ranks have met, the number of restarts is the best name there is.
    return os.environ.get(ATTEMPT) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


class AbsentRanks(ValueError):
    """Ranks did not come; another time they may."""


class Attempt:
    """The ranks that started together; made by each of them, before any process group.

    Where no agent of torch started them, nothing is done, and nobody can be named.

    Args:
        seconds: to wait for all of them.
        refusal: why rank 0 cannot go on; every rank then raises it.
    Raises:
        ValueError: rank 0's refusal.
        AbsentRanks: those that did not come, named.
    """

    def __init__(self, *, seconds: float, refusal: str = "") -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.peers: tuple[Peer, ...] = ()
        self._ended = threading.Event()
        if has_agent_store():
            self._meet(seconds, refusal)
            threading.Thread(target=self._beat, daemon=True).start()
        elif refusal:
            raise ValueError(refusal)

    def leave(self) -> None:
        """Give no more signs of life: this rank has done its work."""
        self._ended.set()

    def lost(self) -> list[Peer]:
        """Ranks that give no sign of life any more and did not say why, after two beats."""
        store = attempt_store()
        store.add(f"failed/{self.rank}", 1)
        before = self._beats(store)
        time.sleep(2.5 * BEAT)
        after = self._beats(store)
        return [
            peer
            for peer in self.peers
            if after[peer.rank] == before[peer.rank] and not store.add(f"failed/{peer.rank}", 0)
        ]

    def _beats(self, store: Store) -> list[int]:
        return [store.add(f"beat/{rank}", 0) for rank in range(self.size)]

    def _beat(self) -> None:
        try:
            store = attempt_store()
            while True:
                store.add(f"beat/{self.rank}", 1)
                if self._ended.wait(BEAT):
                    return
        except GONE:
            # The launcher or the way to it is lost. Collectives will tell, in their time.
            return

    def _meet(self, seconds: float, refusal: str) -> None:
        host, port = agent_address()
        agent = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds))
        store = PrefixStore("dtcp/meeting", agent)
        me = json.dumps([uuid.uuid4().hex, socket.gethostname(), os.getpid()])
        store.set(f"hello/{self.rank}", me)
        deadline = time.monotonic() + seconds
        if self.rank == 0:
            room = self._host(store, host, refusal, deadline)
        else:
            room = self._join(store, me, deadline)
        if room["absent"]:
            raise _absent(room["absent"])
        if room["refusal"]:
            raise ValueError(room["refusal"])
        self.peers = tuple(Peer(i, *json.loads(x)[1:]) for i, x in enumerate(room["hellos"]))
        os.environ[AGENT_STORE], os.environ[ATTEMPT] = f"{host}:{port}", room["name"]
        os.environ["MASTER_PORT"] = str(room["port"])

    def _host(self, store: Store, host: str, refusal: str, deadline: float) -> dict[str, Any]:
        """Open a store for the ranks that say hello, until each has read its own hello there."""
        self._store = loopback_store() if _is_loopback(host) else _open_store(host)
        room = {
            "name": uuid.uuid4().hex,
            "port": self._store.port,
            "hellos": [],
            "refusal": refusal,
            "absent": [],
            "complete": False,
        }
        acks = [f"ack/{room['name']}/{rank}" for rank in range(1, self.size)]
        pause = 0.01
        while True:
            said = [_said(store, rank) for rank in range(self.size)]
            if said != room["hellos"]:
                # The launcher's store may still have had the hello of an earlier attempt.
                room["hellos"] = said
                store.set("room", json.dumps(room))
            late = time.monotonic() > deadline
            if not acks or store.check(acks):
                room["complete"] = True
            elif late:
                absent = [rank for rank, ack in enumerate(acks, start=1) if not store.check([ack])]
                room |= {"complete": True, "absent": absent}
            if room["complete"]:
                store.set("room", json.dumps(room))
                return room
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _join(self, store: Store, me: str, deadline: float) -> dict[str, Any]:
        """Wait for a room of rank 0's that knows this very process, and everybody else."""
        pause = 0.01
        # Rank 0 knows who is absent, and is given the time to say so.
        while time.monotonic() < deadline + 5:
            if store.check(["room"]):
                room: dict[str, Any] = json.loads(store.get("room"))
                if me in room["hellos"]:
                    store.set(f"ack/{room['name']}/{self.rank}", "")
                    if room["complete"]:
                        return room
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        raise _absent([0])


def _said(store: Store, rank: int) -> str:
    key = f"hello/{rank}"
    return store.get(key).decode() if store.check([key]) else ""


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith(LOOPBACK.partition(".")[0] + ".")


def _open_store(host: str) -> TCPStore:
    # On all addresses: which of them others come by is the network's business.
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def _absent(ranks: list[int]) -> AbsentRanks:
    names = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return AbsentRanks(
        f"All ranks of a run start together, got none of rank {names} in time: look at its "
        f"machine, or raise --comm.init_timeout_seconds."
    )
