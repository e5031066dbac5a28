"""A checkpoint is whole or it is not one: what is cut, mixed, renamed, flipped, foreign is refused.

E3 and E4 of what was found by killing, cutting and swapping; in one process, a manager of
checkpoints around a small model. Ranks are in test_survive_kill.py.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dtcp.pretrain.checkpoint_choice import choose
from dtcp.pretrain.manifest import read_manifest, record_files
from dtcp.pretrain.saved_folders import SavedFolders
from tests.harness.small_run import SmallRun, forge_manifest

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with whole checkpoints of steps 2, 4 and 6."""
    return SmallRun(tmp_path_factory.mktemp("trained")).train(6).folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The weights after step 8 of a run that nothing happened to."""
    return SmallRun(tmp_path_factory.mktemp("whole")).train(8).weights()


def shard_of_another_step(step: Path) -> None:
    shutil.copy(step.parent / "step-4/__0_0.distcp", step)


def metadata_of_another_step(step: Path) -> None:
    shutil.copy(step.parent / "step-4/.metadata", step)


def manifest_of_another_step(step: Path) -> None:
    shutil.copy(step.parent / "step-4/manifest.json", step)


def manifest_and_metadata_of_another_step(step: Path) -> None:
    metadata_of_another_step(step)
    manifest_of_another_step(step)


def flipped_weight(step: Path) -> None:
    data = bytearray((step / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (step / "__0_0.distcp").write_bytes(data)


def flipped_metadata(step: Path) -> None:
    data = bytearray((step / ".metadata").read_bytes())
    data[len(data) // 2] ^= 1
    (step / ".metadata").write_bytes(data)


def flipped_manifest(step: Path) -> None:
    text = (step / "manifest.json").read_text()
    (step / "manifest.json").write_text(text.replace('"step": 6', '"step": 9'))


def cut_shard(step: Path) -> None:
    (step / "__0_0.distcp").write_bytes((step / "__0_0.distcp").read_bytes()[:100])


def longer_shard(step: Path) -> None:
    (step / "__0_0.distcp").write_bytes((step / "__0_0.distcp").read_bytes() + b"x")


def empty_metadata(step: Path) -> None:
    (step / ".metadata").write_bytes(b"")


def cut_metadata(step: Path) -> None:
    (step / ".metadata").write_bytes((step / ".metadata").read_bytes()[:-9])


def empty_manifest(step: Path) -> None:
    (step / "manifest.json").write_bytes(b"")


def cut_manifest(step: Path) -> None:
    text = (step / "manifest.json").read_text()
    (step / "manifest.json").write_text(text[: len(text) // 2])


def other_json(step: Path) -> None:
    (step / "manifest.json").write_text(json.dumps([{"step": 6}]))


def without(name: str) -> Callable[[Path], None]:
    def remove(step: Path) -> None:
        (step / name).unlink()

    remove.__name__ = f"without_{name}"
    return remove


def empty_folder(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def file_as_a_folder(step: Path) -> None:
    (step / "__0_0.distcp").unlink()
    (step / "__0_0.distcp").mkdir()


# Damage to step 6, and the file that is to be named.
DAMAGE = [
    (shard_of_another_step, "__0_0.distcp"),
    (metadata_of_another_step, ".metadata"),
    (manifest_of_another_step, "step-6 holds step 4"),
    (manifest_and_metadata_of_another_step, "step-6 holds step 4"),
    (flipped_weight, "__0_0.distcp"),
    (flipped_metadata, ".metadata"),
    (flipped_manifest, "manifest.json"),
    (cut_shard, "__0_0.distcp"),
    (longer_shard, "__0_0.distcp"),
    (empty_metadata, ".metadata"),
    (cut_metadata, ".metadata"),
    (empty_manifest, "manifest.json"),
    (cut_manifest, "manifest.json"),
    (other_json, "manifest.json"),
    (without("__0_0.distcp"), "__0_0.distcp"),
    (without(".metadata"), ".metadata"),
    (without("manifest.json"), "manifest.json"),
    (empty_folder, "manifest.json"),
    (file_as_a_folder, "__0_0.distcp"),
]
ROWS = [pytest.param(damage, named, id=f"E3-{damage.__name__}") for damage, named in DAMAGE]


@pytest.mark.parametrize(("damage", "named"), ROWS)
def test_torn_checkpoints_are_passed_over_for_the_newest_whole_one(
    folder, whole, damage, named, capsys
):
    """It is said which and why; what follows equals a run that nothing happened to, bit for bit."""
    damage(folder / "checkpoint/step-6")
    capsys.readouterr()
    run = SmallRun(folder).resume()
    said = capsys.readouterr().out
    assert run.step == 4
    assert "skipped" in said and named in said and "going on from step 4" in said
    assert torch.equal(run.train(8).weights(), whole)
    assert torch.equal(SmallRun(folder).resume().weights(), whole)


@pytest.mark.parametrize(("damage", "named"), ROWS)
def test_torn_checkpoints_that_are_asked_for_are_one_sentence(folder, damage, named):
    """Naming the file and the step to go back to; nothing of the state has changed."""
    damage(folder / "checkpoint/step-6")
    run = SmallRun(folder)
    before = run.weights()
    with pytest.raises(ValueError, match=r"step 4 with --checkpoint.load_step") as caught:
        run.resume(6)
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert run.step == 0 and torch.equal(run.weights(), before)


def test_torn_E3_a_renamed_checkpoint_is_passed_over(folder, capsys):
    (folder / "checkpoint/step-6").rename(folder / "checkpoint/step-9")
    assert SmallRun(folder).resume().step == 4
    assert "step-9 holds step 6: it was renamed" in capsys.readouterr().out


def test_torn_E3_where_nothing_is_whole_a_run_does_not_start_over(folder):
    for step in (2, 4, 6):
        flipped_weight(folder / f"checkpoint/step-{step}")
    with pytest.raises(ValueError, match=r"none in .*step-6.*and 2 more.*move the folder away"):
        SmallRun(folder).resume()


def test_torn_E3_a_checkpoint_of_another_run_is_not_taken_for_the_newest(folder, tmp_path):
    SmallRun(tmp_path / "other").train(8)
    shutil.copytree(tmp_path / "other/checkpoint/step-8", folder / "checkpoint/step-8")
    with pytest.raises(ValueError, match="step-8 of another run than step 6"):
        SmallRun(folder).resume()
    assert SmallRun(folder).resume(6).step == 6
    assert (folder / "checkpoint/aside-1/step-8").is_dir()


def test_torn_E3_a_checkpoint_of_another_model_is_refused(folder):
    for width, what in ((16, "of another shape"),):
        with pytest.raises(ValueError, match=rf"step-6 with 0.weight .*{what}"):
            SmallRun(folder, width=width).resume()


def test_torn_E3_shards_of_two_steps_under_a_manifest_that_fits_are_found_by_the_step(folder):
    """A forger's, or a manifest made after the fact."""
    step = folder / "checkpoint/step-6"
    for name in (".metadata", "__0_0.distcp"):
        shutil.copy(step.parent / "step-4" / name, step)
    forge_manifest(step)
    with pytest.raises(ValueError, match=r"after step 4 in .*step-6.*load_step 4"):
        SmallRun(folder).resume()


def test_torn_E3_without_checksums_sizes_and_small_files_are_compared(folder, monkeypatch, capsys):
    monkeypatch.setattr("dtcp.pretrain.manifest.SMALL", 50_000)
    flipped_weight(folder / "checkpoint/step-6")
    assert (folder / "checkpoint/step-6/__0_0.distcp").stat().st_size > 50_000
    run = SmallRun(folder, verify_checksums=False).resume()
    assert run.step == 6 and "no checksums" in capsys.readouterr().out
    cut_shard(folder / "checkpoint/step-6")
    assert SmallRun(folder, verify_checksums=False).resume().step == 4
    flipped_metadata(folder / "checkpoint/step-4")
    assert SmallRun(folder, verify_checksums=False).resume().step == 2


def test_torn_E3_a_save_is_visible_when_all_of_it_is(folder, monkeypatch):
    """And a re-save of a step replaces it as a whole."""
    seen = []
    publish = SavedFolders.publish

    def look(self: SavedFolders, staging: Path, final: Path) -> str:
        seen.append((sorted(path.name for path in staging.iterdir()), final.exists()))
        return publish(self, staging, final)

    monkeypatch.setattr(SavedFolders, "publish", look)
    run = SmallRun(folder).resume(4)
    assert not (folder / "checkpoint/step-6").exists()
    run.train(6)
    assert seen == [([".metadata", "__0_0.distcp", "manifest.json"], False)]
    before = read_manifest(folder / "checkpoint/step-6").save
    run.checkpoints.save(6)
    assert seen[1][1] and read_manifest(folder / "checkpoint/step-6").save != before
    assert not list((folder / "checkpoint").glob(".*"))


@pytest.mark.parametrize("moment", range(4))
def test_torn_E3_a_re_save_that_is_cut_leaves_a_whole_step(folder, monkeypatch, moment):
    """Cut before or after each rename: step 6 is one of the two, or step 4 is the newest."""

    class Cut(BaseException):
        pass

    renames = iter(range(10))
    rename = Path.rename

    def cut(self: Path, target: Path) -> Path:
        number = next(renames)
        if number == moment // 2 and moment % 2 == 0:
            raise Cut
        result = rename(self, target)
        if number == moment // 2:
            raise Cut
        return result

    run = SmallRun(folder).resume()
    # torch renames its metadata by itself, first.
    renames = iter(range(-1, 10))
    monkeypatch.setattr(Path, "rename", cut)
    with pytest.raises(ValueError, match="Cut"):
        run.checkpoints.save(6)
    monkeypatch.undo()
    again = SmallRun(folder).resume()
    assert again.step == (6 if moment in (0, 3) else 4)
    assert torch.equal(again.train(6).weights(), run.weights())


def test_torn_E3_what_a_cut_save_left_is_cleared_and_nothing_else(folder):
    root = folder / "checkpoint"
    left = root / f".saving/step-8.{'0' * 32}"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"x")
    (root / ".saving/mine").mkdir()
    SmallRun(folder).resume()
    assert not left.exists() and (root / ".saving/mine").is_dir()


def bystanders(root: Path) -> list[Path]:
    """What people put beside checkpoints: copies, notes, links."""
    for name in ("step-2.bak", "best-step-1", "step-12.bak", "old-step-3", "step-4-copy"):
        shutil.copytree(root / "step-2", root / name)
    (root / "step-1").write_text("a note")
    (root / "step-0").symlink_to("step-2")
    (root / "step-x").mkdir()
    return [path for path in root.iterdir() if not path.name.startswith(".")]


def test_survive_E4_only_what_the_run_wrote_is_deleted(tmp_path):
    run = SmallRun(tmp_path, keep_latest_k=2).train(2)
    before = [path for path in bystanders(run.root) if path.name != "step-2"]
    run = SmallRun(tmp_path, keep_latest_k=2).resume()
    assert run.step == 2
    run.train(10).checkpoints.close()
    assert all(os.path.lexists(path) for path in before)
    assert SavedFolders(run.root).whole() == [8, 10]
    assert SmallRun(tmp_path, keep_latest_k=2).resume().step == 10


def test_survive_E4_a_linked_checkpoint_is_read_and_not_deleted(tmp_path):
    run = SmallRun(tmp_path, keep_latest_k=2).train(2)
    (run.root / "step-2").rename(tmp_path / "kept")
    (run.root / "step-2").symlink_to(tmp_path / "kept")
    SmallRun(tmp_path, keep_latest_k=2).resume().train(10).checkpoints.close()
    assert read_manifest(tmp_path / "kept").step == 2


def test_survive_E4_a_run_that_goes_back_moves_later_steps_aside(folder, whole, capsys):
    capsys.readouterr()
    run = SmallRun(folder, keep_latest_k=2).resume(2)
    said = capsys.readouterr().out
    assert f"moved       step-4, step-6 to {folder}/checkpoint/aside-1" in said
    run.train(3).checkpoints.save(3, last_step=True)
    run.checkpoints.close()
    # The new step 3 is the newest, and step 6 is as it was.
    assert SavedFolders(folder / "checkpoint").steps() == [2, 3]
    assert read_manifest(folder / "checkpoint/aside-1/step-6").step == 6
    again = SmallRun(folder, keep_latest_k=2).resume()
    assert again.step == 3 and torch.equal(again.train(8).weights(), whole)


def test_survive_E4_loading_only_moves_and_clears_nothing(folder):
    left = folder / f"checkpoint/.saving/step-8.{'0' * 32}"
    left.mkdir(parents=True)
    assert SmallRun(folder, load_only=True).resume(2).step == 2
    assert left.exists() and SavedFolders(folder / "checkpoint").steps() == [2, 4, 6]


def test_survive_E4_a_foreign_folder_in_the_way_of_a_save_is_moved_aside(folder, capsys):
    foreign = folder / "checkpoint/step-8"
    run = SmallRun(folder).resume()
    foreign.mkdir()
    (foreign / "notes").write_text("mine")
    run.train(8)
    assert "no save of ours" in capsys.readouterr().out
    assert (folder / "checkpoint/aside-1/step-8/notes").read_text() == "mine"
    assert SmallRun(folder).resume().step == 8


def test_survive_E4_a_step_that_was_not_saved_is_one_sentence(folder):
    with pytest.raises(ValueError, match=r"load_step 5 for .*of steps \[2, 4, 6\]: name one"):
        SmallRun(folder).resume(5)
    with pytest.raises(ValueError, match=r"load_step 5 for .*of steps \[\]"):
        SmallRun(folder / "new").resume(5)


def test_torn_E3_any_flipped_byte_is_found(folder):
    """200 of them, in any file of the newest checkpoint."""
    step, chance = folder / "checkpoint/step-6", random.Random(0)
    shutil.copytree(step, folder / "whole")
    folders = SavedFolders(folder / "checkpoint")
    for _ in range(200):
        file = step / chance.choice([".metadata", "__0_0.distcp", "manifest.json"])
        data = bytearray(file.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        choice = choose(folders, -1, checksums=True)
        assert choice is not None and choice.manifest.step == 4, (file, choice)
        shutil.copy(folder / "whole" / file.name, file)
    choice = choose(folders, -1, checksums=True)
    assert choice is not None and choice.manifest.step == 6


def test_torn_E3_of_an_export_the_weights_are_recorded_and_a_config_is_not(tmp_path):
    """Which may be edited by hand."""
    for name in ("model-1.safetensors", "model.safetensors.index.json", "config.json"):
        (tmp_path / name).write_text(name)
    every = record_files(tmp_path)
    assert {name: record.size for name, record in every.items()} == {x: len(x) for x in every}
    weights = record_files(tmp_path, ".safetensors", ".safetensors.index.json")
    assert set(weights) == set(every) - {"config.json"} and len(every) == 3
