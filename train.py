"""Train a model on long sequences: FSDP x TP x CP, compiled, on whatever machine this is.

    python train.py                         the default config; starts its own ranks
    python train.py --config NAME           another config of dtcp/pretrain/configs.py
    python train.py --training.steps 400    any setting of torchtitan's config, and of ours
    python train.py --dtcp.verify 3         the first steps again on one device, and compare
    torchrun --nproc-per-node 8 train.py --config NAME          the same on ranks started elsewhere

A run leaves checkpoints, a TensorBoard log and a plot of the loss in --dump_folder, and goes on
from the last checkpoint when it is started again.
"""

import os
import sys
from pathlib import Path

import torch

from dtcp.pretrain.compiler import use_what_works
from dtcp.pretrain.launch import (
    check_world,
    launch,
    launched,
    ranks_for,
)
from dtcp.pretrain.options import parse
from dtcp.pretrain.plot import plot_losses
from dtcp.pretrain.progress import quiet, say
from dtcp.pretrain.report import report_failures
from dtcp.pretrain.trainer import Trainer
from dtcp.pretrain.verify import verify


def main(arguments: list[str]) -> int:
    """Start the ranks, or be one of them. Returns the exit code."""
    report_failures(None)
    config = parse(arguments)
    config.check()
    if not launched():
        ranks = ranks_for(config.parallelism, config.dtcp.device)
        if ranks.because:
            print(ranks.because, flush=True)
        return launch(ranks, __file__, arguments)
    check_world(config.parallelism, int(os.environ["WORLD_SIZE"]))
    report_failures(Path(config.dump_folder))
    quiet(int(os.environ["RANK"]))
    told = use_what_works(config.compile)
    if told and os.environ["RANK"] == "0":
        print(told, flush=True)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
