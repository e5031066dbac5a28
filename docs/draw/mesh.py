"""The axes of a mesh: which ranks share a row, a weight, a mean."""

from typing import Any

import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from docs.draw.canvas import FAINT, RANKS, bare, figure, title
from dtcp import Degrees, ParallelMesh

DEGREES = Degrees(dp_shard=2, cp=2, tp=2)
VIEWS = {
    "batch": "which rows a rank reads: ranks of one number\nread the same rows",
    "cp": "ranks that share a row: keys, states and halos\ntravel between them",
    "tp": "ranks that share heads and channels: activations\nare summed over them",
    "fsdp": "ranks that share weights (dp_shard x cp): gathered,\nand gradients summed, over them",
    "loss": "ranks whose tokens make up one mean\n(dp_replicate x dp_shard x cp)",
}
ROWS = ("#5a6069", "#9aa1ab")


def data() -> dict[str, Any]:
    """For each global rank and each view: its rank in the view, and who else is in its group."""
    views: dict[str, list[dict[str, Any]]] = {name: [] for name in VIEWS}
    for rank in range(DEGREES.world):
        mesh = _mesh_of(rank)
        for name, of_view in views.items():
            axis = getattr(mesh, name)
            members = [rank] if axis is None else axis.mesh.flatten().tolist()
            of_view.append({"rank": mesh.rank(name), "group": members})
        dist.destroy_process_group()
    return {"degrees": str(DEGREES), "views": views}


def _mesh_of(rank: int) -> ParallelMesh:
    """The mesh as one rank of a run sees it, without the other ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=DEGREES.world, store=FakeStore())
    return ParallelMesh.from_degrees(DEGREES, "cpu")


def draw(data: dict[str, Any]) -> Figure:
    fig = figure(11, 4.5)
    title(
        fig,
        "The axes of a mesh",
        f"{DEGREES.world} ranks, {data['degrees']}. Numbers: a rank's coordinate in the view. "
        "From cp on, ranks of one colour form a group.",
    )
    ax = fig.add_axes((0.015, 0.03, 0.97, 0.79))
    for rank in range(DEGREES.world):
        ax.text(rank + 0.5, -0.12, f"{rank}", ha="center", va="center", size=10, weight="bold")
    ax.text(-0.15, -0.12, "global rank", ha="right", va="center", size=9.5)
    for line, (name, cells) in enumerate(data["views"].items()):
        _line(ax, line, name, cells)
    ax.set_xlim(-1.25, 13.6)
    ax.set_ylim(len(VIEWS) + 0.3, -0.45)
    bare(ax)
    return fig


def _line(ax: Axes, line: int, name: str, cells: list[dict[str, Any]]) -> None:
    groups = sorted({tuple(cell["group"]) for cell in cells})
    y = line + 0.25
    ax.text(-0.15, y + 0.4, name, ha="right", va="center", size=10.5, weight="bold")
    for rank, cell in enumerate(cells):
        group = groups.index(tuple(cell["group"]))
        color = ROWS[cell["rank"]] if name == "batch" else RANKS[group]
        box = FancyBboxPatch(
            (rank + 0.1, y + 0.08), 0.8, 0.64, boxstyle="round,pad=0,rounding_size=0.12",
            fc=color, ec="none",
        )  # fmt: skip
        ax.add_patch(box)
        text = f"{cell['rank']}"
        ax.text(rank + 0.5, y + 0.41, text, color="white", size=11, ha="center", va="center")
    ax.text(8.3, y + 0.4, VIEWS[name], size=8.5, va="center", linespacing=1.3)
    ax.plot([-1.2, 13.5], [y - 0.1] * 2, color=FAINT, lw=0.4, alpha=0.5)
