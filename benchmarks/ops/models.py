"""A small diffusion transformer in plain torch, for machines without diffusers and for pixel space."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_features(timesteps: Tensor, width: int) -> Tensor:
    """(B,) timesteps as (B, width) sines and cosines of geometrically spaced frequencies."""
    frequencies = torch.exp(torch.arange(width // 2, device=timesteps.device) * (-math.log(10000.0) / (width // 2)))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    """Attention and an MLP, each shifted, scaled and gated by the timestep's embedding."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(F.silu(embedding))[:, None].chunk(
            6, dim=-1
        )
        q, k, v = self.qkv(self.norm(x) * (1 + scale) + shift).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.out(attended)
        return x + gate_mlp * self.mlp(self.norm(x) * (1 + scale_mlp) + shift_mlp)


class PlainDiT(nn.Module):
    """Pictures or latents (B, C, H, W) and timesteps (B,) to a prediction of the same shape.

    Args:
        channels: C.
        size: side of the square input.
        patch: side of a patch; a divisor of size.
        width: of a token.
        depth: number of blocks.
        heads: of the attention; a divisor of width.
    """

    def __init__(self, channels: int, size: int, patch: int, width: int = 192, depth: int = 4, heads: int = 3):
        super().__init__()
        self.patch, self.channels = patch, channels
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, channels * patch * patch)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        grid = [side // self.patch for side in x.shape[-2:]]
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        embedding = self.time(timestep_features(timesteps, tokens.shape[-1]).to(tokens.dtype))
        for block in self.blocks:
            tokens = block(tokens, embedding)
        patches = self.head(self.norm(tokens)).unflatten(1, grid).unflatten(-1, (self.channels, self.patch, self.patch))
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
