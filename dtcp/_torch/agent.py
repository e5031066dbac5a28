"""The agent of torchrun that starts and ends the ranks of one machine."""

import signal

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent


def end_ranks(agent: LocalElasticAgent, death_sig: signal.Signals, seconds: int) -> None:
    """End the ranks that an agent has started, and kill what is left after so many seconds.

    The agent's own way takes a timeout from torch 2.12 on; to it, what has ended has (2.11-2.15).
    """
    if agent._pcontext is not None:
        agent._pcontext.close(death_sig, seconds)
