"""Plan a run: python -m dtcp.plan --config llama3_8b_128k --cluster 8xH100.

Prints which meshes, strategies and checkpointing fit, ranked by modelled tokens/s, what does not
fit and by how much, and the command line that runs the best. Needs no GPU and no weights.
"""

import argparse
import json
import os
import sys
import warnings
from contextlib import closing
from pathlib import Path

import torch

from dtcp.distributed.mesh import Degrees, check_no_stages
from dtcp.plan.collect import collect, collected_lines
from dtcp.plan.collected_page import write_collected
from dtcp.plan.command import command_lines
from dtcp.plan.options import check_options
from dtcp.plan.source import Request, request_of
from dtcp.plan.sweep import sweep_points, write_sweep
from dtcp.planner.cluster import GB, Cluster, cluster_of
from dtcp.planner.report import as_json, detail_lines, on_one_line, text_report
from dtcp.planner.search import MOST_GPUS, Candidate, Planner, Search, smallest_cluster
from dtcp.planner.workload import Workload

MOST_PROCESSES = 8
"""Processes that trace steps at once; each takes up to 2 GB."""


def run_planner(argv: list[str], *, processes: int = 1) -> int:
    """Plan what the arguments name. Returns 0; 1 where nothing fits; 2 for bad arguments.

    Args:
        processes: how many trace steps side by side, forked from this one.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    torch.set_num_threads(1)
    # DTensor and models of transformers warn of things that no plan depends on.
    warnings.simplefilter("ignore")
    try:
        check_options(arguments, {name: parser.get_default(name) for name in vars(arguments)}, rest)
        if arguments.collect:
            return _collect(Path(arguments.collect))
        cluster = cluster_of(arguments.cluster)
        request = request_of(arguments, rest)
        if arguments.sweep:
            return _sweep(request, cluster, arguments)
        planner = Planner(request.subject, cluster, request.workload, processes=processes)
        with closing(planner.row_forecasts):
            return _show(arguments, request, planner, _search(planner, arguments))
    except ModuleNotFoundError as error:
        said = (
            f"A plan of train.py's configs or of transformers' models needs their packages, got "
            f"{error}: pip install 'dtcp[train,hf]'."
        )
    except (ValueError, TypeError, ImportError) as error:
        said = on_one_line(str(error))
    except OSError as error:
        said = f"Files are read and written, got {error}: name another one."
    print(f"error: {said}", file=sys.stderr)
    return 2


def _sweep(request: Request, cluster: Cluster, arguments: argparse.Namespace) -> int:
    words = arguments.ranks.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(
            f"A sweep goes over numbers of ranks, got --ranks {arguments.ranks}: give 1,2,4,8."
        )
    points = sweep_points(
        arguments.sweep,
        [*dict.fromkeys(int(word) for word in words)],
        request.workload.documents.seq_len,
    )
    folder = Path(arguments.out)
    options = {"steps": arguments.steps, "documents": arguments.documents}
    print("\n".join(write_sweep(request, cluster, points, folder, **options)))
    print(f"written to {folder / 'runs.sh'}; then: python -m dtcp.plan --collect {folder}")
    return 0


def _collect(folder: Path) -> int:
    collected = collect(folder)
    written = write_collected(folder, collected)
    print("\n".join([*collected_lines(collected), f"written to {folder}: {', '.join(written)}"]))
    return 0


def _search(planner: Planner, arguments: argparse.Namespace) -> Search:
    def say(line: str) -> None:
        if not arguments.json:
            print(f"plan        {line}", flush=True)

    planner.say = say
    if not arguments.mesh:
        return planner.search()
    return planner.search_mesh(_degrees(arguments.mesh, planner.cluster, planner.workload.etp))


def _show(arguments: argparse.Namespace, request: Request, planner: Planner, search: Search) -> int:
    workload, cluster = planner.workload, planner.cluster
    if not search.candidates:
        why = search.refused[0].why if search.refused else _undivided(workload, cluster)
        print(f"error: No mesh of {cluster} carries the model: {on_one_line(why)}", file=sys.stderr)
        return 2
    best = search.best
    if arguments.json:
        as_data = as_json(workload, cluster, search)
        if best.fits:
            as_data["command"] = _command(request, planner, best)
        print(json.dumps(as_data, indent=1))
    else:
        report = text_report(workload, cluster, search)
        print("\n".join([*report, *detail_lines(best, cluster)]))
    if arguments.html:
        from dtcp.planner.page import write_page

        write_page(Path(arguments.html), workload, cluster, search)
        if not arguments.json:
            print(f"pictures    {arguments.html}, and PNGs beside it")
    if not best.fits:
        _say_what_would_do(planner, best, named=arguments.mesh)
        return 1
    if not arguments.json:
        first, *more = _command(request, planner, best)
        print("\n".join(["", f"run it      {first}", *(f"            {x}" for x in more)]))
        print("\n".join(["", "assumed:", *(f"  {line}" for line in cluster.assumptions())]))
    return 0


def _undivided(workload: Workload, cluster: Cluster) -> str:
    """What to change where the rows of a step do not divide evenly on any mesh."""
    seq_len, gpus = workload.documents.seq_len, cluster.gpus
    rows = -(-workload.rows // gpus) * gpus
    return (
        f"a global batch of {workload.rows} rows of {seq_len} tokens is not dealt out, or cut, "
        f"among {gpus} GPUs evenly: give --global-batch {rows}, "
        f"or --seq-len {-(-seq_len // gpus // 2) * gpus * 2}."
    )


def _command(request: Request, planner: Planner, best: Candidate) -> list[str]:
    reads_strategy = planner.row_forecasts.reads_strategy
    return command_lines(request, best, planner.cluster, reads_strategy=reads_strategy)


def _say_what_would_do(planner: Planner, best: Candidate, *, named: str) -> None:
    cluster = planner.cluster
    seq_len, most = planner.workload.documents.seq_len, 2 * cluster.gpus
    if named and planner.has_room():
        would = f"another mesh would do, leave out --mesh {named}"
    elif planner.workload.cuts_evenly and cluster.gpus > 1 and seq_len % most:
        near = max(1, round(seq_len / most)) * most
        would = f"rows of {seq_len} tokens are not cut among all GPUs; --seq-len {near} would be"
    elif gpus := smallest_cluster(planner):
        would = f"{gpus}x{cluster.name} would do"
    else:
        would = f"{MOST_GPUS}x{cluster.name} would not do either: take a GPU with more memory"
    print(
        f"error: A run fits in the memory of its GPUs, got {cluster} where the best setup lacks "
        f"{best.missing / GB:.1f} GB per GPU: {would}.",
        file=sys.stderr,
    )


def _degrees(text: str, cluster: Cluster, etp: int) -> Degrees:
    try:
        pairs = [pair.split("=") for pair in text.split(",")]
        degree_of = {key: int(value) for key, value in pairs}
        if len(degree_of) < len(pairs):
            raise ValueError("an axis is given twice")
        named = Degrees(**{axis: n for axis, n in degree_of.items() if axis not in ("ep", "etp")})
        if etp > 1:
            degree_of.setdefault("etp", etp)
        if "dp_shard" not in degree_of and cluster.gpus % named.world == 0:
            degree_of["dp_shard"] = cluster.gpus // named.world
        degrees = Degrees(**degree_of)
        check_no_stages("A plan", degrees)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"A mesh is given as cp=8,tp=1, of dp_replicate, dp_shard, cp, tp, ep and etp, got "
            f"--mesh {text} ({error}): correct it."
        ) from None
    if degrees.world != cluster.gpus:
        raise ValueError(
            f"A mesh has all GPUs of its cluster, got {degrees} = {degrees.world} with "
            f"{cluster.gpus} GPUs: change a degree, or leave out dp_shard."
        )
    return degrees


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dtcp.plan", description=__doc__, allow_abbrev=False
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--collect", help="a sweep's folder: read its logs, plot them")
    model.add_argument("--config", help="a config of train.py; --section.key VALUE changes it")
    model.add_argument("--hf-config", help="a config.json, its folder, a preset or a model type")
    model.add_argument(
        "--model", help="module:function that returns a model: of transformers, or with a --plan"
    )
    parser.add_argument("--plan", default="", help="module:function (model, mesh, style) -> plan")
    parser.add_argument("--cluster", default="8xH100", help="as 64xH200, or a JSON file")
    parser.add_argument("--seq-len", type=int, help="tokens of a row")
    parser.add_argument("--global-batch", type=int, help="rows of a step")
    parser.add_argument(
        "--documents",
        default="single",
        help="single, lognormal:MEDIAN:SIGMA, a file of lengths, or a folder of texts",
    )
    parser.add_argument("--mesh", default="", help="this mesh alone, as cp=8,tp=1")
    parser.add_argument("--json", action="store_true", help="everything, in bytes and seconds")
    parser.add_argument("--html", default="", help="a page with pictures, in one file")
    parser.add_argument(
        "--sweep", choices=("weak", "strong"), help="write runs over --ranks: rows grow, or stay"
    )
    parser.add_argument("--ranks", default="1,2,4,8", help="of the runs of a sweep")
    parser.add_argument("--out", default="outputs/sweep", help="the folder of a sweep")
    parser.add_argument("--steps", type=int, default=8, help="of each run of a sweep")
    return parser


if __name__ == "__main__":
    can_fork = sys.platform == "linux" and not torch.accelerator.is_available()
    cores = len(os.sched_getaffinity(0)) if can_fork else 1
    sys.exit(run_planner(sys.argv[1:], processes=min(cores, MOST_PROCESSES)))
