"""What train.py is made of: launching, data, progress, verification, configs."""

from dtcp.torchtitan import compat as compat
