"""train.py on a test's config: as a person starts it, under torchrun, or on forked ranks."""

import re
import sys
from typing import Any

from tests.harness.run_script import ROOT as ROOT
from tests.harness.run_script import SECONDS, run_forked, run_process

# A busy machine is no reason for a collective to give up.
PATIENT = ("--comm.init_timeout_seconds", "3600", "--comm.train_timeout_seconds", "3600")


def train(
    *arguments: str,
    module: str = "dtcp.pretrain.configs",
    config: str,
    ranks: int = 2,
    seconds: float = SECONDS,
) -> tuple[int, str]:
    """Be the ranks of train.py, without what it takes to start them.

    Args:
        module: where the config is; `config` is the name of a function there.
        ranks: as many as the mesh has; 0: be the process that would start them.
    Returns:
        exit code and output.
    """
    named = ("--module", module, "--config", config, *PATIENT)
    ended = run_forked("train.py", *named, *arguments, ranks=ranks, seconds=seconds)
    return ended.code, ended.output


def trained(*arguments: str, **options: Any) -> str:
    """The output of `train`, which has to succeed."""
    code, output = train(*arguments, **options)
    assert code == 0, output
    return output


def launch(*arguments: str, module: str, config: str, torchrun: int = 0) -> tuple[int, str]:
    """Start train.py, which starts its own ranks; or let torchrun start that many."""
    named = ("--module", module, "--config", config, *PATIENT)
    command = [sys.executable, "train.py"]
    if torchrun:
        agent = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
        command = [sys.executable, *agent, f"{torchrun}", "train.py"]
    ended = run_process(*command, *named, *arguments)
    return ended.code, ended.output


def losses(output: str) -> dict[int, float]:
    """The loss of each step that was printed."""
    return {int(s): float(x) for s, x in re.findall(r"^step +(\d+)/\d+  loss +(\S+)", output, re.M)}
