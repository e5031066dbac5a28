"""Run a subject on ranks of this machine and on one device, and say how they differ."""

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
from dtcp.check.subject import Mixing, Subject, vocabulary
from dtcp.compile import Graphs, count_graphs
from dtcp.distributed.dtensor_rules import CollectiveCalls
from dtcp.distributed.ledger import (
    LEDGER,
    Count,
    count,
    since,
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
"""What says that something cannot be carried out, rather than that something went wrong."""


@dataclass(frozen=True)
class Options:
    """What is compared.

    Args:
        bound: relative error that passes; models with norms in fp32 reach 1e-6 in fp64.
        backend: of torch.compile for the second of the two runs; empty for one run, eager.
    """

    degrees: Degrees
    style: AttentionStyle = field(default_factory=RingAttention)
    layout: type[SequenceLayout] = HeadTail
    seq_len: int = 48
    bound: float = 1e-5
    backend: str = "aot_eager"


@dataclass(frozen=True)
class Outcome:
    """One run, eager or compiled, as rank 0 saw it.

    Args:
        errors: largest difference over largest value, of the loss and of each gradient.
        by_op: executions and bytes of this rank, forward and backward.
        by_layer: the same by mixer and pass, "<mixer>, forward"; an eager run alone knows.
        elsewhere: calls of collectives outside of mixers (of tp and FSDP); an eager run too.
    """

    errors: Mapping[str, float]
    by_op: Mapping[str, Count]
    by_layer: Mapping[str, Count]
    graphs: Graphs
    elsewhere: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All that was found; runs is empty where something was refused."""

    mixing: Mixing
    bound: float
    runs: Mapping[str, Outcome] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return bool(self.runs) and not any(self.failures(name) for name in self.runs)

    def failures(self, run: str) -> dict[str, float]:
        """Errors out of bound; NaN is one."""
        errors = self.runs[run].errors
        return {name: error for name, error in errors.items() if not error <= self.bound}


def run(subject: Subject, options: Options) -> Report:
    """Check a subject; ranks are processes of this machine, on its CPU.

    What a rank refuses is refused; any other error of a rank is raised here.
    """
    mixing = subject.mixing(_seeded(subject), options.style, options.degrees.tp)
    if mixing.refused:
        return Report(mixing, options.bound)
    with tempfile.TemporaryDirectory(prefix="dtcp-check-") as folder:
        try:
            multiprocessing.spawn(
                _rank, (subject, options, folder), nprocs=options.degrees.world, join=True
            )
        except multiprocessing.ProcessRaisedException:
            refusals = {path.read_text() for path in Path(folder).glob("refused-*")}
            if not refusals:
                raise
            return Report(replace(mixing, refused=tuple(sorted(refusals))), options.bound)
        # Written by rank 0 a moment ago.
        runs = torch.load(Path(folder, "runs"), weights_only=False)
    return Report(mixing, options.bound, runs)


def compare(
    subject: Subject, options: Options, mesh: ParallelMesh, compile: Compile | None
) -> Outcome:
    """One step on the mesh, against the same step on one device."""
    reference = _seeded(subject)
    vocab_size, seq_len = vocabulary(reference), options.seq_len
    rows = [_row(vocab_size, seq_len, index) for index in range(mesh.size("batch"))]
    wanted = _one_device(subject, reference, rows)

    model = subject.parallelize(_seeded(subject), mesh, options.style, compile)
    by_layer: dict[str, Count] = {}
    others = CollectiveCalls()
    with ExitStack() as watch:
        traffic, graphs = watch.enter_context(count()), watch.enter_context(count_graphs())
        if compile is None:
            # A mode of this kind makes dynamo run eager: of no use where graphs are counted.
            watch.enter_context(others)
            watch.enter_context(_watch_mixers(model, by_layer))
        found = _on_mesh(subject, model, mesh, options, rows[mesh.rank("batch")])
    errors = {"loss": _error(found, wanted)}
    for name, parameter in reference.named_parameters():
        errors[name] = _gradient_error(model.get_parameter(name).grad, parameter.grad)
    return Outcome(errors, traffic.by_op, by_layer, graphs, dict(others.calls))


def _rank(rank: int, subject: Subject, options: Options, folder: str) -> None:
    torch.set_num_threads(1)
    world = options.degrees.world
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        mesh = ParallelMesh.from_degrees(options.degrees, "cpu")
        runs = {"eager": compare(subject, options, mesh, None)}
        if options.backend:
            runs[options.backend] = compare(subject, options, mesh, Compile(options.backend))
        if rank == 0:
            torch.save(runs, Path(folder, "runs"))
    except REFUSALS as error:
        Path(folder, f"refused-{rank}").write_text(str(error))
        raise
    finally:
        dist.destroy_process_group()


def _seeded(subject: Subject) -> Any:
    torch.manual_seed(0)
    return subject.build()


@contextmanager
def _watch_mixers(model: nn.Module, by_layer: dict[str, Count]) -> Iterator[None]:
    """Note what each mixer's forward and backward add to the ledger."""
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


def _between(found: dict[str, Count], name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Two hooks: what was counted from the one's call to the other's."""
    start: dict[str, Count] = {}

    def before(*_: Any) -> None:
        start.update(LEDGER.snapshot())

    def after(*_: Any) -> None:
        found[name] = sum(since(start).by_op.values(), Count())

    return before, after


@dataclass(frozen=True)
class _Row:
    """A row of packed documents: [1, S] each."""

    documents: Documents
    input_ids: Tensor
    labels: Tensor


def _row(vocab_size: int, seq_len: int, index: int) -> _Row:
    """Three documents, random tokens; shards end inside of documents."""
    first, second = seq_len // 3 + 1 + index, seq_len // 4 + 1
    documents = Documents(((first, second, seq_len - first - second),), seq_len)
    generator = torch.Generator().manual_seed(index)
    input_ids = torch.randint(1, vocab_size, (1, seq_len), generator=generator)
    return _Row(documents, input_ids, shift_labels(input_ids, documents))


def _one_device(subject: Subject, model: nn.Module, rows: list[_Row]) -> Tensor:
    losses = []
    for row in rows:
        labels = row.labels
        logits = subject.whole(model, row.input_ids, row.documents).flatten(0, 1)
        per_token = F.cross_entropy(logits, labels.flatten(), reduction="none")
        losses.append(per_token[labels.flatten() >= 0])
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.detach()


def _on_mesh(
    subject: Subject, model: nn.Module, mesh: ParallelMesh, options: Options, row: _Row
) -> Tensor:
    documents = row.documents
    position_ids = documents.position_ids()
    batch = {"input_ids": row.input_ids, "labels": row.labels, "position_ids": position_ids}
    local, plan = shard_batch(batch, mesh, options.layout, model=model, documents=documents)
    logits = subject.local(model, local, plan)
    tokens = global_token_count(local["labels"], mesh.loss)
    share = token_mean_loss(logits, local["labels"], tokens)
    share.backward()
    loss = share.detach()
    if mesh.loss is not None:
        dist.all_reduce(loss, group=mesh.loss.get_group())
    return loss


def _gradient_error(found: Tensor | None, wanted: Tensor | None) -> float:
    """0 where neither has one, infinite where one alone has."""
    if found is None or wanted is None:
        return 0.0 if found is wanted else math.inf
    whole = found.full_tensor() if isinstance(found, DTensor) else found
    # A style may give a dim of several parts a dim for the parts.
    return _error(whole.reshape(wanted.shape), wanted)


def _error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over largest value; over 1 where all values are 0."""
    scale = float(wanted.abs().max())
    return float((found - wanted).abs().max()) / (scale or 1.0)
