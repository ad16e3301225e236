"""What goes in and out of a memory: its rule (static), gates (per token) and state (M5, M14)."""

# B batch, H heads, T tokens, D head dim, F feature dim

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from atlas_lm.memory.network import Network, Weights, renormalised, shrink
from atlas_lm.memory.newton_schulz import STEPS


class Rule(NamedTuple):
    """How a memory learns. Everything that changes no tensor's shape, so chunk sizes may change at run time (M13)."""

    network: Network
    chunk: int  # C: tokens whose gradients are taken at the same weights
    context: int = 1  # c of the Omega rule: each g_t sums the last c tokens; 1 is the delta rule
    update: str = "gradient"  # U of ATLAS eq 33: gradient (identity) or newton_schulz; delta: see `delta.py`
    read: str = (
        "token"  # token: M(W_t; q_t), inside the chunk too; chunk: M(W_ξ; q_t), the weights of the chunk's start
    )
    radius: float = float("inf")  # bound on the root mean square of the entries of W − W_init, per matrix
    newton_schulz_steps: int = STEPS
    momentum: bool = True  # False: S_t is the gradient itself, so that none is carried
    weight_norm: bool = False  # after each chunk every column of W is as long as that of W_init

    @property
    def halo(self) -> int:
        """Tokens before the chunk whose gradients its first windows still need."""
        return self.context - 1

    @property
    def has_momentum(self) -> bool:
        return self.momentum and self.update != "delta"

    @property
    def kept(self) -> int:
        """Tokens that a state holds: the halo and an unfinished chunk. The delta rule finishes with every token."""
        return 0 if self.update == "delta" else self.halo + self.chunk - 1


def check_rule(rule: Rule) -> Rule:
    """Raise ValueError naming the first value that no memory can run with."""
    if rule.chunk < 1:
        raise ValueError(f"chunk size must be at least 1, got {rule.chunk}")
    if rule.context < 1:
        raise ValueError(f"Omega context must be at least 1 token, got {rule.context}; 1 is the delta rule")
    if rule.update not in ("gradient", "newton_schulz", "delta"):
        raise ValueError(f"unknown memory update {rule.update!r}; choose gradient, newton_schulz or delta")
    if rule.update == "delta" and (rule.network.kind != "linear" or rule.context != 1):
        raise ValueError(
            f"update delta solves the chunk of a linear memory with context 1, got network {rule.network.kind} and "
            f"context {rule.context}: set network: linear and context: 1, or update: gradient (for local memories "
            "local_network and local_update)"
        )
    if rule.update == "delta" and rule.weight_norm:
        raise ValueError(
            "update delta corrects what was read at the very weights that it wrote, and weight_norm would turn them: "
            "set weight_norm: false or update: gradient (for local memories local_update)"
        )
    if rule.read not in ("token", "chunk"):
        raise ValueError(f"unknown memory read {rule.read!r}; choose token or chunk")
    if not rule.radius > 0:
        raise ValueError(f"the radius of fast weights must be positive, got {rule.radius}")
    return rule


class Gates(NamedTuple):
    """Input-dependent coefficients of ATLAS eq 33, each (B, H, T) in [0, 1]."""

    alpha: Tensor  # retention: W_t = α_t W_{t−1} − …
    eta: Tensor  # write strength: share of the error that one write may correct
    theta: Tensor  # momentum
    gamma: Tensor  # weight of the token in the windows that see it


class Tokens(NamedTuple):
    """What a memory has to know of a token in order to learn it."""

    k: Tensor  # (B, H, T, D) unit norm
    phi: Tensor  # (B, H, T, F) φ(k)
    v: Tensor  # (B, H, T, D)
    gates: Gates
    restart: Tensor | None = None  # (B, H, T) bool: the memory restarts from W_init at this token


class MemoryState(NamedTuple):
    """A memory between two calls. Its size does not depend on how many tokens it has seen.

    The gradients of a chunk are all taken at the weights of its start, so the tokens of an unfinished chunk are kept
    (at most C−1, after a halo of c−1) until it is full; what was read meanwhile is what a longer call would have read.
    """

    change: Weights  # W_ξ − W_init at the start of the unfinished chunk, per layer (B, H, rows, columns)
    momentum: Weights  # S_ξ, alike; () of a rule without momentum
    tail: Tokens  # the halo, then the unfinished chunk, zeros after it: c−1 + C−1 tokens
    filled: int  # tokens in the unfinished chunk
    rule: Rule  # of the memory that made it


def initial_state(rule: Rule, initial: Weights, batch: int, features: int, restart: bool = False) -> MemoryState:
    """A memory that has seen nothing: W = W_init, whose shapes `initial` (H, rows, columns) gives, and S = 0."""
    H, _, D = initial[-1].shape
    B = batch
    zeros = initial[-1].detach().new_zeros
    wide = torch.promote_types(initial[-1].dtype, torch.float32)
    nothing = tuple(zeros(B, *w.shape, dtype=wide) for w in initial)
    length = rule.kept
    per_token = zeros(B, H, length, dtype=wide)
    tail = Tokens(
        zeros(B, H, length, D),
        zeros(B, H, length, features),
        zeros(B, H, length, D),
        Gates(per_token, per_token, per_token, per_token),
        per_token.bool() if restart else None,
    )
    return MemoryState(nothing, nothing if rule.has_momentum else (), tail, 0, rule)


def without_momentum(rule: Rule, tokens: Tokens) -> Tokens:
    """θ = 0 where the rule has no momentum, whatever the gates say."""
    if rule.has_momentum:
        return tokens
    return tokens._replace(gates=tokens.gates._replace(theta=torch.zeros_like(tokens.gates.theta)))


def map_tokens(f, *tokens: Tokens) -> Tokens:
    """Apply `f` field by field."""
    first = tokens[0]
    gates = Gates(*(f(*parts) for parts in zip(*(t.gates for t in tokens), strict=True)))
    restart = None if first.restart is None else f(*(t.restart for t in tokens))
    k, phi, v = (f(*(getattr(t, name) for t in tokens)) for name in ("k", "phi", "v"))
    return Tokens(k, phi, v, gates, restart)


def without_autocast(like: Tensor) -> AbstractContextManager:
    """No autocast on the device of a tensor; device meta knows none."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def wide_logits(linear: nn.Linear, x: Tensor) -> Tensor:
    """What a layer makes of x (…, channels), in at least float32, autocast or not: for gates.

    At the logit of a half-life of 4,096 tokens bfloat16 has steps of 6 %.
    """
    wide = torch.promote_types(torch.promote_types(linear.weight.dtype, x.dtype), torch.float32)
    with without_autocast(x):
        return nnf.linear(x.to(wide), linear.weight.to(wide), linear.bias.to(wide))


@torch.compiler.disable  # it looks at a value
def all_finite(x: Tensor) -> bool:
    """Whether to trust masked products (B, H, T, D): a mask that is multiplied with leaves 0 · NaN of later tokens.

    False for some that are finite as well: their sum may overflow.
    """
    return x.size(2) == 1 or x.is_meta or math.isfinite(x.detach().sum().item())


def fit(name: str, x: Tensor, sizes: dict[str, int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of a state in the precision of this call: `dtype`, or that of `like`, whose device it must be on.

    `sizes`: the shape that this call needs, by what each axis is. ValueError for another shape, device or kind of
    number: the state is then of another model or batch.
    """
    dtype = dtype or like.dtype
    if x.shape != tuple(sizes.values()):
        wrong = f"is {tuple(x.shape)}, this model and these tokens need {tuple(sizes.values())} ({', '.join(sizes)})"
    elif x.device != like.device:
        wrong = f"lies on {x.device}, the tokens on {like.device}"
    elif x.dtype.is_floating_point != dtype.is_floating_point or x.is_complex():
        wrong = f"has numbers of {x.dtype}, not of {dtype}"
    else:
        return x.to(dtype)
    raise ValueError(f"the state does not fit: its {name} {wrong}; start from initial_state of this model and batch")


def fit_state(rule: Rule, state: MemoryState, initial: Weights, tokens: Tokens) -> MemoryState:
    """A state in the precision of these tokens. ValueError for one of another memory or batch, naming what differs."""
    if state.rule != rule:
        pairs = zip(Rule._fields, state.rule, rule, strict=True)
        differ = ", ".join(f"{name} {old} instead of {new}" for name, old, new in pairs if old != new)
        raise ValueError(
            f"this state was made by another memory ({differ}) than this one of chunk {rule.chunk}, "
            f"context {rule.context}; prefill again"
        )
    if not 0 <= state.filled < rule.chunk:
        raise ValueError(f"the state's unfinished chunk holds {state.filled} tokens of {rule.chunk}; prefill again")
    if (state.tail.restart is None) != (tokens.restart is None):
        here, there = ("without", "with") if state.tail.restart is None else ("with", "without")
        raise ValueError(f"this state was made {here} document starts, these tokens come {there}; prefill again")
    momenta = len(initial) if rule.has_momentum else 0
    if len(state.change) != len(initial) or len(state.momentum) != momenta:
        raise ValueError(
            f"the state has {len(state.change)} fast matrices, the network {rule.network.kind} {len(initial)}; "
            "start from initial_state of this model"
        )
    B, H = tokens.phi.shape[:2]
    wide = torch.promote_types(tokens.k.dtype, torch.float32)

    def matrices(name: str, given: Weights) -> Weights:
        axes = [{"batch": B, "heads": H, "features or hidden": w.size(1), "outputs": w.size(2)} for w in initial]
        return tuple(fit(name, x, sizes, tokens.k, wide) for x, sizes in zip(given, axes, strict=False))

    def per_token(name: str, x: Tensor, like: Tensor) -> Tensor:
        sizes = {"batch": B, "heads": H, "tokens": rule.kept}
        return fit(name, x, sizes | ({"channels": like.size(3)} if like.dim() == 4 else {}), like)

    old, restart = state.tail, state.tail.restart
    if restart is not None and tokens.restart is not None:
        restart = per_token("document starts", restart, tokens.restart)
    tail = Tokens(
        per_token("keys", old.k, tokens.k),
        per_token("features", old.phi, tokens.phi),
        per_token("values", old.v, tokens.v),
        Gates(*(per_token("gates", x, y) for x, y in zip(old.gates, tokens.gates, strict=True))),
        restart,
    )
    return MemoryState(matrices("change", state.change), matrices("momentum", state.momentum), tail, state.filled, rule)


def append(rule: Rule, state: MemoryState, tokens: Tokens) -> Tokens:
    """The halo, the unfinished chunk and the new tokens in one row. The state fits (`fit_state`)."""
    known = rule.halo + state.filled
    return map_tokens(lambda old, new: torch.cat([old[:, :, :known], new], dim=2), state.tail, tokens)


def make_tail(rule: Rule, tokens: Tokens, filled: int) -> Tokens:
    """The end of a row of tokens as the tail of a state: halo and unfinished chunk, zero-padded to constant length."""
    keep = rule.halo + filled
    missing = rule.chunk - 1 - filled

    def cut(x: Tensor) -> Tensor:
        x = x[:, :, x.size(2) - keep :]
        return nnf.pad(x, (0, 0, 0, missing) if x.dim() == 4 else (0, missing))

    return map_tokens(cut, tokens)


def bounded(rule: Rule, initial: Weights, change: Weights) -> Weights:
    """Scale W − W_init back onto the rule's radius wherever its entries' root mean square exceeds it (M16), then give
    W the lengths of W_init where the rule has a weight norm.

    A projection onto a ball: whatever the finite inputs, gates, chunk size or precision, fast weights stay bounded.
    """
    inside = shrink(rule.network, change, rule.radius)
    return renormalised(rule.network, initial, inside) if rule.weight_norm else inside
