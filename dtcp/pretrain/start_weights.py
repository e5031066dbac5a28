"""Whether a run can start from the weights it names, checked before any rank starts."""

from pathlib import Path
from typing import Any

from dtcp.checkpoint.huggingface import weight_files
from dtcp.checkpoint.metadata import NAME as METADATA
from dtcp.pretrain.checkpoint_fit import STATES
from dtcp.pretrain.tokenizer import VOCABULARY_FILES, Tokenizer


def check_start(config: Any) -> None:
    """Refuse a folder that cannot be what --checkpoint.initial_load_path is said to be.

    Raises:
        ValueError: naming the folder, and what to name instead.
    """
    start = config.checkpoint
    _check_tokenizer(config)
    unknown = [name for name in start.exclude_from_loading if name not in STATES]
    if unknown:
        raise ValueError(
            f"What is not loaded is one of {', '.join(STATES)}, got "
            f"--checkpoint.exclude_from_loading {' '.join(unknown)}: correct it, or leave it out."
        )
    if start.enable and start.initial_load_in_hf and not start.initial_load_path:
        raise ValueError(
            "Hugging Face weights are loaded from a folder, got --checkpoint.initial_load_in_hf "
            "without --checkpoint.initial_load_path: give its absolute path."
        )
    if not start.initial_load_path:
        return
    path = Path(start.initial_load_path)
    if not path.is_dir():
        raise ValueError(
            f"A run starts from a folder of weights, got --checkpoint.initial_load_path "
            f"{path}: no such folder."
        )
    if start.initial_load_in_hf:
        weight_files(path)
    elif not (path / METADATA).exists():
        raise ValueError(
            f"A run starts from a checkpoint's folder, got --checkpoint.initial_load_path {path} "
            f"without {METADATA}: {_instead(path)}."
        )


def _check_tokenizer(config: Any) -> None:
    """Refuse the tokenizer of bytes for weights of another tokenizer: no number would show it."""
    tokenizer, source = config.tokenizer, getattr(config.model_spec.model, "source", "")
    start = config.checkpoint
    loaded = start.initial_load_path if start.enable and start.initial_load_in_hf else ""
    if not isinstance(tokenizer, Tokenizer.Config) or tokenizer.folder:
        return
    for folder in (Path(path) for path in (source, loaded) if path):
        if folder.is_dir() and any((folder / name).is_file() for name in VOCABULARY_FILES):
            raise ValueError(
                f"Weights go with the token ids of their tokenizer, got those of {folder}, which "
                f"has one, with a tokenizer of bytes: add --tokenizer.folder {folder}."
            )


def _instead(path: Path) -> str:
    steps = sorted(p.name for p in path.glob("**/step-*") if (p / METADATA).exists())
    if steps:
        return f"name one of its steps, such as {steps[-1]}"
    if list(path.glob("*.safetensors")):
        return "it has safetensors; add --checkpoint.initial_load_in_hf"
    return "it is none, or its save was cut short"
