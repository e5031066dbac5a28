"""Proves by a trial that a model of transformers can be cut into stages, before it is.

A small copy of the model is run whole and as a chain of stages: with each layer, the embedding and
the head in a stage of its own, and in two halves. Outputs and the gradients of all weights are the
same, or the model is refused: a layer may read another one's cache, the embedding or token ids.
"""

import itertools
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from dtcp.huggingface.install import install_mixers
from dtcp.huggingface.meta_device import small_copies
from dtcp.huggingface.stages import HFStage, StageCut, UncutError, find_cut, keep_stage
from dtcp.mixer_metadata import batch_metadata
from dtcp.sequence.documents import Documents
from dtcp.token_dropout import TokenDropout

LENGTHS = ((9, 15),)
"""Of the documents in the trial's row."""
SPREAD = 0.05
"""Of what is added to weights: many are drawn as 0 or 1, where a wrong use would not show."""
SAME: Mapping[torch.dtype, float] = {torch.float64: 1e-8, torch.float32: 1e-4}
"""How far two runs of one calculation may be apart, by the largest number in it."""


def stage_cut(model: Any) -> StageCut:
    """Where a causal language model can be cut into stages, proved on a small copy of it.

    Args:
        model: as transformers built it, on any device.
    Raises:
        UncutError: a ValueError: a model that has no stages, with the reason.
        ValueError: one that has no mixers either.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        copy = _small_copy(model)
        try:
            cut = _tried(copy)
            _check_same_parts(model, cut)
            return cut
        except UncutError as error:
            raise UncutError(error.why, model) from error
        # The model's own code, on inputs that it was not made for, may raise anything.
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(f'{error}'.split())[:200]}"
            raise UncutError(f"its stages do not run by themselves ({said})", model) from error


def _check_same_parts(model: Any, cut: StageCut) -> None:
    """Refuse a model whose weights are not where its small copy, made from its config, has them."""
    modules = {name for name, _ in model.named_modules()}
    lacking = [name for name in (cut.layers, *cut.first, *cut.last) if name not in modules]
    if lacking:
        raise UncutError(f"a copy of its config has a {lacking[0]}, which it has not")
    layers = [name for name, _ in model.get_submodule(cut.layers).named_children()]
    if layers != [f"{number}" for number in range(cut.count)]:
        raise UncutError(f"a copy of its config has {cut.count} {cut.layers}, and it {len(layers)}")
    placed = tuple(f"{name}." for name in (cut.layers, *cut.first, *cut.last))
    for name, _ in model.named_parameters(remove_duplicate=False):
        if not name.startswith(placed):
            raise UncutError(f"a copy of its config has no {name}, which would be in no stage")
    _check_tied(model, cut)


def _small_copy(model: Any) -> Any:
    """A small copy of a model with mixers and with weights of which none is 0 or 1.

    In fp64, but for models that multiply numbers of fp32 by it.
    """
    failed: Exception | None = None
    for build, dtype in itertools.product(small_copies(model), SAME):
        try:
            copy = build().to(dtype)
            if copy._can_set_experts_implementation():
                copy.set_experts_implementation("eager")  # others have no fp64
            install_mixers(copy)
        # Configs check sizes in classes of errors of their own.
        except Exception as error:  # noqa: BLE001
            failed = failed if isinstance(failed, ValueError) else error
            continue
        for module in copy.modules():
            if isinstance(module, TokenDropout):
                module.p = 0.0  # drops by names and tokens, in stages as in the whole model
        with torch.no_grad():
            for parameter in copy.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
        return copy
    if isinstance(failed, ValueError):
        raise failed
    raise UncutError(f"no small copy of it runs ({type(failed).__name__}: {failed})", model)


def _tried(model: Any) -> StageCut:
    """A cut of a small model, after its trial."""
    documents = Documents(LENGTHS, sum(LENGTHS[0]))
    position_ids = documents.position_ids()
    metadata = batch_metadata(model, documents, position_ids=position_ids)
    inputs = {"position_ids": position_ids, "attn_metadata": metadata}
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(size // 4, size, position_ids.shape)
    cut = find_cut(model, lambda: model(input_ids=ids, **inputs))
    _check_tied(model, cut)
    expected = model(input_ids=ids, **inputs).logits
    cotangent = torch.randn_like(expected)
    gradients = _gradients(expected, model, cotangent)
    for stages in (_alone(cut), _halves(cut)):
        out = _chain(model, cut, stages, ids, inputs)
        if not _same(out, expected):
            raise UncutError("stages of it give other logits than the whole model")
        for name, x in _gradients(out, model, cotangent).items():
            if not _same(x, gradients[name]):
                raise UncutError(f"stages of it give {name} another gradient than the whole model")
    return cut


def _alone(cut: StageCut) -> list[range]:
    return [range(0), *(range(i, i + 1) for i in range(cut.count)), range(0)]


def _halves(cut: StageCut) -> list[range]:
    return [range(cut.count // 2), range(cut.count // 2, cut.count)]


def _chain(
    model: Any, cut: StageCut, stages: list[range], ids: Tensor, inputs: Mapping[str, Any]
) -> Tensor:
    """What stages give, one after the other; they share the model's weights."""
    x, seen = ids, set[str]()
    width = model.config.get_text_config().hidden_size
    layers = list(model.get_submodule(cut.layers).children())
    last = len(stages) - 1
    for index, numbers in enumerate(stages):
        shared = [*layers, *model.parameters()]
        stage = deepcopy(model, {id(each): each for each in shared})
        keep_stage(stage, HFStage(cut, numbers, index == 0, index == last))
        names = {name for name, _ in stage.named_parameters(remove_duplicate=False)}
        if seen & names:
            raise UncutError(f"{min(seen & names)} is in two stages")
        seen |= names
        x = stage(x, **inputs)
        if index < last and x.shape != (*ids.shape, width):
            raise UncutError(f"its layers hand on {list(x.shape)} for {list(ids.shape)} tokens")
    missing = {name for name, _ in model.named_parameters(remove_duplicate=False)} - seen
    if missing:
        raise UncutError(f"{min(missing)} is in no stage")
    return x


def _check_tied(model: Any, cut: StageCut) -> None:
    """Refuse weights that layers share: they might be in different stages."""
    names: dict[Tensor, str] = {}
    for name, x in model.named_parameters(remove_duplicate=False):
        other = names.setdefault(x, name)
        for each in (name, other) if other != name else ():
            if each.startswith(f"{cut.layers}."):
                raise UncutError(f"{other} and {name} are one weight")


def _gradients(out: Tensor, model: Any, cotangent: Tensor) -> dict[str, Tensor]:
    named = {name: x for name, x in model.named_parameters() if x.requires_grad}
    found = torch.autograd.grad(out, list(named.values()), cotangent, allow_unused=True)
    return {
        name: torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(named.items(), found, strict=True)
    }


def _same(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    bound = SAME[expected.dtype]
    return bool((actual - expected).abs().max() <= bound * expected.abs().max().clamp(min=bound))
