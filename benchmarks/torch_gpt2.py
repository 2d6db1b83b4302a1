"""The other side of against_torch.py: training steps of a plain GPT-2 with RoPE, by an interpreter that has PyTorch.

Written as one writes it in PyTorch: eager, float32, one product for queries, keys and values, its fused attention and its
fused AdamW, gradients clipped. Is given its sizes as JSON, says "ready" and its version; then takes a step for each line
that it is given, and prints its seconds.
"""

import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and in front of a residual sum."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Returns the next states [B, L, D]."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotated(query, cos, sin), rotated(key, cos, sin), value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_2(x)), approximate="tanh"))


def rotated(array: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Returns [B, H, L, K] with the pairs (2i, 2i + 1) rotated."""
    even, odd = array[..., 0::2], array[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class GPT2(nn.Module):
    """A causal language model with RoPE; logits through the transposed embedding."""

    def __init__(self, sizes: dict[str, int]):
        super().__init__()
        width, heads, half = sizes["width"], sizes["heads"], sizes["width"] // sizes["heads"] // 2
        self.embedding = nn.Embedding(sizes["vocabulary"], width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(sizes["layers"]))
        self.norm = nn.LayerNorm(width)
        angles = torch.outer(torch.arange(sizes["length"]).float(), 10000 ** (-torch.arange(half).float() / half))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the logits [B, L, V] of the next token."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.linear(self.norm(x), self.embedding.weight)


def main(sizes: dict[str, int]) -> None:
    """Steps, a line each."""
    torch.set_num_threads(sizes["threads"])
    model = GPT2(sizes)
    matrices = [weight for weight in model.parameters() if weight.ndim == 2 and weight is not model.embedding.weight]
    others = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    tokens = torch.randint(0, sizes["vocabulary"], (sizes["batch"], sizes["length"] + 1))
    print("ready", torch.__version__, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
