"""Settings that another one leaves without effect are refused on the launcher, by both names."""

from functools import reduce
from typing import Any

from dtcp.torchtitan.section import Section

import pytest

from dtcp.pretrain import configs
from dtcp.pretrain.options import parse
from dtcp.pretrain.without_effect import check_effects, check_started_elsewhere

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "weights": (
        "llama_tiny",
        {"checkpoint.enable": False, "checkpoint.initial_load_path": "/weights"},
        r"checkpoint.initial_load_path='/weights' with checkpoint.enable=False",
    ),
    "a_step": (
        "llama_tiny",
        {"checkpoint.enable": False, "checkpoint.load_step": 5},
        r"checkpoint.load_step=5 with checkpoint.enable=False",
    ),
    "export": (
        "llama_tiny",
        {"checkpoint.load_only": True, "checkpoint.export_hf": True},
        r"checkpoint.export_hf=True with checkpoint.load_only",
    ),
    "patterns": (
        "llama_tiny",
        {"checkpoint.hf_ignore": ["x"]},
        r"checkpoint.hf_ignore=\['x'\] with no checkpoint.initial_load_in_hf",
    ),
    "seed_verified": (
        "llama_tiny",
        {"dtcp.verify": 2, "checkpoint.create_seed_checkpoint": True},
        r"create_seed_checkpoint=True with dtcp.verify=2",
    ),
    "folder": (
        "llama_tiny",
        {"dataloader.dataset_path": "texts"},
        r"dataloader.dataset_path='texts' with dataloader.dataset=stdlib",
    ),
    "split": (
        "llama_tiny",
        {"validator.dataloader.dataset": "folder", "validator.dataloader.split": "test"},
        r"validator.dataloader.split='test' with validator.dataloader.dataset=folder",
    ),
    "bytes": (
        "llama_tiny",
        {"dataloader.dataset": "c4", "dataloader.replace_invalid": True},
        r"replace_invalid=True with dataloader.dataset=c4",
    ),
    "end_of_validation": (
        "llama_tiny",
        {"validator.dataloader.infinite": False},
        r"validator.dataloader.infinite=False with validator.steps=4",
    ),
    "changes": (
        "llama_tiny",
        {"validator.dataloader.accept_changes": True},
        r"validator.dataloader.accept_changes=True with validations that begin anew",
    ),
    "held_out_of_nothing": (
        "llama_tiny",
        {"dataloader.part": "all"},
        r"part=validation of stdlib with dataloader.part=all",
    ),
    "held_out_of_a_split": (
        "llama_tiny",
        {
            "dataloader.dataset": "c4",
            "dataloader.split": "test",
            "validator.dataloader.dataset": "c4",
            "validator.dataloader.split": "test",
        },
        r"part=validation of c4 with dataloader.part=train, dataloader.split='test'",
    ),
    "dtype": (
        "llama_tiny",
        {"checkpoint.export_dtype": "bfloat16"},
        r"export_dtype='bfloat16' with neither checkpoint.export_hf nor",
    ),
    "dtype_of_nothing_saved": (
        "llama_tiny",
        {
            "checkpoint.load_only": True,
            "checkpoint.last_save_model_only": True,
            "checkpoint.export_dtype": "bfloat16",
        },
        r"export_dtype='bfloat16' with checkpoint.load_only, which saves nothing",
    ),
    "dtype_without_checkpoints": (
        "llama_tiny",
        {
            "checkpoint.enable": False,
            "checkpoint.last_save_model_only": True,
            "checkpoint.export_dtype": "bfloat16",
        },
        r"export_dtype='bfloat16' with checkpoint.enable=False",
    ),
    "experts": (
        "titan_llama3_tiny",
        {"debug.moe_force_load_balance": True},
        r"debug.moe_force_load_balance=True for llama3 debugmodel, which has none",
    ),
    "further_tokens": ("llama_tiny", {"loss.mtp_weight": 0.3}, r"loss.mtp_weight=0.3 for llama"),
    "strategy": (
        "deepseek_v4_tiny",
        {"dtcp.strategy": "ulysses"},
        r"dtcp.strategy=ulysses for deepseek_v4, whose mixers have one",
    ),
    "boundary": (
        "deepseek_v4_tiny",
        {"dtcp.boundary": "eager_island"},
        r"dtcp.boundary=eager_island for deepseek_v4",
    ),
    "sums": (
        "deepseek_v4_tiny",
        {"dtcp.reduce_dtype": "float32"},
        r"dtcp.reduce_dtype=float32 for deepseek_v4",
    ),
}

TAKEN: list[tuple[str, dict[str, Any]]] = [
    ("deepseek_v4_tiny", {"loss.mtp_weight": 0.3, "dtcp.strategy": "auto"}),
    ("llama_tiny", {"dtcp.strategy": "ulysses", "checkpoint.export_hf": True}),
    ("llama_tiny", {"dataloader.dataset": "folder", "dataloader.dataset_path": "texts"}),
    ("llama_tiny", {"dataloader.part": "all", "validator.enable": False}),
    ("llama_tiny", {"dataloader.part": "all", "dtcp.verify": 3}),
    ("llama_tiny", {"dataloader.part": "all", "checkpoint.create_seed_checkpoint": True}),
    ("llama_tiny", {"dataloader.part": "all", "validator.dataloader.part": "all"}),
    ("llama_tiny", {"dataloader.dataset": "c4", "validator.dataloader.dataset": "c4"}),
    ("llama_tiny", {"checkpoint.export_dtype": "bfloat16", "checkpoint.export_hf": True}),
    ("llama_tiny", {"validator.enable": False, "validator.dataloader.split": "test"}),
    ("llama_tiny", {"validator.steps": -1, "validator.dataloader.infinite": False}),
]


def changed(name: str, changes: dict[str, Any]) -> Any:
    config = getattr(configs, name)()
    for option, value in changes.items():
        *path, field = option.split(".")
        setattr(reduce(getattr, path, config), field, value)
    return config


@pytest.mark.parametrize("case", REFUSED)
def test_C2_a_setting_without_effect_is_refused(case):
    name, changes, says = REFUSED[case]
    with pytest.raises(ValueError, match=says):
        check_effects(changed(name, changes))


@pytest.mark.parametrize(("name", "changes"), TAKEN)
def test_C2_a_setting_that_is_read_is_taken(name, changes):
    check_effects(changed(name, changes))


@pytest.mark.parametrize(
    ("settings", "accelerated", "says"),
    [
        ({"max_restarts": 2}, False, r"dtcp.max_restarts=2 .* torchrun has --max-restarts"),
        ({"stop_seconds": 5}, True, r"dtcp.stop_seconds=5 of ranks that another launcher"),
        ({"device": "cpu"}, True, r"dtcp.device=cpu where they find an accelerator each"),
        ({"device": "accelerator"}, False, r"dtcp.device=accelerator where they find none"),
    ],
)
def test_C2_what_train_py_does_for_its_own_ranks_is_refused_of_others(settings, accelerated, says):
    check_started_elsewhere(Section(device="cpu"), accelerated=False)
    check_started_elsewhere(Section(device="accelerator"), accelerated=True)
    with pytest.raises(ValueError, match=says):
        check_started_elsewhere(Section(**settings), accelerated=accelerated)


def test_C2_a_model_of_transformers_without_a_name_is_refused():
    for words in (["--model.hf"], ["--model.hf="], ["--model.hf", ""]):
        with pytest.raises(ValueError, match=r"got --model.hf without one"):
            parse(words)


def test_C2_a_folder_of_a_model_without_its_weights_is_refused(tmp_path):
    """Its config alone would train from drawn weights, without a word."""
    from dtcp.torchtitan.hf_model import huggingface_spec, read_config

    read_config("llama").save_pretrained(tmp_path)
    huggingface_spec(str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match=r"without any.*config.json starts from drawn weights"):
        huggingface_spec(str(tmp_path))
