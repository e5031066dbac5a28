"""Resolves --dtcp.strategy auto and --dtcp.layout auto by the planner's choice.

It is made before the model is, from the config, the mesh and the first rows of the data, and by
rank 0 for all ranks.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from dtcp.torchtitan.section import AUTO, LAYOUT_CLASSES, LayoutName, Section, StrategyName

from dtcp._torch.mesh import available_device_type
from dtcp.distributed.mesh import Degrees
from dtcp.planner.cluster import cluster_here
from dtcp.planner.report import layout_name, strategy_name
from dtcp.planner.search import Candidate, Planner
from dtcp.planner.search_space import attention_styles
from dtcp.planner.workload import Workload
from dtcp.pretrain.attempt import attempt_store, has_agent_store
from dtcp.pretrain.data import PackedDocuments
from dtcp.pretrain.expected import precision_of, setup_of, subject_of
from dtcp.pretrain.launch import degrees_of, rank, ranks_of_machine
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail, SequenceLayout
from dtcp.softmax import HybridAttention, RingAttention
from dtcp.softmax.style import AttentionStyle


@dataclass(frozen=True)
class PlannedStrategy:
    """What the planner chose, in the terms of the section, and the lines that report it."""

    strategy: StrategyName
    ulysses_degree: int
    layout: LayoutName
    lines: tuple[str, ...]

    def close(self, section: Section) -> Section:
        """The section with nothing left open."""
        return replace(
            section,
            strategy=self.strategy,
            ulysses_degree=self.ulysses_degree,
            layout=self.layout,
        )


def with_planned_strategy(config: Any, ranks: int) -> Any:
    """The config as it is run, on every rank alike; what was chosen is printed.

    Args:
        config: a `Trainer.Config`.
        ranks: of the whole run.
    Raises:
        ValueError: on all ranks, where the model takes no strategy or layout on this mesh.
    """
    if not config.dtcp.is_open:
        return config
    choice = _of_rank_0(config, ranks) if has_agent_store() else plan_strategy(config, ranks)
    if rank() == 0:
        print("\n".join(choice.lines), flush=True)
    return replace(config, dtcp=choice.close(config.dtcp))


def _of_rank_0(config: Any, ranks: int) -> PlannedStrategy:
    """Rank 0's choice, from the store of this start of the ranks."""
    store = attempt_store(float(config.comm.init_timeout_seconds))
    if rank() == 0:
        said, cause = _said_or_why_not(config, ranks)
        store.set("choice", said)
    else:
        said, cause = store.get("choice").decode(), None
    choice = json.loads(said)
    if "refusal" in choice:
        raise ValueError(choice["refusal"]) from cause
    return PlannedStrategy(**{**choice, "lines": tuple(choice["lines"])})


def _said_or_why_not(config: Any, ranks: int) -> tuple[str, Exception | None]:
    """The planner's choice as JSON, or why it failed; others wait for either."""
    try:
        return json.dumps(asdict(plan_strategy(config, ranks))), None
    except (ValueError, TypeError) as error:
        return json.dumps({"refusal": str(error)}), error
    # Only rank 0 plans, and the others wait in the store for its word: an error of any class that
    # left here would leave them waiting. It is raised on every rank, on rank 0 with its cause.
    except Exception as error:  # noqa: BLE001
        text = (
            f"A strategy and a layout are chosen by the planner, got "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]} from it: name a "
            f"--dtcp.strategy and a --dtcp.layout."
        )
        return json.dumps({"refusal": text}), error


def plan_strategy(config: Any, ranks: int) -> PlannedStrategy:
    """Forecast what is left open, strategies first, and take what ranks first.

    Raises:
        ValueError: a model that the planner does not know, or that takes none of them.
    """
    section = config.dtcp
    degrees = mesh_of(config.parallelism, ranks, etp=section.expert_tensor_parallel_degree)
    nodes = section.ranks_per_node or ranks_of_machine()
    documents = first_rows(config)
    layouts = _layouts(section, documents)
    planner = Planner(
        subject_of(config),
        cluster_here(ranks, nodes),
        Workload(documents, documents.batch, precision_of(config.training)),
    )
    plain = setup_of(config, degrees, documents, layouts[0], RingAttention())
    plain = replace(plain, ranks_per_node=nodes if nodes < ranks else 0)
    ways = _ways(section, degrees.cp if planner.row_forecasts.reads_strategy else 1)
    plans = [replace(plain, attention=way) for way in ways]
    search = planner.ranked(plans)
    if search.candidates:
        plans = [search.best.setup]
    others = [replace(setup, layout=layout) for setup in plans for layout in layouts[1:]]
    search = planner.ranked(others, search)
    if not search.candidates:
        raise ValueError(search.refused[0].why)
    tried = len(search.candidates) + len(search.refused)
    return _said(search.best, planner, section, tried)


def _said(best: Candidate, planner: Planner, section: Section, tried: int) -> PlannedStrategy:
    setup = best.setup
    strategy = cast(StrategyName, strategy_name(setup).partition("(")[0])
    layout = cast(LayoutName, layout_name(setup))
    read = strategy_name(setup) if planner.row_forecasts.reads_strategy else "of the model's own"
    lines = [
        f"chosen      strategy {read}, layout {layout}, of {tried} that the planner tried: "
        f"{best.time.total:.3g} s per micro-batch, as on {planner.cluster}"
    ]
    lines += [f"            {line}" for line in best.forecast.styles]
    inner = setup.attention.inner_ranks if isinstance(setup.attention, HybridAttention) else 0
    return PlannedStrategy(strategy, inner or section.ulysses_degree, layout, tuple(lines))


def mesh_of(parallelism: Any, ranks: int, *, etp: int = 1) -> Degrees:
    """The mesh of a config on so many ranks."""
    degrees = degrees_of(parallelism)
    degrees.pop("pp")  # 1, where the planner is asked
    if degrees["dp_shard"] < 0:
        degrees["dp_shard"] = ranks // (degrees["dp_replicate"] * degrees["cp"] * degrees["tp"])
    return Degrees(**degrees, ep=parallelism.expert_parallel_degree, etp=etp)


def first_rows(config: Any) -> Documents:
    """The documents of a rank's first micro-batch, as far as the loader is dtcp's."""
    training, loader = config.training, config.dataloader
    if not isinstance(loader, PackedDocuments.Config):
        return Documents.single(training.local_batch_size, training.seq_len)
    batches = loader.build(
        dp_world_size=1,
        dp_rank=0,
        tokenizer=config.tokenizer.build(tokenizer_path=config.hf_assets_path),
        seq_len=training.seq_len,
        local_batch_size=training.local_batch_size,
    )
    batch, _ = next(iter(batches))
    rows: Documents = batch["documents"]
    return Documents(rows.lengths, rows.seq_len)


def _ways(section: Section, cp: int) -> list[AttentionStyle]:
    if section.strategy != AUTO:
        return [section.attention_style(available_device_type() or "cpu")]
    return attention_styles(cp, **section.style_options)


def _layouts(section: Section, documents: Documents) -> Sequence[type[SequenceLayout]]:
    if section.layout != AUTO:
        return [LAYOUT_CLASSES[section.layout]]
    packed = any(len(row) > 1 for row in documents.lengths)
    return [HeadTail, Contiguous, *([DocumentBalanced] if packed else [])]
