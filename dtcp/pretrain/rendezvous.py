"""Where the launcher of one machine and its ranks meet: a store that listens on loopback.

torch's own rendezvous listens on every address of the machine, asks nobody for credentials, and
keeps a pickle of its state where everyone who connects may write. One machine needs none of it:
its launcher knows the ranks.
"""

import socket
from dataclasses import dataclass, field

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

LOOPBACK = "127.0.0.1"


def loopback_store() -> TCPStore:
    """A store that only processes of this machine can reach, on a free port."""
    listener = socket.create_server((LOOPBACK, 0), backlog=1024)
    port = listener.getsockname()[1]
    return TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        # By its port alone, the store would listen on all addresses. It closes the socket.
        master_listen_fd=listener.detach(),
    )


@dataclass
class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of an agent that is alone: rank 0 of 1, at once."""

    run_id: str
    store: TCPStore = field(default_factory=loopback_store)

    def next_rendezvous(self) -> RendezvousInfo:
        store: Store = PrefixStore(self.run_id, self.store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, self.store.port))

    def get_backend(self) -> str:
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        """Ranks are clients of this store, instead of one of them opening another."""
        return True

    def get_run_id(self) -> str:
        return self.run_id

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None: ...

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True
