"""A target that is only read, on ranks, against the same target on one device."""

import pytest
import torch
from torch.testing import assert_close

from dtcp.cp_utils import gather_cp_seq, make_cp_batch_and_ctx, make_target_cp_ctx
from dtcp.sdpa.frozen import FrozenTarget
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import HeadTail
from tests.harness import reference
from tests.harness.plain_sdpa_model import VOCAB, Decoder
from tests.harness.spmd import spmd

SEQ_LEN = 13
LENGTHS = ((13,), (5, 8))
CAPTURED = ("layers.0", "layers.1.mlp")


def truth(model, ids, lengths):
    """Logits and hidden states of one device, under the reference's mask."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out})
        )
        for name in CAPTURED
    ]
    mask = reference.visible(lengths, SEQ_LEN, reference.causal)[:, None]
    with torch.no_grad():
        logits = model(ids, Documents(lengths, SEQ_LEN).position_ids(), mask)
    for handle in handles:
        handle.remove()
    return logits, seen


@pytest.mark.slow_where(lambda compiled, ranks: compiled and ranks != 2)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@spmd(ranks=(1, 2, 3, 4))
def test_target_on_ranks_reads_what_one_device_reads(mesh, ranks, compiled):
    """Whole, in order, contiguous, without gradients; one row, or two packed differently."""
    model = Decoder()
    rows = LENGTHS[:1] if ranks == 1 else LENGTHS
    for lengths in (rows,) if compiled else (LENGTHS[:1], rows):
        ids = torch.randint(0, VOCAB, (len(lengths), SEQ_LEN))
        logits, hidden_states = truth(model, ids, lengths)
        target = FrozenTarget(model, mesh, capture=CAPTURED)
        if compiled:
            for layer in model.layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        before = ids.clone()
        output = target(ids, Documents(lengths, SEQ_LEN).position_ids())
        assert_close(output.logits, logits)
        assert_close(output.hidden_states, hidden_states)
        for x in (output.logits, *output.hidden_states.values()):
            assert x.is_contiguous() and not x.requires_grad
        assert torch.equal(ids, before)


@spmd(ranks=(1, 2, 3))
def test_seed_functions_shard_and_gather_in_order(mesh, ranks):
    ids = torch.arange(2 * SEQ_LEN).view(2, SEQ_LEN)
    context, local, position_ids, length = make_target_cp_ctx(mesh, ids)
    with context:
        pass
    shard_len = -(-SEQ_LEN // ranks)
    assert local.shape == position_ids.shape == (2, shard_len) and length == SEQ_LEN
    hidden = local[..., None].double() * torch.ones(3).double()
    back, where, turned = [
        gather_cp_seq(mesh, [x], dim, length)[0]
        for x, dim in ((hidden, 1), (position_ids, 1), (hidden.transpose(1, 2), -1))
    ]
    assert_close(back[..., 0], ids.double())
    assert_close(where, torch.arange(SEQ_LEN).expand(2, -1))
    assert_close(turned, back.transpose(1, 2))
    assert turned.is_contiguous()


@spmd(ranks=2)
def test_reading_a_target_leaves_balanced_training_as_it_was(mesh):
    model, batch = Decoder(), {"input_ids": torch.ones(1, 8).long(), "labels": torch.ones(1, 8)}

    def step():
        context, local = make_cp_batch_and_ctx(mesh, batch)
        with context():
            return local, model(local["input_ids"], local["position_ids"])

    _, before = step()
    FrozenTarget(model, mesh, capture=CAPTURED)(torch.ones(1, 8).long())
    local, after = step()
    assert_close(after, before)
    assert_close(local["position_ids"][0], HeadTail(8, 2).token_indices(mesh.get_local_rank()))
    assert after.requires_grad


@spmd(ranks=2)
def test_targets_that_cannot_be_read_are_refused(mesh):
    with pytest.raises(ValueError, match="whose forward has no position_ids"):
        FrozenTarget(torch.nn.Linear(1, 1), mesh)
    with pytest.raises(ValueError, match="which matches none"):
        FrozenTarget(Decoder(), mesh, capture=["layers.7"])

    class Local(Decoder):
        def forward(self, input_ids, position_ids):
            return self.head(self.embed(input_ids))

    with pytest.raises(ValueError, match="did not call it"):
        FrozenTarget(Local(), mesh)(torch.ones(1, 8).long())
    with pytest.raises(ValueError, match=r"got \['layers.0'\] without one"):
        FrozenTarget(Skips(), mesh, capture=["layers.0"])(torch.ones(1, 8).long())
    with pytest.raises(ValueError, match="Position ids count up"):
        make_target_cp_ctx(mesh, torch.ones(1, 8).long(), torch.arange(8)[None] + 1)


class Skips(Decoder):
    """Never calls its first layer."""

    def forward(self, input_ids, position_ids):
        return self.layers[1](self.embed(input_ids), None)
