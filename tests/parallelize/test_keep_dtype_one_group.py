"""Parameters that keep their dtype, where units of torch have one group only (before 2.13)."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dtcp.parallelize import keep_dtype


def one_group(param_dtype, *dtypes):
    """A unit's only group, and its parameters; FSDP of torch 2.15 reads the policies of these."""
    parameters = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in dtypes]
    policy = SimpleNamespace(param_dtype=param_dtype)
    held = [SimpleNamespace(sharded_param=each, mp_policy=policy) for each in parameters]
    return SimpleNamespace(fsdp_params=held), parameters


def gathered(monkeypatch, group, kept):
    monkeypatch.setattr(keep_dtype, "fsdp_param_groups", lambda unit: (group,))
    keep_dtype.gather_in_own_dtype(None, kept)


def test_one_group_that_casts_nothing_keeps_dtypes_as_it_is(monkeypatch):
    group, parameters = one_group(None, torch.float32, torch.float32)
    policies, held = [each.mp_policy for each in group.fsdp_params], list(group.fsdp_params)
    gathered(monkeypatch, group, parameters[:1])
    assert group.fsdp_params == held and not hasattr(group, "mp_policy")
    assert [each.mp_policy for each in held] == policies


def test_one_group_that_would_have_to_be_two_is_refused(monkeypatch):
    group, parameters = one_group(torch.bfloat16, torch.float32, torch.float32)
    with pytest.raises(NotImplementedError, match=r"param_dtype=torch\.bfloat16: use torch 2\.13"):
        gathered(monkeypatch, group, parameters[:1])


def test_one_group_of_which_all_keep_their_dtype_is_gathered_in_it(monkeypatch):
    group, parameters = one_group(torch.bfloat16, torch.float32)
    gathered(monkeypatch, group, parameters)
    assert group.mp_policy is group.fsdp_params[0].mp_policy is keep_dtype.OWN_DTYPE
