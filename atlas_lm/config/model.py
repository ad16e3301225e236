"""The settings of a model, typed and checked. What trains it has others, see `schema.py`."""

from dataclasses import dataclass
from typing import Any

from atlas_lm.config.fields import MISSING, check_values, choice, number


@dataclass
class ModelConfig:
    """One model. ValueError for a value outside its choices or range."""

    name: str = MISSING
    """What reports call it."""
    dim: int = number(minimum=1)
    """Width of the residual stream."""
    layers: int = number(minimum=1)
    """Blocks."""
    heads: int = number(minimum=1)
    """Heads of the attention, and of each memory unless `memory_heads` says otherwise."""
    head_dim: int = number(minimum=1)
    """Query, key and value width of one head."""
    memory_heads: int | None = number(None, minimum=1)
    """Heads of each memory, which share the width heads · head_dim: few wide ones hold more, many narrow ones cost
    less; null: as many as the attention has."""
    window: int = number(minimum=1)
    """Attention window, tokens; what lies further back only the memory knows."""
    ffn_multiple: float = number(minimum=0)
    """Hidden width of the SwiGLU feed-forward, as a multiple of `dim`."""
    fusion: str = choice("multiplicative", "normalised_product", "convex")
    """How attention and memory meet (M12)."""
    memory: str = choice("atlas", "gated_delta", "none")
    """The baselines have the parameters of the model with memory. gated_delta: a gated delta net with as many fast
    weights, or as many as half the feed-forward pays for; none: attention alone."""
    memory_layers: list[int] | None = None
    """Blocks that hold a memory, counted from 0; null: all of them."""
    local_chunks: list[int] = MISSING
    """Chunk size of each local memory, tokens; as many local memories as entries (M8)."""
    global_chunk: int | None = number(minimum=1)
    """Chunk size of the global memory, C_G, tokens; null: no global memory."""
    shard: int = number(minimum=1)
    """Tokens after which the local memories restart, S_L; a multiple of `global_chunk`."""
    network: str = choice("gated_mlp", "mlp", "linear")
    """Memory network: ATLAS eq 43, eq 42, or one matrix."""
    residual: bool = MISSING
    """Whether the memory network adds its raw input."""
    features: str = choice("linear", "quadratic", "sketch")
    """Feature map of keys and queries (M1)."""
    rank: int = number(minimum=1)
    """Features of the low-rank sketch; read by `features: sketch` alone."""
    memory_hidden: int = number(minimum=1)
    """Hidden width of the memory network, at least that of a memory's head: the answers of a narrower one lie in a
    subspace. The linear network has none."""
    context: int = number(minimum=1)
    """Omega context c, tokens: each inner gradient sums over the last c (M4); 1 is the delta rule."""
    update: str = choice("gradient", "newton_schulz", "delta")
    """U of ATLAS eq 33. delta: for `network: linear` with `context: 1`, every token's error is corrected at the weights
    that the tokens before it left, chunks solved exactly; no momentum."""
    local_network: str | None = choice("gated_mlp", "mlp", "linear", default=None)
    """Memory network of the local memories; null: that of the global one."""
    local_update: str | None = choice("gradient", "newton_schulz", "delta", default=None)
    """Update of the local memories; null: that of the global one."""
    local_features: str | None = choice("linear", "quadratic", "sketch", default=None)
    """A feature map of the local memories' own; null: they share that of the global one."""
    local_rank: int = number(191, minimum=1)
    """Features of its low-rank sketch; read by `local_features: sketch` alone."""
    momentum: bool = True
    """Whether the updates `gradient` and `newton_schulz` have one, with a gate of its own. Without, a memory's state is
    half as large."""
    answers: str = choice("sum", "gated", default="sum")
    """How the answers of a block's memories meet. gated: each token weighs those of the local memories, which are
    nearly shut at first; summed as they are they drown the global memory's."""
    newton_schulz_steps: int = number(5, minimum=1)
    """Iterations of Newton–Schulz (M6)."""
    projection: bool = True
    """Whether local memories are read with queries that are projected onto the keys of their shard (M9), or as they
    come."""
    persistent_keys: int = number(64, minimum=0)
    """Learned keys of the Q–K projection, N_p (M10); 0: none, a shard starts from its own keys alone."""
    eta_max: float = number(minimum=0)
    """Largest write strength, dimensionless: share of the error that one write may correct (M16)."""
    half_life: float = number(minimum=0)
    """Tokens after which the memory has forgotten half, as its gates start out."""
    half_life_least: float = number(0.0, minimum=0)
    """The shortest half-life that its gates can come to, tokens; 0: they can forget all at once."""
    cached_states: int = number(0, minimum=0)
    """So many states of the global memory, from the ends of the last shards, are read beside it, weighed by a gate
    (Memory Caching); a stream keeps them. 0: none."""
    write_gate: str = choice("sigmoid", "sparse", default="sigmoid")
    """sparse: a gate on writes that can come to exactly 0 and 1, so that a memory selects what it takes."""
    weight_norm: bool = False
    """Whether after each chunk every column of a fast matrix is given the length that it has in W_init, as in LaCT:
    meant for one memory with long chunks. Not for the update `delta`."""
    radius: float = number(minimum=0)
    """Bound on the root mean square of a fast matrix's entries."""
    conv: int = number(4, minimum=1)
    """Length of the causal convolution on the memory's queries, keys and values, tokens; 1 is none. Not read where
    they are the attention's."""
    attention_conv: int = number(1, minimum=1)
    """The same for the attention, whose keys then hold the token before from the start on; 1 is none."""
    share_qkv: bool = False
    """Whether the memory takes the attention's queries, keys and values, before their rotary positions, instead of
    projections of its own."""
    checkpoint: str = choice("none", "block", default="none")
    """block: a training step keeps the inputs of each block alone and computes the block again on the way back: the
    same gradients bit for bit, less memory, about a third more time."""
    reset_at_document: bool = MISSING
    """Whether a document is read as if it stood alone: attention, convolutions and memories restart there."""
    polarisation_cap: float = number(minimum=0)
    """Largest norm of the gate polarisation loss's gradient, as a fraction of the language-model gradient
    (M15); its weight comes from `callbacks.loss_weight_schedule`."""
    rope_base: float = number(minimum=1)
    """Base of the rotary position embedding."""

    @property
    def memory_head_dim(self) -> Any:
        """Width of a head of a memory; not a whole number where they cannot share the width evenly."""
        if not all(isinstance(x, int) for x in (self.memory_heads, self.heads, self.head_dim)):
            return self.head_dim
        width, heads = self.heads * self.head_dim, self.memory_heads or self.heads
        return width / heads if width % heads else width // heads

    def __post_init__(self) -> None:
        check_values(self, "model.")
        hidden, width = self.memory_hidden, self.memory_head_dim
        if isinstance(self.memory_heads, int) and isinstance(width, float):
            raise ValueError(
                f"model.memory_heads={self.memory_heads} must divide the width that heads share, model.heads · "
                f"model.head_dim = {self.heads * self.head_dim}: choose a divisor, or null"
            )
        deep = self.network != "linear" or self.local_network not in (None, "linear")
        if deep and isinstance(hidden, int) and isinstance(width, int) and hidden < width:
            raise ValueError(
                f"model.memory_hidden={hidden} must be at least the width of a memory's head, {width}, or what the "
                f"memory answers lies in a subspace: raise it to {width}, or leave it out"
            )
        if isinstance(self.memory_layers, list) and isinstance(self.layers, int):
            layers = self.memory_layers
            if not layers or len(set(layers)) < len(layers) or not all(0 <= i < self.layers for i in layers):
                raise ValueError(
                    f"model.memory_layers={list(layers)} must name blocks from 0 to {self.layers - 1}, each once; "
                    "null names all of them, model.memory=none is the model without"
                )
        if isinstance(self.local_chunks, list) and isinstance(self.shard, int):
            longest = max(self.local_chunks, default=0)
            if longest > self.shard:
                raise ValueError(
                    f"model.local_chunks={self.local_chunks}: a chunk of {longest} tokens is longer than a shard, "
                    f"model.shard={self.shard}, at which local memories restart: lower it"
                )
