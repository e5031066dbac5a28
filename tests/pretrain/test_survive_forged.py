"""Nothing that a folder holds is run: payloads that would leave a file behind, on every way in.

E1: torch reads metadata by pickle and entries that are no tensors without weights_only; paths in
metadata lead anywhere. Each payload here is first shown to work where nobody guards.
"""

import contextlib
import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path

from dtcp.torchtitan import compat as compat

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from dtcp.checkpoint import SafeHuggingFaceReader, SafeLoadPlanner, SafeReader
from dtcp.checkpoint.metadata import parse_metadata, read_metadata
from dtcp.pretrain.tokenizer import Tokenizer
from tests.harness.small_run import Payload, SmallRun, forge_manifest

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with whole checkpoints of steps 2 and 4."""
    return SmallRun(tmp_path_factory.mktemp("trained")).train(4).folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be forged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def saved_metadata(step: Path) -> Metadata:
    return pickle.loads((step / ".metadata").read_bytes())


def code_as_metadata(step: Path, payload: Payload) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(payload))


def code_beside_metadata(step: Path, payload: Payload) -> None:
    """Honest metadata, of which one field is the payload."""
    metadata = saved_metadata(step)
    metadata.planner_data = payload
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def code_in_a_protocol_of_1996(step: Path, payload: Payload) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(payload, protocol=0))


def code_in_an_entry(step: Path, payload: Payload, name: str = "train_state.step") -> None:
    """Clean metadata, and the payload where the number of the step was."""
    metadata = saved_metadata(step)
    index = next(index for index in metadata.storage_data if index.fqn == name)
    stored = io.BytesIO()
    torch.save(payload, stored)
    info = metadata.storage_data[index]
    file = step / info.relative_path
    info.offset, info.length = file.stat().st_size, len(stored.getvalue())
    file.write_bytes(file.read_bytes() + stored.getvalue())
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def code_in_a_tensor(step: Path, payload: Payload) -> None:
    """Where torch has read a tensor with weights_only before it looks at its kind."""
    code_in_an_entry(step, payload, name="1.weight")


def code_in_a_pickle_in_an_entry(step: Path, payload: Payload) -> None:
    """Bytes, which weights_only lets through, and torchtitan's data loaders unpickle."""
    code_in_an_entry(step, pickle.dumps(payload), name="dataloader.document")


def read_elsewhere(step: Path, path: str) -> None:
    metadata = saved_metadata(step)
    for info in metadata.storage_data.values():
        info.relative_path = path
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def path_upward(step: Path, payload: Payload) -> None:
    read_elsewhere(step, "../step-2/__0_0.distcp")


def path_absolute(step: Path, payload: Payload) -> None:
    read_elsewhere(step, str(step / "__0_0.distcp"))


def link_out(step: Path, payload: Payload) -> None:
    file = step / "__0_0.distcp"
    shutil.move(file, step.parent / "elsewhere")
    file.symlink_to("../elsewhere")


def pipe(step: Path, payload: Payload) -> None:
    (step / "__0_0.distcp").unlink()
    os.mkfifo(step / "__0_0.distcp")


FORGERIES = [
    code_as_metadata,
    code_beside_metadata,
    code_in_a_protocol_of_1996,
    code_in_an_entry,
    code_in_a_pickle_in_an_entry,
    code_in_a_tensor,
    path_upward,
    path_absolute,
    link_out,
    pipe,
]
ROWS = [pytest.param(forgery, id=f"E1-{forgery.__name__}") for forgery in FORGERIES]


@pytest.mark.parametrize("call", ["open", "system"])
def test_a_payload_works_where_nobody_guards(trace, call):
    pickle.loads(pickle.dumps(Payload(trace, call)))
    assert trace.exists()


@pytest.mark.parametrize("forge", FORGERIES[:4], ids=lambda forgery: forgery.__name__)
def test_torch_alone_runs_the_payload(folder, trace, forge):
    """So what the next tests see refused is real."""
    step = folder / "checkpoint/step-4"
    forge(step, Payload(trace))
    with contextlib.suppress(AttributeError, dcp.api.CheckpointException):
        dcp.load({"train_state": {"step": 0}}, checkpoint_id=str(step))
    assert trace.exists()


@pytest.mark.parametrize("call", ["open", "system"])
@pytest.mark.parametrize("forge", ROWS)
def test_forged_checkpoints_are_refused_on_resume(folder, trace, forge, call):
    """By a forger who writes a manifest, too."""
    step = folder / "checkpoint/step-4"
    forge(step, Payload(trace, call))
    if forge is not pipe:
        forge_manifest(step)
    run = SmallRun(folder)
    if forge in (link_out, pipe):
        # Seen before anything is read: another checkpoint is gone on from.
        assert run.resume().step == 2
    else:
        with pytest.raises(ValueError, match=r"step-4|train_state.step|dataloader.document"):
            run.resume()
        assert run.step == 0
    assert not trace.exists()


@pytest.mark.parametrize("with_manifest", [False, True])
@pytest.mark.parametrize("forge", ROWS)
def test_forged_checkpoints_are_refused_as_initial_load_path(
    folder, tmp_path, trace, forge, with_manifest
):
    step = folder / "checkpoint/step-4"
    forge(step, Payload(trace))
    if with_manifest and forge is not pipe:
        forge_manifest(step)
    else:
        (step / "manifest.json").unlink()
    run = SmallRun(tmp_path / "other", initial_load_path=str(step))
    with pytest.raises(ValueError, match=r"step-4|train_state.step|dataloader.document"):
        run.resume()
    assert run.step == 0 and not trace.exists()


def test_forged_E1_honest_checkpoints_are_read(folder, tmp_path):
    """And without a manifest, as other trainers of torchtitan leave them."""
    step = folder / "checkpoint/step-4"
    (step / "manifest.json").unlink()
    run = SmallRun(tmp_path / "other", initial_load_path=str(step)).resume()
    assert run.step == 4 and torch.equal(run.weights(), SmallRun(tmp_path).train(4).weights())


def test_forged_E1_the_pickle_of_a_data_loader_of_torchtitan_is_read(tmp_path):
    """Its state is a pickle of plain values in an entry of bytes."""
    state = {"loader": {"dp_rank_0": pickle.dumps({"_num_yielded": 3, "x": [1, "a", None, 2.5]})}}
    dcp.save(state, checkpoint_id=tmp_path)
    loaded = {"loader": {"dp_rank_0": b""}}
    dcp.load(loaded, storage_reader=SafeReader(tmp_path), planner=SafeLoadPlanner())
    assert loaded == state


def test_forged_E1_metadata_are_parsed_to_what_torch_makes_of_them(folder):
    for step in ("step-2", "step-4"):
        path = folder / "checkpoint" / step
        expected, actual = saved_metadata(path), read_metadata(path)
        assert actual.state_dict_metadata == expected.state_dict_metadata
        assert actual.storage_data == expected.storage_data
        assert actual.planner_data == expected.planner_data


def test_forged_E1_a_stand_in_cannot_reach_torchs_classes(folder):
    """A pickle may set attributes of any class it is given: the next file must not notice."""
    poison = (
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nStorageMeta\n"
        b"N}\x8c\x08__init__\x8c\x01xs\x86b."
    )
    with pytest.raises(ValueError, match="cut short or damaged"):
        parse_metadata(poison, Path("forged"))
    test_forged_E1_metadata_are_parsed_to_what_torch_makes_of_them(folder)


def test_forged_E1_damaged_metadata_are_one_error_whatever_the_damage(folder):
    """1,000 flipped, cut or doubled files: data, or a ValueError that names the file."""
    data = (folder / "checkpoint/step-4/.metadata").read_bytes()
    chance, errors = random.Random(0), []
    for _ in range(1000):
        bad = bytearray(data)
        for _ in range(chance.choice([1, 1, 5])):
            bad[chance.randrange(len(bad))] = chance.randrange(256)
        bad = bad[: chance.choice([len(bad), chance.randrange(len(bad))])]
        try:
            parse_metadata(bytes(bad), Path("damaged/.metadata"))
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) > 500 and all("damaged/.metadata" in error for error in errors)


def test_forged_E1_an_entry_of_another_kind_is_refused(tmp_path):
    dcp.save({"step": 3, "w": torch.ones(2)}, checkpoint_id=tmp_path)
    for state, match in (
        ({"step": torch.zeros(()), "w": torch.zeros(2)}, "another value for step"),
        ({"step": 0, "w": 1.0}, "a tensor for w"),
        ({"step": "3", "w": torch.zeros(2)}, "a int for step where the state has a str"),
    ):
        with pytest.raises(dcp.api.CheckpointException, match=match):
            dcp.load(state, storage_reader=SafeReader(tmp_path), planner=SafeLoadPlanner())


def weights_folder(folder: Path) -> Path:
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    return folder


def test_forged_E1_hugging_face_folders_are_read_as_safetensors_only(tmp_path, trace):
    folder = weights_folder(tmp_path / "hf")
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        torch.save(Payload(trace), folder / name)
    (folder / "modeling_evil.py").write_text(f"open({str(trace)!r}, 'w')")
    config = {"auto_map": {"AutoModel": "modeling_evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = {"w": torch.zeros(2)}
    dcp.load(loaded, storage_reader=SafeHuggingFaceReader(folder))
    assert loaded["w"].tolist() == [1, 1] and not trace.exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"read from safetensors, got .*a pickle that may run"):
        SafeHuggingFaceReader(folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({"weight_map": {"w": "../other.safetensors"}}, "plain names"),
        ({"weight_map": {"w": "/etc/passwd"}}, "plain names"),
        ({"weight_map": {"w": "gone.safetensors"}}, "gone.safetensors is missing"),
        ({"weight_map": {"w": 3}}, "plain names"),
        ({"weight_map": []}, "maps tensors to files"),
        ([], "maps tensors to files"),
    ],
)
def test_forged_E1_indices_stay_in_their_folder(tmp_path, index, match):
    folder = weights_folder(tmp_path / "hf")
    shutil.copy(folder / "model.safetensors", tmp_path / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=match):
        SafeHuggingFaceReader(folder)


def test_forged_E1_links_lead_into_the_hubs_cache_and_nowhere_else(tmp_path):
    snapshot = tmp_path / "models--a--b/snapshots/1f"
    snapshot.mkdir(parents=True)
    blob = weights_folder(tmp_path / "models--a--b/blobs") / "model.safetensors"
    (snapshot / "model.safetensors").symlink_to(blob)
    assert list(SafeHuggingFaceReader(snapshot).shapes()) == ["w"]
    outside = weights_folder(tmp_path / "outside") / "model.safetensors"
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of its folder"):
        SafeHuggingFaceReader(snapshot)


def test_forged_E1_tokenizers_run_nothing(tmp_path, trace):
    vocabulary = {"a": 0, "b": 1, "[UNK]": 2}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil"]}}
    config |= {"chat_template": f"{{{{ cycler.__init__.__globals__.os.system('touch {trace}') }}}}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenization_evil.py").write_text(f"open({str(trace)!r}, 'w')")
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(Payload(trace)))
    tokenizer = Tokenizer(Tokenizer.Config(folder=str(tmp_path)), tokenizer_path="")
    assert tokenizer.encode("a") == [0] and not trace.exists()
