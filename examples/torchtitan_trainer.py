"""A trainer in the manner of torchtitan: meta device, parallelize, to_empty, init, train.

    torchrun --nproc-per-node 2 examples/torchtitan_trainer.py --out runs/titan

The lines that end in ``# ckpt`` give it LoRA and checkpoints of the adapter alone: the frozen
base is not written at each save, and a run resumes on any number of ranks.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from archon_lora import LoRAConfig, apply_lora, initialise_adapters  # ckpt
from ckpt import CheckpointManager, TrainState  # ckpt

DIM, HEADS, VOCAB = 16, 2, 64


class Attention(nn.Module):
    """Causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Map ``[B, S, D]`` to ``[B, S, D]``."""
        rows, length, _ = x_BSD.shape
        q, k, v = (
            layer(x_BSD).view(rows, length, HEADS, -1).transpose(1, 2)
            for layer in (self.wq, self.wk, self.wv)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.wo(mixed.transpose(1, 2).reshape(rows, length, DIM))
        return out


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.w1, self.w2 = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Map ``[B, S, D]`` to ``[B, S, D]``."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        return x_BSD + self.w2(F.silu(self.w1(self.ffn_norm(x_BSD))))


class Transformer(nn.Module):
    """A small decoder with torchtitan's names."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleDict({str(i): TransformerBlock() for i in range(2)})
        self.norm = nn.RMSNorm(DIM)
        self.output = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits ``[B, S, V]``."""
        h_BSD = self.tok_embeddings(tokens_BS)
        for layer in self.layers.values():
            h_BSD = layer(h_BSD)
        logits_BSV: Tensor = self.output(self.norm(h_BSD))
        return logits_BSV

    def init_weights(self) -> None:
        """Values for what ``to_empty`` left undefined; a real run loads a checkpoint here."""
        torch.manual_seed(0)
        for parameter in self.parameters():
            if parameter.requires_grad or parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def parallelize(model: Transformer, mesh: DeviceMesh) -> None:
    """FSDP2 on each block and on the whole."""
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train; the losses of this rank, by step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/titan")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    own = not dist.is_initialized()
    if own:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))

    with torch.device("meta"):
        model = Transformer()
    apply_lora(model, LoRAConfig(rank=4, alpha=8, target_modules=["wq", "wv"]))  # ckpt
    parallelize(model, mesh)
    model.to_empty(device="cpu")
    model.init_weights()
    initialise_adapters(model)  # ckpt
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=options.steps)

    state = TrainState(model, optimizer, scheduler)  # ckpt
    manager = CheckpointManager(options.out)  # ckpt
    done = manager.restore(state)  # ckpt
    losses = []
    for step in range(0 if done is None else done + 1, options.steps):  # ckpt
        seed = 100 * step + dist.get_rank()
        tokens = torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(seed))
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        manager.save(step, state)  # ckpt
    manager.close()  # ckpt
    if own:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    print(main())
