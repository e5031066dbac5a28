"""The order of a run: read its settings, start the ranks or be one of them, train or verify."""

import functools
from pathlib import Path

import torch

from dtcp.pretrain.compiler import use_what_works
from dtcp.pretrain.launch import check_world, launch, launched, rank, ranks_for, world_size
from dtcp.pretrain.options import parse
from dtcp.pretrain.plot import plot_losses
from dtcp.pretrain.progress import quiet, say
from dtcp.pretrain.report import FailureReport
from dtcp.pretrain.trainer import Trainer
from dtcp.pretrain.verify import verify


def run(arguments: list[str], *, command: tuple[str, ...]) -> int:
    """Start the ranks that the arguments ask for, or be one of them. Returns the exit code.

    Args:
        command: what runs this again when it follows the interpreter: a script, or -m and a module.
    """
    with FailureReport():
        config = parse(arguments)
        config.check()
        if launched():
            check_world(config.parallelism, world_size())
            return run_rank(config)
        ranks = ranks_for(config.parallelism, config.dtcp.device)
        if ranks.because:
            print(ranks.because, flush=True)
        return launch(ranks, functools.partial(run_rank, config), (*command, *arguments))


def run_rank(config: Trainer.Config) -> int:
    """Be one rank, which the environment describes: train or verify. Returns the exit code."""
    with FailureReport(Path(config.dump_folder)):
        quiet(rank())
        message = use_what_works(config.compile)
        if message and rank() == 0:
            print(message, flush=True)
        return verify(config) if config.dtcp.verify else train(config)


def train(config: Trainer.Config) -> int:
    """Train to the last step of the config, from the last checkpoint there is."""
    trainer = config.build()
    seed_only = config.checkpoint.create_seed_checkpoint
    try:
        if seed_only:
            trainer.checkpointer.save(curr_step=0, last_step=True)
        else:
            trainer.train()
    finally:
        trainer.close()
    if seed_only:
        say("a checkpoint of step 0 for other runs to start from; nothing was trained")
    elif trainer.resumed_step >= config.training.steps:
        say(
            f"already trained to step {trainer.resumed_step}; "
            f"raise --training.steps to go on, or choose another --dump_folder"
        )
    elif config.metrics.enable_tensorboard and torch.distributed.get_rank() == 0:
        say(f"plotted     {plot_losses(Path(config.dump_folder))}")
    torch.distributed.destroy_process_group()
    return 0
