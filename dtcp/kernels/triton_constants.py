"""Constants of kernels whose scores are in units of log 2, for exp2. Imports Triton."""

import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
