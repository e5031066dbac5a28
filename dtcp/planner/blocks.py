"""One block of each kind is built and run, and counted as often as the model repeats it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.mixer_metadata import mixers_of
from dtcp.mixer_plan import find, matching
from dtcp.parallelize import ParallelPlan


@dataclass(eq=False)
class BlockKind:
    """Blocks that have the same parts.

    Args:
        name: of the first of them, which is run.
        blocks: the names of all.
        members: how many results it returns; 0 for one tensor.
    """

    name: str
    blocks: list[str]
    members: int = field(default=0, init=False)

    @property
    def count(self) -> int:
        return len(self.blocks)


class SkippedBlock(nn.Module):
    """Passes the stream on, in the place of a block whose kind has been run already.

    Args:
        facts: the block's own attributes, by name.
    """

    def __init__(self, kind: BlockKind, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.kind, self.facts = kind, facts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        members = self.kind.members
        return (x, *[None] * (members - 1)) if members else x

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # transformers' models read facts off a layer: its type of attention, for one.
            if name in self.facts:
                return self.facts[name]
            raise


def _block_kinds(blocks: Mapping[str, nn.Module]) -> list[BlockKind]:
    """Group blocks by their modules, settings and parameters, in the order of the model."""
    kinds: dict[Any, BlockKind] = {}
    for name, block in blocks.items():
        sizes = tuple((key, tuple(p.shape), p.dtype) for key, p in block.named_parameters())
        kind = kinds.setdefault((repr(block), sizes), BlockKind(name, []))
        kind.blocks.append(name)
    return list(kinds.values())


def keep_one_of_each(model: nn.Module, plan: ParallelPlan) -> tuple[list[BlockKind], ParallelPlan]:
    """Leave one block of each kind in the model, and in its plan what still applies."""
    blocks = find(model, plan.blocks)
    kinds = _block_kinds(blocks)
    for kind in kinds:
        _count_members(kind, blocks[kind.name])
        for mixer in mixers_of(blocks[kind.name]):
            mixer.layers = kind.count
        for name in kind.blocks[1:]:
            parent, _, last = name.rpartition(".")
            facts = {
                key: value
                for key, value in vars(blocks[name]).items()
                if not key.startswith("_") and not isinstance(value, nn.Module)
            }
            setattr(model.get_submodule(parent), last, SkippedBlock(kind, facts))
    return kinds, _applicable(model, plan)


def _count_members(kind: BlockKind, block: nn.Module) -> None:
    def note(_: Any, args: Any, out: Any) -> None:
        kind.members = 0 if isinstance(out, Tensor) else len(out)

    block.register_forward_hook(note)


def _applicable(model: nn.Module, plan: ParallelPlan) -> ParallelPlan:
    names = dict(model.named_modules())

    def named(styles: Mapping[str, ParallelStyle]) -> dict[str, ParallelStyle]:
        # By full names: a pattern would be looked for in blocks that are skipped as well.
        return {name: style for key, style in styles.items() for name in matching(names, key)}

    parameters = dict(model.named_parameters())
    return replace(
        plan,
        tp=named(plan.tp),
        cp=named(plan.cp),
        ep=named(plan.ep),
        blocks=tuple(
            name
            for name, module in find(model, plan.blocks).items()
            if not isinstance(module, SkippedBlock)
        ),
        keep_dtype=tuple(
            dict.fromkeys(n for key in plan.keep_dtype for n in matching(parameters, key))
        ),
    )
