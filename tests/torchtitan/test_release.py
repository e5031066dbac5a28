"""Another release of torchtitan, or a checkout of one, is refused in one sentence at the start."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from dtcp.torchtitan import compat

import pytest

import train

RELEASES = {
    "later": ("0.4.0", compat.REMOVED_SINCE, r"got torchtitan=0\.4\.0 in \S+: pip install"),
    "main": ("0.3.0", compat.REMOVED_SINCE[1:], r"0\.3\.0 in \S+ without \['components/datalo"),
    "candidate": ("0.3.0rc1", compat.REMOVED_SINCE, r"got torchtitan=0\.3\.0rc1 in \S+: pip"),
    "same": ("0.3.0", compat.REMOVED_SINCE, ""),
    "built here": ("0.3.0+cu130", compat.REMOVED_SINCE, ""),
}


@pytest.mark.parametrize("case", RELEASES)
def test_a_checkout_is_looked_at_before_it_is_imported(case, tmp_path, monkeypatch):
    """What it says of itself counts, and not what else is installed; so does what it has."""
    version, modules, says = RELEASES[case]
    for name in ("../assets/version.txt", *modules):
        path = tmp_path / "torchtitan" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(version)
    spec = ModuleSpec("torchtitan", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "torchtitan")]
    monkeypatch.setattr(compat, "find_spec", lambda _: spec)
    if not says:
        compat._check_release()
        return
    with pytest.raises(ImportError, match=says) as refused:
        compat._check_release()
    assert refused.value.name == "torchtitan"


def test_no_torchtitan_is_said_as_well(monkeypatch):
    monkeypatch.setattr(compat, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"knows torchtitan 0.3.0, got torchtitan=none: pip"):
        compat._check_release()


@pytest.mark.parametrize(
    ("name", "is_said"), [("torchtitan", True), ("torchtitan.trainer", True), ("grain", False)]
)
def test_train_says_what_of_torchtitan_is_missing(name, is_said, monkeypatch, capsys):
    def missing(_: str) -> None:
        raise ImportError("it is not the one", name=name)

    module = ModuleType("dtcp.pretrain.run")
    module.__getattr__ = missing
    monkeypatch.setitem(sys.modules, "dtcp.pretrain.run", module)
    if is_said:
        assert train.main([]) == 2
        assert capsys.readouterr().err == "error: it is not the one\n"
    else:
        with pytest.raises(ImportError):
            train.main([])
