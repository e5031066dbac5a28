"""The order of a run: read its settings, start the ranks or be one of them, train or verify."""

import functools
import sys
from io import TextIOWrapper
from pathlib import Path

from dtcp.torchtitan import compat as compat

import torch
from torchtitan.observability import structured_logger

from dtcp.pretrain.attempt import Attempt
from dtcp.pretrain.compiler import use_what_works
from dtcp.pretrain.config_check import check_on_ranks
from dtcp.pretrain.dry_run import describe_dry, is_dry, made_dry
from dtcp.pretrain.folder_lock import FolderLock, refuse_held
from dtcp.pretrain.launch import (
    RestartPolicy,
    check_named,
    check_world,
    end_with_launcher,
    launch,
    launched,
    of_this_launcher,
    play_one_of,
    rank,
    ranks_for,
    world_size,
)
from dtcp.pretrain.options import parse
from dtcp.pretrain.planned_strategy import with_planned_strategy
from dtcp.pretrain.plot import plot_losses
from dtcp.pretrain.progress import quiet, say
from dtcp.pretrain.report import FailureReport
from dtcp.pretrain.trainer import Trainer
from dtcp.pretrain.verify import verify
from dtcp.pretrain.without_effect import check_started_elsewhere


def run(arguments: list[str], *, command: tuple[str, ...]) -> int:
    """Start the ranks that the arguments ask for, or be one of them. Returns the exit code.

    Args:
        command: what runs this again when it follows the interpreter: a script, or -m and a module.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        # A path may have bytes that are no text, or letters that a terminal has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    with FailureReport():
        if launched():
            check_named()
            end_with_launcher()
        config = parse(arguments)
        if is_dry(config):
            return _play_alone(config)
        config.check()
        if launched():
            if not of_this_launcher():
                accelerated = torch.accelerator.is_available()
                check_started_elsewhere(config.dtcp, accelerated=accelerated)
            check_world(config.parallelism, world_size())
            check_on_ranks(config, world_size())
            return run_rank(config)
        ranks = ranks_for(config.parallelism, config.dtcp.device)
        check_on_ranks(config, ranks.count)
        if not config.dtcp.verify:
            refuse_held(Path(config.dump_folder))
        if ranks.because:
            print(ranks.because, flush=True)
        policy = RestartPolicy(config.dtcp.max_restarts, config.dtcp.stop_seconds)
        work = functools.partial(run_rank, config)
        return launch(ranks, work, (*command, *arguments), policy)


def _play_alone(config: Trainer.Config) -> int:
    """Be one rank of a run that has no others. Returns the exit code."""
    config = made_dry(config)
    config.check()
    world = play_one_of(config.parallelism)
    check_on_ranks(config, world)
    print(describe_dry(rank(), world), flush=True)
    return run_rank(config)


def run_rank(config: Trainer.Config) -> int:
    """Be one rank, which the environment describes: train or verify. Returns the exit code."""
    with FailureReport(Path(config.dump_folder)) as report:
        quiet(0 if is_dry(config) else rank())
        report.is_starting = True
        lock, refusal = _lock_folder(config)
        seconds = float(config.comm.init_timeout_seconds)
        report.attempt = Attempt(seconds=seconds, refusal=refusal)
        try:
            code = _start(config, lock, report)
            report.attempt.leave()
        finally:
            # After an error as well: the next start has nothing to take over.
            if lock is not None:
                lock.release()
        return code


def _start(config: Trainer.Config, lock: FolderLock | None, report: FailureReport) -> int:
    config = with_planned_strategy(config, world_size())
    structured_logger.init_structured_logger(
        source="training",
        output_dir=config.dump_folder,
        enable=config.debug.enable_structured_logging,
    )
    message = use_what_works(config.compile)
    if message and rank() == 0:
        print(message, flush=True)
    return verify(config) if config.dtcp.verify else train(config, lock, report)


def _lock_folder(config: Trainer.Config) -> tuple[FolderLock | None, str]:
    """On rank 0, the right to write the run's folder, or why it cannot be had."""
    if rank() or config.dtcp.verify or is_dry(config):
        return None, ""
    try:
        lock = FolderLock(Path(config.dump_folder))
    except ValueError as error:
        return None, str(error)
    if lock.taken_over:
        print(
            f"took over   {config.dump_folder} from {lock.taken_over}, which ended without a word",
            flush=True,
        )
    return lock, ""


def train(config: Trainer.Config, lock: FolderLock | None, report: FailureReport) -> int:
    """Train to the last step of the config, from the last checkpoint there is.

    Args:
        lock: of the run's folder, on the rank that holds it.
        report: hears whether a step was taken.
    Returns:
        0, or 128 and the number of the signal that stopped the run.
    """
    trainer = config.build()
    trainer.lock = lock
    seed_only = config.checkpoint.create_seed_checkpoint
    try:
        if seed_only:
            trainer.checkpointer.save(curr_step=0, last_step=True)
        else:
            trainer.train()
    finally:
        report.is_starting = not trainer.has_stepped
        trainer.close()
    if seed_only:
        say("a checkpoint of step 0 for other runs to start from; nothing was trained")
    elif trainer.resumed_step >= config.training.steps:
        say(
            f"already trained to step {trainer.resumed_step}; "
            f"raise --training.steps to go on, or choose another --dump_folder"
        )
    elif trainer.metrics_processor.losses and config.metrics.enable_tensorboard and not rank():
        say(_plotted(Path(config.dump_folder)))
    if trainer.has_stepped and trainer.step >= config.training.steps:
        say(_what_next(config))
    # A rank that ended with a code of its own would have the others killed.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 128 + trainer.stopped_by if trainer.stopped_by else 0


def _what_next(config: Trainer.Config) -> str:
    """How to continue a finished run, and where to see its numbers."""
    ways = []
    checkpoint = config.checkpoint
    # The weights alone are no state to go on from.
    if checkpoint.enable and not (checkpoint.load_only or checkpoint.last_save_model_only):
        ways.append(f"--training.steps {2 * config.training.steps} goes on from here")
    if config.metrics.enable_tensorboard:
        logs = Path(config.dump_folder, config.metrics.save_tb_folder)
        ways.append(f"tensorboard --logdir {logs} shows every number")
    return "; ".join([f"done        {config.training.steps} steps", *ways])


def _plotted(folder: Path) -> str:
    """Plot a run's loss; what became of it. A run that is done does not fail for its picture."""
    try:
        return f"plotted     {plot_losses(folder)}"
    except OSError as error:
        return f"not plotted {error.filename or folder}: {error.strerror}"
