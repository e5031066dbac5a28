"""One start of the ranks, among all those of their launcher: who takes part, and who was lost.

Ranks meet in the launcher's store. It outlives them, so what they write there belongs to an
attempt: torch (2.13) keeps the addresses of dead ranks in it, and a second start would dial them.
So rank 0 opens a store for the attempt, and torch's own rendezvous is sent there.
"""

import contextlib
import ipaddress
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore

from dtcp.pretrain.rendezvous import LOOPBACK, loopback_store

AGENT_STORE, ATTEMPT = "DTCP_AGENT_STORE", "DTCP_ATTEMPT"
"""Environment variables of a rank: the launcher's store, and the name of this attempt in it."""

BEAT = 2.0
"""Seconds between two signs of life of a rank."""

QUIET = 30.0
"""Seconds that rank 0 waits for others before it says so."""

REACH = 60.0
"""Seconds that a rank tries to reach the launcher's store, which is there before any rank."""

GONE = (DistNetworkError, DistStoreError)
"""What a store raises when it cannot be reached."""


@dataclass(frozen=True)
class Peer:
    """A rank, as other ranks name it in messages."""

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
    """A new connection to the launcher's store, to the part of this attempt.

    Raises:
        DistNetworkError: it cannot be reached within that time.
    """
    host, port = agent_address()
    store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds))
    return PrefixStore(f"dtcp/{attempt_name()}", store)


def attempt_name() -> str:
    """The name of this start of the ranks, among those of one launcher."""
    # Before ranks have met, the number of restarts is the best name there is.
    return os.environ.get(ATTEMPT) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def tell_others(text: str) -> None:
    """Called by a rank that ends before it has met the others, so that they do not wait for it.

    Its launcher knows, but the launchers of other hosts do not.
    """
    if has_agent_store():
        with contextlib.suppress(*GONE):
            me = (int(os.environ["RANK"]), socket.gethostname(), text)
            attempt_store().set("ended", json.dumps(me))


class AbsentRanks(ValueError):
    """Some ranks did not come; on another start they may."""


class RefusedTogether(ValueError):
    """Ranks have met, and all of them know why they cannot go on."""


class Attempt:
    """The ranks that started together; made by each of them, before any process group.

    Where no agent of torch started them, nothing is done, and nobody can be named.

    Args:
        seconds: to wait for all of them.
        refusal: why rank 0 cannot go on; every rank then raises it.
    Raises:
        RefusedTogether: rank 0's refusal, or hosts that cannot hear each other.
        AbsentRanks: those that did not come, named; or one that ended early, in its words.
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
        """Stop giving signs of life: this rank has done its work."""
        self._ended.set()

    def lost(self) -> list[Peer]:
        """Ranks that have stopped giving signs of life without saying why, after two beats."""
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
            # The launcher, or the network to it, is lost. Collectives will fail in their own time.
            return

    def _meet(self, seconds: float, refusal: str) -> None:
        host, port = agent_address()
        agent = _reach(host, port, min(seconds, REACH))
        store = PrefixStore("dtcp/meeting", agent)
        self._early = PrefixStore(f"dtcp/{attempt_name()}", agent)
        me = json.dumps([uuid.uuid4().hex, socket.gethostname(), os.getpid(), gloo_address()])
        store.set(f"hello/{self.rank}", me)
        if self.rank == 0:
            room = self._host(store, host, refusal, seconds)
        else:
            room = self._join(store, me, time.monotonic() + seconds)
        if room["absent"]:
            raise _absent(room["absent"])
        if room["refusal"]:
            raise RefusedTogether(room["refusal"])
        hellos = read_hellos(room["hellos"])
        refuse_loopback({name: address for name, _, address in hellos})
        self.peers = tuple(Peer(i, name, pid) for i, (name, pid, _) in enumerate(hellos))
        os.environ[AGENT_STORE], os.environ[ATTEMPT] = f"{host}:{port}", room["name"]
        os.environ["MASTER_PORT"] = str(room["port"])

    def _host(self, store: Store, host: str, refusal: str, seconds: float) -> dict[str, Any]:
        """Open a store for the ranks that say hello, and wait until each has read its own there."""
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
        pause, start = 0.01, time.monotonic()
        deadline, notice = start + seconds, start + QUIET
        while True:
            self._refuse_ended()
            said = [_said(store, rank) for rank in range(self.size)]
            if said != room["hellos"]:
                # The launcher's store may still have had the hello of an earlier attempt.
                room["hellos"] = said
                store.set("room", json.dumps(room))
            now = time.monotonic()
            if not acks or store.check(acks):
                room["complete"] = True
            elif now > min(deadline, notice):
                absent = [rank for rank, ack in enumerate(acks, start=1) if not store.check([ack])]
                if now > deadline:
                    room |= {"complete": True, "absent": absent}
                else:
                    notice = deadline
                    names = _names(absent)
                    print(f"waiting     for rank {names}, {seconds:g} s at most", flush=True)
            if room["complete"]:
                store.set("room", json.dumps(room))
                return room
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _join(self, store: Store, me: str, deadline: float) -> dict[str, Any]:
        """Wait for a room of rank 0 that lists this very process, and all others."""
        pause = 0.01
        # Rank 0 knows who is absent, and gets the time to say so.
        while time.monotonic() < deadline + 5:
            self._refuse_ended()
            if store.check(["room"]):
                room: dict[str, Any] = json.loads(store.get("room"))
                if me in room["hellos"]:
                    store.set(f"ack/{room['name']}/{self.rank}", "")
                    if room["complete"]:
                        return room
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        raise _absent([0])

    def _refuse_ended(self) -> None:
        """Stop waiting where a rank that was to come has ended; a new start of it waits on."""
        if not self._early.check(["ended"]):
            return
        rank, host, text = json.loads(self._early.get("ended"))
        if rank == self.rank:
            self._early.delete_key("ended")
            return
        raise AbsentRanks(
            f"All ranks of a run start together, got rank {rank} on {host} that has ended: {text}"
        )


def read_hellos(texts: Sequence[str]) -> list[tuple[str, int, str]]:
    """Host, process and gloo's address of each rank.

    Raises:
        RefusedTogether: naming a rank whose code says hello differently.
    """
    hellos = [tuple(json.loads(text)[1:]) for text in texts]
    for rank, hello in enumerate(hellos):
        if len(hello) != 3:
            raise RefusedTogether(
                f"All ranks of a run have the same code, got rank {rank} on {hello[0]} with "
                f"another version of dtcp: install the same on every host."
            )
    return hellos


def _reach(host: str, port: int, seconds: float) -> TCPStore:
    try:
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds))
    except GONE as error:
        raise AbsentRanks(
            f"Ranks meet at the launcher of rank 0, got MASTER_ADDR:MASTER_PORT={host}:{port}, "
            f"which {socket.gethostname()} cannot reach: have that name lead to its host here "
            f"(/etc/hosts), start torchrun with --local-addr ADDRESS, each host with its own, or "
            f"look at the network."
        ) from error


def gloo_address() -> str:
    """The address that gloo finds for itself on this host; empty where the user names one."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return ""
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(
            socket.gethostname(), None, type=socket.SOCK_STREAM
        ):
            with contextlib.suppress(OSError), socket.socket(family, kind) as trial:
                trial.bind(address)
                return str(address[0])
    return LOOPBACK


def refuse_loopback(addresses: Mapping[str, str]) -> None:
    """Refuse hosts where gloo would listen on loopback: others would try for half an hour.

    Args:
        addresses: of every host by its name, as `gloo_address` finds them.
    Raises:
        RefusedTogether: naming host and address.
    """
    deaf = {n: x for n, x in addresses.items() if x and ipaddress.ip_address(x).is_loopback}
    if deaf and len(addresses) > 1:
        name, address = min(deaf.items())
        more = f" and {len(deaf) - 1} hosts more" if len(deaf) > 1 else ""
        raise RefusedTogether(
            f"Hosts of a run reach each other, got {name}{more}, where gloo listens on {address}, "
            f"for that is where its own name leads: set GLOO_SOCKET_IFNAME to the interface that "
            f"the others come by (ip -br address), or mend /etc/hosts."
        )


def _said(store: Store, rank: int) -> str:
    key = f"hello/{rank}"
    return store.get(key).decode() if store.check([key]) else ""


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.")


def _open_store(host: str) -> TCPStore:
    # On all addresses: which of them others can reach depends on the network.
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def _absent(ranks: list[int]) -> AbsentRanks:
    return AbsentRanks(
        f"All ranks of a run start together, got none of rank {_names(ranks)} in time: look at its "
        f"machine, or raise --comm.init_timeout_seconds."
    )


def _names(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
