"""Read what torch.distributed.checkpoint wrote, and run nothing of it.

torch reads a checkpoint's `.metadata` by pickle, and entries that are no tensors likewise: whoever
can write the folder runs code in every rank. These readers parse the same files as data.

    dcp.load(state_dict, storage_reader=SafeReader(folder), planner=SafeLoadPlanner())
"""

from dtcp.checkpoint.huggingface import SafeHuggingFaceReader
from dtcp.checkpoint.planner import SafeLoadPlanner
from dtcp.checkpoint.reader import SafeReader

__all__ = ["SafeHuggingFaceReader", "SafeLoadPlanner", "SafeReader"]
