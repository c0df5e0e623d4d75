"""A masked autoencoder as nnssl's EvaMAE, small enough to learn waves in seconds; none of our code is used."""

from __future__ import annotations

import math

import torch
from dynamic_network_architectures.architectures.primus import Primus
from dynamic_network_architectures.building_blocks.eva import Eva
from torch import Tensor, nn

WIDTH, KERNEL, GRID = 24, (4, 4, 2), (4, 3, 2)
PATCH = (16, 12, 4)


def tokens_of(volume: Tensor, order: str) -> Tensor:
    """(B, C, w, h, d) → (B, N, C)."""
    places = volume.permute(0, 3, 2, 4, 1) if order == "hwd" else volume.permute(0, 2, 3, 4, 1)
    return places.reshape(len(volume), -1, volume.shape[1])


def volume_of(tokens: Tensor, order: str) -> Tensor:
    """(B, N, C) → (B, C, w, h, d)."""
    w, h, d = GRID
    if order == "hwd":
        return tokens.reshape(-1, h, w, d, tokens.shape[-1]).permute(0, 4, 2, 1, 3)
    return tokens.reshape(-1, w, h, d, tokens.shape[-1]).permute(0, 4, 1, 2, 3)


class TinyAutoencoder(nn.Module):
    """``order`` is how it flattens its tokens."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        options = {
            "embed_dim": WIDTH,
            "num_heads": 2,
            "ref_feat_shape": GRID,
            "init_values": 0.1,
            "scale_attn_inner": True,
        }
        primus = Primus(1, WIDTH, KERNEL, 1, eva_depth=2, eva_numheads=2, input_shape=PATCH)
        self.down_projection, self.up_projection = primus.down_projection, primus.up_projection
        self.eva, self.decoder = Eva(depth=2, **options), Eva(depth=1, **options)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, WIDTH))

    def forward(self, image: Tensor, seen: Tensor) -> Tensor:
        tokens = (tokens_of(self.down_projection(image), self.order) + self.eva.pos_embed)[:, seen]
        rope = self.eva.rope.get_embed()
        for block in self.eva.blocks:
            tokens = block(tokens, rope=rope[seen])
        full = self.mask_token.repeat(len(image), math.prod(GRID), 1)
        full[:, seen] = self.eva.norm(tokens)
        decoded, _ = self.decoder(full)
        return self.up_projection(volume_of(decoded, self.order))


def waves(count: int, generator: torch.Generator) -> Tensor:
    """Images (count, 1, Z, Y, X) of slow waves in any direction."""
    axes = [(torch.arange(n) + 0.5) / k for n, k in zip(PATCH, KERNEL, strict=True)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    direction = torch.randn(count, 3, generator=generator) * torch.tensor([1.0, 1.0, 0.3])
    length = 4 + 3 * torch.rand(count, 1, generator=generator)
    phase = 2 * math.pi * torch.rand(count, 1, 1, 1, generator=generator)
    steps = torch.einsum("ba,azyx->bzyx", direction / direction.norm(dim=1, keepdim=True) / length, places)
    return math.sqrt(2) * torch.sin(2 * math.pi * steps + phase)[:, None]


def trained(order: str, steps: int = 400) -> dict[str, Tensor]:
    """Tensors of an autoencoder that has learned waves, under nnssl's names."""
    torch.manual_seed(0)
    network = TinyAutoencoder(order)
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=steps)
    for _ in range(steps):
        image = waves(32, generator)
        seen = torch.randperm(math.prod(GRID), generator=generator)[:10]
        loss = (network(image, seen) - image).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}
