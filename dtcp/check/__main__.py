"""The command: python -m dtcp.check --hf-config llama --cp 2 --tp 2."""

import argparse
import json
import sys

from dtcp import softmax as attention
from dtcp.check.parity import (
    REFUSALS,
    Options,
    Outcome,
    Report,
    run,
)
from dtcp.check.subject import HuggingFaceSubject, MixerSubject, Subject
from dtcp.distributed.mesh import Degrees
from dtcp.sequence import layout

STRATEGIES = ("RingAttention", "AllGatherAttention", "UlyssesAttention")
LAYOUTS = ("HeadTail", "Contiguous", "PerDocument", "BlockBalanced")


def main(argv: list[str]) -> int:
    """Check what the arguments name, print what was found, and return 0 if it passed, else 1."""
    arguments = _parser().parse_args(argv)
    try:
        options = _options(arguments)
        report = run(_subject(arguments), options)
    except (*REFUSALS, ImportError) as error:
        print("\n".join(["refused:", f"  {error}", "FAILED"]))
        return 1
    print("\n".join(lines(report, options)))
    return 0 if report.passed else 1


def lines(report: Report, options: Options) -> list[str]:
    """The report as a person reads it."""
    mixing = report.mixing
    text = [*mixing.said, f"mesh: {options.degrees}", "tokens meet in:"]
    text += [f"  {name}: {what}" for name, what in mixing.claimed.items()]
    if mixing.split:
        text += ["split over tp:", *(f"  {name}: {how}" for name, how in mixing.split.items())]
    if report.mixing.refused:
        return [*text, "refused:", *(f"  {line}" for line in report.mixing.refused), "FAILED"]
    for name, outcome in report.runs.items():
        text += [f"{name}, rank 0:", *_outcome(outcome)]
        text += [f"  OUT OF BOUND {key}: {e:.1e}" for key, e in report.failures(name).items()]
    return [*text, "PASSED" if report.passed else "FAILED"]


def _outcome(outcome: Outcome) -> list[str]:
    text = [f"  error of {name}: {error:.1e}" for name, error in outcome.errors.items()]
    for name, count in (*outcome.by_layer.items(), *outcome.by_op.items()):
        text.append(f"  {name}: {count.calls} calls, {count.received} bytes received")
    text += [f"  {op}, outside of mixers: {calls} calls" for op, calls in outcome.elsewhere.items()]
    graphs = outcome.graphs
    return [*text, f"  graphs: {graphs.graphs}, graph breaks: {graphs.breaks}"]


def _options(arguments: argparse.Namespace) -> Options:
    return Options(
        Degrees(dp_shard=arguments.dp_shard, cp=arguments.cp, tp=arguments.tp),
        style=getattr(attention, arguments.strategy)(),
        layout=getattr(layout, arguments.layout),
        seq_len=arguments.seq_len,
        bound=arguments.bound,
        backend=arguments.compile,
    )


def _subject(arguments: argparse.Namespace) -> Subject:
    if arguments.hf_config or arguments.hf_model:
        change = dict(_pair(each) for each in arguments.set)
        return HuggingFaceSubject(arguments.hf_config or arguments.hf_model, change)
    return MixerSubject(arguments.model, arguments.plan)


def _pair(text: str) -> tuple[str, object]:
    key, _, value = text.partition("=")
    return key, json.loads(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dtcp.check", description=__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--hf-config", help="a model type of transformers, or a config.json")
    model.add_argument("--hf-model", help="module:function that returns a transformers model")
    model.add_argument("--model", help="module:function that returns a model with mixers")
    parser.add_argument("--plan", default="", help="module:function (model, mesh, style) -> plan")
    parser.add_argument("--set", nargs="*", default=[], help="config fields, key=json")
    parser.add_argument("--cp", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dp-shard", type=int, default=1)
    parser.add_argument("--strategy", choices=STRATEGIES, default=STRATEGIES[0])
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0])
    parser.add_argument("--seq-len", type=int, default=48)
    parser.add_argument("--bound", type=float, default=1e-5, help="relative error that passes")
    parser.add_argument("--compile", default="aot_eager", help="a backend, or '' for eager only")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
