"""Attention and feed-forwards of any form: what a rank of tp has of each layer, found by a run.

Layers give random numbers, and autograd says of which of them the heads of a rank are made: the
rows that it has, be they one stretch of a layer, a stretch of each of its parts, or all. Then each
rank is played with its rows, and what attention and the layer that narrows are handed has to be its
part of what they are handed on one device, and all else what it is there.

    by part      [q of all heads, k of all, v of all]; gate and up of a feed-forward
    by head      [q k v of the first, q k v of the second]
    in groups    [queries that share a key, key, value]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from dtcp.huggingface.distance_bias import TABLE, biased_attentions
from dtcp.parallelize.plans.adapters import adapted_layers
from dtcp.parallelize.plans.dummy_calls import (
    dummy_calls,
    dummy_tensors,
    is_elementwise,
    sizes_of_heads,
)
from dtcp.parallelize.plans.parts_of_ranks import (
    NotSplitError,
    kind_of_part,
    nearly_equal,
    part_of_rank,
    same_arguments,
)
from dtcp.parallelize.plans.recurrent_heads import ROWS, norm_of_parts
from dtcp.parallelize.plans.stand_in_run import StandInRun, calls_registry, forward_of
from dtcp.parallelize.tensor_parallel import (
    WHOLE_FOR_HEADS,
    Conv1DRows,
    Conv1DSum,
    HeadsOfLayer,
    LocalParams,
    RowRun,
    Segment,
    SegmentRows,
    cut,
    is_conv1d,
    reads_its_class,
    rows_of_heads,
)

TOKENS, MOST_LAYERS = 7, 8

Styles = dict[str, ParallelStyle]
Segments = tuple[Segment, ...]


def styles_by_trial(
    module: nn.Module, tp: int, rotary: Sequence[int], parts: Sequence[str] = ("",)
) -> Styles:
    """Styles of a module and of those in it, by name; empty where it stays whole.

    Args:
        rotary: widths that tables of positions may have.
        parts: modules in it, by name, whose layers are split as one; all else stays whole.
    """
    linear = adapted_layers(module, lambda x: isinstance(x, nn.Linear) or is_conv1d(x))
    layers = {name: x for name, x in linear.items() if _is_in(name, parts)}
    heads = any(calls_registry(x) for name, x in module.named_modules() if _is_in(name, parts))
    if not 2 <= len(layers) <= MOST_LAYERS:
        return {}
    width = _shape(next(iter(layers.values())))[1]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        calls = dummy_calls(forward_of(module), module, TOKENS, width, rotary)
        for call, pairs, down in product(calls, (True, False), reversed(list(layers))):
            # Code of others, called as nobody promised that it could be: any class may come, and
            # each gives the same answer, that nothing is known of it. It then stays whole on each
            # rank of tp, which is exact, and a warning says so.
            try:
                trial = _Trial(module, layers, down, call, tp, heads=heads, pairs=pairs)
                return trial.styles(parts)
            except Exception:  # noqa: BLE001
                continue
    return {}


def _is_in(name: str, parts: Sequence[str]) -> bool:
    return any(not part or f"{name}.".startswith(f"{part}.") for part in parts)


def _shape(layer: Any) -> tuple[int, int]:
    """Outputs and inputs."""
    return (layer.nf, layer.nx) if is_conv1d(layer) else (layer.out_features, layer.in_features)


@dataclass(frozen=True)
class _HeadSplit:
    """How the heads are split, as the runs of all ranks agree."""

    sizes: Mapping[str, int]
    cut_dims: Mapping[str, int]
    inputs: Mapping[str, str]


class _Trial:
    """A module with one of its layers as the one that narrows."""

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, nn.Module],
        down: str,
        call: Mapping[str, Any],
        tp: int,
        *,
        heads: bool,
        pairs: bool,
    ) -> None:
        self.module, self.layers, self.down, self.call, self.tp = module, layers, down, call, tp
        self.pairs = pairs
        self.ups = [name for name in layers if name != down]
        # Small and positive: no activation is flat there.
        self.outputs = {
            name: (0.25 + torch.rand(TOKENS, _shape(layer)[0])).requires_grad_(name != down)
            for name, layer in layers.items()
        }
        self.own = dummy_tensors(module)
        self.whole = StandInRun(self.outputs, None, self.own, pairs=pairs)
        self.result = self.whole.run(module, **call)
        whole = self.whole
        if whole.reads.keys() != layers.keys() or bool(whole.operands) != heads or whole.reads_two:
            raise NotSplitError
        # What heads read without a layer in between would be read by one rank's alone, and of what
        # every rank has whole, its gradient would be a part.
        if any(self._depends(x, self._whole_on_ranks()) for x, _ in self._sinks()):
            raise NotSplitError
        # Every rank's gradient of another output is the whole one, and not a part to add up.
        if any(self._depends(x, [self.outputs[name] for name in self.ups]) for x in whole.others):
            raise NotSplitError

    def styles(self, parts: Sequence[str]) -> Styles:
        """Styles by name in the module, which has the name ""."""
        segments = {name: self._segments(name) for name in self.ups}
        if all(each[0].pieces == 1 and len(each) == 1 for each in segments.values()):
            raise NotSplitError
        split = self._head_split(segments)
        styles = {name: self._of_rows(name, parts) for name, parts in segments.items()}
        down = self.layers[self.down]
        styles[self.down] = Conv1DSum() if is_conv1d(down) else RowwiseParallel()
        others = {name: self._other(name, kind) for name, kind in split.inputs.items()}
        # Those that are in no part have styles of their own, for what is whole.
        if any(x != LocalParams() for name, x in others.items() if not _is_in(name, parts)):
            raise NotSplitError
        styles |= {name: x for name, x in others.items() if _is_in(name, parts)}
        return styles | self._containers(split, styles) | self._table()

    def _whole_on_ranks(self) -> list[Tensor]:
        """Tokens, parameters that are no heads', and outputs of what is handed nothing of heads."""
        by_heads, inside = self._cut_dims(), self._of_heads()
        own = {name: x for name, x in self.own.items() if name not in by_heads}
        inputs, marks = self.whole.inputs, self.whole.marks
        outputs = [x for name, x in marks.items() if not self._depends(inputs[name], inside)]
        every = [*self.call.values(), *own.values(), *outputs]
        return [x for x in every if isinstance(x, Tensor) and x.requires_grad]

    def _of_heads(self) -> list[Tensor]:
        """What each rank has a part of: outputs of layers that are split, and of attention."""
        attended = [] if self.whole.attended is None else [self.whole.attended]
        return [self.outputs[name] for name in self.ups] + attended

    def _segments(self, name: str) -> Segments:
        """The parts of a layer's rows, and who has which."""
        rows, by_sink = _shape(self.layers[name])[0], self._rows_by_sink(name)
        union = [_runs(torch.stack(masks).any(0)) for masks in zip(*by_sink, strict=True)]
        chunk = rows // self.tp
        if not by_sink:
            others = [x for n, x in self.whole.reads.items() if n not in (name, self.down)]
            if any(self._depends(x, [self.outputs[name]]) for x in others):
                return (Segment(rows, 1),)
            raise NotSplitError
        if all(runs == [(0, rows)] for runs in union):
            return (Segment(rows, 1),)
        if all(runs == [(r * chunk, (r + 1) * chunk)] for r, runs in enumerate(union)):
            return (Segment(rows, self.tp),)
        starts: dict[int, Segment] = {}
        for masks in by_sink:
            starts |= self._parts([_runs(mask) for mask in masks])
        ends = [start + starts[start].rows for start in sorted(starts)]
        if [0, *ends] != [*sorted(starts), rows]:
            raise NotSplitError
        return tuple(starts[start] for start in sorted(starts))

    def _rows_by_sink(self, name: str) -> list[list[Tensor]]:
        """For each of what heads are made of, which rows of a layer each rank reads in it."""
        masks_of_sinks = []
        for sink in self._sinks():
            masks = []
            for rank in range(self.tp):
                part = part_of_rank(sink[0], sink[1], rank, self.tp)
                (grad,) = torch.autograd.grad(
                    (part * (0.5 + torch.rand_like(part))).sum(),
                    [self.outputs[name]],
                    allow_unused=True,
                    retain_graph=True,
                )
                none = torch.zeros_like(self.outputs[name])
                masks.append(((none if grad is None else grad) != 0).any(0))
            if any(bool(mask.any()) for mask in masks):
                masks_of_sinks.append(masks)
        return masks_of_sinks

    def _sinks(self) -> list[tuple[Tensor, int]]:
        """Queries, keys and values by heads, and what the layer that narrows reads."""
        sinks = [(x, 1) for x in self.whole.operands] + [(self.whole.reads[self.down], -1)]
        return [(x, dim) for x, dim in sinks if x.requires_grad]

    def _parts(self, runs: list[list[RowRun]]) -> dict[int, Segment]:
        """Parts of which every rank has one stretch, by their first rows."""
        if len({len(each) for each in runs}) != 1:
            raise NotSplitError
        parts = {}
        for stretches in zip(*runs, strict=True):
            distinct = sorted(set(stretches))
            first, rows = distinct[0][0], distinct[-1][1] - distinct[0][0]
            part = Segment(rows, len(distinct))
            fits = part.divides(self.tp) and all(
                run == (a := first + part.start(self.tp, rank), a + part.local(self.tp))
                for rank, run in enumerate(stretches)
            )
            if not fits:
                raise NotSplitError
            parts[first] = part
        return parts

    def _depends(self, x: Tensor, on: Sequence[Tensor]) -> bool:
        if not (x.requires_grad and on):
            return False
        grads = torch.autograd.grad(x.sum(), on, allow_unused=True, retain_graph=True)
        return any(grad is not None for grad in grads)

    def _cut_dims(self) -> dict[str, int]:
        """In which dim a rank has a part of what a module has of its own, one for each head."""
        tensors = {name: x for name, x in self.own.items() if isinstance(x, Tensor)}
        heads = self._heads()
        return {name: [*x.shape].index(heads) for name, x in tensors.items() if heads in x.shape}

    def _heads(self) -> int:
        return self.whole.operands[0].shape[1] if self.whole.operands else 0

    def _head_split(self, segments: Mapping[str, Segments]) -> _HeadSplit:
        """The fewest sizes of a module that let all ranks run, and what others are handed."""
        # A table may have as many channels as there are heads.
        tables = {name for name, _ in self.module.named_buffers(recurse=False)}
        by_heads = self._cut_dims()
        others = {name: dim for name, dim in by_heads.items() if name not in tables}
        for sizes in sizes_of_heads(forward_of(self.module), self.module, self.tp):
            for cut_dims in (by_heads, others):
                runs = [self._inputs(rank, segments, cut_dims, sizes) for rank in range(self.tp)]
                if None not in runs and all(each == runs[0] for each in runs):
                    return _HeadSplit(sizes, cut_dims, runs[0] or {})
        raise NotSplitError

    def _inputs(
        self,
        rank: int,
        segments: Mapping[str, Segments],
        cut_dims: Mapping[str, int],
        sizes: Mapping[str, int],
    ) -> dict[str, str] | None:
        """What others are handed on a rank, in a word; None if it has not its part of the work."""
        whole, tp = self.whole, self.tp
        outputs = {self.down: self.outputs[self.down]}
        for name, parts in segments.items():
            outputs[name] = cut(self.outputs[name].detach(), rows_of_heads(parts, tp, rank), 1)
        own = dict(self.own)
        own |= {name: part_of_rank(own[name], dim, rank, tp) for name, dim in cut_dims.items()}
        attended = None if whole.attended is None else part_of_rank(whole.attended, 2, rank, tp)
        run = StandInRun(outputs, attended, {**own, **sizes}, pairs=self.pairs)
        try:
            with torch.no_grad():
                result = run.run(self.module, **self.call)
        except Exception:  # noqa: BLE001 (as above: with these sizes it does not run)
            return None
        pairs = [(result, self.result)]
        pairs += [(run.reads[name], whole.reads[name]) for name in self.ups]
        pairs += [(run.reads[self.down], part_of_rank(whole.reads[self.down], -1, rank, tp))]
        pairs += [
            (x, part_of_rank(y, 1, rank, tp))
            for x, y in zip(run.operands, whole.operands, strict=True)
        ]
        if not all(map(nearly_equal, *zip(*pairs, strict=True))):
            return None
        if not same_arguments(run, whole, rank, tp):
            return None
        inputs = {
            name: kind_of_part(x, whole.inputs[name], rank, tp) for name, x in run.inputs.items()
        }
        return None if None in inputs.values() else {n: x or "" for n, x in inputs.items()}

    def _containers(self, split: _HeadSplit, styles: Styles) -> Styles:
        """Of modules around layers, which read copies; a layer by itself copies what it reads."""
        inside = [self.outputs[name] for name in self.ups]
        sizes, cut_dims, heads = split.sizes, split.cut_dims, self._heads()
        readers: dict[str, list[str]] = {"": []} if sizes or cut_dims else {}
        for name in self.ups:
            if not self._depends(self.whole.reads[name], inside):
                readers.setdefault(name.rpartition(".")[0], []).append(name)
        containers: Styles = {}
        for parent, names in readers.items():
            module = self.module.get_submodule(parent)
            of_heads = cut_dims if parent == "" else {}
            of_rank = sizes if parent == "" else {}
            if len(names) == 1 and not of_heads and not of_rank and styles[names[0]] == ROWS:
                containers[names[0]] = ColwiseParallel()
                continue
            own = {name for name, _ in module.named_parameters(recurse=False)}
            dims = {name: dim for name, dim in of_heads.items() if name in own}
            runs = all(parent in self.whole.within[name] for name in names)
            if dims.keys() != own or not runs or reads_its_class(type(module).forward):
                raise NotSplitError
            buffers = {name: (Segment(heads, heads),) for name in of_heads if name not in own}
            inner = tuple(name.rpartition(".")[2] for name in names)
            containers[parent] = HeadsOfLayer(dims, of_rank, buffers, False, inner)
        return containers

    def _table(self) -> Styles:
        """Of a table of biases with a column for each head."""
        is_known = self.module in biased_attentions(self.module) and hasattr(self.module, TABLE)
        shape = self.module.get_parameter(f"{TABLE}.weight").shape if is_known else (0, 0)
        return {TABLE: LocalParams(Shard(1))} if shape[1] == self._heads() > 0 else {}

    def _of_rows(self, name: str, parts: Segments) -> ParallelStyle:
        layer = self.layers[name]
        if len(parts) == 1 and parts[0].pieces == 1:
            return WHOLE_FOR_HEADS
        rows = sum(part.rows for part in parts)
        if is_conv1d(layer):
            if rows % self.tp:
                raise NotSplitError
            return Conv1DRows(parts)
        return ROWS if len(parts) == 1 else SegmentRows(segments=parts)

    def _other(self, name: str, kind: str) -> ParallelStyle:
        """The style of a module that is no linear layer, by what it is handed."""
        module, x = self.module.get_submodule(name), self.whole.inputs[name]
        if not self._depends(x, self._of_heads()):
            return LocalParams()
        parameters = list(module.named_parameters())
        by_channel = all("." not in n and p.numel() in (1, x.shape[-1]) for n, p in parameters)
        if not by_channel:
            raise NotSplitError
        if kind != "channels" or is_elementwise(module, x.shape[-1], self.tp):
            return WHOLE_FOR_HEADS
        style = norm_of_parts(module, x.shape[-1])
        if style is None:
            raise NotSplitError
        return style


def _runs(mask: Tensor) -> list[RowRun]:
    """Where a mask is set, in stretches."""
    edge = torch.zeros(1, dtype=torch.int64)
    ends = torch.diff(mask.long(), prepend=edge, append=edge).nonzero().flatten().tolist()
    return list(zip(ends[::2], ends[1::2], strict=True))
