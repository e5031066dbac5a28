"""What is saved is finite, what is set is in effect, what is loaded is all of it and no more.

E5, E8 and E9: NaN in an optimizer's state, a lower learning rate, weights with holes or leftovers,
"saved" before it is, and folders that cannot be written.
"""

import contextlib
import io
import resource
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from dtcp.torchtitan.model_spec import NameMapAdapter

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist

from dtcp.models.llama import Llama, tiny
from dtcp.parallelize.plans.families import LLAMA
from dtcp.pretrain import output_folder
from dtcp.pretrain.checkpoint_choice import agree
from dtcp.pretrain.checkpoint_writer import CheckpointWriter, WrittenFile
from dtcp.pretrain.configs import llama_tiny
from dtcp.pretrain.finite import not_finite
from dtcp.pretrain.hf_weights import read_hf_weights
from dtcp.pretrain.manifest import FileRecord, record_files
from dtcp.pretrain.output_folder import check_output, checkpoint_size
from dtcp.pretrain.saved_folders import SavedFolders
from tests.harness.small_run import SmallRun
from tests.harness.spmd import spmd

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Change = Callable[[SmallRun], None]


def nan_in_a_moment(run: SmallRun) -> None:
    for optimizer in run.optimizers:
        optimizer.state[run.model[1].weight]["exp_avg"][3, 4] = float("nan")


def infinity_in_a_variance(run: SmallRun) -> None:
    for optimizer in run.optimizers:
        optimizer.state[run.model[0].bias]["exp_avg_sq"][1] = float("inf")


def nan_in_a_weight(run: SmallRun) -> None:
    run.model[1].bias.data[0] = float("nan")


def nan_in_a_setting(run: SmallRun) -> None:
    for optimizer in run.optimizers:
        optimizer.param_groups[0]["lr"] = float("nan")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(nan_in_a_moment, "optimizer.state.1.weight.exp_avg at", id="E5-moment"),
        pytest.param(infinity_in_a_variance, "state.0.bias.exp_avg_sq at", id="E5-variance"),
        pytest.param(nan_in_a_weight, "model.1.bias at", id="E5-weight"),
        pytest.param(nan_in_a_setting, "optimizer.param_groups.0.weight.lr and", id="E5-setting"),
    ],
)
def test_survive_a_state_that_is_not_finite_is_not_saved(tmp_path, change: Change, named):
    run = SmallRun(tmp_path).train(4)
    change(run)
    run.step = 6
    with pytest.raises(ValueError, match=r"step=6: nothing was written.*is of step 4; lower") as e:
        run.checkpoints.save(6)
    assert named in str(e.value)
    assert SavedFolders(run.root).steps() == [2, 4]


def test_survive_E5_large_finite_numbers_are_saved():
    """Their sum is infinite."""
    state = {"a": {"b": torch.full((4,), 3e38)}, "c": torch.tensor([6e4] * 9, dtype=torch.float16)}
    assert not_finite(state) == []
    assert not_finite({**state, "d": torch.tensor([3e38, 3e38, -float("inf")])}) == ["d"]


@spmd(ranks=2)
def test_survive_E5_a_nan_on_one_rank_is_one_name_on_all(mesh):
    state = {"a": torch.ones(3), "b": torch.ones(3), "n": 1.0}
    if dist.get_rank() == 1:
        state["b"][2] = float("nan")
    assert not_finite(state) == ["b"]


def test_survive_E5_a_lower_learning_rate_is_in_effect_in_the_first_resumed_step(tmp_path, capsys):
    """And every other setting of the optimizer; what changed is said."""
    SmallRun(tmp_path).train(4)
    before = SmallRun(tmp_path).resume()
    lower = SmallRun(tmp_path, lr=1e-3)
    for optimizer in lower.optimizers:
        optimizer.param_groups[0]["weight_decay"] = 0.0
    lower.resume()
    rates = [next(iter(run.optimizers)).param_groups[0]["lr"] for run in (before, lower)]
    assert rates[1] == pytest.approx(rates[0] / 10) and rates[0] > 0
    assert next(iter(lower.optimizers)).param_groups[0]["weight_decay"] == 0
    assert "changed     optimizer.lr 0.01 -> 0.001, since step 4" in capsys.readouterr().out
    start = before.weights()
    steps = [(run.train(5).weights() - start).abs().max() for run in (before, lower)]
    assert steps[1] < steps[0] / 5


SHAPE = tiny(vocab_size=32)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Weights of a small Llama as transformers has them."""
    torch.manual_seed(0)
    folder = tmp_path / "published"
    folder.mkdir()
    weights = adapter().to_hf(Llama(SHAPE).state_dict())
    save_file({name: x.contiguous() for name, x in weights.items()}, folder / "model.safetensors")
    return folder


def adapter(**changes: object) -> NameMapAdapter:
    return NameMapAdapter(LLAMA, SimpleNamespace(shape=replace(SHAPE, **changes)), None)


@contextlib.contextmanager
def weights_of(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of a folder, to be changed."""
    weights = load_file(folder / "model.safetensors")
    yield weights
    save_file(weights, folder / "model.safetensors")


def read(folder: Path, *ignore: str, **changes: object) -> dict[str, torch.Tensor]:
    model = Llama(replace(SHAPE, **changes))
    state = model.state_dict()
    return read_hf_weights(adapter(**changes), state, folder, ignore=ignore)


LAYER = "model.layers.1.self_attn.q_proj.weight"


def test_survive_E5_hugging_face_weights_that_fit_are_read(published):
    loaded, expected = read(published), load_file(published / "model.safetensors")
    torch.testing.assert_close(dict(adapter().to_hf(loaded)), expected, rtol=0, atol=0)


def test_survive_E5_hugging_face_weights_without_a_tensor_are_refused(published):
    with weights_of(published) as weights:
        del weights[LAYER]
    with pytest.raises(ValueError, match=f"without {LAYER}: take weights of this config"):
        read(published)


def test_survive_E5_hugging_face_weights_of_more_layers_are_refused(published):
    """They would be ignored: the model would be the lower part of another."""
    with pytest.raises(ValueError, match=r"takes every weight .*got model.layers.1.* and \d+ more"):
        read(published, num_layers=1)
    assert read(published, "model.layers.[1-9]*", num_layers=1)


def test_survive_E5_hugging_face_weights_of_another_shape_are_refused(published):
    with pytest.raises(ValueError, match=r"got model.layers.0.mlp.* of \[.*\] for \[.* more in"):
        read(published, hidden_dim=2 * SHAPE.hidden_dim)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_survive_E5_hugging_face_weights_that_are_not_finite_are_refused(published, value):
    with weights_of(published) as weights:
        weights[LAYER][1, 1] = value
    with pytest.raises(ValueError, match=f"NaN or infinity in {LAYER} of"):
        read(published)


def test_survive_E5_hugging_face_weights_may_repeat_a_tied_head_and_nothing_else(published):
    with weights_of(published) as weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    assert read(published, tied=True)
    with weights_of(published) as weights:
        weights["lm_head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match=r"got lm_head.weight in .*hf_ignore lm_head.weight"):
        read(published, tied=True)


def test_survive_E5_hugging_face_weights_in_two_files_are_refused(published):
    with weights_of(published) as weights:
        save_file({LAYER: weights[LAYER].clone()}, published / "model-2.safetensors")
    with pytest.raises(ValueError, match=f"got {LAYER} in model-2.safetensors and model.safet"):
        read(published)


def test_torn_E5_hugging_face_weights_that_were_cut_are_refused(published):
    file = published / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"whole safetensors files, got .*model\.safetensors"):
        read(published)


def test_survive_E5_initial_weights_that_are_not_finite_are_refused(tmp_path):
    run = SmallRun(tmp_path / "a").train(2)
    run.checkpoints.checksums = False
    nan_in_a_weight(run)
    run.checkpoints._refuse_not_finite = lambda step: None
    run.checkpoints.save(2)
    start = run.root / "step-2"
    with pytest.raises(ValueError, match=r"Weights are finite, got NaN or infinity in 1.bias of"):
        SmallRun(tmp_path / "b", initial_load_path=str(start)).resume()


def test_survive_E5_a_seed_checkpoint_starts_an_optimizer_that_has_taken_no_step(tmp_path):
    """torchtitan saves a step of no gradient, which AdamW counts."""
    seed = SmallRun(tmp_path / "seed")
    seed.checkpoints.save(0, last_step=True)
    new = SmallRun(tmp_path / "new").train(3)
    settings = {"initial_load_path": str(seed.root / "step-0")}
    started = SmallRun(tmp_path / "started", **settings).resume().train(3)
    assert torch.equal(started.weights(), new.weights())


def test_survive_E5_a_part_with_other_settings_is_named(tmp_path):
    SmallRun(tmp_path).train(2)
    other = SmallRun(tmp_path)
    for group in other.optimizers.optimizers[0].param_groups:
        group["amsgrad"] = True
    said = r"without optimizer\.state\.0\.weight\.max_exp_avg_sq: its optimizer had other settings"
    with pytest.raises(ValueError, match=said):
        other.resume()


@spmd(ranks=2)
def test_survive_E8_a_save_in_the_background_is_said_when_it_is_on_disk(mesh):
    folder = shared_folder()
    run = SmallRun(Path(folder), async_mode="async", keep_latest_k=2).train(1)
    may_finish, finish = threading.Event(), CheckpointWriter.finish

    def wait(self, *args, **kwargs):
        may_finish.wait()
        finish(self, *args, **kwargs)

    CheckpointWriter.finish = wait
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            run.train(2)
            first = out.getvalue()
            visible = (run.root / "step-2").exists()
            dist.barrier()  # until all ranks have looked
            may_finish.set()
            run.checkpoints.maybe_wait_for_saving()
            dist.barrier()
    finally:
        CheckpointWriter.finish = finish
    assert not visible and (run.root / "step-2/manifest.json").is_file()
    if dist.get_rank() == 0:
        assert "saving" in first and "saved" not in first
        assert out.getvalue().endswith(f"saved       {run.root}/step-2\n")
    run.train(10).checkpoints.maybe_wait_for_saving()
    dist.barrier()
    assert SavedFolders(run.root).whole() == [8, 10]
    again = SmallRun(Path(folder)).resume()
    assert again.step == 10 and torch.equal(again.weights(), run.weights())


@spmd(ranks=2)
def test_survive_E9_a_failed_save_in_the_background_is_one_sentence_on_all_ranks(mesh):
    run = SmallRun(Path(shared_folder()), async_mode="async").train(2)
    run.checkpoints.maybe_wait_for_saving()
    with failing_writes(dist.get_rank() == 1):
        run.train(4)
        with pytest.raises(ValueError, match=r"rank 1: .*in the background .*is of step 2; make"):
            run.checkpoints.maybe_wait_for_saving()
    assert SavedFolders(run.root).steps() == [2]


@spmd(ranks=2)
def test_survive_E9_what_rank_0_fails_for_is_known_to_the_others(mesh):
    """Whatever its class: they wait for what rank 0 decides."""

    def fail(error):
        raise error

    for error, raised in ((OSError("no disk"), ValueError), (KeyError("step"), RuntimeError)):
        with pytest.raises(raised, match="no disk" if raised is ValueError else "KeyError: 'step'"):
            agree(lambda error=error: fail(error))
    assert agree(lambda: dist.get_rank()) == 0


@spmd(ranks=3)
def test_survive_E3_ranks_pass_over_the_same_checkpoints(mesh):
    folder = Path(shared_folder())
    run = SmallRun(folder).train(6)
    dist.barrier()
    if dist.get_rank() == 0:
        for file in (run.root / "step-6").glob("__*_0.distcp"):
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
    dist.barrier()
    again = SmallRun(folder).resume()
    assert again.step == 4 and torch.equal(again.train(6).weights(), run.weights())


def shared_folder() -> str:
    """A new folder, the same on every rank."""
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(names)
    return names[0]


@contextlib.contextmanager
def failing_writes(here: bool = True) -> Iterator[None]:
    """Files that cannot grow past 20 kB in this process, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_survive_E9_a_disk_that_fills_up_is_one_sentence_and_the_last_step_stays(tmp_path):
    run = SmallRun(tmp_path).train(3)
    said = r"OSError: .*File too large at step=4 in .*is of step 2; make"
    with failing_writes(), pytest.raises(ValueError, match=said):
        run.train(4)
    assert SavedFolders(run.root).steps() == [2]
    assert not list(run.root.glob(".saving/*"))
    # With room again, the run goes on.
    assert SmallRun(tmp_path).resume().train(4).checkpoints.newest().endswith("step 4")


def test_survive_E9_a_folder_that_hosts_do_not_share_is_told_at_the_first_save(
    tmp_path, monkeypatch
):
    """A rank wrote where the first one does not see it."""
    elsewhere = WrittenFile("__8_0.distcp", FileRecord(10, "0"))
    finish = CheckpointWriter.finish

    def with_another(self, metadata, results):
        finish(self, metadata, [*results, [elsewhere]])

    monkeypatch.setattr(CheckpointWriter, "finish", with_another)
    with pytest.raises(ValueError, match=r"all hosts share, got .*__8_0.distcp is missing"):
        SmallRun(tmp_path).train(2)
    assert SavedFolders(tmp_path / "checkpoint").steps() == []


def test_survive_E9_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path):
    config = llama_tiny()
    (tmp_path / "file").write_text("")
    config.dump_folder = str(tmp_path / "file/run")
    with pytest.raises(ValueError, match=r"writes into its folder, got .*Not a directory"):
        check_output(config)
    config.dump_folder = "/proc/run"
    with pytest.raises(ValueError, match=r"writes into its folder, got /proc/run/checkpoint"):
        check_output(config)


def test_survive_E9_a_full_folder_is_told_at_the_start(tmp_path, monkeypatch):
    config = llama_tiny()
    config.dump_folder = str(tmp_path)
    check_output(config)
    assert not list(tmp_path.rglob("*"))
    full = SimpleNamespace(free=checkpoint_size(config) - 1)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: full)
    with pytest.raises(ValueError, match=r"0\.\d\d GiB free for about 0\.\d\d GiB: make room"):
        check_output(config)
    config.checkpoint.load_only = True
    check_output(config)


def test_survive_E9_settings_that_cannot_work_are_told_at_the_start(tmp_path):
    config = llama_tiny()
    config.dump_folder = str(tmp_path)
    config.dtcp.device = "cpu"
    config.checkpoint.async_mode = "async_with_pinned_mem"
    with pytest.raises(ValueError, match=r"use --checkpoint\.async_mode async"):
        check_output(config)
    config.checkpoint.async_mode, config.checkpoint.folder = "async", "gs://bucket/run"
    with pytest.raises(ValueError, match=r"gs://bucket/run: object stores"):
        check_output(config)


def test_survive_E9_the_size_of_a_checkpoint_is_known_before_there_is_one(tmp_path):
    """Weights and AdamW's two moments, and a little for names."""
    config = llama_tiny()
    model = config.model_spec.model.build()
    weights = sum(p.nbytes for p in model.parameters())
    assert checkpoint_size(config) == 3 * weights
    run = SmallRun(tmp_path).train(2)
    size = sum(record.size for record in record_files(run.root / "step-2").values())
    assert size > 3 * sum(p.nbytes for p in run.model.parameters())
