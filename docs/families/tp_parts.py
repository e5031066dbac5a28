"""What a rank of tp 2 holds of every model that passes at cp 2: python -m docs.families.tp_parts.

The plan is made, and no rank is started. The page has a row for each model.
"""

import re
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle
from transformers.utils import logging as transformers_logging

from docs.families.cases import Case, all_cases
from docs.families.outcome import Results
from dtcp.check import CheckedHuggingFaceModel
from dtcp.check.matrix import FIRST
from dtcp.parallelize.plans.huggingface_tensor_plan import hf_tensor_plan
from dtcp.parallelize.tensor_parallel import (
    LocalParams,
    ReplicatedLinear,
    ReplicatedParams,
    SegmentRows,
    WholeExperts,
)

PAGE = Path(__file__).parents[1] / "tp_parts.md"
TP, NAMED = 2, 0.005
"""Ranks of tp; and of all parameters, the part that a module has to hold to be named."""

_TITLE = """# What each rank of tp holds

Of a tiny model of every family that passes at cp 2 ([the table](families.md)): the share of its
parameters, without embedding and head, that a rank of tp 2 holds, and which parts of blocks are
whole on each rank. Tables of positions, norms and what makes latents are small in a real model. A
model in brackets is refused under tp, and for what. `python -m docs.families.tp_parts` makes the
page.

| `--hf-config` | share | whole on each rank |
|---|---|---|
"""


def row_of(case: Case) -> str:
    """The row of one model."""
    kept = {key: x for key, x in case.change.items() if isinstance(x, bool) or x != 0}
    changes = [f"{key}={value}".lower() for key, value in kept.items()]
    shown = f"`{' --set '.join([case.model_type, *changes])}`"
    model = CheckedHuggingFaceModel(case.model_type, case.change).build()
    try:
        plan = hf_tensor_plan(model, TP)
    except ValueError as error:
        return f"| ({shown}) | | {str(error).partition(', got')[0]} |"
    share, whole = _share(model, plan)
    return f"| {shown} | {100 * share:.0f} % | {', '.join(f'`{name}`' for name in whole)} |"


def _share(model: nn.Module, plan: dict[str, ParallelStyle]) -> tuple[float, list[str]]:
    ends = {id(each) for each in (model.get_input_embeddings(), model.get_output_embeddings())}  # type: ignore[operator]
    numbers = {
        name: sum(p.numel() for p in module.parameters(recurse=False))
        for name, module in model.named_modules()
        if id(module) not in ends
    }
    total = sum(numbers.values())
    whole = {name: count for name, count in numbers.items() if count and _is_whole(plan.get(name))}
    by_kind: dict[str, int] = {}
    for name, count in whole.items():
        kind = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        by_kind[kind] = by_kind.get(kind, 0) + count
    held = sum(whole.values()) + (total - sum(whole.values())) / TP
    return held / total, [kind for kind, count in by_kind.items() if count > NAMED * total]


def _is_whole(style: ParallelStyle | None) -> bool:
    if isinstance(style, LocalParams):
        return style.placement.is_replicate() and not isinstance(style, SegmentRows)
    return style is None or isinstance(style, ReplicatedParams | ReplicatedLinear | WholeExperts)


def main() -> None:
    """Write the page."""
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = Results.read()
    passed = [
        case
        for case in all_cases()
        if (outcome := results.outcome(case.name, FIRST)) and outcome.verdict == "passed"
    ]
    PAGE.write_text(_TITLE + "\n".join(map(row_of, passed)) + "\n")


if __name__ == "__main__":
    sys.exit(main())
