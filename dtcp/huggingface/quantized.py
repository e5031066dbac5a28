"""Layers with quantized weights (QLoRA): whole on every rank, frozen, and one token at a time.

A linear layer reads one token at a time, so a rank that has it whole computes for its own tokens
what one device computes for them, however weights are stored. Nothing here knows a particular
library: a layer is inspected, and tried on a few tokens.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FP32 = torch.zeros(())
TOKENS, CHANGED, FACTOR = 16, 2, 100.0
"""Of a trial: one token is made so much larger that a scale or choice shared by all would show."""
OTHERS_COUNT = (
    "computes for one token other numbers where another token is larger, so that tokens of other "
    "ranks would count: quantize weights alone, or inputs token by token."
)


def is_quantized(x: Tensor) -> bool:
    """Whether a parameter is not a plain float tensor: of another dtype, or of a class with its own
    storage, as bitsandbytes has under `bnb_4bit_quant_storage`."""
    if isinstance(x, DTensor) or is_lazy(x):
        return False
    of_own_class = type(x) is not nn.Parameter and nn.Parameter in type(x).__mro__
    by_parts = hasattr(x, "__tensor_flatten__")
    return of_own_class or by_parts or not (x.dtype in FLOATS or x.is_complex())


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether a module holds a quantized weight: in a parameter, or, if linear, in buffers."""
    if any(is_quantized(x) for x in module.parameters(recurse=False)):
        return True
    own = module.buffers(recurse=False)
    is_plain = isinstance(getattr(module, "weight", None), nn.Parameter)
    return _is_linear(module) and not is_plain and any(not x.is_floating_point() for x in own)


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with quantized weights, by name."""
    return {name: module for name, module in model.named_modules() if is_quantized_layer(module)}


def weights_kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """Frozen parameters of layers with quantized weights, which every rank keeps whole."""
    layers = quantized_layers(model).values()
    return {x for layer in layers for x in layer.parameters(recurse=False) if not x.requires_grad}


@contextmanager
def run_in_training_mode(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, layers run in training mode, whatever the model is set to; then they are as before.

    bitsandbytes takes a layer's dtype from its first call, and in eval mode packs the weights of a
    CPU in another way, for good, which trains nothing before it.
    """
    before = {layer: dict(vars(layer)) for layer in layers}
    hooks = [layer.register_forward_pre_hook(_train) for layer in before]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, own in before.items():
            for key in vars(layer).keys() - own.keys():
                delattr(layer, key)
            vars(layer).update(own)


def keep_unpacked(model: nn.Module) -> None:
    """Keep 4-bit layers of bitsandbytes (0.50) as they are stored on CPUs with AVX512-BF16.

    In the first evaluation they would repack their weights for good: training would then go on in
    bf16 and silently pass no gradient back.
    """
    for layer in quantized_layers(model).values():
        if hasattr(layer, _PACKS):
            setattr(layer, _PACKS, False)


_PACKS = "support_avx512bf16_for_cpu"


def _train(layer: nn.Module, _: Any) -> None:
    layer.train()


def tensors_held(layer: nn.Module) -> list[Tensor]:
    """The plain tensors that a layer's weight consists of, scales and the like included."""
    state = layer.state_dict()
    return [part for x in state.values() if isinstance(x, Tensor) for part in _plain(x)]


def quantized_problems(model: Any) -> Iterator[str]:
    """Why a model's quantized weights are not supported, in sentences."""
    name, layers = type(model).__name__, quantized_layers(model)
    method = getattr(model, "quantization_method", None)
    kind = f" ({getattr(method, 'value', method)})" if method else ""
    if method and not layers:
        yield (
            f"{name} has weights that are quantized{kind} in no linear layer that is known by its "
            f"parameters or buffers: load it without quantization_config."
        )
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    said: set[tuple[type, str]] = set()
    like = next((x for x in model.parameters() if not is_quantized(x)), FP32)
    for part, layer in layers.items():
        own = "" if method else _own_numbers(layer)
        if own:
            yield f"{part} ({type(layer).__name__}) {own}"
            continue
        end = next((key for key, x in ends.items() if _holds(x, layer)), "")
        problem = _of_end(end) if end else _problem(layer, like)
        if problem and (type(layer), problem) not in said:
            said.add((type(layer), problem))
            yield f"{part} ({type(layer).__name__}), whose weight is quantized{kind}, {problem}"
    yield from _problems_of_trained(model, layers.values())


def _problems_of_trained(model: nn.Module, quantized: Collection[nn.Module]) -> Iterator[str]:
    """Which linear layers of their own kind (torchao's float8) scale a token by others.

    All are tried, the first one of a kind is named. What cannot be tried so, the survey runs.
    """
    kinds = {nn.Linear.forward}
    for part, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or type(layer).forward in kinds or layer in quantized:
            continue
        weight = layer.weight
        if not weight.is_meta and _problem_of_trial(layer, weight) == OTHERS_COUNT:
            kinds.add(type(layer).forward)
            yield f"{part} ({type(layer).__name__}) {OTHERS_COUNT}"


def _own_numbers(layer: nn.Module) -> str:
    """Why integer parameters that are not quantized weights are refused; empty without any."""
    plain = {key: x for key, x in layer.named_parameters(recurse=False) if type(x) is nn.Parameter}
    numbers = [key for key, x in plain.items() if not (x.dtype in FLOATS or x.is_complex())]
    weight = plain.get("weight", layer)
    if not numbers or (_is_linear(layer) and getattr(weight, "dtype", None) not in FLOATS):
        return ""
    return (
        f"has a parameter of whole numbers, {numbers[0]} of {plain[numbers[0]].dtype}, and is no "
        f"linear layer whose weight is quantized: make it a buffer (register_buffer), or quantize "
        f"linear layers alone."
    )


def _holds(end: Any, layer: nn.Module) -> bool:
    return end is not None and any(module is layer for module in end.modules())


def _of_end(end: str) -> str:
    return (
        f"is the model's {end}, which is read in other ways than by a call: leave it as it is "
        f"(llm_int8_skip_modules, modules_to_not_convert)."
    )


def _is_linear(module: Any) -> bool:
    sizes = (getattr(module, key, None) for key in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes)


def _problem(layer: Any, like: Tensor) -> str:
    """Why a layer cannot be kept whole on every rank; empty if it can.

    Args:
        like: a parameter of the model, of the device and dtype of what layers read.
    """
    trained = [key for key, x in layer.named_parameters(recurse=False) if x.requires_grad]
    if trained:
        return (
            f"trains {trained}: freeze them, and train adapters (of LoRA with bias='none') or other"
            f" layers."
        )
    if not _is_linear(layer):
        return "is no linear layer: quantize linear layers alone."
    threshold = getattr(getattr(layer, "state", None), "threshold", None)
    if threshold:
        return (
            f"computes in fp16 what is beyond threshold={threshold} in any token, so that tokens "
            f"of other ranks would count: load it with llm_int8_threshold=0.0."
        )
    own = {x.device for x in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))}
    if own != {like.device}:
        return (
            f"lies on {sorted(map(str, own))}, and the model on {like.device}: load it by "
            f"from_pretrained with device_map={{'': {str(like.device)!r}}}."
        )
    return _problem_of_trial(layer, like)


def _problem_of_trial(layer: Any, like: Tensor) -> str:
    """Run a layer forward and backward on a few tokens, again, and with one of them changed."""
    generator = torch.Generator().manual_seed(0)
    # On the CPU whatever the default device is, as the generator is.
    by_host = partial(torch.randn, generator=generator, device="cpu")
    x = by_host(1, TOKENS, layer.in_features)
    out_grad = by_host(1, TOKENS, layer.out_features)
    changed = x.clone()
    changed[:, CHANGED] *= FACTOR
    try:
        with run_in_training_mode(layer.modules()):
            first, again, other = (_run(layer, each.to(like), out_grad) for each in (x, x, changed))
    # A library's code, which may raise anything: its error is the answer for this layer.
    except Exception as error:  # noqa: BLE001
        said = " ".join(str(error).split())[:200]
        return (
            f"cannot be run forward and backward in {like.dtype} on {like.device} "
            f"({type(error).__name__}: {said})."
        )
    if first[1] is None:
        return (
            "hands no gradient back to its input, so that what lies before it would not learn: "
            "quantize weights alone (weight-only)."
        )
    if not all(bool(x.isfinite().all()) for x in (*first, *other)):
        return f"gives NaN or infinity on {like.device}: give it a dtype that its kernels compute."
    for a, b, c in zip(first, again, other, strict=True):
        # Kernels may sum in another order each time: two equal runs differ by that much.
        noise = max(torch.finfo(x.dtype).eps for x in (a, FP32)) * float(a.abs().max())
        noise += float((a - b).abs().max())
        moved = (a - c).abs()
        moved[:, CHANGED] = 0
        if not float(moved.max()) <= 4 * noise:
            return OTHERS_COUNT
    return ""


def _run(layer: nn.Module, x: Tensor, out_grad: Tensor) -> tuple[Any, ...]:
    """The output and the gradient of the input; None where there is none."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out: Tensor = layer(x)
        grads: Any = (None,)
        if out.requires_grad:
            grads = torch.autograd.grad(out, [x], out_grad.to(out), allow_unused=True)
    return out.detach(), *grads


def _plain(x: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor of any class is made of."""
    if isinstance(x, DTensor) or not hasattr(x, "__tensor_flatten__"):
        yield x.detach().as_subclass(Tensor)
        return
    names, _ = x.__tensor_flatten__()
    for name in names:
        yield from _plain(getattr(x, name))


def whole_in_words(model: nn.Module) -> str:
    """How many layers each rank keeps whole, and how many bytes that takes; empty if none."""
    layers = quantized_layers(model)
    if not layers:
        return ""
    size = sum(x.nbytes for layer in layers.values() for x in tensors_held(layer))
    kinds = sorted({type(layer).__name__ for layer in layers.values()})
    first = re.sub(r"\.\d+(?=\.|$)", ".*", next(iter(layers)))
    return (
        f"{len(layers)} layers with quantized weights ({', '.join(kinds)}; {first}, ..) are whole "
        f"and frozen on each rank, {size / 2**20:.3f} MiB: they are sharded over no axis."
    )


def check_no_quantized(contract: str, model: nn.Module, remedy: str) -> None:
    """Refuse a model with quantized weights.

    Raises:
        ValueError: as above.
    """
    for name, layer in quantized_layers(model).items():
        raise ValueError(
            f"{contract}, got {name} ({type(layer).__name__}) of a {type(model).__name__}, whose "
            f"weight is quantized: {remedy}."
        )
