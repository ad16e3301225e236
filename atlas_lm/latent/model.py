"""Frames → the next frame: a trunk between two linear maps, and a head that predicts it directly or as a step.

    direct     y = normalize(out(h))
    residual   y = normalize(u + α · Δ),   Δ = out(h), u the last frame, α learned from 0.5

Trunks: `blocks`, those of AtlasLM: window attention with a memory beside it or without (`model.memory`), and `gru`.
Called with a state it streams: a document read in pieces gives what it gives as a whole.
"""

# B batch, T frames, D dimensions of a frame, M model width

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atlas_lm.config.model import ModelConfig
from atlas_lm.latent.metrics import unit
from atlas_lm.model.atlas import block_spec, check, ffn_hidden, make_block
from atlas_lm.model.block import Block
from atlas_lm.model.norm import RMSNorm

TRUNKS = ("blocks", "gru")
HEADS = ("direct", "residual")
ALPHA = 0.5  # at first


class Predicted(NamedTuple):
    """What a forward pass returns."""

    y: Tensor  # (B, T, D), unit length
    delta: Tensor | None  # (B, T, D) of the residual head
    state: Any  # after the last frame, where a state was given


class LatentModel(nn.Module):
    """Predicts from every frame, and those before it, the next one."""

    def __init__(self, config: ModelConfig, dim: int, trunk: str, head: str) -> None:
        super().__init__()
        check(config)
        self.config, self.dim, self.trunk = config, dim, trunk
        self.enter = nn.Linear(dim, config.dim)
        self.blocks, self.gru = nn.ModuleList(), None
        if trunk == "gru":
            self.gru = nn.GRU(config.dim, config.dim, config.layers, batch_first=True)
        else:
            holds = [config.memory_layers is None or i in config.memory_layers for i in range(config.layers)]
            sizes = {held: (block_spec(config, held), ffn_hidden(config, held)) for held in set(holds)}
            self.blocks.extend(make_block(config, *sizes[held]) for held in holds)
        self.norm = RMSNorm(config.dim)
        self.leave = nn.Linear(config.dim, dim)
        self.alpha = nn.Parameter(torch.tensor(ALPHA)) if head == "residual" else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As AtlasLM: what blocks add to the stream shrinks with their number. A residual head begins with none."""
        for block in self.blocks:
            assert isinstance(block, Block)
            for linear in (block.out, block.ffn.down):
                linear.weight.mul_((2 * self.config.layers) ** -0.5)
        if self.alpha is not None:
            nn.init.zeros_(self.leave.weight)
            nn.init.zeros_(self.leave.bias)

    def initial_state(self, batch: int) -> Any:
        """The state of `batch` documents of which nothing has been read."""
        if self.gru is not None:
            return self.enter.weight.new_zeros(self.config.layers, batch, self.config.dim)
        return tuple(block.initial_state(batch) for block in self.blocks)  # type: ignore[operator]

    def forward(self, frames_BTD: Tensor, state: Any = None) -> Predicted:
        """(B, T, D) frames of unit length → the next frame after each. ValueError: another D, or no frames."""
        if frames_BTD.dim() != 3 or frames_BTD.size(1) < 1 or frames_BTD.size(2) != self.dim:
            raise ValueError(
                f"frames must be (batch, T, {self.dim}) with T at least 1, got {tuple(frames_BTD.shape)}: embed the "
                "text with the model that the training text was embedded with"
            )
        x = self.enter(frames_BTD * self.dim**0.5)  # numbers of about 1
        after: Any = None
        if self.gru is not None:
            h, after = self.gru(x, state)
            x = x + h
            after = None if state is None else after
        else:
            states = []
            for i, block in enumerate(self.blocks):
                x, _, block_state = block(x, None if state is None else state[i], None)
                states.append(block_state)
            after = None if state is None else tuple(states)
        out = self.leave(self.norm(x)).float() * self.dim**-0.5
        if self.alpha is None:
            return Predicted(unit(out), None, after)
        return Predicted(unit(frames_BTD + self.alpha * out), out, after)
