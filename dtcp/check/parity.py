"""A step of a model on a mesh, held against the same step on one device."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from dtcp.check.auxiliary import auxiliary_losses, whole
from dtcp.check.checked_model import CheckedModel, padding_id, vocabulary
from dtcp.check.collective_calls import CollectiveCalls
from dtcp.compile import Graphs, count_graphs
from dtcp.distributed.ledger import LEDGER, OpCount, count_traffic, traffic_since
from dtcp.distributed.mesh import Degrees, ParallelMesh, check_no_stages
from dtcp.labels import IGNORED, shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.mixer import ClaimedMixer, Mixer
from dtcp.parallelize import Compile
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail, SequenceLayout
from dtcp.sequence.masks import And, Or
from dtcp.softmax import RingAttention
from dtcp.softmax.mixer import SoftmaxAttention
from dtcp.softmax.style import AttentionStyle
from dtcp.token_dropout import leave_out_dropout

FLOOR = 0.1
"""An error is relative to the gradient's largest value, or to this part of the model's scale: the
median of those values. A key's bias without rotary positions has the gradient 0, and what is left
of it on either side is noise: 1e-16 of the scale, or 1e-7 behind a norm in fp32."""


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

    def __post_init__(self) -> None:
        check_no_stages("A check", self.degrees)
        least = 12 + 2 * self.degrees.dp_shard * self.degrees.dp_replicate
        if self.seq_len < least:
            raise ValueError(
                f"A check packs three documents into each row, got seq_len={self.seq_len}: give "
                f"at least {least} tokens."
            )


@dataclass(frozen=True)
class ParityResult:
    """One run, eager or compiled.

    Args:
        errors: the largest of all ranks, of the loss, of losses that modules keep, and of each
            gradient: the largest difference divided by the largest value, or by FLOOR of the
            model's scale.
        by_op: calls and bytes received on this rank, forward and backward.
        by_layer: the same by mixer and pass, "<mixer>, forward"; empty unless the run is eager.
        elsewhere: calls of collectives outside of mixers (by tp and FSDP); empty unless eager.
        claims: mixer -> the style that took it over, and the mixer.
        kinds: of masks, and of mixers without one.
        packed: whether rows were packed documents.
    """

    errors: Mapping[str, float]
    by_op: Mapping[str, OpCount]
    by_layer: Mapping[str, OpCount]
    graphs: Graphs
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    claims: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    packed: bool = True


def compare(
    checked: CheckedModel, options: CheckOptions, mesh: ParallelMesh, compile: Compile | None
) -> ParityResult:
    """One step on the mesh, held against the same step on one device; the same on every rank.

    Raises:
        ValueError: a step on one device that proves nothing: no gradient, or one not finite.
    """
    reference, rows, expected = _on_one_device(checked, mesh, options)
    model = checked.parallelize(seeded(checked), mesh, options.style, compile)
    by_layer: dict[str, OpCount] = {}
    others = CollectiveCalls()
    with ExitStack() as watch:
        traffic, graphs = watch.enter_context(count_traffic()), watch.enter_context(count_graphs())
        if compile is None:
            # Under a dispatch mode dynamo runs eager, and there would be no graphs to count.
            watch.enter_context(others)
            watch.enter_context(_watch_mixers(model, by_layer))
        losses = _on_mesh(checked, model, mesh, options, rows[mesh.rank("batch")])
    errors = {name: _error(losses.get(name), value, 1e-6) for name, value in expected.items()}
    floor = FLOOR * _scale(reference)
    for name, parameter in reference.named_parameters():
        errors[name] = _gradient_error(model.get_parameter(name).grad, parameter.grad, floor)
    errors = _largest(errors)
    claims = {name: _claim(mixer) for name, mixer in _mixers(model) if mixer.style is not None}
    kinds = tuple(sorted({kind for _, mixer in _mixers(model) for kind in _kinds(mixer)}))
    packed = len(rows[0].documents.lengths[0]) > 1
    return ParityResult(
        errors,
        by_op=traffic.by_op,
        by_layer=by_layer,
        graphs=graphs,
        elsewhere=dict(others.calls),
        claims=claims,
        kinds=kinds,
        packed=packed,
    )


def seeded(checked: CheckedModel) -> Any:
    """The model, with the same weights wherever it is built; it drops nothing by token."""
    torch.manual_seed(0)
    model = checked.build()
    leave_out_dropout(model)
    return model


def _mixers(model: nn.Module) -> Iterator[tuple[str, Mixer]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Mixer))


def _claim(mixer: Mixer) -> str:
    """The style that took a mixer over, and the mixer as it was before."""
    kind = _kind(mixer)
    return f"{mixer.style}, {kind.__name__}({kind.extra_repr(mixer)})"


def _kind(mixer: Mixer) -> type[Mixer]:
    """The class of a mixer before a style took it over."""
    return next(
        kind
        for kind in type(mixer).__mro__
        if issubclass(kind, Mixer) and not issubclass(kind, ClaimedMixer)
    )


def _kinds(mixer: Any) -> Iterator[str]:
    """What a mixer's mask is made of; the mixer's own kind if it is none of plain attention."""
    mask = getattr(mixer, "mask", None)
    if mask is None or _kind(mixer) is not SoftmaxAttention:
        yield _kind(mixer).__name__
    waiting = [] if mask is None else [mask]
    while waiting:
        mask = waiting.pop()
        parts = [mask.left, mask.right] if isinstance(mask, And | Or) else []
        waiting += parts
        if not parts:
            yield type(mask).__name__


@contextmanager
def _watch_mixers(model: nn.Module, by_layer: dict[str, OpCount]) -> Iterator[None]:
    """Record what the forward and the backward of each mixer add to the ledger."""
    with ExitStack() as hooks:
        for name, mixer in _mixers(model):
            before, after = _between(by_layer, f"{name}, forward")
            hooks.enter_context(mixer.register_forward_pre_hook(before))
            hooks.enter_context(mixer.register_forward_hook(after))
            before, after = _between(by_layer, f"{name}, backward")
            hooks.enter_context(mixer.register_full_backward_pre_hook(before))
            hooks.enter_context(mixer.register_full_backward_hook(after))
        yield


def _between(
    counts: dict[str, OpCount], name: str
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Two hooks that record what the ledger counts between their calls."""
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


def _row(model: nn.Module, seq_len: int, index: int, *, packed: bool) -> _Row:
    """Three documents of random tokens, none of them padding; shards end inside of documents."""
    first, second = seq_len // 3 + 1 + index, seq_len // 4 + 1
    lengths = (first, second, seq_len - first - second) if packed else (seq_len,)
    generator = torch.Generator().manual_seed(index)
    input_ids = torch.randint(1, vocabulary(model), (1, seq_len), generator=generator)
    padding = padding_id(model)
    if padding is not None:
        input_ids = input_ids.where(input_ids != padding, max(padding - 1, 1) + (padding == 1))
    return _Row(Documents((lengths,), seq_len), input_ids)


def _labels(row: _Row, width: int) -> Tensor:
    """The next token of each, modulo the width of the head: [1, S]."""
    labels = shift_labels(row.input_ids, row.documents)
    return labels.where(labels == IGNORED, labels % max(width, 2))


def _on_one_device(
    checked: CheckedModel, mesh: ParallelMesh, options: CheckOptions
) -> tuple[nn.Module, list[_Row], dict[str, Tensor]]:
    """The model with its gradients, the rows of all batch ranks, and the losses on them.

    Rows are single documents where modules keep losses of their own: a model that is run on one
    document after the other would not say what it keeps of the whole row.
    """
    model, indices = seeded(checked), range(mesh.size("batch"))
    rows = [_row(model, options.seq_len, index, packed=True) for index in indices]
    losses = _losses(checked, model, rows)
    if len(losses) > 1:
        # Start over: a loss may have added itself to earlier ones.
        model = seeded(checked)
        rows = [_row(model, options.seq_len, index, packed=False) for index in indices]
        losses = _losses(checked, model, rows)
    sum(losses.values(), torch.zeros(())).backward()
    values = {name: loss.detach() for name, loss in losses.items()}
    if not all(bool(value.isfinite()) for value in values.values()):
        losses_found = {name: value.item() for name, value in values.items()}
        raise ValueError(
            f"A step to compare has a finite loss on one device, got {losses_found} from "
            f"{type(model).__name__}: correct the model, or its config by --set."
        )
    if not _scale(model) > 0:
        raise ValueError(
            f"A step to compare has gradients on one device, got none in {type(model).__name__}: "
            f"its logits depend on no parameter that is trained."
        )
    return model, rows, values


def _losses(checked: CheckedModel, model: nn.Module, rows: list[_Row]) -> dict[str, Tensor]:
    """The mean loss over the tokens of all rows, and the sums of what modules keep of each row."""
    per_token, kept = [], dict[str, Tensor]()
    for row in rows:
        before = auxiliary_losses(model).values()
        logits = _two_or_more(
            checked.logits_on_one_device(model, row.input_ids, row.documents)
        ).flatten(0, 1)
        labels = _labels(row, logits.shape[-1]).flatten()
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
        per_token.append(losses[labels != IGNORED])
        for name, loss in auxiliary_losses(model, before).items():
            kept[name] = kept.get(name, torch.zeros(())) + whole(loss)
    return {"loss": torch.cat(per_token).mean(), **kept}


def _on_mesh(
    checked: CheckedModel, model: nn.Module, mesh: ParallelMesh, options: CheckOptions, row: _Row
) -> dict[str, Tensor]:
    """The same losses on the mesh, whose shares all ranks add up."""
    documents = row.documents
    batch = {"input_ids": row.input_ids, "position_ids": documents.position_ids()}
    batch["labels"] = shift_labels(row.input_ids, documents)
    # No token is of an image, for masks that ask.
    batch["block"] = torch.full_like(row.input_ids, -1)
    local, sharded = checked.shard(model, batch, documents, mesh, options.layout)
    logits = _two_or_more(checked.local_logits(model, local, sharded))
    labels = local["labels"]
    labels = labels.where(labels == IGNORED, labels % logits.shape[-1])
    share = token_mean_loss(logits, labels, global_token_count(labels, mesh.loss))
    kept = {name: whole(loss) for name, loss in auxiliary_losses(model).items()}
    losses = {"loss": share, **kept}
    sum(losses.values(), torch.zeros(())).backward()
    shares = {name: loss.detach() for name, loss in losses.items()}
    if mesh.loss is not None:
        for loss in shares.values():
            dist.all_reduce(loss, group=mesh.loss.get_group())
    return shares


def _two_or_more(logits: Tensor) -> Tensor:
    """Logits of at least two classes: with one class the loss would always be 0."""
    return logits if logits.shape[-1] > 1 else F.pad(logits, (0, 1))


def _scale(model: nn.Module) -> float:
    """The scale of a model's gradients: the median of their largest values, zeros left out."""
    largest = [float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None]
    largest = sorted(value for value in largest if value != 0)
    return largest[len(largest) // 2] if largest else 0.0


def _gradient_error(actual: Tensor | None, expected: Tensor | None, floor: float) -> float:
    """0 if there is no gradient on either side; one that is missing is one of zeros."""
    if expected is None or actual is None:
        present = actual if expected is None else expected
        if present is None:
            return 0.0
        expected = torch.zeros_like(present) if expected is None else expected
        actual = torch.zeros_like(present) if actual is None else actual
    return _error(actual, expected, floor)


def _error(actual: Tensor | None, expected: Tensor, floor: float) -> float:
    """Largest difference divided by largest value, or by the floor; infinite if one is missing."""
    if actual is None:
        return math.inf
    actual = actual.full_tensor() if isinstance(actual, DTensor) else actual
    # A style may split a dim that holds several parts: one dim for the parts, one for each.
    difference = actual.reshape(expected.shape) - expected
    return float(difference.abs().max()) / max(float(expected.abs().max()), floor)


def _largest(errors: dict[str, float]) -> dict[str, float]:
    """The largest error of all ranks: what a single rank gets wrong is wrong."""
    values = torch.tensor(list(errors.values()), dtype=torch.float64)
    if dist.is_initialized():
        # Not every backend's maximum of NaN and a number is NaN.
        values = values.nan_to_num(nan=math.inf)
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(errors, values.tolist(), strict=True))
