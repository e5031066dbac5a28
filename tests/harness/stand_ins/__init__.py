"""Stand-ins for the kernels of others: their signatures, layouts and conventions, fp64 on a CPU.

A parameter that is not computed with may only be given its default. What a real kernel would
refuse, these refuse: layouts, dtypes of lengths, shapes of block lists, lse that is not finite.

    python -m tests.harness.stand_ins     # compare with the packages that are installed here

A file for each library; torch's are of its own schemas.
"""

from tests.harness.stand_ins.aten import AtenOps
from tests.harness.stand_ins.ffpa import FFPAOps
from tests.harness.stand_ins.flash2 import (
    flash2_backward,
    flash2_forward,
    flash2_varlen_backward,
    flash2_varlen_forward,
)
from tests.harness.stand_ins.flash3 import flash3_backward, flash3_forward
from tests.harness.stand_ins.flash4 import (
    Sparsity,
    flash4_backward,
    flash4_forward,
    flash4_sparse_backward,
    interval_mask,
)

__all__ = [
    "AtenOps",
    "FFPAOps",
    "Sparsity",
    "flash2_backward",
    "flash2_forward",
    "flash2_varlen_backward",
    "flash2_varlen_forward",
    "flash3_backward",
    "flash3_forward",
    "flash4_backward",
    "flash4_forward",
    "flash4_sparse_backward",
    "interval_mask",
]
