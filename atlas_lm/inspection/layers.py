"""Where the layers and attentions of a Hugging Face model are, and what a layer makes of a prompt."""

# B batch, T tokens, H heads, Q queries, K keys, M model width

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atlas_lm.inspection import metrics
from atlas_lm.inspection.schema import Prompt

CROSS = ("cross", "encdec", "encoder_attn")  # in the names of modules that attend to an encoder, or of their classes


class Stack(NamedTuple):
    """The layers of a model, or of its encoder or decoder: each with its attention to itself and to the encoder."""

    layers: list[nn.Module]
    attention: list[nn.Module]
    cross: list[nn.Module]  # empty without an encoder


def find_stack(part: nn.Module) -> Stack:
    """The longest list of layers that each hold an attention. ValueError: there is none."""
    found: list[list[nn.Module]] = [
        list(module)
        for module in part.modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_attentions(layer) for layer in module)
    ]
    if not found:
        raise ValueError(f"{type(part).__name__} has no layers with an attention: it cannot be inspected")
    layers = max(found, key=len)
    own = [[m for name, m in _attentions(layer) if not _is_cross(name, m)] for layer in layers]
    cross = [[m for name, m in _attentions(layer) if _is_cross(name, m)] for layer in layers]
    return Stack(layers, [some[0] for some in own if some], [some[0] for some in cross if some])


def _attentions(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost modules whose class is an attention."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in layer.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if name and not inside and type(module).__name__.endswith("Attention"):
            found.append((name, module))
    return found


def _is_cross(name: str, module: nn.Module) -> bool:
    return any(word in f"{name} {type(module).__name__}".lower() for word in CROSS)


def weights_of(output: Any, name: str) -> Tensor:
    """The weights (B, H, Q, K) in what an attention returned. ValueError: there are none."""
    parts = output if isinstance(output, tuple) else (output,)
    for part in reversed(parts):  # T5 returns the bias of its positions, of the same shape, before them
        if isinstance(part, Tensor) and part.dim() == 4 and part.is_floating_point():
            return part
    raise ValueError(
        f"{name} gives no attention weights: load the model with attn_implementation='eager', or use capture=off"
    )


class PromptLayer:
    """What a layer made of the prompt: reduced at once, as its weights grow with the square of the prompt."""

    def __init__(self) -> None:
        self.tokens = 0
        self.transformation: list[float] = []

    def read_weights(self, weights_HQK: Tensor, causal: bool = True) -> None:
        T = weights_HQK.size(1)
        seen = torch.arange(1, T + 1, device=weights_HQK.device) if causal else torch.full((T,), T)
        of = metrics.head_metrics(weights_HQK, seen.to(weights_HQK.device))
        self.tokens = T
        self.entropy, self.concentration = float(of.entropy_bits.mean()), float(of.concentration.mean())
        self.seen_keys = metrics.seen_keys(weights_HQK).tolist()
        mass = metrics.wide(weights_HQK).sum(1)
        # an encoder sees all keys: its null is the share of keys that lie in the middle
        null = metrics.basin(torch.ones(T, dtype=torch.float64)) if T > 2 and not causal else 1.0
        self.basin = (metrics.relative_basin(mass) if causal else metrics.basin(mass) / null).tolist()

    def read_hidden(self, hidden_TM: Tensor, below_TM: Tensor | None) -> Tensor:
        states = metrics.hidden_metrics(hidden_TM)
        self.norm, self.nonfinite = float(states.norm.mean()), int(states.nonfinite.sum())
        if below_TM is not None:
            self.transformation.append(float(metrics.transformation(below_TM, hidden_TM)))
        return hidden_TM

    def into(self, prompt: Prompt) -> None:
        prompt.entropy_mean.append(self.entropy)
        prompt.concentration_mean.append(self.concentration)
        prompt.seen_keys.append(self.seen_keys)
        prompt.basin.append(self.basin)
        prompt.norm.append(self.norm)
        prompt.nonfinite.append(self.nonfinite)
