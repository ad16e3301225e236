"""One memory of the hierarchy: its learned initial weights, how they start, and the gates that hidden states open."""

# B batch, H heads, T tokens, D head dim, M model width

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atlas_lm.memory.features import Features
from atlas_lm.memory.network import Network, Weights, build_network
from atlas_lm.memory.newton_schulz import STEPS
from atlas_lm.memory.state import Gates, Rule, check_rule, wide_logits


class MemorySpec(NamedTuple):
    """What a hierarchy is built from. Sizes in tokens unless said otherwise."""

    dim: int  # model width, the input of the gates
    heads: int
    head_dim: int  # D
    local_chunks: tuple[int, ...]  # C_L of each local memory
    global_chunk: int | None  # C_G; None: no global memory
    shard: int  # S_L: local memories restart after so many tokens
    network: str = "gated_mlp"
    residual: bool = False  # M adds the raw input
    features: str = "sketch"
    rank: int = 447  # features of the quadratic sketch
    hidden: int = 64  # E
    context: int = 1  # c of the Omega rule
    update: str = "gradient"
    newton_schulz_steps: int = STEPS
    projection: bool = True  # of the queries of local memories onto the keys of their shard
    persistent_keys: int = 64  # N_p per head; 0: a shard starts from its own keys alone
    eta_max: float = 1.0  # write strength at an open gate: the share of an error that is corrected
    half_life: float = 1024.0  # of a memory at first, in tokens
    radius: float = 8.0  # bound on the root mean square of a fast matrix
    half_life_least: float = 0.0  # tokens; a gate that is shut still forgets no faster. 0: at once
    local_network: str | None = None  # of the local memories; None: that of the global one
    local_update: str | None = None
    local_features: str | None = None  # a feature map of their own; None: they share that of the global one
    local_rank: int = 191
    momentum: bool = True  # of updates that can have one
    weight_norm: bool = False  # of W after each chunk
    write_gate: str = "sigmoid"  # or sparse: exactly 0 for tokens that a memory does not take
    cached_states: int = 0  # of the global memory, one a shard, that are read beside it
    answers: str = "sum"  # or gated: each token weighs what the local memories answer

    def of_local(self) -> MemorySpec:
        """That of the local memories."""
        return self._replace(network=self.local_network or self.network, update=self.local_update or self.update)


WRITE_GATES = ("sigmoid", "sparse")


class FastMemory(nn.Module):
    """One memory: its learned initial weights W_init per head, and its gates."""

    # biases of the gates before training: write with 3/4 of full strength, momentum 1/4
    ETA, THETA, GAMMA = 1.0, -1.0, 1.0
    # by how much a sparse gate's sigmoid is stretched at either end before it is cut to [0, 1] (hard concrete, arXiv
    # 1712.01312): it shuts below a logit of −2.4
    STRETCH = 0.1

    def __init__(self, spec: MemorySpec, chunk: int, read: str, features: Features) -> None:
        super().__init__()
        network = build_network(spec.network, spec.residual)
        self.rule = check_rule(
            Rule(
                network,
                chunk,
                spec.context,
                spec.update,
                read,
                spec.radius,
                spec.newton_schulz_steps,
                spec.momentum,
                spec.weight_norm,
            )
        )
        self.eta_max = spec.eta_max
        self.heads = spec.heads
        shapes = network.shapes(spec.head_dim, features.dim_out, spec.hidden)
        self.constant = features.weights[0] ** 0.5  # of feature 0, for every token
        self.initial = nn.ParameterList(nn.Parameter(torch.empty(spec.heads, *shape)) for shape in shapes)
        self.gates = nn.Linear(spec.dim, (4 if self.rule.has_momentum else 3) * spec.heads)
        self.half_life = spec.half_life
        if spec.write_gate not in WRITE_GATES:
            raise ValueError(f"unknown write_gate {spec.write_gate!r}; choose sigmoid or sparse")
        self.sparse = spec.write_gate == "sparse"
        self.least = spec.half_life_least
        self.floor = 2 ** (-1 / self.least) if self.least > 0 else 0.0
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        initialise_weights(self.rule.network, list(self.initial), self.constant, self.rule.weight_norm)
        nn.init.normal_(self.gates.weight, std=0.02)
        # α = 2^(−1/half-life) at first: per token even 0.99 would empty a memory within one chunk of 512
        rate, least = math.log(2) / self.half_life, math.log(2) / self.least if self.least > 0 else math.inf
        # log (2^(−1/h) − 2^(−1/h₀)) / (1 − 2^(−1/h)), where neither difference loses its digits
        alpha = -rate + math.log(-math.expm1(rate - least)) - math.log(-math.expm1(-rate))
        theta = [self.THETA] if self.rule.has_momentum else []
        bias = torch.tensor([alpha, self.ETA, *theta, self.GAMMA], device=self.gates.bias.device)
        self.gates.bias.copy_(bias.repeat_interleave(self.heads))

    def weights(self) -> Weights:
        """W_init (H, rows, columns) per layer."""
        return tuple(self.initial)

    def open(self, x_BTM: Tensor) -> Gates:
        """The gates of every token, from the model's hidden states: each (B, H, T).

        α = a + (1 − a) σ(·) with a = 2^(−1/least half-life), the others σ(·). A sparse η is 1.2 σ(·) − 0.1, cut to
        [0, 1]: exactly 0 for a token that is not written.
        """
        alpha, eta, *theta, gamma = (
            wide_logits(self.gates, x_BTM).to(_wide(x_BTM)).sigmoid().mT.split(self.heads, dim=1)
        )
        if self.floor:
            alpha = self.floor + (1 - self.floor) * alpha
        if self.sparse:
            eta = ((1 + 2 * self.STRETCH) * eta - self.STRETCH).clamp(0.0, 1.0)
        return Gates(alpha, eta * self.eta_max, theta[0] if theta else torch.zeros_like(alpha), gamma)


def unchanging(x_BTM: Tensor, heads: int) -> Gates:
    """Gates under which W and S of ATLAS eq 33 stay as they are: nothing is forgotten, nothing is written."""
    one = x_BTM.new_ones(x_BTM.size(0), heads, x_BTM.size(1), dtype=_wide(x_BTM))
    return Gates(alpha=one, eta=0 * one, theta=one, gamma=0 * one)


def _wide(x: Tensor) -> torch.dtype:
    """Gates and fast weights are kept in at least float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def initialise_weights(
    network: Network, weights: list[nn.Parameter], constant: float, weight_norm: bool = False
) -> None:
    """W_init such that a memory begins empty and first writes into its input layer.

    There the quadratic features lend their capacity (F numbers per output) whatever the hidden width; a random start
    would write into the output layer, whose capacity is E. So: gates open and constant, W_up near zero, W_down with
    orthogonal columns. `constant`: the value of feature 0, which is the same for every input.

    With a weight norm these lengths are kept: the input layer's columns start as long as one write makes them.
    """
    of_one = weights[0].size(1) ** -0.5  # the deviation of entries in columns of length 1
    if network.kind == "linear":
        if weight_norm:
            nn.init.normal_(weights[0], std=of_one)
        else:
            nn.init.zeros_(weights[0])
        return
    w_in, w_out = weights
    scale = 1.5 if network.kind == "gated_mlp" else 3.0  # the slope of SiLU·up at an open gate is 1.76, GELU's at 0: ½
    # nearly zero: at std 0.02 the read of an empty memory already drowns a needle written into a long chunk
    nn.init.normal_(w_in, std=0.002)
    for head in w_out:
        nn.init.orthogonal_(head, gain=scale)
    gate, up = w_in.chunk(2, dim=-1) if network.kind == "gated_mlp" else (None, w_in)
    if weight_norm:
        up.mul_(of_one / 0.002)
    if gate is not None:
        gate.mul_(50.0)
        gate[:, 0] = 2.0 / constant
