"""A training loop of your own over a mesh, written as it would be with accelerate.

torchrun --nproc-per-node 4 examples/own_loop.py      (two CPU cores, no download, seconds)
"""

import tiny
import torch
from torch import distributed as dist
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from dtcp import Degrees, ParallelMesh
from dtcp.huggingface import WholeRows
from dtcp.parallelize import parallelize_hf
from dtcp.trainers import load_optimizer, load_weights, save_optimizer, save_weights


def train(model, optimizer, steps, mesh=None):
    """Train on given steps; of each step's two rows, each batch rank takes its own."""
    rows_model = model if mesh is None else WholeRows(model, mesh)
    ranks, rank = (1, 0) if mesh is None else (mesh.size("batch"), mesh.rank("batch"))
    for step in steps:
        ids = tiny.rows(2, seed=step)[rank::ranks]
        loss = rows_model(input_ids=ids, labels=ids).loss / ranks
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield tiny.summed(loss.detach(), mesh)


def main(folder):
    world = dist.get_world_size()
    for kind in tiny.KINDS:
        models = [tiny.build(kind) for _ in range(3)]
        degrees = (Degrees(cp=2, tp=world // 2), Degrees(dp_shard=2, cp=world // 2))
        meshes = [ParallelMesh.from_degrees(each, "cpu") for each in degrees]
        for model, mesh in zip(models[1:], meshes, strict=True):
            parallelize_hf(model, mesh)
        alone, first, second = (torch.optim.AdamW(x.parameters(), lr=1e-2) for x in models)
        expected = list(train(models[0], alone, range(4)))
        losses = list(train(models[1], first, range(2), meshes[0]))
        save_weights(models[1], folder / kind)
        save_optimizer(models[1], first, folder / kind)
        dist.barrier()
        load_weights(models[2], folder / kind)
        load_optimizer(models[2], second, folder / kind)
        losses += list(train(models[2], second, range(2, 4), meshes[1]))
        save_weights(models[2], folder / f"{kind} trained")
        dist.barrier()
        plain = AutoModelForCausalLM.from_pretrained(folder / f"{kind} trained")
        ids = tiny.rows(1, seed=9)
        logits = plain(ids).logits - WholeRows(models[2], meshes[1])(input_ids=ids).logits
        tiny.report(kind, losses, expected, float(logits.detach().abs().max()))


if __name__ == "__main__":
    main(tiny.start())
