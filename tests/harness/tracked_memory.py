"""What a step of one rank allocates, by torch's own tracker of memory, inside our ops, too."""

import sys
from functools import partial

from torch._library.custom_ops import OPDEFS
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.one_rank import one_rank

KERNELS = "dtcp.kernels."


class InsideOps(MemTracker):
    """torch's tracker, which sees an op's results alone; of ours, all that their bodies make.

    But for what kernels make for themselves: another machine has other kernels.
    """

    def __init__(self):
        super().__init__()
        self.inside = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name() if hasattr(func, "name") else ""
        if self.inside and in_kernel():
            return func(*args, **kwargs)
        definition = OPDEFS.get(name.removesuffix(".default"))
        if definition is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        body = partial(self.run_inside, definition._init_fn)
        return super().__torch_dispatch__(body, types, args, kwargs)

    def run_inside(self, body, *args, **kwargs):
        self.inside += 1
        try:
            with self:
                return body(*args, **kwargs)
        finally:
            self.inside -= 1

    def _pre_fw_hook(self, *_):
        """Modules are not looked at: each could be called once only."""

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook

    def restart(self):
        """Forget the peak so far."""
        self._peak_mem_snap = self.get_tracker_snapshot()
        self._peak_mem = {device: sizes["Total"] for device, sizes in self._peak_mem_snap.items()}

    @property
    def peak(self):
        (most,) = self._peak_mem.values()
        return most


def in_kernel():
    """Whether a kernel called this, between here and the op."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(KERNELS):
            return True
        if frame.f_code is InsideOps.run_inside.__code__:
            return False
        frame = frame.f_back
    return False


def tracked_peak(subject, setup, *, cp_rank=0):
    """Bytes at most in the second step of a rank, when the optimizer has its states."""
    with InsideOps() as tracker, one_rank(subject, setup, cp_rank=cp_rank) as step:
        step()
        tracker.restart()
        step()
        return tracker.peak
