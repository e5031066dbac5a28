"""train.py for those who installed a wheel: python -m dtcp.pretrain --config NAME."""

import sys
from importlib.util import find_spec

REQUIRED = ("torchtitan", "tensorboard", "matplotlib", "xxhash")


def start_training(arguments: list[str], command: tuple[str, ...] = ("-m", "dtcp.pretrain")) -> int:
    """Run what train.py is made of, where its extra is installed. Returns the exit code.

    Args:
        command: how Python starts another rank of it.
    """
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        print(
            f"error: training needs packages that are not installed, got missing={missing}: "
            f"pip install 'dtcp[train]'.",
            file=sys.stderr,
        )
        return 2
    try:
        from dtcp.pretrain.run import run
    except ImportError as error:
        if not (error.name or "").startswith("torchtitan"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run(arguments, command=command)


if __name__ == "__main__":
    sys.exit(start_training(sys.argv[1:]))
