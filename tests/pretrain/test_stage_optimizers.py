"""Groups of weights that some pipeline stages lack, and which nobody has."""

import pytest
import torch
from torch import nn
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from dtcp.pretrain.stage_optimizers import check_groups, groups_of_stages


def group(pattern, lr, name="AdamW"):
    return ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs={"lr": lr})


GROUPS = [
    group("embedding", 0.1),
    group("norm", 0.2, "Adam"),
    group("lm_head", 0.3),
    group(".*", 1),
]
EMBEDS = nn.ModuleDict({"embedding": nn.Linear(2, 2, bias=False), "layer": nn.Linear(2, 2)})
SCORES = nn.ModuleDict({"norm": nn.RMSNorm(2), "lm_head": nn.Linear(2, 2, bias=False)})


def built(parts):
    config = OptimizersContainer.Config(param_groups=GROUPS, implementation="for-loop")
    return config.build(model_parts=parts)


def test_a_stage_has_the_groups_that_it_has_weights_of():
    """Both stages of one rank, then each of its own."""
    with groups_of_stages() as found:
        made = built([EMBEDS, SCORES])
    rates = [[g["lr"] for g in each.param_groups] for each in made]
    assert rates == [[0.1, 1], [0.2], [0.3]]
    assert [type(each) for each in made] == [torch.optim.AdamW, torch.optim.Adam, torch.optim.AdamW]
    check_groups(GROUPS, found, None)

    with groups_of_stages() as found:
        built([SCORES])
    assert list(found) == ["norm", "lm_head"]
    with pytest.raises(ValueError, match="got pattern='embedding', which matches none"):
        check_groups(GROUPS, found, None)


def test_elsewhere_torchtitan_refuses_a_group_without_weights():
    with groups_of_stages():
        pass
    with pytest.raises(ValueError, match="'lm_head' matched no parameters"):
        built([nn.ModuleDict({"embedding": EMBEDS, "norm": SCORES.norm})])
