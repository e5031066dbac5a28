"""Run a model on ranks of this machine and on one device, and report how the two differ."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from dtcp.batch import shard_batch
from dtcp.check.checked_model import CheckedModel, Mixing, vocabulary
from dtcp.check.collective_calls import CollectiveCalls
from dtcp.compile import Graphs, count_graphs
from dtcp.distributed.ledger import (
    LEDGER,
    OpCount,
    count_traffic,
    traffic_since,
)
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.labels import shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.mixer import Mixer
from dtcp.parallelize import Compile
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail, SequenceLayout
from dtcp.softmax import RingAttention
from dtcp.softmax.style import AttentionStyle

REFUSALS = (ValueError, NotImplementedError)
"""Errors that say that something cannot be done, rather than that something went wrong."""


@dataclass(frozen=True)
class CheckOptions:
    """What is compared.

    Args:
        seq_len: tokens of each row.
        bound: relative error that passes; models with norms in fp32 reach 1e-6 in fp64.
        backend: of torch.compile, for the second of the two runs; empty for one run, eager.
    """

    degrees: Degrees
    style: AttentionStyle = field(default_factory=RingAttention)
    layout: type[SequenceLayout] = HeadTail
    seq_len: int = 48
    bound: float = 1e-5
    backend: str = "aot_eager"


@dataclass(frozen=True)
class ParityResult:
    """One run, eager or compiled, as rank 0 saw it.

    Args:
        errors: largest difference divided by largest value, of the loss and of each gradient.
        by_op: calls and bytes received on this rank, forward and backward.
        by_layer: the same by mixer and pass, "<mixer>, forward"; empty unless the run is eager.
        elsewhere: calls of collectives outside of mixers (by tp and FSDP); empty unless eager.
    """

    errors: Mapping[str, float]
    by_op: Mapping[str, OpCount]
    by_layer: Mapping[str, OpCount]
    graphs: Graphs
    elsewhere: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckReport:
    """The result of a check; runs is empty if something was refused."""

    mixing: Mixing
    bound: float
    runs: Mapping[str, ParityResult] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return bool(self.runs) and not any(self.failures(name) for name in self.runs)

    def failures(self, run: str) -> dict[str, float]:
        """Errors out of bound, NaN included."""
        errors = self.runs[run].errors
        return {name: error for name, error in errors.items() if not error <= self.bound}


def check_model(checked: CheckedModel, options: CheckOptions) -> CheckReport:
    """Check a model; ranks are processes on this machine's CPU.

    What a rank refuses is in the report; any other error of a rank is raised here.
    """
    mixing = checked.mixing(_seeded(checked), options.style, options.degrees.tp)
    if mixing.refused:
        return CheckReport(mixing, options.bound)
    with tempfile.TemporaryDirectory(prefix="dtcp-check-") as folder:
        try:
            multiprocessing.spawn(
                _rank, (checked, options, folder), nprocs=options.degrees.world, join=True
            )
        except multiprocessing.ProcessRaisedException:
            refusals = {path.read_text() for path in Path(folder).glob("refused-*")}
            if not refusals:
                raise
            return CheckReport(replace(mixing, refused=tuple(sorted(refusals))), options.bound)
        # Written by rank 0 a moment ago.
        runs = torch.load(Path(folder, "runs"), weights_only=False)
    return CheckReport(mixing, options.bound, runs)


def compare(
    checked: CheckedModel, options: CheckOptions, mesh: ParallelMesh, compile: Compile | None
) -> ParityResult:
    """One step on the mesh, held against the same step on one device."""
    reference = _seeded(checked)
    vocab_size, seq_len = vocabulary(reference), options.seq_len
    rows = [_row(vocab_size, seq_len, index) for index in range(mesh.size("batch"))]
    expected = _one_device(checked, reference, rows)

    model = checked.parallelize(_seeded(checked), mesh, options.style, compile)
    by_layer: dict[str, OpCount] = {}
    others = CollectiveCalls()
    with ExitStack() as watch:
        traffic, graphs = watch.enter_context(count_traffic()), watch.enter_context(count_graphs())
        if compile is None:
            # Under a dispatch mode dynamo runs eager, and there would be no graphs to count.
            watch.enter_context(others)
            watch.enter_context(_watch_mixers(model, by_layer))
        loss = _on_mesh(checked, model, mesh, options, rows[mesh.rank("batch")])
    errors = {"loss": _error(loss, expected)}
    for name, parameter in reference.named_parameters():
        errors[name] = _gradient_error(model.get_parameter(name).grad, parameter.grad)
    return ParityResult(errors, traffic.by_op, by_layer, graphs, dict(others.calls))


def _rank(rank: int, checked: CheckedModel, options: CheckOptions, folder: str) -> None:
    torch.set_num_threads(1)
    world = options.degrees.world
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        mesh = ParallelMesh.from_degrees(options.degrees, "cpu")
        runs = {"eager": compare(checked, options, mesh, None)}
        if options.backend:
            runs[options.backend] = compare(checked, options, mesh, Compile(options.backend))
        if rank == 0:
            torch.save(runs, Path(folder, "runs"))
    except REFUSALS as error:
        Path(folder, f"refused-{rank}").write_text(str(error))
        raise
    finally:
        dist.destroy_process_group()


def _seeded(checked: CheckedModel) -> Any:
    torch.manual_seed(0)
    return checked.build()


@contextmanager
def _watch_mixers(model: nn.Module, by_layer: dict[str, OpCount]) -> Iterator[None]:
    """Note what the forward and the backward of each mixer add to the ledger."""
    hooks = []
    for name, mixer in model.named_modules():
        if isinstance(mixer, Mixer):
            before, after = _between(by_layer, f"{name}, forward")
            hooks += [mixer.register_forward_pre_hook(before), mixer.register_forward_hook(after)]
            before, after = _between(by_layer, f"{name}, backward")
            hooks += [
                mixer.register_full_backward_pre_hook(before),
                mixer.register_full_backward_hook(after),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _between(
    counts: dict[str, OpCount], name: str
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Two hooks, and what the ledger counts between their calls."""
    start: dict[str, OpCount] = {}

    def before(*_: Any) -> None:
        start.update(LEDGER.snapshot())

    def after(*_: Any) -> None:
        counts[name] = sum(traffic_since(start).by_op.values(), OpCount())

    return before, after


@dataclass(frozen=True)
class _Row:
    """A row of packed documents; tensors [1, S]."""

    documents: Documents
    input_ids: Tensor
    labels: Tensor


def _row(vocab_size: int, seq_len: int, index: int) -> _Row:
    """Three documents of random tokens; shards end inside of documents."""
    first, second = seq_len // 3 + 1 + index, seq_len // 4 + 1
    documents = Documents(((first, second, seq_len - first - second),), seq_len)
    generator = torch.Generator().manual_seed(index)
    input_ids = torch.randint(1, vocab_size, (1, seq_len), generator=generator)
    return _Row(documents, input_ids, shift_labels(input_ids, documents))


def _one_device(checked: CheckedModel, model: nn.Module, rows: list[_Row]) -> Tensor:
    losses = []
    for row in rows:
        labels = row.labels
        logits = checked.logits_on_one_device(model, row.input_ids, row.documents).flatten(0, 1)
        per_token = F.cross_entropy(logits, labels.flatten(), reduction="none")
        losses.append(per_token[labels.flatten() >= 0])
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.detach()


def _on_mesh(
    checked: CheckedModel, model: nn.Module, mesh: ParallelMesh, options: CheckOptions, row: _Row
) -> Tensor:
    documents = row.documents
    position_ids = documents.position_ids()
    batch = {"input_ids": row.input_ids, "labels": row.labels, "position_ids": position_ids}
    local, sharded = shard_batch(batch, mesh, options.layout, model=model, documents=documents)
    logits = checked.local_logits(model, local, sharded)
    tokens = global_token_count(local["labels"], mesh.loss)
    share = token_mean_loss(logits, local["labels"], tokens)
    share.backward()
    loss = share.detach()
    if mesh.loss is not None:
        dist.all_reduce(loss, group=mesh.loss.get_group())
    return loss


def _gradient_error(actual: Tensor | None, expected: Tensor | None) -> float:
    """0 if there is no gradient on either side, infinite if there is one on one side alone."""
    if actual is None or expected is None:
        return 0.0 if actual is expected else math.inf
    whole = actual.full_tensor() if isinstance(actual, DTensor) else actual
    # A style may split a dim that holds several parts: one dim for the parts, one for each.
    return _error(whole.reshape(expected.shape), expected)


def _error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference divided by largest value, or by 1 if all values are 0."""
    scale = float(expected.abs().max())
    return float((actual - expected).abs().max()) / (scale or 1.0)
