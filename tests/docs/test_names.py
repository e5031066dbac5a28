"""Settings, options and names that pages speak of are there, and tables of settings are current."""

import importlib
import pkgutil
import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from docs.train_tables import PAGE, page
from dtcp.plan.options import check_options
from dtcp.pretrain.configs import llama_tiny
from dtcp.pretrain.options import parse
from tests.docs.blocks import BLOCKS, PAGES, ROOT, commands_of

# Decisions and the changelog speak of what was; the families' tables, of transformers.
NOW = [
    path
    for path in PAGES
    if path.name not in ("decisions.md", "changelog.md", "families.md", "tp_parts.md")
]
NAMES = [str(path.relative_to(ROOT)) for path in NOW]
CODE = "\n".join(
    path.read_text()
    for folder in ("dtcp", "parallelize", "models", "tests", "benchmarks", "examples", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != Path(__file__)
) + "".join((ROOT / name).read_text() for name in ("train.py", "pyproject.toml", "Makefile"))
WORDS = frozenset(re.findall(r"\w+", CODE))

OF_TORCHRUN = frozenset(
    [
        "nproc-per-node",
        "nnodes",
        "node-rank",
        "master-addr",
        "master-port",
        "local-addr",
        "rdzv-backend",
        "rdzv-endpoint",
        "rdzv-id",
        "rdzv-conf",
        "max-restarts",
        "shutdown-timeout",
    ]
)
# Of other packages, and placeholders; docs/migrate.md is full of the first.
FOREIGN = frozenset(
    [
        "NCCL_SOCKET_IFNAME",
        "is_host",
        "join_timeout",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
        "my_module",
        "llama3_8b",
        "hf_",
        "ddp_",
        "convert_to_float8_training",
        "rowwise_with_gw_hp",
        "QATConfig",
        "Float8LinearConverter",
        "apply_liger_kernel_to_llama",
    ]
)


def settings_of(section: object, before: str = "") -> set[str]:
    """All settings under a section of a config, by their path."""
    names = set()
    for field in fields(section):
        value = getattr(section, field.name)
        names.add(before + field.name)
        if is_dataclass(value):
            names |= settings_of(value, f"{before}{field.name}.")
    return names


def test_the_tables_of_settings_are_those_of_the_code():
    assert PAGE.read_text() == page(PAGE.read_text()), "python -m docs.train_tables"


def test_every_setting_that_a_page_names_is_one_of_train_py():
    known = settings_of(llama_tiny()) | {"model.hf", "model.dtcp"}
    named = {
        (name, option)
        for name, path in zip(NAMES, NOW, strict=True)
        for option in re.findall(r"(?<![\w-])--([a-z]\w*\.[\w.-]*\w)", path.read_text())
        if option != "section.key"
    }
    assert len(named) > 60
    plain = [(name, re.sub(r"\.no_", ".", x.replace("-", "_"))) for name, x in named]
    assert [each for each in plain if each[1] not in known] == []


def test_every_option_that_a_page_names_is_in_a_parser():
    known = set(re.findall(r'"--([a-z][\w-]*)"', CODE)) | settings_of(llama_tiny()) | OF_TORCHRUN
    named = {
        (name, option)
        for name, path in zip(NAMES, NOW, strict=True)
        for option in re.findall(r"(?<![\w-])--([a-z][\w-]*)(?![\w-]|\.\w)", path.read_text())
    }
    assert len(named) > 30
    assert [each for each in named if each[1] not in known] == []


COMMANDS = dict.fromkeys(command for _, command in commands_of(BLOCKS))
# Their files are the reader's.
OF_TRAIN = [x for x in COMMANDS if " train.py" in x and "path/to" not in x and "--help" not in x]


@pytest.mark.parametrize("command", OF_TRAIN)
def test_a_command_of_train_py_is_parsed(command):
    parse(shlex.split(command.partition("train.py")[2]))


@pytest.mark.parametrize("module", ["dtcp.check", "dtcp.plan", "docs.families"])
def test_commands_of_a_module_are_parsed(module):
    parser = importlib.import_module(f"{module}.__main__")._parser()
    commands = [x for x in COMMANDS if f" -m {module} " in x]
    assert len(commands) > 2
    for command in commands:
        arguments, rest = parser.parse_known_args(shlex.split(command.partition(module)[2]))
        if module == "dtcp.plan":
            defaults = {name: parser.get_default(name) for name in vars(arguments)}
            check_options(arguments, defaults, rest)
        else:
            assert rest == [], command


def test_every_dotted_name_of_the_library_on_a_page_is_there():
    settings = settings_of(llama_tiny())
    named = {
        (name, dotted)
        for name, path in zip(NAMES, NOW, strict=True)
        for dotted in re.findall(r"`(dtcp(?:\.\w+)+)[`(.]", path.read_text())
        if dotted not in settings
    }
    assert len(named) > 20
    for name, dotted in named:
        try:
            pkgutil.resolve_name(dotted)
        except (ImportError, AttributeError) as error:
            raise AssertionError(f"{name} names {dotted}") from error


def test_every_new_name_of_the_changelog_is_there():
    """Of its tables the last column, where a name is spelled in full."""
    page = (ROOT / "docs/changelog.md").read_text()
    columns = re.findall(r"^\| .* \| (.*) \|$", page, re.MULTILINE)
    named = {name for text in columns for name in re.findall(r"`(dtcp(?:\.\w+)+)`", text)}
    assert len(named) > 20
    for name in sorted(named):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "docs/migrate.md"])
def test_names_in_code_type_are_words_of_the_code(name):
    """Finds what was renamed; not a word that the code has elsewhere."""
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    named = {
        word
        for quoted in re.findall(r"`([^`\n]+)`", text)
        for word in re.findall(r"(?<![\w./-])[A-Za-z]\w*(?:\.[A-Za-z]\w*)*", quoted)
    }
    parts = {part for word in named for part in word.split(".")} - FOREIGN
    # Words of plain prose in quoted phrases are no names.
    assert [part for part in sorted(parts - WORDS) if re.search(r"_|[a-z][A-Z]", part)] == []
