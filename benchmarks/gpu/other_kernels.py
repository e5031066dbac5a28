"""The kernels of other mixers, each against plain torch in fp64 on the card.

Sparse attention, the delta rule by head and by channel, gated linear attention, experts. A mixer
without kernels of its own runs on torch's matmuls here, and its line says so.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.candidates import candidates
from benchmarks.gpu.errors import errors_by_name, within
from benchmarks.gpu.problems import Case, lognormal_documents
from benchmarks.gpu.timing import seconds_of
from dtcp.kernels.delta_rule.api import DeltaInputs, delta_kernel, fla_delta_rule
from dtcp.kernels.delta_rule.fla_inside import is_guarded
from dtcp.kernels.delta_rule.reference import ReferenceDeltaRule
from dtcp.kernels.delta_rule.self_test import RecurrentKernel, results_of, slowed
from dtcp.kernels.grouped_linear import grouped_linear
from dtcp.kernels.linear_attention.api import fla_linear_attention, linear_kernel
from dtcp.kernels.linear_attention.reference import ReferenceLinearAttention
from dtcp.kernels.linear_attention.types import LinearInputs
from dtcp.kernels.sparse.api import SparseKeys, sparse_kernel, triton_kernel
from dtcp.kernels.sparse.index_kernel import index_kernel, plain_scores, triton_scores
from dtcp.kernels.sparse.reference import ReferenceSparseAttention
from dtcp.sequence.coords import Coords
from dtcp.sparse.metadata import Compression, sparse_metadata
from dtcp.sparse_latent import SparseLatentAttention

BOUND, STATE_BOUND = 2.0**-6, 2.0**-5
"""Of bf16, as norms relative to the truth's; states are carried over many tokens."""
PARTS = 6
"""Cases that share what fla's autotuner tries: some 80 kernels, of 2 s each to compile."""


def cases(device: str, length: int = 2048) -> list[Case]:
    """What is held to the reference; then what is compiled for the time of the delta rule."""
    found: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("sparse, selected entries", lambda: _sparse(device, length, ratio=4, selected=128)),
        ("sparse, runs of entries", lambda: _sparse(device, length, ratio=32, selected=None)),
        ("sparse, picked latents", lambda: _latents(device, length, selected=256)),
        ("indexer", lambda: _index(device, length)),
        ("delta rule, decay by head", lambda: _delta(device, length, by_channel=False)),
        ("delta rule, decay by channel", lambda: _delta(device, length, by_channel=True)),
        ("linear attention", lambda: _linear(device, length)),
        ("experts", lambda: _experts(device, length)),
    ]
    if device == "cuda":
        found += [
            (f"delta rule's candidates {part + 1} of {PARTS}", partial(_compile_candidates, part))
            for part in range(PARTS)
        ]
    return [Case(name, run) for name, run in found]


def _compile_candidates(part: int) -> dict[str, Any]:
    """Compile a share of what the autotuner tries before the delta rule can be timed."""
    with candidates(part, PARTS):
        return {"kernel": summary_overhead(tokens=4096)["kernel"]}


def _noise(device: str, dtype: torch.dtype = torch.bfloat16) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    return draw


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _compared(
    names: Sequence[str], ours: Sequence[Any], right: Sequence[Any], kernel: object, bound: float
) -> dict[str, Any]:
    errors = errors_by_name(names, ours, right)
    name = kernel if isinstance(kernel, str) else type(kernel).__name__
    return {"kernel": name, **errors, "right": within(errors, bound)}


def _sparse(device: str, length: int, *, ratio: int, selected: int | None) -> dict[str, Any]:
    heads, dim, noise = 64, 512, _noise(device)
    if device == "cpu":
        heads, dim = 4, 32
    coords = Coords.of(lognormal_documents(length))
    compression = Compression(ratio, selected=selected)
    metadata = sparse_metadata(coords, [[(0, length)]], 0, 128, compression, halo=False)
    sight = metadata.to(device).sight
    entries = sight.closing.shape[1]
    q, keys, rows = noise(1, length, heads, dim), noise(1, length, dim), noise(1, entries, dim)
    places = None if selected is None else _places(sight.entry_run, selected)
    given = SparseKeys(keys, rows, places, sight, dim)
    grad = noise(1, length, heads, dim)
    return _held_to_fp64(q, given, noise(heads).float(), grad, dim**-0.5)


def _latents(device: str, length: int, *, selected: int) -> dict[str, Any]:
    """DeepSeek-V3.2's: 512 channels of a latent, which is the value, and 64 of a rotary key."""
    heads, latent, rotary, noise = 128, 512, 64, _noise(device)
    if device == "cpu":
        heads, latent, rotary, selected = 4, 24, 8, 16
    coords = Coords.of(lognormal_documents(length))
    sight = SparseLatentAttention().whole_row_metadata(coords).to(device).sight
    dim, places = latent + rotary, _places(sight.entry_run, selected)
    q, rows = noise(1, length, heads, dim), noise(1, length, dim)
    given = SparseKeys(rows[:, :0], rows, places, sight, latent)
    grad = noise(1, length, heads, latent)
    return _held_to_fp64(q, given, None, grad, (128 + rotary) ** -0.5)


def _index(device: str, length: int) -> dict[str, Any]:
    """DeepSeek-V3.2's scores of all that each query may pick from."""
    heads, dim, noise = (64, 128, _noise(device)) if device == "cuda" else (3, 16, _noise(device))
    coords = Coords.of(lognormal_documents(length))
    sight = SparseLatentAttention().whole_row_metadata(coords).to(device).sight
    q, weight, keys = noise(length, heads, dim), noise(length, heads), noise(length, dim)
    kernel = index_kernel(q, keys) or (triton_scores() if device == "cuda" else plain_scores)
    seen = (sight.first[0], sight.last[0], sight.closing[0])
    ours, right = (
        kernel(q, weight, keys, *seen),
        plain_scores(*map(_wide, (q, weight, keys)), *seen),
    )
    blind = right == -inf
    ours = ours.masked_fill(blind & (ours == -inf), 0.0)
    compared = (("scores",), (ours,), (right.masked_fill(blind, 0.0),))
    return _compared(*compared, kernel.__name__, BOUND)


def _held_to_fp64(
    q: Tensor, given: SparseKeys, sink: Tensor | None, grad: Tensor, scale: float
) -> dict[str, Any]:
    """The kernel that is chosen, beside plain torch."""
    kernel, truth = sparse_kernel(q, given, sink), ReferenceSparseAttention()
    if q.is_cuda and isinstance(kernel, ReferenceSparseAttention):
        # What has failed its self-test is measured all the same: which gradient, and by how much.
        kernel = triton_kernel()
    wide_q, wide_sink, wide_grad = map(_wide, (q, sink, grad))
    exact = given._replace(keys=_wide(given.keys), entries=_wide(given.entries))
    right_out, right_lse = truth.forward(wide_q, exact, wide_sink, scale)
    right = truth.backward(wide_grad, wide_q, exact, wide_sink, right_out, right_lse, scale)
    out, lse = kernel.forward(q, given, sink, scale)
    ours = kernel.backward(grad, q, given, sink, out, lse, scale)
    made = {"out": (out, right_out), "lse": (lse, right_lse)}
    for name, one, other in zip(right._fields, ours, right, strict=True):
        if one is not None and one.numel():
            made[f"d{name}"] = (one, other)
    return _compared(list(made), *zip(*made.values(), strict=True), kernel, BOUND)


def _places(run: Tensor, number: int) -> Tensor:
    """The last entries that each query sees: [1, L, number] int32, ascending, then -1."""
    start, stop = run[..., :1], run[..., 1:]
    first = torch.maximum(start, stop - number)
    place = first + torch.arange(number, device=run.device, dtype=torch.int32)
    return place.where(place < stop, -1).contiguous()


def _stretches(device: str, length: int, *, by_channel: bool) -> tuple[DeltaInputs, Tensor, Tensor]:
    """Inputs, two stretches; a gradient of the output, and the states that enter."""
    groups, heads, key, value, noise = 2, 4, 128, 128, _noise(device)
    unit = torch.nn.functional.normalize
    q, k = (unit(noise(2, length, groups, key).float(), dim=-1).bfloat16() for _ in range(2))
    v, grad = noise(2, length, heads, value), noise(2, length, heads, value)
    shape = (2, length, heads, key) if by_channel else (2, length, heads)
    slow = slowed({"k": k, "g": noise(*shape).float(), "beta": noise(2, length, heads)}, length)
    starts = torch.zeros(2, length, dtype=torch.int32)
    # Summaries of a stretch without starts say what it makes of a state; of one with some, nothing.
    starts[1, [length // 3, length // 3 + 1, 2 * length // 3]] = 1
    x = DeltaInputs(q, k, v, slow["g"], slow["beta"], starts.to(device))
    return x, grad, noise(2, heads, key, value).float()


def _delta(device: str, length: int, *, by_channel: bool) -> dict[str, Any]:
    x, grad, state = _stretches(device, length, by_channel=by_channel)
    return _recurrent(x, grad, state, ReferenceDeltaRule(), delta_kernel, fla_delta_rule)


def _linear(device: str, length: int) -> dict[str, Any]:
    made, grad, state = _stretches(device, length, by_channel=False)
    x = LinearInputs(*made[:4], made.starts)
    truth = ReferenceLinearAttention()
    return _recurrent(x, grad, state, truth, linear_kernel, fla_linear_attention)


def _recurrent(
    x: Any,
    grad: Tensor,
    state: Tensor,
    truth: RecurrentKernel,
    choose: Callable[[Any], RecurrentKernel],
    of_fla: Callable[[Any], RecurrentKernel],
) -> dict[str, Any]:
    """Errors of the kernel that is chosen for x; where the truth's own is, on a GPU, of fla's."""
    exact = type(x)(*map(_wide, x))
    right = results_of(truth, exact, grad.double(), state.double())
    # A hundred candidates compile for minutes, and all of them compute the same. The first of the
    # summaries' kernels spill 31 KB, which alone takes a minute; the fourth ones do not (sm_90).
    with candidates(3, 1000):
        kernel = choose(x)
        if x.v.is_cuda and type(kernel) is type(truth):
            # What has failed its self-test is measured all the same.
            kernel = of_fla(x)
        ours = results_of(kernel, x, grad, state)
    names = list(right)
    pairs = ([each[name] for name in names] for each in (ours, right))
    return _compared(names, *pairs, kernel, STATE_BOUND)


def _experts(device: str, length: int) -> dict[str, Any]:
    """Rows of eight experts, one of which gets none."""
    noise, width, hidden = _noise(device), 256, 128
    ends = torch.tensor([0, 1, 2, 3, 4, 5, 6, 8], dtype=torch.int32) * (length // 8)
    x, weight = noise(length, width), noise(8, hidden, width)
    grad = noise(length, hidden)
    given = [x.requires_grad_(), weight.requires_grad_()]
    exact = [each.detach().double().requires_grad_() for each in given]
    results = []
    for inputs in (given, exact):
        out = grouped_linear(*inputs, ends.to(device))
        results.append((out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))))
    return _compared(("out", "dx", "dweight"), *results, "grouped_linear", BOUND)


def summary_overhead(tokens: int = 131_072, heads: int = 32) -> dict[str, Any]:
    """What a rank's summaries add to the delta rule: forward and backward, over none."""
    noise = _noise("cuda")
    q, k = (torch.nn.functional.normalize(noise(1, tokens, 16, 128), dim=-1) for _ in range(2))
    v, g = noise(1, tokens, heads, 128), -noise(1, tokens, heads).float().sigmoid()
    starts = torch.zeros(1, tokens, dtype=torch.int32, device="cuda")
    x = DeltaInputs(q, k, v, g, noise(1, tokens, heads).sigmoid(), starts)
    grad, state = torch.randn_like(v), noise(1, heads, 128, 128).float()
    kernel = delta_kernel(x)

    def step(carry: Any) -> None:
        _, entered = kernel.forward([x], carry)
        kernel.backward([x], [grad], entered, carry)

    plain, whole = (
        seconds_of(lambda carry=carry: step(carry), v.device)  # type: ignore[misc]
        for carry in (None, lambda summary: state)
    )
    return {
        "kernel": type(kernel).__name__,
        # Then a part of backward is torch's, in both.
        "guarded": is_guarded(),
        "plain_ms": 1e3 * plain,
        "with_summaries_ms": 1e3 * whole,
        "overhead": whole / plain - 1,
    }
