"""The memory hierarchy of TNT: one global memory and N local ones (M8; TNT eq 5–7, 13–15).

The global memory takes long chunks, is carried across the whole sequence and read with the raw query at the weights
of its chunk's start. Each local memory takes short chunks, restarts from its W_init at every shard, and is read with
the projected query. Shards of one sequence run in parallel, as batch. The outputs are summed, those of local memories
weighed by a gate where `answers` is gated. With `cached_states` the global memory is also read as it was at the ends of
the last shards (`cache.py`).

With a state (streaming) nothing is reset: prefill and decode see one endless shard (M14).
"""

# B batch, H heads, T tokens, D head dim, F feature dim, E hidden dim, N local memories

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from atlas_lm.memory.cache import Asked, Cache, empty_cache, fit_cache
from atlas_lm.memory.cache import scan as scan_with_cache
from atlas_lm.memory.chunked import scan, scan_shard
from atlas_lm.memory.fast_memory import FastMemory, MemorySpec, unchanging
from atlas_lm.memory.features import Features, build_features
from atlas_lm.memory.projection import ProjectionState, persistent_state, project
from atlas_lm.memory.state import Gates, MemoryState, Tokens, check_rule, fit, initial_state, wide_logits


class HierarchyState(NamedTuple):
    """Everything that a layer's memory carries between two calls."""

    global_memory: MemoryState | None
    local_memories: tuple[MemoryState, ...]
    projection: ProjectionState
    cache: Cache | None = None  # of a model with cached states


ANSWERS = ("sum", "gated")


class Hierarchy(nn.Module):
    """At most one global and N local memories over shared q, k, v, feature map and persistent keys."""

    # bias of the gates on local answers: 1/20 of them at first. Summed as they are they drown the global memory's
    SHUT = -3.0
    PRESENT = 3.0  # of the logit for the memory as it is, beside cached ones

    def __init__(self, spec: MemorySpec) -> None:
        super().__init__()
        chunk = spec.global_chunk
        if spec.shard < 1 or (chunk is not None and (chunk < 1 or spec.shard % chunk)):
            near = max(1, spec.shard // max(1, chunk or 1)) * max(1, chunk or 1)
            raise ValueError(
                f"the shard length must be a multiple of the global chunk, got shard {spec.shard} and global_chunk "
                f"{chunk}; set shard to {near}"
            )
        if chunk is None and not spec.local_chunks:
            raise ValueError(
                "global_chunk=null and local_chunks=[] leave no memory: set one of them. The model without a memory is "
                "model.memory=none, which takes its size from the memory that these describe"
            )
        if spec.persistent_keys < 0:
            raise ValueError(f"persistent_keys must not be negative, got {spec.persistent_keys}")
        if not 0 < spec.eta_max <= 1:
            raise ValueError(f"eta_max must lie in (0, 1], got {spec.eta_max}; above 1 a write overshoots its error")
        if not spec.half_life > 0:
            raise ValueError(f"half_life must be a positive number of tokens, got {spec.half_life}")
        if not 1e-2 <= spec.half_life <= 1e12:
            raise ValueError(f"half_life must lie between 0.01 and 1e12 tokens, got {spec.half_life}")
        if not 0 <= spec.half_life_least < spec.half_life:
            raise ValueError(
                f"half_life_least must lie in [0, half_life), got {spec.half_life_least} and half_life "
                f"{spec.half_life}: lower it"
            )
        if spec.answers not in ANSWERS:
            raise ValueError(f"unknown answers {spec.answers!r}; choose sum or gated")
        if spec.cached_states and chunk is None:
            raise ValueError(
                f"cached_states={spec.cached_states} are states of the global memory, and global_chunk=null leaves "
                "none: set cached_states: 0 or a global_chunk"
            )
        self.spec = spec
        self.features = build_features(spec.features, spec.head_dim, spec.rank)
        self.local_features: Features | None = None
        if spec.local_features is not None and spec.local_chunks:
            own = build_features(spec.local_features, spec.head_dim, spec.local_rank)
            if chunk is None:  # the only map: another would be parameters that nothing learns
                self.features = own
            else:
                self.local_features = own
        self.projects = bool(spec.local_chunks) and spec.projection
        # without a projection keys would be parameters that nothing learns
        self.persistent_keys = nn.Parameter(
            torch.empty(spec.heads, spec.persistent_keys if self.projects else 0, spec.head_dim),
            requires_grad=self.projects,
        )
        self.global_memory = None if chunk is None else FastMemory(spec, chunk, "chunk", self.features)
        self.local_memories = nn.ModuleList(
            FastMemory(spec.of_local(), c, "token", self.features_of_local()) for c in spec.local_chunks
        )
        gated = spec.answers == "gated" and len(self.memories()) > 1
        self.answer_gates = nn.Linear(spec.dim, len(spec.local_chunks) * spec.heads) if gated else None
        cached = spec.cached_states > 0
        self.cache_gates = nn.Linear(spec.dim, spec.heads * (spec.head_dim + 1)) if cached else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.cache_gates is not None:
            nn.init.normal_(self.cache_gates.weight, std=self.spec.dim**-0.5)
            nn.init.zeros_(self.cache_gates.bias)
            self.cache_gates.bias[-self.spec.heads :] = self.PRESENT
        self.persistent_keys.normal_(std=self.spec.head_dim**-0.5)
        if self.answer_gates is not None:
            nn.init.normal_(self.answer_gates.weight, std=0.02)
            nn.init.constant_(self.answer_gates.bias, self.SHUT)

    @property
    def local_chunks(self) -> tuple[int, ...]:
        return tuple(memory.rule.chunk for memory in self._local())

    def features_of_local(self) -> Features:
        """The feature map of the local memories: their own, or the one that all share."""
        return self.features if self.local_features is None else self.local_features

    def _local(self) -> list[FastMemory]:
        return list(self.local_memories)  # type: ignore[arg-type]

    def memories(self) -> list[FastMemory]:
        """The global one, where there is one, first."""
        return self._local() if self.global_memory is None else [self.global_memory, *self._local()]

    def set_local_chunks(self, chunks: tuple[int, ...]) -> None:
        """Change C_L of every local memory with no rebuild (M13), to any size ≥ 1. Prefill streams again."""
        if len(chunks) != len(self.local_memories):
            raise ValueError(
                f"the model has {len(self.local_memories)} local memories, got {len(chunks)} sizes: {list(chunks)}"
            )
        wrong = [chunk for chunk in chunks if isinstance(chunk, bool) or chunk != int(chunk)]
        if wrong:
            raise ValueError(f"a chunk size must be a whole number of tokens, got {wrong[0]!r}")
        rules = [check_rule(m.rule._replace(chunk=int(c))) for m, c in zip(self._local(), chunks, strict=True)]
        for memory, rule in zip(self._local(), rules, strict=True):  # all of them or none
            memory.rule = rule

    def initial_state(self, batch: int, restart: bool = False) -> HierarchyState:
        """A stream that has seen nothing. `restart`: its calls will mark document starts."""

        def start(memory: FastMemory, features: Features) -> MemoryState:
            return initial_state(memory.rule, memory.weights(), batch, features.dim_out, restart)

        whole = None if self.global_memory is None else start(self.global_memory, self.features)
        local = tuple(start(memory, self.features_of_local()) for memory in self._local())
        cached = None
        if self.global_memory is not None and self.cache_gates is not None:
            cached = empty_cache(self.global_memory.weights(), batch, self.spec.cached_states)
        return HierarchyState(whole, local, persistent_state(self.persistent_keys, batch), cached)

    def _fit(self, given: ProjectionState, k_BHTD: Tensor) -> ProjectionState:
        sizes = dict(zip(("batch", "heads"), k_BHTD.shape[:2], strict=True))
        wide, D = torch.promote_types(k_BHTD.dtype, torch.float32), k_BHTD.size(-1)
        M = fit("sum of keys", given.M, sizes | {"channels": D, "channels again": D}, k_BHTD, wide)
        return ProjectionState(M, fit("sum of squares", given.n, sizes, k_BHTD, wide))

    # Chunks are cut by the number of tokens: compiled for one length after the other, inductor fails at the second.
    @torch.compiler.disable
    def forward(
        self,
        x_BTM: Tensor,
        q_BHTD: Tensor,
        k_BHTD: Tensor,
        v_BHTD: Tensor,
        state: HierarchyState | None = None,
        restart_BT: Tensor | None = None,
        write: bool = True,
    ) -> tuple[Tensor, HierarchyState | None]:
        """Learn every token and answer every query: (B, H, T, D). q and k have unit norm; x opens the gates.

        Without a state the local memories restart at each shard; with one nothing is reset and a new one comes back.
        `restart_BT` (bool) marks document starts: there every memory restarts. `write` False: memories and projection
        answer as they are, whatever the tokens.
        ValueError for a state of another hierarchy or batch, and where there are no tokens.
        """
        if q_BHTD.dim() != 4 or q_BHTD.size(2) < 1 or not q_BHTD.shape == k_BHTD.shape == v_BHTD.shape:
            shapes = ", ".join(str(tuple(x.shape)) for x in (q_BHTD, k_BHTD, v_BHTD))
            raise ValueError(f"q, k and v must be (batch, heads, T, channels) with T at least 1, got {shapes}")
        B, H, T, D = q_BHTD.shape
        if (self.spec.heads, self.spec.head_dim) != (H, D) or x_BTM.shape != (B, T, self.spec.dim):
            raise ValueError(
                f"the memory has {self.spec.heads} heads of {self.spec.head_dim} channels and gates of "
                f"{self.spec.dim}, got q {tuple(q_BHTD.shape)} and x {tuple(x_BTM.shape)}"
            )
        if state is not None and len(state.local_memories) != len(self.local_memories):
            raise ValueError(
                f"the state has {len(state.local_memories)} local memories, this model {len(self.local_memories)}; "
                "start from initial_state of this model"
            )
        if state is not None and (state.global_memory is None) != (self.global_memory is None):
            has, lacks = ("state", "model") if self.global_memory is None else ("model", "state")
            raise ValueError(f"the {has} has a global memory, the {lacks} has none; start from this model's own state")
        if state is not None and state.cache is not None and self.cache_gates is None:
            raise ValueError("the state has cached states, the model has none; start from this model's own state")
        restart = None if restart_BT is None else restart_BT.unsqueeze(1).expand(B, H, T)
        y_BHTD: Tensor | None = None
        global_state: MemoryState | None = None
        cached: Cache | None = None
        phi_k: Tensor | None = None
        if (memory := self.global_memory) is not None:
            phi_k, phi_q = self.features(k_BHTD), self.features(q_BHTD)
            tokens = Tokens(k_BHTD, phi_k, v_BHTD, memory.open(x_BTM) if write else unchanging(x_BTM, H), restart)
            if self.cache_gates is not None:
                y_BHTD, global_state, cached = self._with_cache(x_BTM, state, q_BHTD, phi_q, tokens, write)
            elif state is None or state.global_memory is None:
                y_BHTD = scan_shard(memory.rule, memory.weights(), q_BHTD, phi_q, tokens)
            else:
                y_BHTD, global_state = scan(memory.rule, state.global_memory, memory.weights(), q_BHTD, phi_q, tokens)
            if not self.local_memories:
                return y_BHTD, None if state is None else state._replace(global_memory=global_state, cache=cached)

        features = self.features_of_local()
        if phi_k is None or features is not self.features:
            phi_k = features(k_BHTD)
        shards = _Shards(T, self.spec.shard if state is None else T)
        q, k, v, phi = (shards.fold(x) for x in (q_BHTD, k_BHTD, v_BHTD, phi_k))
        restart = None if restart is None else shards.fold(restart)
        persistent = persistent_state(self.persistent_keys, q.size(0))
        projection = persistent if state is None else self._fit(state.projection, k)
        if self.projects:
            q, projection = project(q, k if write else torch.zeros_like(k), projection, persistent, restart)
        phi_q = features(q)
        shares = (
            None if self.answer_gates is None else wide_logits(self.answer_gates, x_BTM).sigmoid().mT.split(H, dim=1)
        )
        local_states = []
        for n, memory in enumerate(self._local()):
            opened = memory.open(x_BTM) if write else unchanging(x_BTM, H)
            gates = Gates(*(shards.fold(gate) for gate in opened))
            tokens = Tokens(k, phi, v, gates, restart)
            if state is None:
                y = scan_shard(memory.rule, memory.weights(), q, phi_q, tokens)
            else:
                y, after = scan(memory.rule, state.local_memories[n], memory.weights(), q, phi_q, tokens)
                local_states.append(after)
            y = shards.unfold(y)
            if shares is not None:
                y = y * shares[n].unsqueeze(-1).to(y.dtype)
            y_BHTD = y if y_BHTD is None else y_BHTD + y
        assert y_BHTD is not None  # there is at least one memory
        return y_BHTD, None if state is None else HierarchyState(global_state, tuple(local_states), projection, cached)

    def _with_cache(
        self, x_BTM: Tensor, given: HierarchyState | None, q_BHTD: Tensor, phi_q: Tensor, tokens: Tokens, write: bool
    ) -> tuple[Tensor, MemoryState, Cache]:
        """What the global memory answers beside its cached states."""
        memory, spec = self.global_memory, self.spec
        assert memory is not None
        assert self.cache_gates is not None
        (B, H, _, D), initial = q_BHTD.shape, memory.weights()
        if given is None or given.global_memory is None:
            before = initial_state(memory.rule, initial, B, phi_q.size(-1), tokens.restart is not None)
            cache = empty_cache(initial, B, spec.cached_states)
        else:
            if given.cache is None:
                raise ValueError("the state has no cached states, the model has; start from this model's own state")
            before, cache = given.global_memory, given.cache
        cache = fit_cache(cache, initial, spec.cached_states, spec.shard, q_BHTD)
        u, present = wide_logits(self.cache_gates, x_BTM).split([H * D, H], dim=-1)
        asked = Asked(u.unflatten(-1, (H, D)).transpose(1, 2), present.mT)
        return scan_with_cache(
            scan, memory.rule, spec.shard, before, cache, initial, q_BHTD, phi_q, tokens, asked, write
        )


class _Shards(NamedTuple):
    """Cut sequences into shards that run as batch, and back."""

    tokens: int
    shard: int

    def fold(self, x: Tensor) -> Tensor:
        """(B, H, T, …) → (B·S, H, shard, …), zeros after the end."""
        length = min(self.shard, self.tokens)
        missing = -self.tokens % length
        if missing:
            x = nnf.pad(x, (0, 0, 0, missing) if x.dim() == 4 else (0, missing))
        return x.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)

    def unfold(self, y: Tensor) -> Tensor:
        """(B·S, H, shard, …) → (B, H, T, …)."""
        count = -(-self.tokens // y.size(2))
        return y.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)[:, :, : self.tokens]
