"""Every setting of a run, typed: Hydra composes `conf/` against these classes, so a misspelled key fails at once.

Only the model, the optimizer, the paths and the top level are typed here. `data`, `trainer`, `logger` and `callbacks`
name a class each (`_target_`); their keys are checked against its signature, see `validate.py`. `???` marks a value
that `conf/` or the user has to give.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from atlas_lm.config.names import nearest

FLOAT32 = 3.4e38
LARGEST = 2**31 - 1  # of whole numbers: the size of a matrix of two of them still fits 64 bits


def choice(*names: str, default: str | None = MISSING) -> Any:
    """A field that takes one of these names."""
    return field(default=default, metadata={"choices": names})


def number(default: Any = MISSING, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A field that takes a number in [minimum, maximum]; NaN is in no range."""
    return field(default=default, metadata={"minimum": minimum, "maximum": maximum})


def check_values(config: Any, section: str) -> None:
    """ValueError for the first field outside its choices or its range; values that are still `???` pass."""
    for f in fields(config):
        value, where = getattr(config, f.name), f"{section}{f.name}"
        if value is None or (isinstance(value, str) and value == MISSING):
            continue
        choices = f.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{where}={value} must be one of {', '.join(choices)}{nearest(value, choices)}")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"{where}={value} must be at most {LARGEST}: lower it")
        if isinstance(value, float) and FLOAT32 < abs(value) < math.inf:
            raise ValueError(f"{where}={value} is beyond {FLOAT32:g}, the largest number of float32: lower it")
        low, high = f.metadata.get("minimum"), f.metadata.get("maximum")
        if low is not None and not value >= low:
            raise ValueError(f"{where}={value} must be at least {low:g}: raise it")
        if high is not None and not value <= high:
            raise ValueError(f"{where}={value} must be at most {high:g}: lower it")


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


@dataclass
class OptimConfig:
    """The outer optimizer (T5). ValueError for a value outside its choices or range."""

    name: str = choice("adamw", "muon")
    """muon: Muon for the 2-D weights of the blocks, AdamW for the rest."""
    lr: float = number(minimum=0)
    """Peak learning rate of AdamW."""
    muon_lr: float = number(minimum=0)
    """Peak learning rate of Muon; read by `name: muon` alone."""
    memory_lr: float = number(minimum=0)
    """Peak learning rate of W_init and of the memory's feature map: high ones cost the memory its capacity."""
    weight_decay: float = number(minimum=0)
    """Decoupled weight decay of matrices; vectors have none."""
    betas: list[float] = MISSING
    """AdamW's two averaging constants."""
    warmup_steps: int = number(minimum=0)
    """Optimizer steps of linear warm-up."""
    total_steps: int = number(minimum=1)
    """Optimizer steps of the run, warm-up included; the cosine ends here and so does training."""
    min_lr_ratio: float = number(minimum=0, maximum=1)
    """Learning rate at the end, as a fraction of the peak."""
    clip: float = number(minimum=0)
    """Gradient norm above which gradients are scaled down."""

    def __post_init__(self) -> None:
        check_values(self, "optim.")
        if isinstance(self.betas, list) and not (len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)):
            raise ValueError(f"optim.betas={self.betas} must be two numbers from 0 to below 1; [0.9,0.95] is usual")


@dataclass
class PathsConfig:
    """Where a run reads and writes."""

    outputs: str = MISSING
    """Folder of all runs, one folder per experiment in it."""
    run: str = MISSING
    """Folder of this run; Hydra writes its log there too."""


@dataclass
class TrainConfig:
    """`conf/train.yaml`: everything that `train.py` reads."""

    name: str = MISSING
    """Name of the experiment: its runs lie in `outputs/<name>/`."""
    seed: int = number(minimum=0)
    """Of the weights' initial values; `data.seed` is the one of the shuffling."""
    precision: str = choice("auto", "32-true", "bf16-mixed")
    """auto: bf16-mixed where the hardware is fast at it, else 32-true; the log says which."""
    resume: str | None = None
    """What to resume exactly, in its folder, after its last record: `auto` (the newest run of this experiment if
    it is not finished, else a new one), a run folder, an experiment (its newest finished run), or a checkpoint."""
    init_from: str | None = None
    """Checkpoint, run folder or experiment (its newest finished run of this model) whose weights to start from; all
    else begins again."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """conf/model/"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """conf/optim/"""
    data: dict[str, Any] = MISSING
    """conf/data/: a LightningDataModule."""
    trainer: dict[str, Any] = MISSING
    """conf/trainer/: the arguments of Lightning's Trainer."""
    logger: dict[str, Any] = MISSING
    """conf/logger/: by name, each a Logger."""
    callbacks: dict[str, Any] = MISSING
    """conf/callbacks/: by name, each a Callback; they run in this order, checkpoints last."""
    paths: PathsConfig = field(default_factory=PathsConfig)
    """conf/paths/"""

    def __post_init__(self) -> None:
        check_values(self, "")


def register() -> None:
    """Make `schema` known to Hydra, for the defaults list of `conf/train.yaml`."""
    ConfigStore.instance().store(name="schema", node=TrainConfig)


register()
