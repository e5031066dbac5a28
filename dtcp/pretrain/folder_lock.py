"""One writer per folder: a lock that names its holder, and that a dead run does not keep.

The lock is a file in the folder, with the holder's host and process id. Two things say that the
holder lives: a lock of the file system (flock), which the kernel drops with the process, and a
number in the file that the holder counts up. The second works where the first does not, on shared
folders whose server has no locks, and needs no clock that two hosts agree on.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

NAME = "run.lock"
BEAT = 2.0  # seconds between two counts
SILENCE = 4 * BEAT
"""Seconds without a count after which a holder on another host counts as gone."""

LOOKS = 5
"""How often to try a lock before it counts as held: another process may just be looking."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What flock answers where a file system has no locks."""


@dataclass
class Holder:
    """Who holds a folder, as the lock's file says."""

    host: str = field(default_factory=socket.gethostname)
    boot: str = field(default_factory=lambda: _boot())
    pid: int = field(default_factory=os.getpid)
    since: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    beats: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"

    def of_this_host(self) -> bool:
        """Whether it is, or was, a process of this host since it was last started."""
        return (self.host, self.boot) == (socket.gethostname(), _boot())

    def has_process(self) -> bool:
        """Whether a process of that number runs on this host."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True


class FolderLock:
    """The right to write a folder, until `release` or the end of this process.

    Args:
        folder: made if there is none.
    Raises:
        ValueError: another run holds it, named by host and process; or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.me = folder / NAME, Holder()
        self.taken_over: str | None = None
        """Whose lock this was, when that run ended without giving it back."""
        try:
            self._file = _open(self.path)
        except OSError as error:
            raise ValueError(
                f"A run writes into its folder, got --dump_folder {folder} ({error.strerror}): "
                f"choose another, or mend its rights."
            ) from error
        try:
            self._take(folder)
        except BaseException:
            os.close(self._file)
            raise
        self._released, self._lost_to = threading.Event(), ""
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Give the folder back."""
        if self._released.is_set():
            return
        self._released.set()
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
        os.close(self._file)

    def check(self) -> None:
        """Refuse to go on where another run has taken the folder, as after a long standstill.

        Raises:
            ValueError: naming that run.
        """
        if self._lost_to:
            raise ValueError(
                f"A folder has one run at a time, got {self.path.parent}, which {self._lost_to} "
                f"took over while this run stood still: nothing more is written here."
            )

    def _take(self, folder: Path) -> None:
        locked = _flock(self._file)
        before = _read(self._file)
        if locked is False or (before is not None and _lives(self.path, before, bool(locked))):
            raise _held(folder, before)
        self.taken_over = None if before is None else str(before)
        self._write()
        if locked:
            return
        # Two that come at once both write; the one that is still there after a while has it.
        time.sleep(BEAT / 10)
        after = _look(self.path)
        if after is None or after.token != self.me.token:
            raise _held(folder, after)

    def _write(self) -> None:
        # Shorter than a block, in one call: a reader sees one state or the other.
        text = json.dumps(asdict(self.me)).encode().ljust(512)
        os.pwrite(self._file, text, 0)
        # A network file system would keep it on this host for half a minute.
        os.fsync(self._file)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            self.me.beats += 1
            # A server that does not answer for a while is no reason to end a run.
            with contextlib.suppress(OSError):
                holder = _look(self.path)
                if holder is not None and holder.token != self.me.token:
                    self._lost_to = str(holder)
                    return
                self._write()


def refuse_held(folder: Path) -> None:
    """Tell early, before ranks start, that another run writes this folder; takes no lock.

    Raises:
        ValueError: naming its host and process.
    """
    path = folder / NAME
    if not path.is_file():
        return
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        holder = _read(file)
        if holder is not None and _flock(file) is False:
            raise _held(folder, holder)
    finally:
        os.close(file)


def holder_of(folder: Path) -> str:
    """A unique name of the run that holds a folder; empty if none does."""
    try:
        holder = _look(folder / NAME)
    except OSError:
        return ""
    return "" if holder is None else holder.token


def _open(path: Path) -> int:
    for _ in range(LOOKS * LOOKS):
        # A rank that looks whether it could write here removes what it had to make.
        with contextlib.suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    raise FileNotFoundError(errno.ENOENT, "removed again and again", str(path))


def _flock(file: int) -> bool | None:
    """True: locked; False: somebody else has it; None: this file system has no locks."""
    for _ in range(LOOKS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in NO_LOCKS:
                return None
        time.sleep(0.02)
    return False


def _lives(path: Path, holder: Holder, locked: bool) -> bool:
    """Whether the holder that a lock's file names is still there."""
    if holder.of_this_host() and (locked or not holder.has_process()):
        return False
    # Locks may be missing or not reach other hosts, and process ids are reused.
    return _counts(path, holder)


def _boot() -> str:
    """Tells apart two boots of a host, and two hosts of one name."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else ""


def _counts(path: Path, holder: Holder) -> bool:
    """Whether the holder still counts up; waits until it has, or was silent for too long.

    Measured in looks, not seconds: what suspends this process may suspend the holder, too.
    """
    pause = BEAT / 4
    for _ in range(round(SILENCE / pause)):
        time.sleep(pause)
        try:
            now = _look(path)
        except OSError:
            continue  # a server that does not answer says nothing of the holder
        if now is None:
            return False
        if (now.token, now.beats) != (holder.token, holder.beats):
            return True
    return False


def _read(file: int) -> Holder | None:
    """The holder that a lock's file names; None if it names nobody."""
    try:
        value = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        # Empty, or cut short by a crash of the machine: whoever wrote it is not there any more.
        return None
    names = {each.name for each in fields(Holder)}
    return Holder(**value) if isinstance(value, dict) and value.keys() == names else None


def _look(path: Path) -> Holder | None:
    """The same by the file's path: a network file system asks its server when a file is opened."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _read(file)
    finally:
        os.close(file)


def _held(folder: Path, holder: Holder | None) -> ValueError:
    who = "another process" if holder is None else str(holder)
    return ValueError(
        f"A folder has one run at a time, got --dump_folder {folder}, which {who} writes: "
        f"wait for it, end it, or choose another folder."
    )
