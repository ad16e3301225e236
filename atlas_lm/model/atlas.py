"""AtlasLM: tokens → logits. The page to read first.

    x = embed(tokens)
    for each block:                                        block.py
        y = RMSNorm(x)
        x = x + W_o fuse(window attention(y), memory(y))   attention.py, memory/hierarchy.py
        x = x + SwiGLU(RMSNorm(x))
    logits = RMSNorm(x) embedᵀ

The memory learns while it reads, by the same code in training, eval() and inference_mode(). Called with a state the
model streams: prefill with any number of tokens, then decode one by one, at constant memory.
"""

# B batch, T tokens, M model width, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

from atlas_lm.config.model import ModelConfig
from atlas_lm.memory.cache import Cache, Snapshot
from atlas_lm.memory.fast_memory import MemorySpec
from atlas_lm.memory.hierarchy import Hierarchy, HierarchyState
from atlas_lm.memory.host_reads import may_look
from atlas_lm.memory.network import Network
from atlas_lm.memory.projection import ProjectionState
from atlas_lm.memory.state import Gates, MemoryState, Rule, Tokens
from atlas_lm.model import documents
from atlas_lm.model.attention import AttentionState
from atlas_lm.model.block import Block, BlockState, MemoryBranch
from atlas_lm.model.gated_delta import DeltaSpec, spec_of_state
from atlas_lm.model.norm import RMSNorm
from atlas_lm.model.session import Session

State = tuple[BlockState, ...]
# torch.save(state) and torch.load(path, weights_only=True): these hold tensors, numbers and names alone
torch.serialization.add_safe_globals(
    [
        AttentionState, BlockState, Cache, Gates, HierarchyState, MemoryState, Network, ProjectionState, Rule, Snapshot,
        Tokens,
    ]
)  # fmt: skip


class Output(NamedTuple):
    """What a forward pass returns."""

    logits: Tensor  # (B, T, V)
    gates: tuple[Tensor, ...]  # per layer with a memory (B, T, H·D): the fusion gates
    state: State | None  # after the last token, where a state was given


def detach_state(state: State) -> State:
    """The same state without its graph: what a stream that is trained piece by piece carries to the next piece."""
    return tuple(_detach(block) for block in state)


def _detach(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if not isinstance(value, tuple):
        return value
    parts = [_detach(part) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def memory_spec(config: ModelConfig) -> MemorySpec:
    """The memory part of a model config."""
    return MemorySpec(
        dim=config.dim,
        heads=config.memory_heads or config.heads,
        head_dim=config.memory_head_dim,
        local_chunks=tuple(config.local_chunks),
        global_chunk=config.global_chunk,
        shard=config.shard,
        network=config.network,
        residual=config.residual,
        features=config.features,
        rank=config.rank,
        hidden=config.memory_hidden,
        context=config.context,
        update=config.update,
        newton_schulz_steps=config.newton_schulz_steps,
        projection=config.projection,
        persistent_keys=config.persistent_keys,
        eta_max=config.eta_max,
        half_life=config.half_life,
        radius=config.radius,
        half_life_least=config.half_life_least,
        local_network=config.local_network,
        local_update=config.local_update,
        local_features=config.local_features,
        local_rank=config.local_rank,
        momentum=config.momentum,
        answers=config.answers,
        write_gate=config.write_gate,
        weight_norm=config.weight_norm,
        cached_states=config.cached_states,
    )


def delta_spec(config: ModelConfig) -> DeltaSpec:
    """A gated delta net with as many fast weights as our memories have, or as many as half the feed-forward pays."""
    twin = ModelConfig(**{**vars(config), "memory": "atlas"})
    hidden = own_ffn_hidden(config)
    with torch.device("meta"):
        memories = Hierarchy(memory_spec(twin)).memories()
        fast = sum(weight.numel() for memory in memories for weight in memory.weights())
        spec = spec_of_state(config.dim, config.heads * config.head_dim, fast)
        most = parameters_of(make_block(twin, memory_spec(twin), hidden))
        while spec.heads > 1 and parameters_of(make_block(config, spec, hidden // 2)) > most:
            spec = spec._replace(heads=spec.heads - 1)
    return spec


def block_spec(config: ModelConfig, held: bool = True) -> MemorySpec | DeltaSpec | None:
    """What the memory of a block is built from; None for a block that holds none. ValueError: an unknown memory."""
    if config.memory == "none" or not held:
        return None
    if config.memory == "atlas":
        return memory_spec(config)
    if config.memory != "gated_delta":
        raise ValueError(f"unknown memory {config.memory!r}; choose atlas, gated_delta or none")
    return delta_spec(config)


def make_block(config: ModelConfig, spec: MemorySpec | DeltaSpec | None, hidden: int) -> Block:
    return Block(
        spec, config.dim, config.heads, config.head_dim, hidden, config.window, config.rope_base, config.conv,
        config.fusion, config.attention_conv, config.share_qkv,
    )  # fmt: skip


def parameters_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def own_ffn_hidden(config: ModelConfig) -> int:
    """Hidden width of the feed-forward beside our memory."""
    return max(1, round(config.ffn_multiple * config.dim))


def ffn_hidden(config: ModelConfig, held: bool = True) -> int:
    """Hidden width of the feed-forward: with another memory, or none, as wide as makes the parameters equal."""
    hidden = own_ffn_hidden(config)
    if config.memory == "atlas":
        return hidden
    twin = ModelConfig(**{**vars(config), "memory": "atlas"})
    with torch.device("meta"):
        ours, theirs = (make_block(c, block_spec(c, held), hidden) for c in (twin, config))
        return max(1, hidden + round((parameters_of(ours) - parameters_of(theirs)) / (3 * config.dim)))


class AtlasLM(nn.Module):
    """A language model whose blocks hold a memory that learns from the text it reads."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        check(config)
        self.config = config
        self.embed = nn.Embedding(vocab_size, config.dim)
        holds = [config.memory_layers is None or i in config.memory_layers for i in range(config.layers)]
        sizes = {held: (block_spec(config, held), ffn_hidden(config, held)) for held in set(holds)}
        self.blocks = nn.ModuleList(make_block(config, *sizes[held]) for held in holds)
        self.norm = RMSNorm(config.dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """What this module owns and scales; after `to_empty` call `initialise` instead, which begins with the parts."""
        nn.init.normal_(self.embed.weight, std=self.config.dim**-0.5)
        # tied embeddings: the stream starts as the token's own embedding, whose logit would be √dim
        nn.init.constant_(self.norm.weight, 2 * self.config.dim**-0.5)
        for block in self.blocks:
            assert isinstance(block, Block)
            for linear in (block.out, block.ffn.down):
                linear.weight.mul_((2 * self.config.layers) ** -0.5)

    def initialise(self) -> None:
        """Every parameter and buffer as a new model has them, for one that was built on device meta.

        Parts come before what they are part of, which scales what they drew; in another order every tensor gets
        values too, but not these.
        """

        def reset(part: nn.Module) -> None:
            if callable(again := getattr(part, "reset_parameters", None)):
                again()

        self.apply(reset)

    def stream(self, batch: int = 1) -> Session:
        """A stream that has read nothing, as an object that reads, freezes, forks and saves its state."""
        return Session(self, batch)

    def initial_state(self, batch: int) -> State:
        """The state of `batch` streams that have seen nothing. Its size does not grow with what they will see."""
        if batch < 0:
            raise ValueError(f"the batch must not be negative, got {batch}")
        return tuple(block.initial_state(batch) for block in self.blocks)  # type: ignore[operator]

    def forward(
        self,
        tokens_BT: Tensor,
        state: State | None = None,
        document_start_BT: Tensor | None = None,
        restart_BT: Tensor | None = None,
        write: bool = True,
    ) -> Output:
        """(B, T) token ids → logits (B, T, V) of the next tokens.

        Without a state: training and evaluation, local memories restart at each shard. With one: streaming, no
        resets but at document starts where `reset_at_document` asks for them: there everything restarts, and a
        packed document is the document alone. `restart_BT` (bool), without a state: there every memory restarts,
        whatever the configuration; attention sees what it always sees. `write` False: the memories answer and neither
        learn nor forget. ValueError for a state of another model or batch (one of another precision is cast), for
        tokens that are no (B, T) ids of the vocabulary, for restarts in a stream, and for documents that start in some
        of its rows and not in others.
        """
        self._check_tokens(tokens_BT, document_start_BT)
        layers = len(self.blocks)
        if state is not None and len(state) != layers:
            raise ValueError(f"the state has {len(state)} layers, the model {layers}; start from its initial_state")
        if state is not None and restart_BT is not None:
            raise ValueError("restarts are for whole sequences: in a stream take the memories of a new initial_state")
        starts = document_start_BT if self.config.reset_at_document else None
        if starts is None or not starts.numel():
            return self._read(tokens_BT, state, restart_BT, write)
        if state is None:
            return self._documents(tokens_BT, starts, restart_BT, write)
        outputs = []
        for start, end, begins in documents.cuts(starts):
            state = self.initial_state(tokens_BT.size(0)) if begins else state
            outputs.append(self._read(tokens_BT[:, start:end], state, None, write))
            state = outputs[-1].state
        logits, *gates = (
            torch.cat(parts, dim=1) for parts in zip(*((o.logits, *o.gates) for o in outputs), strict=True)
        )
        return Output(logits, tuple(gates), state)

    def _documents(self, tokens_BT: Tensor, starts_BT: Tensor, restart_BT: Tensor | None, write: bool) -> Output:
        """Every document by itself."""
        rows = documents.apart(starts_BT, any(isinstance(block, FSDPModule) for block in self.blocks))
        outputs = [
            self._read(row.take(tokens_BT), None, None if restart_BT is None else row.take(restart_BT), write)
            for row in rows
        ]
        parts = zip(*((output.logits, *output.gates) for output in outputs), strict=True)
        logits, *gates = (documents.together(rows, part, tokens_BT.shape) for part in parts)
        return Output(logits, tuple(gates), None)

    def _read(self, tokens_BT: Tensor, state: State | None, restart_BT: Tensor | None, write: bool) -> Output:
        """As `forward`, of sequences without documents."""
        x = self.embed(tokens_BT) * self.config.dim**0.5
        gates, after = [], []
        for i, block in enumerate(self.blocks):
            run = self._checkpointed(block) if state is None else block
            x, gate, block_state = run(x, None if state is None else state[i], restart_BT, write)
            after.append(block_state)
            if gate is not None:
                gates.append(gate)
        logits = nnf.linear(self.norm(x), self.embed.weight)
        return Output(logits, tuple(gates), None if state is None else tuple(after))

    def _checkpointed(self, block: nn.Module) -> Callable[..., Any]:
        """The block, in training as `model.checkpoint` has it."""
        if self.config.checkpoint == "none" or not (self.training and torch.is_grad_enabled()):
            return block
        return partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn in a block

    def _check_tokens(self, tokens_BT: Tensor, document_start_BT: Tensor | None) -> None:
        if tokens_BT.dim() != 2 or tokens_BT.size(1) < 1:
            shape = tuple(tokens_BT.shape)
            raise ValueError(f"tokens must be (batch, T) with T at least 1, got {shape}; one sequence is tokens[None]")
        if tokens_BT.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens must be ids of torch.int64 or torch.int32, got {tokens_BT.dtype}")
        starts = document_start_BT
        if starts is not None and (starts.shape != tokens_BT.shape or starts.dtype != torch.bool):
            raise ValueError(
                f"document starts must be torch.bool of the tokens' shape {tuple(tokens_BT.shape)}, got "
                f"{tuple(starts.shape)} of {starts.dtype}"
            )
        # on another device the look would wait for it, and the look-up raises there itself
        if may_look(tokens_BT) and tokens_BT.numel() and not torch.compiler.is_compiling():
            least, most = (int(x) for x in tokens_BT.aminmax())
            if least < 0 or most >= self.embed.num_embeddings:
                wrong = least if least < 0 else most
                raise ValueError(
                    f"token {wrong} is outside the vocabulary of {self.embed.num_embeddings}; "
                    "was the text encoded by the model's own tokenizer?"
                )

    @property
    def local_chunks(self) -> tuple[int, ...]:
        """C_L of the local memories; empty where there are none."""
        return next(iter(self.hierarchies())).local_chunks if self.config.memory == "atlas" else ()

    def set_local_chunks(self, chunks: tuple[int, ...] | list[int]) -> None:
        """Change the chunk sizes of the local memories at run time (M13).

        ValueError unless there is a whole number from 1 to the shard's length for each.
        """
        chunks = tuple(chunks)
        if self.config.memory != "atlas" and chunks:
            raise ValueError(f"the model has no local memory to set chunk sizes {list(chunks)} of")
        too_long = [size for size in chunks if size > self.config.shard]
        if too_long:
            raise ValueError(
                f"a chunk of {too_long[0]} tokens is longer than a shard, model.shard={self.config.shard}, at which "
                "local memories start again: lower it"
            )
        for hierarchy in self.hierarchies():
            hierarchy.set_local_chunks(chunks)

    def hierarchies(self) -> Iterator[Hierarchy]:
        """The memories of each layer."""
        return (block.memory.hierarchy for block in self.blocks if isinstance(block.memory, MemoryBranch))


def check(config: ModelConfig) -> None:
    """Raise ValueError naming the first size that no model can have."""
    for name in ("dim", "layers", "heads", "head_dim", "memory_hidden"):
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"model.{name} must be at least 1, got {value}")
    if config.head_dim % 2:
        raise ValueError(f"model.head_dim must be even for rotary positions, got {config.head_dim}")
    if config.ffn_multiple <= 0:
        raise ValueError(f"model.ffn_multiple must be positive, got {config.ffn_multiple}")
