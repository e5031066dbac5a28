"""Distributed checkpoints, as their planners and metadata read them."""

from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo

StorageInfo = _StorageInfo
"""File, offset and length of an entry, as a checkpoint's metadata hold them (2.11-2.15)."""


set_nested = set_element
"""Sets a value in nested dicts and lists by its path, as load planners do (2.11-2.15)."""
