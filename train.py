"""Train a model on long sequences: FSDP x TP x CP, compiled, on whatever machine this is.

    python train.py                         the default config; starts its own ranks
    python train.py --config NAME           another config of dtcp/pretrain/configs.py
    python train.py --model.hf SOURCE       a model of transformers: a folder or a config.json
    python train.py --model.dtcp SOURCE     the same, as dtcp's own model of its family
    python train.py --training.steps 400    any setting of torchtitan's config, and of ours
    python train.py --dtcp.verify 3         the first steps again on one device, and compare
    torchrun --nproc-per-node 8 train.py --config NAME          the same on ranks started elsewhere

A run leaves checkpoints, a TensorBoard log and a plot of the loss in --dump_folder, and goes on
from the last checkpoint when it is started again. What it is made of is in dtcp/pretrain/:

    run         the order of a run: settings, ranks, training or verification
    configs     the runnable configs          options     the command line
    launch      how ranks are started         report      what a run says when it fails
    sources     where documents come from     data        documents to packed rows
    trainer     torchtitan's Trainer over context-parallel batches
"""

import os
import sys
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path

REQUIRED = ("torch", "torchtitan", "tensorboard", "matplotlib", "xxhash")


def main(arguments: list[str]) -> int:
    """Say what is about to happen, then run. Returns the exit code."""
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        remedy = "pip install 'dtcp[train]' (in a checkout: make train)"
        venv = Path(__file__).resolve().with_name(".venv")
        if (venv / "train.stamp").exists() and Path(sys.prefix).resolve() != venv:
            remedy = f"source {venv}/bin/activate, where make has installed them"
        print(
            f"error: train.py needs packages that are not installed, got missing={missing} in "
            f"{sys.executable}: {remedy}.",
            file=sys.stderr,
        )
        return 2
    if isinstance(sys.stdout, TextIOWrapper):
        # A path may have bytes that are no text, or letters that a terminal has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    if os.environ.get("RANK", "0") == "0":
        settings = " ".join(arguments) or "all settings as in the default config"
        print(f"start       {settings}; loading torch and torchtitan", flush=True)
    # Importing torch and torchtitan takes seconds: nobody should wait for them in silence.
    from dtcp.pretrain.__main__ import start_training

    return start_training(arguments, command=(__file__,))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
