"""The planner's command: what it ranks, what it says of what does not fit, what it refuses."""

import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from dtcp.distributed.mesh import Degrees
from dtcp.distributed.nodes import even_neighbours, even_on_cp
from dtcp.huggingface import install
from dtcp.huggingface.config_fields import config_of
from dtcp.models import llama, qwen3_5
from dtcp.parallelize import FullCheckpoint, NoCheckpoint
from dtcp.plan import __main__ as command
from dtcp.plan.source import asked_documents
from dtcp.planner import row_forecasts, search
from dtcp.planner.bounds import LeastSeconds
from dtcp.planner.cluster import GB, cluster_of
from dtcp.planner.forecast import forecast, row_degrees, row_ranks_per_node
from dtcp.planner.report import on_one_line
from dtcp.planner.search import Planner
from dtcp.planner.setup import Setup
from dtcp.planner.subject import FamilyModel, HuggingFaceModel, OwnModel, subject_of_hf
from dtcp.planner.workload import Workload
from dtcp.pretrain.configs import llama_tiny
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail

TINY = FamilyModel("tiny", "llama", llama.tiny())
ROW = Documents.single(1, 2**17)


def staged():
    """A config with pipeline stages."""
    config = llama_tiny()
    config.parallelism.pipeline_parallel_degree = 2
    return config


def run(capsys, *arguments):
    """(exit code, what was printed, what was said on stderr)."""
    code = command.run_planner(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.slow
def test_plan_ranks_what_fits_and_prints_the_command(capsys):
    code, out, _ = run(
        capsys, "--config", "llama3_8b_128k", "--cluster", "8xH100", "--mesh", "cp=8"
    )
    assert code == 0
    assert "torchrun --nproc-per-node 8 train.py --config llama3_8b_128k" in out
    assert "--parallelism.context_parallel_degree 8" in out and "assumed:" in out
    assert "needs" in out and "too many" in out  # keeping all activations does not fit


@pytest.mark.slow
def test_plan_says_what_would_do_where_nothing_fits(capsys):
    code, _, err = run(
        capsys, "--hf-config", "llama3.1-8b", "--cluster", "1xH100", "--seq-len", "131072"
    )
    assert code == 1
    assert "got 1 x H100 in 1 node where the best setup lacks" in err
    assert "2xH100 would do" in err or "4xH100 would do" in err or "8xH100 would do" in err


@pytest.mark.slow
def test_plan_as_json_has_bytes_and_seconds(capsys):
    code, out, _ = run(
        capsys, "--hf-config", "llama3.1-8b", "--cluster", "8xH200", "--mesh", "cp=8", "--json"
    )
    found = json.loads(out)
    best = found["candidates"][0]
    assert code == 0 and best["fits"] and best["mesh"]["cp"] == 8
    assert best["memory"]["total"] == sum(
        size for name, size in best["memory"].items() if name != "total"
    )
    assert found["assumptions"] and best["received"]["cp"]["forward"] > 0


def test_layers_that_are_refused_alike_are_one_and_numbers_are_as_they_are():
    """The 1 of dropout=0.1 was taken for a layer's number: set config.dropout = 0.*"""
    lines = (f"h.{i}.attn: dropout=0.1 in training: set config.dropout = 0." for i in range(3))
    said = on_one_line("\n".join(lines))
    assert said == "h.*.attn: dropout=0.1 in training: set config.dropout = 0."


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hf-config", "nowhere.json"], "got 'nowhere.json': there is no such file; presets"),
        (["--hf-config", "org/name"], "got 'org/name': nothing is downloaded, so give its config"),
        (["--hf-config", ""], "got --hf-config '': name a config, a model or a folder"),
        (["--config", ""], "got --config '': name a config"),
        (["--hf-config", "llama3.1-8b", "--cluster", "eight"], "A cluster is so many GPUs of a"),
        (["--hf-config", "llama3.1-8b", "--mesh", "cp=3"], "A mesh has all GPUs of its cluster"),
        (["--hf-config", "llama3.1-8b", "--mesh", "ep=3"], "A mesh is given as cp=8,tp=1"),
        (["--hf-config", "llama3.1-8b", "--mesh", "ep=8"], "whose plan names no experts: set ep"),
        (["--config", "titan_llama3_tiny"], "whose model is torchtitan's llama3: pass its config"),
        (["--hf-config", "llama3.1-8b", "--documents", "nope"], "Documents are single, lognormal"),
        (["--hf-config", "llama3.1-8b", "--documents", "lognormal:0:1"], "Lengths are drawn as"),
        (["--hf-config", "llama3.1-8b", "--training.steps", "3"], "Settings belong to a config"),
        (["--config", "nope"], "A config is a function of the module"),
        (["--hf-config", "llama3.1-8b", "--cluster", "13xH100"], "got 13 H100 in 2 nodes of up to"),
        (
            ["--config", "llama_tiny", "--parallelism.context_parallel_degree=4"],
            "got --parallelism.context_parallel_degree=4: give --mesh, as cp=8,tp=1",
        ),
        (
            ["--config", "llama_tiny", "--parallelism.pipeline_parallel_degree", "2"],
            "leave it out, for no stages are planned",
        ),
        (
            ["--config", "staged", "--module", "tests.planner.test_plan"],
            "got --config staged with parallelism.pipeline_parallel_degree=2: take",
        ),
        (["--config", "llama_tiny", "--dtcp.ranks_per_node", "4"], "give the nodes, --cluster"),
        (["--config", "llama_tiny", "--dtcp.ulysses_degree", "4"], "name hybrid, or leave it out"),
        (
            [*("--config", "llama_tiny"), "--dtcp.expert_tensor_parallel_degree", "2"],
            "got dtcp.expert_tensor_parallel_degree=2 for a model without experts",
        ),
        (
            ["--model", "nowhere:f", "--plan", "nowhere:g"],
            "got 'nowhere:f': there is no module nowhere;",
        ),
        (["--hf-config", "gema4-31b"], "did you mean gemma4-31b? Presets are"),
        (["--hf-config", "mixtrall"], "got 'mixtrall': did you mean mixtral?"),
        (["--hf-config", "vit"], "give --model module:function, which returns the model"),
        (["--hf-config", "llama3.1-8b", "--clustr", "8xH100"], "did you mean --cluster?"),
        (["--config", "llama_tiny", "--clustr", "8xH100"], "did you mean --cluster?"),
        (["--hf-config", "llama3.1-8b", "--steps", "5"], "got --steps 5 for a plan, which does"),
        (["--hf-config", "llama3.1-8b", "--plan", "a:b"], "--plan goes with --model"),
        (["--hf-config", "llama3.1-8b", "--html", "/nowhere/x.html"], "make /nowhere first"),
        (["--hf-config", "llama3.1-8b", "--documents", "lognormal:inf:1"], "Lengths are drawn as"),
        (["--hf-config", "llama3.1-8b", "--seq-len", "0"], "got --seq-len 0: give 1 or more."),
        (["--hf-config", "llama3.1-8b", "--global-batch", "-3"], "--global-batch -3: give 1"),
        (["--hf-config", "llama3.1-8b", "--mesh", "cp=8,cp=4"], "an axis is given twice"),
        (["--hf-config", "llama3.1-8b", "--mesh", "tp=8", "--seq-len", "1001"], "1000 say"),
        (
            ["--config", "llama_tiny", "--global-batch", "1", "--seq-len", "1001"],
            "give --global-batch 8, or --seq-len 1008",
        ),
        (
            ["--hf-config", "llama3.1-8b", "--sweep", "weak", "--steps", "2"],
            "which compile, got --steps 2: give 3 or more",
        ),
    ],
)
def test_plan_refuses_bad_input_in_a_sentence(capsys, arguments, said):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and said in err and err.count("\n") == 1


def test_plan_refuses_a_document_longer_than_its_row(tmp_path):
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("100 900\n")
    with pytest.raises(ValueError, match="A document lies in one row, got one of 900 tokens"):
        asked_documents(str(lengths), 512)
    assert asked_documents(str(lengths), 1024).lengths == ((100, 900),)


def test_plan_of_documents_that_leave_padding_says_so(capsys, tmp_path):
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("300 200")
    code, out, _ = run(
        capsys,
        *("--config", "llama_tiny", "--cluster", "2xH100", "--mesh", "cp=2"),
        *("--documents", str(lengths), "--global-batch", "1", "--dtcp.strategy", "ring"),
    )
    assert code == 0 and "2 documents per row, the longest 300, 524 tokens of padding" in out


def test_plan_reads_the_files_of_a_folder_that_a_run_reads(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 400)
    (tmp_path / "b.gz").write_bytes(bytes(range(256)))
    (tmp_path / "c.json").write_text("y" * 40)
    assert asked_documents(str(tmp_path), 300).lengths == ((100, 100, 100),)


def test_plan_draws_documents_that_fill_the_row():
    (lengths,) = asked_documents("lognormal:2048:1.5", 2**17).lengths
    assert sum(lengths) == 2**17 and len(lengths) > 5


def test_plan_refuses_a_mixer_whose_bytes_are_unknown():
    from dtcp.softmax import RingAttention

    class Unknown(RingAttention):
        moves = None

    setup = Setup(Degrees(cp=2), Documents.single(1, 256), attention=Unknown())
    with pytest.raises(ValueError, match=r"got 'layers.0.attention.mixer', a .* has no moves"):
        forecast(TINY, setup)


def test_plan_forecasts_more_memory_with_less_recomputation():
    setups = [
        Setup(Degrees(cp=4), ROW, checkpoint=checkpoint)
        for checkpoint in (FullCheckpoint(), NoCheckpoint())
    ]
    full, none = (forecast(TINY, setup).memory for setup in setups)
    assert none.activations > 2 * full.activations
    assert none.parameters == full.parameters


def test_plan_of_more_ranks_has_less_of_everything():
    found = [forecast(TINY, Setup(Degrees(cp=cp), ROW)) for cp in (2, 8)]
    assert found[1].memory.total < found[0].memory.total
    assert found[1].memory.parameters * 4 == found[0].memory.parameters


README = Path(__file__).parents[2] / "README.md"
AT_128K = {
    "gemma4-31b": r"a 31B Gemma 4 receives ([0-9.]+) GB forward at 128K on 8 ranks",
    "deepseek-v4-flash": r"DeepSeek-V4-Flash ([0-9.]+)",
}


@pytest.mark.parametrize(
    "preset", ["gemma4-31b", pytest.param("deepseek-v4-flash", marks=pytest.mark.slow)]
)
def test_forecast_at_128k_receives_what_the_readme_says(preset):
    """In the layout that everybody takes, the busiest of eight ranks; those in the middle are."""
    (stated,) = re.findall(AT_128K[preset], " ".join(README.read_text().split()))
    setup = Setup(Degrees(cp=8), ROW, HeadTail, checkpoint=NoCheckpoint())
    ranks = forecast(subject_of_hf(preset), setup, ranks=[1, 4]).ranks
    assert f"{max(rank.received.forward for rank in ranks) / 1e9:.2f}" == stated


def test_forecast_gemma4_31b_in_contiguous_shards_receives_what_is_documented():
    setup = Setup(Degrees(cp=8), ROW, Contiguous, checkpoint=NoCheckpoint())
    (last,) = forecast(subject_of_hf("gemma4-31b"), setup, ranks=[7]).ranks
    assert last.received.forward == pytest.approx(5.54e9, rel=2e-3)


def test_a_search_says_how_far_it_has_come(monkeypatch):
    """Of a model with many experts nothing was heard for minutes on a small machine."""
    refusal = ValueError("not looked at")
    monkeypatch.setattr(row_forecasts, "_forecast_or_refusal", lambda *_: refusal)
    planner, said = Planner(TINY, cluster_of("64xH100"), Workload(ROW, 64)), []
    planner.say = said.append
    with ThreadPoolExecutor(1) as planner.row_forecasts._pool:
        planner.ranked(Setup(Degrees(cp=cp), ROW) for cp in (1, 2, 4, 8, 16, 32))
    assert said == ["has traced 4 of 6 steps"]


def test_plan_of_thousands_of_gpus_looks_at_one_row_only():
    planner = Planner(TINY, cluster_of("4096xH100"), Workload(Documents.single(1, 4096), 4096))
    candidate = planner.candidate(
        Setup(Degrees(dp_replicate=8, dp_shard=128, cp=4), planner.workload.documents)
    )
    assert candidate.fits and candidate.setup.tokens == 4096 * 1024


def test_plan_sees_on_the_first_rows_what_nodes_do_on_all_of_them():
    """Which neighbours of ep share a node: of a look's ranks as of the whole run's."""

    def neighbours(degrees, nodes):
        ranks = torch.arange(degrees.world).reshape(-1, degrees.ep, degrees.etp)
        run = even_neighbours(ranks.movedim(1, 2).reshape(-1, degrees.ep), nodes)
        return 0 if run == degrees.ep else run

    seen = 0
    for dp, cp, tp, nodes in product((1, 2, 3, 4), (1, 2, 3, 4, 6), (1, 2, 3), (2, 3, 4, 6, 8)):
        world = dp * cp * tp
        if world % nodes or world == nodes or not even_on_cp(cp, tp, nodes):
            continue
        for etp, ep in product({1, tp}, range(2, world + 1)):
            if world // etp % ep == 0:
                degrees = Degrees(dp_shard=dp, cp=cp, tp=tp, ep=ep, etp=etp)
                setup = Setup(degrees, ROW, ranks_per_node=nodes)
                here, least = row_degrees(degrees), row_ranks_per_node(setup)
                found = neighbours(here, least) if least else 0
                assert found == neighbours(degrees, nodes), setup
                seen += found > 0
    assert seen > 50


def test_plan_tries_ranks_of_their_own_for_experts():
    subject = FamilyModel("tiny", "qwen3_5", qwen3_5.tiny(experts=True))
    planner = Planner(subject, cluster_of("16xH100"), Workload(Documents.single(1, 4096), 16))
    assert {degrees.ep for degrees in planner.space.meshes()} == {1, 8}
    dense = Planner(TINY, cluster_of("16xH100"), planner.workload)
    assert {degrees.ep for degrees in dense.space.meshes()} == {1}


def test_plan_does_not_run_steps_whose_weights_leave_no_room():
    """Weights, their gradients and the optimizer take 16 bytes a parameter, whatever is kept."""
    small = replace(cluster_of("8xH100"), memory=5 * 10**9)
    planner = Planner(TINY, small, Workload(Documents.single(1, 4096), 1))
    setups = [Setup(degrees, planner.workload.documents) for degrees in planner.space.meshes()]
    worth, sifted = planner.sift(setups)
    assert len(worth) + len(sifted.refused) == len(setups) and not sifted.too_large
    for setup in worth:
        assert planner.row_forecasts.least(setup) <= planner.candidate(setup).forecast.memory.total
    tight = planner.on(
        replace(small, memory=small.reserved + planner.row_forecasts.least(setups[0]) - 1)
    )
    assert tight.sift(setups[:1])[1].too_large[0].needs == planner.row_forecasts.least(setups[0])


@pytest.mark.slow
def test_plan_passes_over_meshes_that_others_make_needless():
    """Of many meshes some are looked at, and the best of all are among them."""
    workload = Workload(Documents.single(1, 2**14), 64)
    planner = Planner(TINY, cluster_of("64xH100"), workload)
    every = [planner.space.plain(degrees) for degrees in planner.space.meshes() if degrees.tp < 4]
    narrow, outdone = planner._narrow(every)
    assert 0 < len(narrow) < len(every) - outdone
    best = max(map(planner.candidate, every), key=lambda each: each.score)
    assert best.score == max(map(planner.candidate, narrow), key=lambda each: each.score).score


@pytest.mark.slow
def test_meshes_that_are_left_out_take_longer_than_those_that_a_report_lists(monkeypatch):
    """A search of 64 GPUs took minutes, most of them for meshes that no report had a line of."""
    subject = FamilyModel("tiny", "qwen3_5", qwen3_5.tiny(experts=True))
    workload = Workload(Documents.single(1, 2**12), 8)
    planner = Planner(subject, cluster_of("8xH100"), workload)
    every = [planner.space.plain(degrees) for degrees in planner.space.meshes() if degrees.tp < 4]
    found = [planner.candidate(setup) for setup in every]
    least = LeastSeconds(planner.cluster)
    for each in found:
        before = least.of(each.setup, planner.row_forecasts.units(each.setup))
        least.note(each.forecast, each.time)
        after = least.of(each.setup, planner.row_forecasts.units(each.setup))
        assert before <= each.time.total * (1 + 1e-9) and after <= each.time.total * (1 + 1e-9)
    monkeypatch.setattr(search, "SHOWN", 1)
    monkeypatch.setattr(search, "AT_ONCE", 1)
    narrow, outdone = planner._narrow(every)
    assert outdone > 0
    best = max(found, key=lambda each: each.score)
    assert max(planner.candidate(setup).score for setup in narrow) == best.score


def test_a_model_of_transformers_is_surveyed_once(monkeypatch):
    """Each mesh surveyed it anew: 4 s of the 5 that one of Qwen3-235B-A22B took."""
    surveyed, survey = [], install.survey_of
    monkeypatch.setattr(install, "survey_of", lambda model: surveyed.append(model) or survey(model))
    sizes = {"hidden_size": 64, "num_heads": 4, "head_dim": 32, "n_groups": 2}
    config = config_of({"model_type": "mamba2", "num_hidden_layers": 2, **sizes}, "")
    workload = Workload(Documents.single(1, 64), 4)
    planner = Planner(HuggingFaceModel("small", config), cluster_of("4xH100"), workload)
    for degrees in (Degrees(cp=2), Degrees(dp_shard=2, cp=2)):
        assert planner.candidate(planner.space.plain(degrees)).fits
    # It was looked for on tensors without data, failed, and was taken to be read.
    assert not planner.row_forecasts.reads_strategy
    assert pickle.loads(pickle.dumps(planner.row_forecasts.subject)).survey and len(surveyed) == 1


def test_plan_of_a_model_of_ones_own(capsys):
    here = f"{__name__}"
    code, out, _ = run(
        capsys,
        *("--model", f"{here}:own_model", "--plan", f"{here}:own_plan"),
        *("--cluster", "2xH100", "--seq-len", "4096", "--mesh", "cp=2"),
    )
    assert code == 0 and "YOUR_SCRIPT.py" in out


def test_a_function_that_returns_no_model_is_named():
    with pytest.raises(ValueError, match="Module, got int from builtins:int: return"):
        OwnModel("builtins:int", own_plan).build()


def own_model() -> nn.Module:
    return llama.Llama(llama.tiny())


def own_plan(model, mesh, style):
    from dtcp.parallelize import llama_plan

    return llama_plan(model.config, mesh, style)


def test_a_cluster_is_read_from_a_file(tmp_path):
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"kind": "H200", "gpus": 16, "matmul": 0.7}))
    cluster = cluster_of(str(path))
    assert (cluster.gpus, cluster.matmul, cluster.memory) == (16, 0.7, 141 * GB)
    for wrong, why in (
        ({"kind": "H200", "gpus": 8, "speed": 1}, "speed is no field"),
        ({"kind": "A100", "gpus": 8}, "'A100' is no kind, so say name, memory, flops and inside"),
        ({"kind": "H200"}, "it does not say gpus"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=f"A cluster's file is JSON with the .*: {why}.$"):
            cluster_of(str(path))


def test_forecast_leaves_torch_as_it_was():
    before = torch.get_default_dtype()
    forecast(TINY, Setup(Degrees(cp=2), Documents.single(1, 512)))
    assert torch.get_default_dtype() == before and not torch.distributed.is_initialized()
