"""Random pairs of models, precisions and streaming states: one model's state is given to the other.

Every pair must end in a correct continuation (the parallel forward's logits, on the compiled and on the PyTorch path)
or in a ValueError, never in a crash and never in numbers from a state that does not belong there. A crash takes the
process with it, so the tests run this file as a process of its own:

    python -m tests.support.state_pairs 500 0              # pairs, seed
    python -m tests.support.state_pairs 500 0 --sanitize   # with the library built by g++ -fsanitize=address
"""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict
from unittest.mock import patch

import torch
from torch import Tensor

from atlas_lm.config.model import ModelConfig
from atlas_lm.memory.kernels import attention as cpu_attention
from atlas_lm.memory.kernels import compiled
from atlas_lm.memory.kernels import convolution as cpu_convolution
from atlas_lm.memory.kernels import delta as cpu_delta
from atlas_lm.memory.kernels import features as cpu_features
from atlas_lm.memory.kernels import norm as cpu_norm
from atlas_lm.memory.loop import cpu as cpu_loop
from atlas_lm.model.atlas import AtlasLM, State
from tests.support import ROOT

VOCABULARY = 11
CHOICES = {
    "layers": (1, 2), "heads": (1, 2, 3), "head_dim": (4, 6, 16), "window": (1, 5, 8), "conv": (1, 4),
    "memory": ("atlas", "atlas", "atlas", "atlas", "none"), "local_chunks": ([3, 7], [4, 7], [7, 3], [5], []),
    "global_chunk": (8, 12, 24, None), "network": ("gated_mlp", "mlp", "linear"), "residual": (False, True),
    "features": ("sketch", "linear", "quadratic"), "rank": (6, 7), "memory_hidden": (16, 17, 20, 23),
    "context": (1, 4, 5), "update": ("gradient", "newton_schulz", "delta"), "radius": (8.0, 4.0),
    "reset_at_document": (False, False, True), "rope_base": (10000.0, 500.0), "memory_layers": (None, None, [0]),
    "attention_conv": (1, 1, 3), "share_qkv": (False, False, True),
    "weight_norm": (False, False, True), "cached_states": (0, 0, 1, 2),
}  # fmt: skip
FIXED = dict(
    name="pair", dim=10, ffn_multiple=2.0, fusion="multiplicative", shard=24, persistent_keys=3, eta_max=0.05,
    half_life=64.0, polarisation_cap=0.1,
)  # fmt: skip
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # of the largest logit
NARROW = (torch.bfloat16, torch.float16)
WITHOUT_MEMORY = ("layers", "heads", "head_dim", "window", "memory", "rope_base", "attention_conv")


def identity(config: ModelConfig, batch: int) -> dict:
    """What a state must share with the model that continues it."""
    values = asdict(config)
    names = WITHOUT_MEMORY if config.memory == "none" else CHOICES
    kept = {name: values[name] for name in names} | {"batch": batch}
    kept.pop("reset_at_document", None)  # without document starts it changes nothing
    if config.memory != "none":
        if config.features != "sketch":
            kept.pop("rank")
        if config.network == "linear":
            kept.pop("memory_hidden")
        if config.share_qkv:
            kept.pop("conv")
        if config.memory_layers == [0] and config.layers == 1:
            kept["memory_layers"] = None
    return kept


def forward(model: AtlasLM, tokens: Tensor, state: State | None, through_torch: bool):
    modules = (cpu_attention, cpu_convolution, cpu_delta, cpu_features, cpu_loop)
    with torch.inference_mode(), ExitStack() as stack:
        if through_torch:
            for module in modules:
                stack.enter_context(patch.object(module, "can_run", lambda *_: False))
            stack.enter_context(patch.object(cpu_norm, "can_run", lambda *_: False))
        return model(tokens, state)


def check_pair(rng: random.Random) -> str:
    """continued or refused; AssertionError for a pair that ends otherwise."""
    values = {name: rng.choice(options) for name, options in CHOICES.items()}
    others = copy.deepcopy(values)
    for name in rng.sample(sorted(CHOICES), rng.choice((0, 0, 1, 1, 2))):
        others[name] = rng.choice(CHOICES[name])
    for chosen in (values, others):
        if chosen["update"] == "delta":
            chosen |= {"network": "linear", "context": 1, "weight_norm": False}
        if chosen["global_chunk"] is None and not chosen["local_chunks"]:
            chosen["global_chunk"] = 8  # no memory at all is refused
        if chosen["global_chunk"] is None:
            chosen["cached_states"] = 0
    dtype, other_dtype = (rng.choice(list(TOLERANCE)) for _ in range(2))
    batch, other_batch = rng.choice(((2, 2), (2, 2), (2, 2), (2, 1), (1, 3)))
    source, target = (ModelConfig(**FIXED, **v) for v in (values, others))
    belongs = identity(source, batch) == identity(target, other_batch)
    if belongs:
        target = source  # what else differs may change the weights, and with them the logits to compare with
    seed, T = rng.randrange(1000), 24
    split = rng.randrange(0, T)
    torch.manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (3, T))
    torch.manual_seed(seed)
    maker = AtlasLM(source, VOCABULARY).to(dtype)
    torch.manual_seed(seed)
    user = AtlasLM(target, VOCABULARY).to(other_dtype)
    state = maker.initial_state(batch)
    if split:
        state = forward(maker, tokens[:batch, :split], state, rng.random() < 0.5).state
    reported = f"{values} {dtype} {batch} -> {others} {other_dtype} {other_batch}, split {split}"
    results = []
    for through_torch in (False, True):
        for piece in (T - split, 1):  # prefill and decode
            given = tokens[:other_batch, split : split + piece]
            try:
                results.append((given.size(1), forward(user, given, state, through_torch).logits))
            except ValueError as error:
                if belongs:
                    raise AssertionError(f"a state that belongs was refused\n{reported}") from error
                results.append(None)
    if not belongs:
        assert results == [None] * 4, f"a foreign state was accepted\n{reported}"
        return "refused"
    wide = torch.float64 if torch.float64 in (dtype, other_dtype) else torch.float32
    truth = forward(user.to(wide), tokens[:batch], None, True).logits.double()
    least = max(TOLERANCE[dtype], TOLERANCE[other_dtype])
    for length, logits in results:
        error = (logits.double() - truth[:, split : split + length]).abs().max() / truth.abs().max()
        assert error <= least, f"{error:.3g} > {least}\n{reported}"
    return "continued"


def run(pairs: int, seed: int) -> None:
    assert compiled.library() is not None, "no C++ compiler: the compiled code is not tested"
    counts = {"continued": 0, "refused": 0}
    for i in range(pairs):
        counts[check_pair(random.Random(f"{seed} {i}"))] += 1
    print(f"{pairs} pairs: {counts['continued']} continued, {counts['refused']} refused, none crashed")


def pairs(*arguments: str) -> str:
    """What this file prints as a process of its own; a crash of that process is its exit status."""
    command = [sys.executable, "-m", "tests.support.state_pairs", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def main(pairs: int, seed: int, sanitize: bool) -> int:
    if not sanitize:
        run(pairs, seed)
        return 0
    if "ASAN_OPTIONS" not in os.environ:  # the runtime must be loaded before Python
        found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        environment = {"LD_PRELOAD": os.path.realpath(found.stdout.strip()), "ASAN_OPTIONS": "detect_leaks=0"}
        return subprocess.run(
            [sys.executable, "-m", "tests.support.state_pairs", *sys.argv[1:]], env=os.environ | environment
        ).returncode
    compiled._FLAGS += ["-fsanitize=address", "-fno-omit-frame-pointer", "-g"]
    run(pairs, seed)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), "--sanitize" in sys.argv[3:]))
