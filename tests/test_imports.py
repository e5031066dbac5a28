"""The tree keeps its own law: who imports whom, where private and optional imports live, sizes.

Read with ast, so lazy and guarded imports count as well.
"""

import ast
import contextlib
import functools
import gc
import graphlib
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.harness.run_script import run_python

ROOT = Path(__file__).parent.parent
CODE = ("dtcp", "models", "parallelize")

# Lowest first. A module imports from its own floor and from those below it.
FLOORS = (
    ("dtcp._torch",),
    (
        "dtcp.sequence",
        "dtcp.metadata",
        "dtcp.forward",
        "dtcp.autocast",
        "dtcp.inference_mode",
        "dtcp.local_op",
        "dtcp.checkpoint",
    ),
    ("dtcp.distributed", "dtcp.compile"),
    ("dtcp.kernels",),
    (
        "dtcp.mixer",
        "dtcp.mixer_metadata",
        "dtcp.mixer_positions",
        "dtcp.mixer_ranks",
        "dtcp.style",
        "dtcp.token_dropout",
    ),
    (
        "dtcp.softmax",
        "dtcp.recurrent",
        "dtcp.sparse",
        "dtcp.sparse_latent",
        "dtcp.sparse_blocks",
        "dtcp.experts",
        "dtcp.mixer_plan",
    ),
    (
        "dtcp.batch",
        "dtcp.row_parts",
        "dtcp.rows",
        "dtcp.sharded_batch",
        "dtcp.distillation",
        "dtcp.linear_logits",
        "dtcp.logit_sums",
        "dtcp.router_balance",
        "dtcp.token_entropy",
        "dtcp.token_statistics",
        "dtcp.labels",
        "dtcp.loss",
        "dtcp.sdpa",
        "dtcp.thd",
        "dtcp.thd_attention",
    ),
    ("dtcp.huggingface", "dtcp.cp_utils"),
    ("dtcp",),
    ("dtcp.models",),
    ("dtcp.parallelize",),
    (
        "dtcp.torchtitan",
        "dtcp.check",
        "dtcp.planner",
        "dtcp.trainers",
        "dtcp.copied_weights",
        "dtcp.cut_backward",
        "dtcp.microbatches",
    ),
    ("dtcp.pretrain",),
    ("train", "dtcp.plan"),
)
MODELS_MAY_IMPORT = (
    "dtcp.metadata",
    "dtcp.mixer",
    "dtcp.softmax.mixer",
    "dtcp.sparse.mixer",
    "dtcp.recurrent.mixer",
    "dtcp.sequence.arguments",
    "dtcp.sequence.masks",
    "dtcp.kernels.grouped_linear",
    "dtcp.experts.losses",
    "dtcp.experts.exchange",
    "dtcp.models",
    "torch",
)
# Private names that are not torch's and have no public spelling.
OF_TRANSFORMERS = (
    "_apply_gate",
    "_attn_implementation",
    "_can_set_experts_implementation",
    "_experts_implementation",
    "_from_config",
    "_gradient_checkpointing_func",
    "_init_weights",
    "_keep_in_fp32_modules_strict",
    "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_save",
    "_split_heads",
    "_supports_sdpa",
    "_weight_conversions",
)
OF_TORCHTITAN = (
    "_build_param_groups",
    "_create_checkpoint_id",
    "_find_load_step",
    "_owner",
    "_should_save",
)
# Part of what a NamedTuple is: Python documents them, the underscore keeps fields' names free.
NAMED_TUPLE = ("_asdict", "_fields", "_make", "_replace")
OPTIONAL = ("fla", "cutlass", "ffpa_attn", "flash_attn", "flash_attn_interface", "flash_attn_3")
# torchrun speaks to its ranks through the environment, and launching is speaking to torchrun.
ENVIRONMENT_HOMES = (
    "dtcp/pretrain/launch.py",
    "dtcp/pretrain/report.py",
    "dtcp/pretrain/attempt.py",
)


@dataclass(frozen=True)
class File:
    """A file of the project, parsed."""

    path: str  # from the root, with slashes
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        with collector_at_rest():
            return ast.parse(self.text, self.path)

    @functools.cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """Of the tree, all."""
        tree = self.tree
        with collector_at_rest():
            return tuple(ast.walk(tree))

    @functools.cached_property
    def module(self) -> str:
        name = self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return f"dtcp.{name}" if within(name, ("models", "parallelize")) else name

    def imports(self) -> Iterator[tuple[str, str]]:
        """(place, full name) of everything imported; `from a import b` gives a.b."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((self.place(node), alias.name) for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{self.place(node)}: imports are absolute"
                yield from ((self.place(node), f"{node.module}.{a.name}") for a in node.names)

    def place(self, node: ast.AST) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 0)}"


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """No collection meanwhile: of a million nodes that all stay, each would pass over all."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    """No later test carries these trees along."""
    yield
    for cached in (file_of, files, graph, own_private_names):
        cached.cache_clear()


@functools.cache
def files(*tops: str) -> tuple[File, ...]:
    """The Python files under these folders (or the files of that name), in order of path."""
    paths = [p for top in tops for p in ([ROOT / top] if top.endswith(".py") else tree_of(top))]
    return tuple(file_of(path) for path in paths if path.exists())


@functools.cache
def file_of(path: Path) -> File:
    """Read and parsed once, however many tests ask for it."""
    return File(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))


def tree_of(top: str) -> list[Path]:
    return sorted((ROOT / top).rglob("*.py"))


def within(name: str, packages: tuple[str, ...]) -> bool:
    """Whether the dotted name is one of the packages or lies inside one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def floor(module: str) -> int:
    """Index of the floor: that of the longest name that fits."""
    fits = [
        (len(name), level)
        for level, names in enumerate(FLOORS)
        for name in names
        if module == name or (name != "dtcp" and within(module, (name,)))
    ]
    assert fits, f"{module} has no floor: add it to FLOORS, at the height it imports from"
    return max(fits)[1]


@functools.cache
def graph() -> dict[str, tuple[tuple[str, str], ...]]:
    """For every module of the project, (place, module) of each import of another one."""
    project = files(*CODE, "train.py")
    modules = {file.module for file in project}

    def resolve(name: str) -> str | None:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name or None

    return {
        file.module: tuple(
            (place, target)
            for place, name in file.imports()
            if (target := resolve(name)) not in (None, file.module)
        )
        for file in project
    }


def test_imports_run_downward_only():
    upward = [
        f"{place} imports {target}"
        for module, edges in graph().items()
        for place, target in edges
        if floor(target) > floor(module)
    ]
    assert upward == []


def test_imports_have_no_cycles():
    sorter = graphlib.TopologicalSorter(
        {module: {target for _, target in edges} for module, edges in graph().items()}
    )
    sorter.prepare()


def test_only_the_adapter_and_train_import_the_adapter():
    """The core and the plans serve trainers that are not torchtitan's."""
    lifts = [
        f"{place} imports {target}"
        for module, edges in graph().items()
        for place, target in edges
        if within(target, ("dtcp.torchtitan",))
        and not within(module, ("dtcp.torchtitan", "dtcp.pretrain", "train"))
    ]
    assert lifts == []


def test_only_the_adapter_imports_torchtitan():
    assert foreign_imports(("torchtitan",), homes=("dtcp/torchtitan/", "dtcp/pretrain/")) == []


def test_optional_kernels_are_imported_in_kernels_only():
    assert foreign_imports(OPTIONAL, homes=("dtcp/kernels/",)) == []


def test_kernels_know_one_device():
    """No groups, no collectives, no counting: what communicates is an op, above the kernels."""
    talk = [
        f"{place} imports {name}"
        for file in files("dtcp/kernels")
        for place, name in [*file.imports(), *torch_attributes(file)]
        if within(name, ("torch.distributed", "dtcp.distributed", "dtcp.compile"))
    ]
    assert talk == []


def test_fast_kernels_do_not_import_the_reference():
    """What a backend needs of it stands in a file of its own, such as types.py."""
    reference = [
        f"{place} imports {target}"
        for module, edges in graph().items()
        if within(module, ("dtcp.kernels",))
        for place, target in edges
        if target.endswith(".reference") and not module.endswith(".api")
    ]
    assert reference == []


def foreign_imports(packages: tuple[str, ...], homes: tuple[str, ...]) -> list[str]:
    return [
        f"{place} imports {name}"
        for file in files(*CODE, "train.py")
        if not file.path.startswith(homes)
        for place, name in file.imports()
        if within(name, packages)
    ]


def test_models_import_torch_and_the_seams_only():
    foreign = [
        f"{place} imports {name}"
        for file in files("models")
        for place, name in file.imports()
        if not within(name, MODELS_MAY_IMPORT)
        and name.partition(".")[0] not in sys.stdlib_module_names
    ]
    assert foreign == []


def test_models_and_plans_have_one_name():
    """That of a wheel, dtcp.models and dtcp.parallelize; under two names classes exist twice."""
    # Most files are not parsed: no line of theirs can be such an import.
    maybe = re.compile(r"\b(import|from)\b.*(?<![\w.])(models|parallelize)\b")
    imports = [
        f"{place} imports {name}"
        for file in files(*CODE, "tests", "benchmarks", "train.py")
        if maybe.search(file.text.replace("\\\n", " "))
        for place, name in file.imports()
        if within(name, ("models", "parallelize"))
    ]
    short = re.compile(r"^ *(from |import (.*, ?)?)(models|parallelize)\b", re.MULTILINE)
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    assert imports == [path.name for path in documents if short.search(path.read_text())] == []


@pytest.mark.parametrize("name", ["models", "parallelize"])
def test_the_short_names_of_models_and_plans_are_refused(name):
    with pytest.raises(ImportError, match=f"imported as dtcp.{name}, got {name}: write dtcp"):
        importlib.import_module(name)


def test_private_names_of_torch_stay_in_their_home():
    """In dtcp/_torch: every name of torch that starts with one underscore.

    Seen are imports and dotted names (`torch._dynamo.reset`, `from torch._C import x`), and
    attributes of any object (`mesh._flatten`, `getattr(x, "_local_tensor")`, `vars(x)["_modules"]`)
    unless somewhere the project gives that name to a thing of its own, which it may not do with
    names that every module has. Not seen: another name that both torch and the project use, and
    one put together at run time.
    """
    own = own_private_names()
    elsewhere = [
        f"{place} uses {name}"
        for file in files(*CODE, "train.py")
        if not file.path.startswith("dtcp/_torch/")
        for place, name in private_names(file)
        if name.rpartition(".")[2] not in own
    ]
    assert elsewhere == []


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import torch._inductor", "torch._inductor"),
        ("from torch._C import _set_grad_enabled", "torch._C._set_grad_enabled"),
        ("torch._dynamo.reset()", "torch._dynamo"),
        ("mesh._flatten('x')", "_flatten"),
        ("first().rest[0]._local_tensor", "_local_tensor"),
        ("getattr(unit, '_get_fsdp_state')()", "_get_fsdp_state"),
        ("vars(module)['_modules']", "_modules"),
        ("module.__dict__['_buffers']", "_buffers"),
    ],
)
def test_private_names_of_torch_are_seen(code, name):
    assert name in [name for _, name in private_names(File("code.py", code))]
    assert name.rpartition(".")[2] not in own_private_names()


def test_the_home_of_private_names_is_the_lowest_floor():
    home = [module for module in graph() if within(module, ("dtcp._torch",))]
    targets = {target for module in home for _, target in graph()[module]}
    assert len(home) > 1 and targets <= set(home)


def private_names(file: File) -> Iterator[tuple[str, str]]:
    for place, name in [*file.imports(), *torch_attributes(file)]:
        if name.startswith("torch.") and is_private(name):
            yield place, name
    for node in file.nodes:
        if isinstance(node, ast.Attribute) and not dotted(node).startswith("torch."):
            name = node.attr
        elif isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "setattr", "hasattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
        elif isinstance(node, ast.Subscript) and is_namespace(node.value):
            name = str(node.slice.value) if isinstance(node.slice, ast.Constant) else ""
        else:
            continue
        if is_private(name):
            yield file.place(node), name


def is_namespace(node: ast.expr) -> bool:
    """Whether it spells all attributes of an object: vars(x), x.__dict__."""
    if isinstance(node, ast.Call):
        return dotted(node.func) == "vars"
    return isinstance(node, ast.Attribute) and node.attr == "__dict__"


@functools.cache
def own_private_names() -> frozenset[str]:
    """What the project itself defines: functions, classes, variables, attributes of self."""
    names = {*OF_TRANSFORMERS, *OF_TORCHTITAN, *NAMED_TUPLE}
    for file in files(*CODE, "train.py"):
        for node in file.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if dotted(node.value) in ("self", "cls") else set()
    # Whoever gives a thing of their own such a name would hide the uses of torch's.
    return frozenset(names - vars(torch.nn.Module()).keys())


def is_private(name: str) -> bool:
    """Whether a part of the dotted name is private.

    Operators are not: their schemas are versioned. Nor is `torch._check`, which torch documents.
    """
    if name.startswith(("torch.ops.", "torch._check")):
        return False
    return any(p.startswith("_") and not p.startswith("__") for p in name.split("."))


def torch_attributes(file: File) -> Iterator[tuple[str, str]]:
    """Every attribute read off torch: torch.ops.aten.mm, torch._dynamo.reset."""
    for node in file.nodes:
        if isinstance(node, ast.Attribute) and dotted(node).startswith("torch."):
            yield file.place(node), dotted(node)


def dotted(node: ast.AST) -> str:
    """The name a chain of attributes spells; empty where it starts from a call or an index."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def test_compiler_is_switched_off_in_one_file():
    disabled = [
        place
        for file in files(*CODE)
        if file.path != "dtcp/compile.py"
        for place, name in torch_attributes(file)
        if name == "torch.compiler.disable"
    ]
    assert disabled == []


def test_environment_is_not_read():
    reads = [
        file.place(node)
        for file in files(*CODE)
        if file.path not in ENVIRONMENT_HOMES
        for node in file.nodes
        if isinstance(node, ast.Attribute) and dotted(node) in ("os.environ", "os.getenv")
    ]
    assert reads == []


def test_modules_hold_no_mutable_state():
    mutable = [
        file.place(node)
        for file in files(*CODE, "train.py")
        if file.path != "dtcp/distributed/ledger.py"
        for node in module_level(file.tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and is_mutable(node.value)
        and not is_read_only(node)
    ]
    assert mutable == []


def module_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run at import, those under a module-level if or try included."""
    stack = list(tree.body)
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.For):
            stack += [child for child in ast.walk(node) if isinstance(child, ast.Assign)]


def is_mutable(value: ast.expr | None) -> bool:
    containers = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    makers = ("list", "dict", "set", "defaultdict", "OrderedDict", "Counter", "deque")
    if isinstance(value, ast.Call):
        return dotted(value.func).rpartition(".")[2] in makers
    return isinstance(value, containers)


def is_read_only(node: ast.Assign | ast.AnnAssign) -> bool:
    """Whether the type checker keeps the value as it is: a table annotated as a Mapping."""
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.annotation).startswith("Mapping[")
    return ast.unparse(node.targets[0]) == "__all__"


def test_no_module_is_patched_at_import():
    """Importing dtcp changes nobody's behaviour; only the adapter's shim does, and says so."""
    patches = [
        file.place(node)
        for file in files("dtcp", "models", "parallelize")
        if file.path != "dtcp/torchtitan/compat.py"
        for node in module_level(file.tree)
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)
    ]
    assert patches == []


@pytest.mark.parametrize(
    ("top", "ceiling"), [("dtcp", 400), ("models", 500), ("parallelize", 400), ("train.py", 400)]
)
def test_files_can_be_read_in_one_sitting(top, ceiling):
    long = {f.path: n for f in files(top) if (n := f.text.count("\n")) > ceiling}
    assert long == {}


def test_functions_fit_on_a_screen():
    long = {
        f"{file.place(node)} {node.name}": length
        for file in files(*CODE, "train.py")
        for node in file.nodes
        if isinstance(node, ast.FunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > 60
    }
    assert long == {}


def test_no_two_public_definitions_share_a_name():
    """But in models, where each family has its Attention and its from_hf."""
    places: dict[str, list[str]] = {}
    for file in files("dtcp", "parallelize"):
        for name, place in public_definitions(file):
            places.setdefault(name, []).append(place)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_public_definitions_say_what_they_are():
    silent = [
        f"{file.place(node)} {node.name}"
        for file in files(*CODE, "train.py")
        for node in file.tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        and not (node.name.startswith("_") or ast.get_docstring(node))
    ]
    assert silent == []


OLD_NAMES = re.compile(
    "make_"
    "tables|table_"
    "key|line_"
    "up|add_"
    "home|communicated_"
    "ops|Brought"
    "Attention"
    "|tol"
    r"d\b"
)
"""What the field has other words for."""


def test_names_that_were_replaced_stay_away():
    found = [
        f"{file.path}: {match[0]}"
        for file in files("dtcp", "parallelize", "models", "tests")
        for match in OLD_NAMES.finditer(file.text)
    ]
    assert found == []


def public_definitions(file: File) -> Iterator[tuple[str, str]]:
    """(name, place) of every class and function at a module's top level without an underscore."""
    for node in file.tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, file.place(node)


def test_source_is_ascii():
    odd = [file.path for file in files(*CODE, "tests", "train.py") if not file.text.isascii()]
    assert odd == []


@pytest.mark.parametrize(
    ("module", "extras"),
    [
        ("dtcp", ()),
        ("dtcp.parallelize", ()),
        ("dtcp.huggingface", ()),
        ("dtcp.cp_utils", ()),
        ("dtcp.check.__main__", ()),
        ("dtcp.plan.__main__", ()),
        ("dtcp.kernels.__main__", ()),
        ("dtcp.pretrain.run", ("train",)),
        ("dtcp.pretrain.configs", ("train",)),
        ("dtcp.trainers", ("hf",)),
    ],
)
def test_what_is_imported_at_the_start_is_installed_with_its_extras(module, extras):
    """Read off the imports: the tests' own environment has every extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][each] for each in extras)]
    brought = {re.match(r"[\w-]+", line)[0] for lines in lists for line in lines}
    missing = {name for name in imported_at_start(module) if name not in brought}
    assert missing == set()


def imported_at_start(module: str) -> set[str]:
    """Packages of others that are imported with a module, by it or by what it imports of ours."""
    project = {file.module: file for file in files(*CODE)}
    seen: set[str] = set()
    others: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        while name and name not in project:
            name, last = name.rpartition(".")[0], name.partition(".")[0]
            others |= {last} if not name else set()
        if not name or name in seen:
            continue
        seen.add(name)
        waiting.append(name.rpartition(".")[0])
        for node in module_level(project[name].tree):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                waiting += [f"{node.module}.{alias.name}" for alias in node.names]
    return others - {*sys.stdlib_module_names, ""}


def test_core_is_imported_without_torchtitan_or_optional_packages():
    """In a process of its own: dtcp by itself, which does not even import what compiles, for that
    takes longer than all else; then every module of the core at once."""
    core = [
        f.module
        for f in files("dtcp")
        if not f.path.startswith(("dtcp/torchtitan", "dtcp/pretrain"))
    ]
    unwanted = ("torchtitan", "transformers", "datasets", *OPTIONAL)
    extras = ("torchtitan", "transformers", "matplotlib", "tensorboard", "fla", "triton")
    script = (
        f"import sys, importlib, dtcp\n"
        f"print(*({set(extras)} | {{'torch._dynamo'}}) & set(sys.modules))\n"
        f"for name in {core}: importlib.import_module(name)\n"
        f"print(*({{name.partition('.')[0] for name in sys.modules}} & set({unwanted})))"
    )
    ended = run_python("-c", script)
    assert (ended.code, ended.printed.split()) == (0, []), ended.errors
