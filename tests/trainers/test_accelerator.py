"""accelerate's Accelerator, where the ranks of a cp and tp group are one process."""

from types import SimpleNamespace

from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.trainers.accelerator import MeshAccelerator
from tests.harness.spmd import spmd


@spmd(ranks=4)
def test_objects_are_gathered_of_each_batch_rank_once(mesh):
    """accelerate gathers those of all processes, and a cp group is one."""
    on = ParallelMesh.from_degrees(Degrees(dp_shard=2, cp=2), "cpu")
    accelerator = object.__new__(MeshAccelerator)
    accelerator.mesh, rank = on, on.rank("batch")
    for ended, expected in ((False, ["0a", "0b", "1a", "1b"]), (True, ["0a", "0b", "1a"])):
        accelerator.gradient_state = SimpleNamespace(end_of_dataloader=ended, remainder=3)
        assert accelerator.gather_for_metrics([f"{rank}a", f"{rank}b"]) == expected
