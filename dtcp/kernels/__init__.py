"""Kernels: each one op, behind one signature. Optional imports live here and nowhere else."""
