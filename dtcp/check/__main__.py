"""The command: python -m dtcp.check --hf-config llama --cp 2 --tp 2."""

import argparse
import json
import sys
from importlib.util import find_spec

import torch
from torch.multiprocessing import ProcessExitedException

from dtcp import softmax
from dtcp.check.checked_hf import CheckedHuggingFaceModel
from dtcp.check.checked_mixers import CheckedMixerModel
from dtcp.check.checked_model import CheckedModel
from dtcp.check.matrix import CHECKS, FIRST, matrix
from dtcp.check.parity import CheckOptions, ParityResult
from dtcp.check.ranks import REFUSALS, CheckReport, RankFailed, check_model
from dtcp.distributed.mesh import Degrees
from dtcp.sequence import layout

_STRATEGIES = ("RingAttention", "AllGatherAttention", "UlyssesAttention")
_LAYOUTS = ("HeadTail", "Contiguous", "PerDocument", "BlockBalanced", "DocumentBalanced")


def main(argv: list[str]) -> int:
    """Check the model that the arguments name, print the report, return 0 if it passed, else 1."""
    arguments = _parser().parse_args(argv)
    if not arguments.model and find_spec("transformers") is None:
        print(
            "error: --hf-config and --hf-model need transformers, which is not installed: "
            "pip install 'dtcp[hf]'.",
            file=sys.stderr,
        )
        return 2
    # Ranks are forked from here, and threads do not survive a fork.
    torch.set_num_threads(1)
    try:
        if arguments.matrix:
            _refuse_options_of_one(arguments)
            return _print_matrix(_model(arguments))
        options = _options(arguments)
        report = check_model(_model(arguments), options)
    except (*REFUSALS, ImportError) as error:
        refusal = f"{error}"
    except ProcessExitedException as error:
        refusal = (
            f"A rank ended before its answer ({error}): where memory ran out, check a smaller "
            f"model or fewer ranks."
        )
    except RankFailed as error:
        print(error, file=sys.stderr)
        first = " ".join(error.error.split())
        refusal = (
            f"A rank raised what one device did not ({first}): where the model reads whole rows, "
            f"give it what it needs of them as inputs; the traceback is on stderr."
        )
    else:
        print("\n".join(lines(report, options)))
        return 0 if report.passed else 1
    print(f"refused:\n  {refusal}\nFAILED")
    return 1


def _print_matrix(checked: CheckedModel) -> int:
    """Each check of the matrix as it ends; 0 if the first passed, and none of them failed."""
    codes = []
    for name, outcome in matrix(checked):
        end = f"  (largest error {outcome.error:.0e})" if outcome.verdict == "passed" else ""
        print(f"{name}: {outcome.verdict}{end}", flush=True)
        if outcome.reason:
            print("\n".join(f"  {line}" for line in outcome.reason.splitlines()), flush=True)
        if name == FIRST and outcome.mixers:
            rows = "packed documents" if outcome.packed else "single documents"
            print(f"  of {rows}, by {', '.join(outcome.mixers)}", flush=True)
        # What a model is refused in one way of several is an answer, too.
        good = ("passed",) if name == FIRST else ("passed", "refused")
        codes.append(outcome.verdict not in good)
    return int(any(codes))


def lines(report: CheckReport, options: CheckOptions) -> list[str]:
    """The report as a person reads it."""
    mixing = report.mixing
    text = [*mixing.notes, f"mesh: {options.degrees}", "tokens meet in:"]
    text += [f"  {name}: {claim}" for name, claim in report.claims.items()]
    if mixing.tp_styles:
        styles = mixing.tp_styles.items()
        text += ["split over tp:", *(f"  {name}: {style}" for name, style in styles)]
    if mixing.refused:
        return [*text, "refused:", *(f"  {line}" for line in mixing.refused), "FAILED"]
    for name, result in report.runs.items():
        text += [f"{name}, errors of all ranks, traffic of rank 0:", *_result_lines(result)]
        failures = report.failures(name)
        text += [f"  OUT OF BOUND {key}: {e:.1e}" for key, e in failures.items()]
        text += [_WRONG_LOSS] if "loss" in failures else []
    return [*text, "PASSED" if report.passed else "FAILED"]


_WRONG_LOSS = (
    "  The loss itself is out of bound: does the model count positions? A shard does not start at "
    "0, so they come as an argument (docs/add_a_model.md)."
)


def _result_lines(result: ParityResult) -> list[str]:
    text = [f"  error of {name}: {error:.1e}" for name, error in result.errors.items()]
    for name, count in (*result.by_layer.items(), *result.by_op.items()):
        text.append(f"  {name}: {count.calls} calls, {count.received} bytes received")
    text += [f"  {op}, outside of mixers: {calls} calls" for op, calls in result.elsewhere.items()]
    graphs = result.graphs
    return [*text, f"  graphs: {graphs.graphs}, graph breaks: {graphs.breaks}"]


_OF_ONE_CHECK = ("cp", "tp", "dp_shard", "ep", "strategy", "layout", "seq_len", "bound", "compile")


def _refuse_options_of_one(arguments: argparse.Namespace) -> None:
    """Refuse what the checks of a matrix have of their own."""
    defaults = _parser()
    for name in _OF_ONE_CHECK:
        value = getattr(arguments, name)
        if value != defaults.get_default(name):
            raise ValueError(
                f"The checks of --matrix have a mesh and a strategy each ({', '.join(CHECKS)}), "
                f"got --{name.replace('_', '-')} {value}: leave it out, or leave --matrix out."
            )


def _options(arguments: argparse.Namespace) -> CheckOptions:
    return CheckOptions(
        Degrees(dp_shard=arguments.dp_shard, cp=arguments.cp, tp=arguments.tp, ep=arguments.ep),
        style=getattr(softmax, arguments.strategy)(),
        layout=getattr(layout, arguments.layout),
        seq_len=arguments.seq_len,
        bound=arguments.bound,
        backend=arguments.compile,
    )


def _model(arguments: argparse.Namespace) -> CheckedModel:
    change = dict(_pair(each) for each in arguments.set)
    if arguments.plan and not arguments.model:
        raise ValueError(
            f"--plan says how a model with mixers is sharded, got --plan {arguments.plan} without "
            f"--model: leave it out; parallelize_hf makes the plan of a model of transformers."
        )
    if arguments.hf_config or arguments.hf_model:
        return CheckedHuggingFaceModel(arguments.hf_config or arguments.hf_model, change)
    return CheckedMixerModel(arguments.model, arguments.plan, change)


def _pair(text: str) -> tuple[str, object]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        raise ValueError(
            f"--set takes key=json, got {text!r}: write a number, true, false, null, or a string "
            f"in quotes, --set hidden_act='\"gelu\"'."
        ) from None


def _named(text: str) -> str:
    """What names a model: not nothing, as a variable of a shell may be."""
    if not text:
        raise argparse.ArgumentTypeError("a model has a name, got none")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dtcp.check", description=__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--hf-config", type=_named, help="a model type of transformers, or a config.json"
    )
    model.add_argument(
        "--hf-model", type=_named, help="module:function that returns a transformers model"
    )
    model.add_argument(
        "--model", type=_named, help="module:function that returns a model with mixers"
    )
    parser.add_argument("--plan", default="", help="module:function (model, mesh, style) -> plan")
    parser.add_argument(
        "--set",
        nargs="*",
        action="extend",
        default=[],
        metavar="KEY=JSON",
        help="fields of the config, text_config.key for one inside; arguments of the function",
    )
    parser.add_argument(
        "--matrix",
        action="store_true",
        help=f"check in several ways: {', '.join(CHECKS)}, each with a mesh of its own",
    )
    parser.add_argument("--cp", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dp-shard", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1, help="ranks with experts of their own")
    parser.add_argument("--strategy", choices=_STRATEGIES, default=_STRATEGIES[0])
    parser.add_argument("--layout", choices=_LAYOUTS, default=_LAYOUTS[0])
    parser.add_argument("--seq-len", type=int, default=48, help="tokens of a row: 48")
    parser.add_argument(
        "--bound", type=float, default=1e-5, help="relative error that passes: 1e-5"
    )
    parser.add_argument("--compile", default="aot_eager", help="a backend ('' for none): aot_eager")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
