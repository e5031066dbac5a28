"""What a user asks to be planned: a config of train.py, a config.json, a model of their own."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from math import inf, lcm
from pathlib import Path
from typing import Any

import numpy as np

from dtcp.huggingface.own_errors import imported
from dtcp.parallelize import ActivationCheckpoint, FullCheckpoint
from dtcp.plan.script import Script, script_of
from dtcp.planner.cluster import cluster_of
from dtcp.planner.setup import BF16, Precision
from dtcp.planner.subject import MadeHuggingFaceModel, OwnModel, Subject, subject_of_hf
from dtcp.planner.workload import Workload
from dtcp.sequence.documents import Documents

SEED = 0


@dataclass(frozen=True)
class Request:
    """A model, what to run of it, and the command that would.

    Args:
        script: the start of a command line.
        given: further words of it, by the setting that they are for.
        checkpoint: what blocks keep for backward, as the config says.
    """

    subject: Subject
    workload: Workload
    script: Script = field(default_factory=Script)
    given: Mapping[str, Sequence[str]] = field(default_factory=dict)
    checkpoint: ActivationCheckpoint = field(default_factory=FullCheckpoint)


def request_of(arguments: argparse.Namespace, rest: Sequence[str]) -> Request:
    """Read what the arguments name.

    Args:
        rest: overrides of a config's settings.
    Raises:
        ValueError: naming what cannot be planned.
    """
    if arguments.config:
        return _of_config(arguments, rest)
    workload = _workload(arguments, _seq_len(arguments, 131_072), BF16, default_rows=None)
    if arguments.model:
        return Request(_own_model(arguments.model, arguments.plan), workload)
    subject = subject_of_hf(arguments.hf_config)
    script = script_of(subject, arguments.hf_config)
    given = {_COMPUTE: [f"--{_COMPUTE}", f"{BF16.compute}".removeprefix("torch.")]}
    return Request(subject, replace(workload, cuts_evenly=bool(script.words)), script, given)


_COMPUTE = "training.mixed_precision_param"


def _seq_len(arguments: argparse.Namespace, default: int) -> int:
    seq_len: int | None = arguments.seq_len
    return default if seq_len is None else seq_len


def _own_model(model: str, plan: str) -> Subject:
    """A model of a function: of transformers where it has no plan."""
    imported(model)  # an error of the import is reported before anything is planned
    return OwnModel(model, imported(plan)) if plan else MadeHuggingFaceModel(model)


def _of_config(arguments: argparse.Namespace, rest: Sequence[str]) -> Request:
    from dtcp.pretrain.config_check import check_settings
    from dtcp.pretrain.expected import kept_by_blocks, precision_of, subject_of
    from dtcp.pretrain.options import parse
    from dtcp.pretrain.without_effect import check_effects

    given = _given(rest)
    config = parse(["--config", arguments.config, *rest])
    check_settings(config)
    check_effects(config)
    if (stages := config.parallelism.pipeline_parallel_degree) > 1:
        raise ValueError(
            f"Every rank has all layers in a plan, got --config {arguments.config} with "
            f"parallelism.pipeline_parallel_degree={stages}: take a config without stages."
        )
    try:
        subject = subject_of(config)
    except ValueError:
        raise ValueError(
            f"The planner builds models of dtcp's and of transformers, got --config "
            f"{arguments.config}, whose model is torchtitan's {config.model_spec.name}: pass its "
            f"config.json as --hf-config."
        ) from None
    etp = config.dtcp.expert_tensor_parallel_degree
    if etp > 1 and not getattr(config.model_spec.model, "num_experts", 0):
        raise ValueError(
            f"A degree of tp splits experts, got dtcp.expert_tensor_parallel_degree={etp} for a "
            f"model without experts: leave it out."
        )
    training, precision = config.training, precision_of(config.training)
    rows = training.global_batch_size if training.global_batch_size > 0 else None
    seq_len = _seq_len(arguments, training.seq_len)
    workload = _workload(arguments, seq_len, precision, default_rows=rows)
    workload = replace(
        workload,
        cuts_evenly=True,
        **_wished_of(config.dtcp, given),
        checkpoint=kept_by_blocks(config) if CHECKPOINT in given else None,
        etp=etp,
        reshard=config.parallelism.fsdp_reshard_after_forward != "never",
    )
    script = Script(("train.py", "--config", arguments.config))
    return Request(subject, workload, script, given, kept_by_blocks(config))


CHECKPOINT = "activation_checkpoint"
CHOSEN: Mapping[str, str] = {
    **dict.fromkeys(
        [
            f"parallelism.{axis}_degree"
            for axis in (
                *("data_parallel_replicate", "data_parallel_shard", "context_parallel"),
                *("tensor_parallel", "expert_parallel"),
            )
        ],
        "give --mesh, as cp=8,tp=1",
    ),
    "parallelism.pipeline_parallel_degree": "leave it out, for no stages are planned",
    "training.local_batch_size": "give the rows of a step, --global-batch",
    "dtcp.ranks_per_node": "give the nodes, --cluster",
}
"""Settings that a plan chooses, and how to choose them by hand."""


def _given(rest: Sequence[str]) -> dict[str, list[str]]:
    """Words of a command line by the setting that they are for.

    Raises:
        ValueError: a setting that the planner chooses.
    """
    given: dict[str, list[str]] = {}
    name = ""
    for word in rest:
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        elif word.startswith(f"{CHECKPOINT}:"):
            name = CHECKPOINT
        given.setdefault(name, []).append(word)
    for name in CHOSEN.keys() & given.keys():
        raise ValueError(
            f"The planner chooses what a run's ranks do, got {' '.join(given[name])}: "
            f"{CHOSEN[name]}."
        )
    return given


def _wished_of(section: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given of the section dtcp, and not left open; sums are those of the config."""
    wished: dict[str, Any] = {"reduce_dtype": section.style_options["reduce_dtype"]}
    if {"dtcp.strategy", "dtcp.ulysses_degree"} & given.keys() and section.strategy != "auto":
        wished["attention"] = section.attention_style("cuda")
    if "dtcp.layout" in given and section.layout != "auto":
        wished["layout"] = section.sequence_layout()
    return wished


def _workload(
    arguments: argparse.Namespace, seq_len: int, precision: Precision, default_rows: int | None
) -> Workload:
    rows = default_rows if arguments.global_batch is None else arguments.global_batch
    if rows is None:
        # About four million tokens in a global batch, as many rows for each node, and odd factors
        # of the GPUs among the rows, for lengths of rows seldom have them.
        cluster = cluster_of(arguments.cluster)
        unit = lcm(cluster.nodes, cluster.gpus // (cluster.gpus & -cluster.gpus))
        rows = unit * 2 ** max(0, (4_194_304 // max(1, seq_len) // unit).bit_length() - 1)
    if seq_len < 1 or rows < 1:
        got = f"--seq-len {seq_len}" if seq_len < 1 else f"--global-batch {rows}"
        raise ValueError(f"A step has rows of tokens, got {got}: give 1 or more.")
    return Workload(asked_documents(arguments.documents, seq_len), rows, precision)


def asked_documents(text: str, seq_len: int) -> Documents:
    """A row's documents: `single`, `lognormal:MEDIAN:SIGMA`, lengths in a file, or a data folder.

    Raises:
        ValueError: naming what was read; a document longer than the row.
    """
    if text == "single":
        return Documents.single(1, seq_len)
    if text.startswith("lognormal:"):
        return _drawn(text, seq_len)
    path = Path(text)
    if text and path.is_dir():
        return _filled(_lengths_in_folder(path), seq_len, cut=True)
    if not path.is_file():
        raise ValueError(
            f"Documents are single, lognormal:MEDIAN:SIGMA, a file of lengths or a folder of "
            f"texts, got --documents {text}: correct it."
        )
    return _filled(_lengths_in_file(path), seq_len, cut=False)


def _lengths_in_file(path: Path) -> list[int]:
    try:
        words = path.read_text().split()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"A file of documents is a text of lengths in tokens, got {path} ({error}): name one."
        ) from None
    wrong = [word for word in words if not (word.isdecimal() and int(word))]
    if not words or wrong:
        raise ValueError(
            f"A file of documents has lengths in tokens, positive whole numbers, got {path} with "
            f"{repr(wrong[0]) if wrong else 'none'}: correct it."
        )
    return [int(word) for word in words]


def _drawn(text: str, seq_len: int) -> Documents:
    try:
        median, sigma = (float(word) for word in text.split(":")[1:])
        if not (1 <= median < inf and 0 <= sigma < 20):
            raise ValueError(text)
    except ValueError:
        raise ValueError(
            f"Lengths are drawn as lognormal:MEDIAN:SIGMA, got --documents {text}: give "
            f"lognormal:2048:1.5, say."
        ) from None
    draw = np.random.default_rng(SEED).lognormal(np.log(median), sigma, 1 + 64 * seq_len // 1024)
    return _filled([max(1, int(x)) for x in draw], seq_len, cut=True)


def _filled(lengths: Sequence[int], seq_len: int, *, cut: bool) -> Documents:
    """As many documents as fill a row; the last one is cut, and what is left of the row is padding.

    Args:
        cut: longer documents, too; and where all do not fill the row, they come again.
    """
    row: list[int] = []
    left = seq_len
    for length in cycle(lengths) if cut else lengths:
        if length > seq_len and not cut:
            raise ValueError(
                f"A document lies in one row, got one of {length} tokens with --seq-len {seq_len}: "
                f"give longer rows, or cut it in the file."
            )
        row.append(min(length, left))
        left -= row[-1]
        if not left:
            break
    return Documents((tuple(row),), seq_len)


def _lengths_in_folder(folder: Path) -> list[int]:
    """Tokens of a folder's documents, at four bytes per token."""
    from dtcp.pretrain import sources

    lengths = []
    # The files that a run would read.
    for document in sources.folder(f"{folder}", "all", text_key="text").documents(epoch=0):
        lengths.append(max(1, len(document.text.encode()) // 4))
        if len(lengths) == 100_000:
            break
    if not lengths:
        raise ValueError(f"A data folder holds texts, got {folder} without one: correct the path.")
    return lengths
