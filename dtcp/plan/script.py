"""The train.py command for a model of transformers or of a config.json, where there is one."""

from dataclasses import dataclass
from pathlib import Path

from dtcp.checkpoint.huggingface import weight_files
from dtcp.huggingface.language_model import is_causal
from dtcp.planner.hf_config import PRESETS, REMEDY, config_file, read_hf_config
from dtcp.planner.subject import FamilyModel, HuggingFaceModel, Subject


@dataclass(frozen=True)
class Script:
    """The start of a command line.

    Args:
        words: of train.py; none where it does not take the model.
        before: a shell command that is run first.
        note: what the command leaves open.
        why_not: why train.py does not take the model.
    """

    words: tuple[str, ...] = ()
    before: str = ""
    note: str = ""
    why_not: str = ""


FIRST_TRY = (
    "data, optimizer and schedule are those of --config llama_tiny, for a first try: name yours"
)


def script_of(subject: Subject, source: str) -> Script:
    """How train.py is given the model that a source of `--hf-config` names.

    Args:
        source: a config.json, its folder, a preset or a model type.
    """
    path = config_file(source)
    if isinstance(subject, FamilyModel):
        words = ("train.py", "--model.dtcp", _named(source, path), *_tokenizer(path))
        return Script(words, note=FIRST_TRY)
    assert isinstance(subject, HuggingFaceModel)
    config = subject.config
    if not is_causal(config, REMEDY):
        return Script(why_not="it trains causal language models")
    if getattr(config.get_text_config(), "output_router_logits", False):
        return Script(why_not="its loss has no place for what output_router_logits asks for")
    has_more = path is not None and read_hf_config(source)[1]["model_type"] != config.model_type
    if path is None or has_more:
        # A model type means a tiny model to train.py, and it takes models of text alone.
        made = f"for_model({source!r})" if path is None else f"from_pretrained({str(path)!r})"
        text = ".get_text_config(decoder=True)"
        folder = config.model_type
        made = f"transformers.AutoConfig.{made}{text}.save_pretrained({folder!r})"
        before = f'python -c "import transformers; {made}"'
        return Script(("train.py", "--model.hf", f"{folder}/config.json"), before, FIRST_TRY)
    words = ("train.py", "--model.hf", _named(source, path), *_tokenizer(path))
    return Script(words, note=FIRST_TRY)


def _named(source: str, path: Path | None) -> str:
    """The source, or its file where a folder has no weights to start from."""
    if path is None or not Path(source).is_dir():
        return source
    try:
        weight_files(Path(source))
    except ValueError:
        return str(path)
    return source


def _tokenizer(path: Path | None) -> tuple[str, ...]:
    if path is None or path.parent == PRESETS or not (path.parent / "tokenizer.json").is_file():
        return ()
    return ("--tokenizer.folder", str(path.parent))
