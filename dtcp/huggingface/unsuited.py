"""Why a transformers model is refused before it is run, by its config and its modules."""

from collections.abc import Iterator
from typing import Any

from dtcp.huggingface.quantized import quantized_problems
from dtcp.huggingface.rotary_lengths import unread_lengths
from dtcp.huggingface.token_dropouts import drops
from dtcp.huggingface.version import too_old
from dtcp.mixer_plan import dropout_of


def unsuited(model: Any) -> Iterator[str]:
    """Why a model is refused before it is run, in sentences."""
    yield from too_old()
    name = type(model).__name__
    if next(model.parameters()).is_meta:
        yield (
            f"{name} is on the meta device, where nothing can be run: install_mixers and "
            f"parallelize_hf survey a narrow copy of it."
        )
    devices = sorted({f"{each}" for each in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(devices) > 1:
        yield (
            f"{name} lies on several devices ({', '.join(devices)}), and each rank has its own: "
            f"load it without device_map."
        )
    else:
        yield from quantized_problems(model)
    for part, module in model.named_modules():
        rate = dropout_of(module)
        if rate and not drops(module):
            yield (
                f"{part} ({type(module).__name__}): dropout={rate} in training would depend on "
                f"the mesh: set it to 0.0 in the config."
            )
        dropped = getattr(module, "layerdrop", 0.0)
        if isinstance(dropped, float) and dropped:
            yield (
                f"{part} ({type(module).__name__}): layers are left out at random in training "
                f"(layerdrop={dropped}), others on each rank: set it to 0.0 in the config."
            )
        if getattr(module, "token_dropout", None) is True:
            yield (
                f"{part} ({type(module).__name__}): scales embeddings by how many tokens of a row "
                f"are masked, and a shard has some of them: set config.token_dropout = False."
            )
    if getattr(model.config, "router_jitter_noise", 0.0):
        yield (
            f"{name} routes by noise of its own on each rank (router_jitter_noise): set "
            f"config.router_jitter_noise = 0.0."
        )
    if getattr(model.config, "slow_but_exact", False) and model.config.pretraining_tp > 1:
        yield (
            f"{name} leaves out biases of its projections (slow_but_exact, pretraining_tp="
            f"{model.config.pretraining_tp}), which are added here: set config.slow_but_exact = "
            f"False."
        )
    yield from unread_lengths(model)
