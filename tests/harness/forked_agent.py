"""torchrun with ranks that are forked from it, with all that it has imported.

    python tests/harness/forked_agent.py OPTIONS OF torchrun SCRIPT ARGUMENTS

The agent, its rendezvous and its restarts are torchrun's own; a rank's imports would take it 8 s.
"""

import signal
import sys
from pathlib import Path

from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from tests.harness.run_script import exit_code_of


def be_rank(script: str, *arguments: str) -> None:
    """Without the signal handlers of the agent."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = exit_code_of(Path(script), arguments)
    if code:
        sys.exit(code)


def main() -> None:
    config, _, words = config_from_args(parse_args(sys.argv[1:]))
    config.start_method = "fork"
    # The first word tells Python not to buffer.
    elastic_launch(config, be_rank)(*words[1:])


if __name__ == "__main__":
    main()
