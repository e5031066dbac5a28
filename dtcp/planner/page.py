"""A plan as one HTML page, pictures inside it, and as PNGs beside it."""

import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtcp.planner.cluster import Cluster
from dtcp.planner.pictures import pictures
from dtcp.planner.report import detail_lines, text_report
from dtcp.planner.search import Search
from dtcp.planner.workload import Workload

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto;
padding: 0 1em; color: #222; }
pre { overflow-x: auto; background: #f5f5f5; padding: 1em; font-size: 12px; }
figure { margin: 2em 0; } figcaption { color: #444; } svg { max-width: 100%; height: auto; }
svg text { font-family: "DejaVu Sans", Verdana, sans-serif; } dt { font-weight: bold; }"""

WORDS: Mapping[str, str] = {
    "cp, context parallelism": "GPUs of this group hold different tokens of the same row, and "
    "exchange what attention reads of the others' tokens.",
    "dp_shard, fsdp": "GPUs of this group share the weights: each keeps a part, and all gather a "
    "layer's weights when it is at work. Those of dp_shard read different rows.",
    "tp, tensor parallelism": "GPUs of this group split each matrix of a layer.",
    "ring, all_gather, ulysses, hybrid": "ways to exchange: step by step while attention computes, "
    "all at once, by heads instead of tokens, or heads inside a node and steps between nodes.",
    "layout": "which tokens of a row a GPU holds; balanced layouts give all GPUs equal work.",
    "full, selective, none": "checkpointing: recompute a layer in the backward pass, recompute "
    "some of it, or keep all that it computed.",
}


def write_page(path: Path, workload: Workload, cluster: Cluster, search: Search) -> None:
    """Write the page, and each picture as <page>_<picture>.png beside it.

    Raises:
        ValueError: the folder is not there.
    """
    if not path.parent.is_dir():
        raise ValueError(f"A page is written into a folder, got {path}: make {path.parent} first.")
    parts = []
    for key, (text, figure) in pictures(search, cluster).items():
        svg = svg_of(figure, key)
        figure.savefig(path.with_name(f"{path.stem}_{key}.png"), dpi=110)
        caption = f"<figcaption>{html.escape(text)}</figcaption>"
        parts.append(f"<figure>{svg}{caption}</figure>")
    best = search.best
    report = [*text_report(workload, cluster, search), *detail_lines(best, cluster)]
    text = html.escape("\n".join(report))
    assumed = "".join(f"<li>{html.escape(line)}</li>" for line in cluster.assumptions())
    words = "".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in WORDS.items())
    title = f"Plan: {html.escape(best.forecast.name)} on {html.escape(str(cluster))}"
    path.write_text(
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
        f"<p>A training step of {workload.rows} rows of {workload.documents.seq_len:,} tokens, "
        f"worked out without running it: what each GPU would hold, send and compute. A GPU of the "
        f"context-parallel group (cp) holds a part of every row; fsdp is the group that shares "
        f"the weights, tp the one that splits each matrix.</p>"
        f"{''.join(parts)}<h2>Words</h2><dl>{words}</dl>"
        f"<h2>All numbers</h2><pre>{text}</pre><h2>Assumed</h2><ul>{assumed}</ul>"
        f"</body></html>\n"
    )


def svg_of(figure: Any, name: str) -> str:
    """A figure as it stands inside of a page, its letters as letters.

    Args:
        name: unlike those of other figures of the page: ids inside are made of it.
    """
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    text = drawn.getvalue()
    # Without the XML head, which does not belong inside of a page.
    return text[text.index("<svg") :]
