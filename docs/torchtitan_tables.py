"""The tables of docs/torchtitan.md, from the library's own code: python -m docs.torchtitan_tables.

Writes them into the page, between the lines that mark them.
"""

import importlib
import inspect
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dtcp.torchtitan.settings import settings_table

from torchtitan.models import _supported_models

from docs.marked_tables import with_tables
from dtcp.pretrain.adopt import adopt_model

PAGE = Path(__file__).parent / "torchtitan.md"


@dataclass(frozen=True)
class Flavor:
    """A flavor of a family: what was read of its layers, or why it is refused."""

    name: str
    adopted: bool
    what: str


def flavors(family: str) -> list[Flavor]:
    """All flavors of a family in torchtitan's registry, in its order."""
    module = importlib.import_module(f"torchtitan.models.{family}")
    names = next(
        value
        for name, value in vars(module).items()
        if name.endswith("configs") and isinstance(value, dict)
    )
    return [_flavor(module.model_registry, name) for name in names]


def _flavor(registry: Callable, name: str) -> Flavor:
    options = inspect.signature(registry).parameters
    # The kernels of its default are CUDA's; what a layer asks for is the same.
    backend = {"attn_backend": "flex"} if "attn_backend" in options else {}
    spec = registry(name, **backend)
    try:
        model = adopt_model(spec).model
    except ValueError as error:
        return Flavor(name, False, str(error).removesuffix("."))
    asked = Counter(_asks(layer.attention.inner_attention) for layer in model.layers)
    return Flavor(name, True, ", ".join(f"{count} x {what}" for what, count in asked.items()))


def _asks(inner: object) -> str:
    window = re.search(r"SlidingWindow\(size=(\d+)", str(inner.mask))
    kind = f"window of {window[1]}" if window else str(inner.mask).lower().removesuffix("()")
    return f"{kind} with sinks" if inner.sinks else kind


FAMILIES = [(family, lambda family=family: flavors(family)) for family in sorted(_supported_models)]


def families_table() -> str:
    """A row for each family and outcome, as Markdown."""
    rows = ["| family | flavors | taken | layers, or why not |", "|---|---|---|---|"]
    for family, of_family in FAMILIES:
        every = of_family()
        for adopted in (True, False):
            group = [each for each in every if each.adopted is adopted]
            if not group:
                continue
            names = ", ".join(f"`{each.name}`" for each in group)
            rows.append(
                f"| `{family}` | {names} | {'exact' if adopted else 'refused'} | "
                f"{group[0].what if not adopted else _layers(group)} |"
            )
    return "\n".join(rows)


def _layers(group: list[Flavor]) -> str:
    kinds = [re.sub(r"\d+ x ", "", each.what).split(", ") for each in group]
    return ", ".join(dict.fromkeys(kind for each in kinds for kind in each))


def page(text: str) -> str:
    """The page with its tables made anew."""
    return with_tables(text, {"families": families_table(), "settings": settings_table()})


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
