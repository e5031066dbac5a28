"""The result of a search, as text and as JSON."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dtcp.distributed.mesh import AXES
from dtcp.parallelize import FullCheckpoint, SelectiveCheckpoint
from dtcp.planner.axis_bytes import AxisBytes
from dtcp.planner.cluster import GB, Cluster
from dtcp.planner.forecast import Forecast
from dtcp.planner.search import SHOWN, Candidate, Search
from dtcp.planner.setup import Setup
from dtcp.planner.workload import Workload
from dtcp.sequence.documents import Documents
from dtcp.softmax import AllGatherAttention, HybridAttention, UlyssesAttention


def strategy_name(setup: Setup) -> str:
    """The strategy, as --dtcp.strategy names it."""
    match setup.attention:
        case HybridAttention():
            return f"hybrid({setup.attention.inner_ranks})"
        case UlyssesAttention():
            return "ulysses"
        case AllGatherAttention():
            return "all_gather"
    return "ring"


def checkpoint_name(setup: Setup) -> str:
    """The checkpointing, as the option activation_checkpoint names it."""
    match setup.checkpoint:
        case FullCheckpoint():
            return "full"
        case SelectiveCheckpoint():
            return "selective"
    return "none"


def layout_name(setup: Setup) -> str:
    """The layout, as --dtcp.layout names it."""
    name = setup.layout.__name__
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def mesh_name(setup: Setup) -> str:
    """The axes of more than one rank."""
    degrees = setup.degrees
    wide = [f"{axis} {getattr(degrees, axis)}" for axis in AXES if getattr(degrees, axis) > 1]
    etp = f", etp {degrees.etp}" if degrees.etp > 1 else ""
    spread = f" (ep {degrees.ep}{etp})" if degrees.ep > 1 else ""
    return (" x ".join(wide) or "one rank") + spread


def text_report(workload: Workload, cluster: Cluster, search: Search) -> list[str]:
    """Ranked setups with what bounds each; what does not fit; and what was not tried, and why."""
    documents, model = workload.documents, search.best.forecast
    lengths = documents.lengths[0]
    fitting = [candidate for candidate in search.candidates if candidate.fits]
    rest = [candidate for candidate in search.candidates if not candidate.fits]
    lines = [
        f"model       {model.name}, {_count(model.parameters)} parameters",
        f"cluster     {cluster}",
        f"batch       global, per step: {workload.rows} row{'s' * (workload.rows > 1)} of "
        f"{documents.seq_len:,} tokens ({workload.rows * documents.seq_len:,} in all), "
        f"{len(lengths):,} document{'s' * (len(lengths) > 1)} per row, the longest "
        f"{max(lengths):,}{_padding(documents)}",
    ]
    if fitting:
        lines += [
            "",
            "fits, by modelled tokens/s (GB received per step by the busiest rank):",
            _HEAD,
        ]
        lines += [_line(candidate) for candidate in fitting[:SHOWN]]
        if len(fitting) > SHOWN:
            lines.append(f"  and {len(fitting) - SHOWN} more that fit")
    if rest or search.too_large:
        lines += ["", f"does not fit in {cluster.usable / GB:.0f} GB per GPU:"]
        lines += _too_much(search, rest, cluster.usable)
    if search.passed:
        lines += [
            "",
            f"not looked at: {search.passed} meshes with a larger cp than one that fits, which "
            f"move more and compute as much",
        ]
    if search.outdone:
        lines += [
            "",
            f"not looked at: {search.outdone} meshes whose steps take longer than those above, "
            f"by their weights' transfers or by what others of their tp and ep do",
        ]
    if search.refused:
        lines += ["", "not possible:"]
        for why, count in _reasons(search).items():
            lines.append(f"  {count} setup{'s' * (count > 1)}: {why}")
    return lines


def _padding(documents: Documents) -> str:
    left = documents.seq_len - sum(documents.lengths[0])
    return f", {left:,} tokens of padding" if left else ""


def _count(number: int) -> str:
    return f"{number / 1e9:,.2f} B" if number >= 10**8 else f"{number / 1e6:,.2f} M"


_HEAD = (
    f"  {'mesh, strategy, layout, checkpointing':<58} {'tokens/s':>9} {'s/step':>7} {'GB peak':>8} "
    f"{'cp':>7} {'weights':>7} {'tp':>7} {'ep':>7} {'exposed':>8}  bound by"
)


def _line(candidate: Candidate) -> str:
    forecast, time, setup = candidate.forecast, candidate.time, candidate.setup
    cp, axes = forecast.cp.total, forecast.by_axis
    weights = sum(axes.get(axis, AxisBytes()).total for axis in ("fsdp", "edp", "dp_replicate"))
    tp, ep = (axes.get(axis, AxisBytes()).total for axis in ("tp", "ep"))
    exposed = sum(time.exposed.values()) / time.total
    return (
        f"  {_what(setup):<58} {candidate.tokens_per_second:9,.0f} {time.total:7.2f} "
        f"{forecast.memory.total / GB:8.1f} {cp / GB:7.1f} {weights / GB:7.1f} "
        f"{tp / GB:7.1f} {ep / GB:7.1f} {exposed:8.0%}  {time.bound}"
    )


def _what(setup: Setup) -> str:
    rows = setup.documents.batch
    parts = [mesh_name(setup), strategy_name(setup), layout_name(setup), checkpoint_name(setup)]
    if rows > 1:
        parts.append(f"{rows} rows")
    return ", ".join(parts)


def _too_much(search: Search, rest: Sequence[Candidate], usable: int) -> Iterator[str]:
    """Setups that need more memory than there is, with what they lack."""
    needs = [(_what(each.setup), each.forecast.memory.total, "") for each in rest]
    needs += [(_what(each.setup), each.needs, " or more") for each in search.too_large]
    for name, size, more in needs[:SHOWN]:
        yield (f"  {name:<58} needs {size / GB:8.1f} GB{more}, {(size - usable) / GB:.1f} too many")
    if len(needs) > SHOWN:
        yield f"  and {len(needs) - SHOWN} more that do not fit"


def _reasons(search: Search) -> dict[str, int]:
    reasons: dict[str, int] = {}
    for each in search.refused:
        why = on_one_line(each.why)
        reasons[why] = reasons.get(why, 0) + 1
    return reasons


def on_one_line(text: str) -> str:
    """A text on one line; lines that differ only in a layer's number become one."""
    kinds: dict[str, list[str]] = {}
    for line in (" ".join(line.split()) for line in text.splitlines()):
        kinds.setdefault(re.sub(r"(?<=[A-Za-z_])\.\d+(?=[\s.])", ".*", line), []).append(line)
    return " ".join(kind if len(lines) > 1 else lines[0] for kind, lines in kinds.items())


def detail_lines(candidate: Candidate, cluster: Cluster) -> list[str]:
    """Memory, bytes and time of one setup, in full."""
    forecast, time = candidate.forecast, candidate.time
    setup, busiest = candidate.setup, candidate.forecast.busiest
    lines = ["", f"best        {_what(setup)}"]
    lines += [f"layers      {style}" for style in forecast.styles]
    lines += [f"warning     {text}" for text in forecast.warnings]
    parts = {name: size for name, size in forecast.memory.parts().items() if size}
    lines.append(
        f"memory      {forecast.memory.total / GB:.1f} GB at most, in {forecast.memory.where}: "
        + ", ".join(f"{name} {size / GB:.1f}" for name, size in parts.items())
    )
    axes = {"cp": forecast.cp, **forecast.by_axis}
    for axis, moved in {axis: moved for axis, moved in axes.items() if moved.total}.items():
        lines.append(
            f"{axis:<11} {moved.forward / GB:.2f} GB received forward, {moved.backward / GB:.2f} "
            f"backward, a step"
        )
    for axis, crossing in _crossing_bytes(forecast, cluster).items():
        lines += [
            f"            of {axis}'s, {crossing.forward / GB:.2f} GB forward and "
            f"{crossing.backward / GB:.2f} backward come from other nodes"
        ] * (axes[axis].total > 0)
    for mixer in busiest.mixers:
        there, back = (sum(each.received) / GB for each in (mixer.forward, mixer.backward))
        if there or back:
            lines.append(
                f"            {mixer.part} (x {mixer.count}): {there:.3f} forward, {back:.3f} "
                f"backward, a layer and micro-batch"
            )
    exposed = ", ".join(f"{axis} {seconds:.2f}" for axis, seconds in time.exposed.items())
    lines.append(
        f"time        {time.total:.2f} s per step: matmuls {time.matmuls:.2f}, attention "
        f"{time.mixers:.2f}, waited for {exposed}"
    )
    if setup.attention.sums_wide(setup.degrees.cp):
        lines.append(
            "            with reduce_dtype=torch.float32 attention takes longer where ranks sum: "
            "kernels that do not round have about half the speed"
        )
    return lines


def _crossing_bytes(forecast: Forecast, cluster: Cluster) -> dict[str, AxisBytes]:
    """Bytes a step that come from other nodes, of the axes whose exchanges are dtcp's."""
    if cluster.nodes == 1:
        return {}
    nodes = cluster.ranks_per_node
    crossing = {"cp": forecast.crossing_cp(nodes)}
    if forecast.experts:
        crossing["ep"] = forecast.crossing_ep(nodes)
    return crossing


def as_json(workload: Workload, cluster: Cluster, search: Search) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    return {
        "model": search.best.forecast.name,
        "parameters": search.best.forecast.parameters,
        "cluster": str(cluster),
        "seq_len": workload.documents.seq_len,
        "documents": list(workload.documents.lengths[0]),
        "rows": workload.rows,
        "assumptions": cluster.assumptions(),
        "candidates": [_candidate_json(each, cluster) for each in search.candidates],
        "passed": search.passed,
        "outdone": search.outdone,
        "too_large": [
            {"mesh": _mesh_json(x.setup), "needs_at_least": x.needs} for x in search.too_large
        ],
        "refused": [{"mesh": mesh_name(x.setup), "why": x.why} for x in search.refused],
    }


def _bytes_json(by_axis: Mapping[str, AxisBytes]) -> dict[str, dict[str, int]]:
    return {axis: {"forward": x.forward, "backward": x.backward} for axis, x in by_axis.items()}


def _mesh_json(setup: Setup) -> dict[str, int]:
    return {axis: getattr(setup.degrees, axis) for axis in (*AXES, "ep", "etp")}


def _candidate_json(candidate: Candidate, cluster: Cluster) -> dict[str, Any]:
    forecast, time, setup = candidate.forecast, candidate.time, candidate.setup
    axes = {"cp": forecast.cp, **forecast.by_axis}
    return {
        "mesh": _mesh_json(setup),
        "strategy": strategy_name(setup),
        "layout": layout_name(setup),
        "checkpoint": checkpoint_name(setup),
        "local_batch_size": setup.documents.batch,
        "micro_batches": setup.micro_batches,
        "fits": candidate.fits,
        "missing": candidate.missing,
        "tokens_per_second": candidate.tokens_per_second,
        "memory": {**forecast.memory.parts(), "total": forecast.memory.total},
        "received": _bytes_json(axes),
        "from_other_nodes": _bytes_json(_crossing_bytes(forecast, cluster)),
        "ranks_per_node": setup.ranks_per_node,
        "seconds": {
            "total": time.total,
            "matmuls": time.matmuls,
            "mixers": time.mixers,
            "exposed": time.exposed,
        },
        "bound_by": time.bound,
        "warnings": list(forecast.warnings),
        "flops": forecast.flops,
    }
