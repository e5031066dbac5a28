"""Kernels: what one device computes. No process groups, no collectives, no counting of traffic.

Each family of token mixers has a folder with the same files: `api.py` chooses a backend and is
what strategies call, `types.py` names the tensors and states the contract of a backend,
`reference.py` fulfils it in plain torch. Faster backends (`triton/`, `fla.py`) import the types,
never the reference. Optional packages are imported in this folder and nowhere else, and only
once a backend that needs them was chosen.
"""
