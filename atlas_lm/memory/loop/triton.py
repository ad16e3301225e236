"""The loop over chunks on a GPU, as Triton kernels. What it computes is that of `autograd.py`, to rounding.

A segment of √K chunks at a time: one kernel takes every (shard, head) from state to state, a second one does all its
reads. The backward pass does a segment again, from the state that was kept at its start, and goes back through it:
nothing of a single chunk is kept, and nothing is added in an order that varies.
"""

# G batch × heads, K chunks, C chunk, F feature dim, P pre-activations, E hidden dim, D outputs; S chunks of a segment
# of layer l: R rows (F or E), Q columns (P or D)

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
from typing import Any

import torch
from torch import Tensor

from atlas_lm.memory import network as net
from atlas_lm.memory.host_reads import simulated
from atlas_lm.memory.kernels.compiled import once_differentiable
from atlas_lm.memory.loop.types import LoopConfig, LoopInputs, serve_once
from atlas_lm.memory.state import without_autocast

log = logging.getLogger(__name__)

DEVICES = ["cuda"]  # Triton's interpreter runs on a CPU, for tests
LONGEST = 64  # tokens of a chunk
COLUMNS = (16, 32, 64, 128)  # what hidden units and outputs may be


def can_run(config: LoopConfig, x: LoopInputs) -> bool:
    """Whether the kernels know this rule and its sizes, and Triton is there."""
    at_the_start = x.read_coef is None and config.update == "gradient"  # few and long chunks: cuBLAS is right for those
    if not (x.phi.device.type in DEVICES or simulated()) or at_the_start:
        return False
    why = _unknown(config, x)
    if why:
        _say(why)
    return not why


def _unknown(config: LoopConfig, x: LoopInputs) -> str:
    """What the kernels do not know; empty where they know all."""
    C, F = x.phi.shape[2:]
    sizes = {x.v.size(-1)} | ({x.initial_out.size(1)} if x.initial_out is not None else set())
    if not (_installed() or simulated()):
        return "triton is not installed"
    for unknown, what in (
        (config.update != "gradient", f"update: {config.update}"),
        (config.context > 1, f"context: {config.context}"),
        (x.same_segment is not None, "restarts at documents"),
        (C > LONGEST, f"chunks of {C} tokens"),
        (F % 16 > 0, f"{F} features"),
        (not sizes <= set(COLUMNS), f"heads and hidden units of {sorted(sizes)}"),
    ):
        if unknown:
            return f"no kernel for {what}"
    return ""


def variant(config: LoopConfig, x: LoopInputs) -> tuple[Any, ...]:
    """What kernels are compiled for: problems that share it run the same code."""
    sizes = (x.phi.size(3), x.by_initial.size(3), x.v.size(3), _block(x.phi.size(2)))
    return (config.network.kind, config.operands, x.decay.dtype, x.phi.device, *sizes)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _say(why: str) -> None:
    """Once for each reason."""
    log.warning("the memory runs in PyTorch operations, some tens of times slower than its Triton kernels: %s", why)


def run(config: LoopConfig, given: list[Tensor], inputs: LoopInputs) -> tuple[Tensor, list[Tensor]]:
    """Outputs (G, K·C, D) and the states after the last complete chunk; `given` are those before, z (G, 2R, Q)."""
    key_scores = (inputs.phi @ inputs.phi.mT).detach()
    y, *after = _TritonLoop.apply(config, len(given), *given, key_scores, *inputs)
    return y, after


class _TritonLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, config: LoopConfig, layers: int, *tensors: Tensor | None) -> Any:
        states: list[Any] = list(tensors[:layers])
        rest: list[Any] = [None if x is None else x.contiguous() for x in tensors[layers:]]
        key_scores, x = rest[0], LoopInputs(*rest[1:])
        with without_autocast(x.phi):
            segments = _Segments(config, x, key_scores)
            scratch = segments.scratch(states)
            y = x.phi.new_empty(*x.phi_q.shape[:3], x.v.size(-1))
            kept: list[Tensor] = []
            for start in segments.starts:
                if config.train:
                    kept += [scratch[name][:, 0].clone() for name in segments.state_names]
                segments.learn(scratch, start)
                segments.read(scratch, start, y)
                segments.go_on(scratch, start)
            after = segments.last_states(scratch)
        if config.train:
            ctx.config, ctx.layers = config, layers
            ctx.save_for_backward(*rest, *kept)
        return (y.flatten(1, 2), *after)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *dafter: Tensor) -> Any:
        serve_once(ctx)
        saved, count = ctx.saved_tensors, 1 + len(LoopInputs._fields)  # read once: see cpu.py
        x, kept = LoopInputs(*saved[1:count]), saved[count:]
        with without_autocast(x.phi):
            segments = _Segments(ctx.config, x, saved[0])
            scratch = segments.scratch(None)
            grads = segments.gradients([dz.contiguous().clone() for dz in dafter])
            dy = dy.to(ctx.config.operands).contiguous()
            many = len(segments.state_names)
            for index in reversed(range(len(segments.starts))):
                for name, state in zip(segments.state_names, kept[index * many : (index + 1) * many], strict=True):
                    scratch[name][:, 0] = state
                segments.learn(scratch, segments.starts[index])
                segments.backward(scratch, segments.starts[index], dy, grads)
        found = {name: grads.get(f"d{name}") for name in LoopInputs._fields}
        dstates = [grads[name] for name in segments.dstate_names]
        return (None, None, *dstates, None, *found.values())


class _Segments:
    """The launches over segments of a call, and what they share."""

    def __init__(self, config: LoopConfig, x: LoopInputs, key_scores: Tensor) -> None:
        self.config, self.x = config, x
        self.G, self.K, self.C, F = x.phi.shape
        D, act = x.v.size(-1), config.network.activation
        self.width = 0 if act is None else act.width
        self.E = D if act is None else x.initial_out.size(1)
        self.P = x.by_initial.size(-1)
        self.F, self.D = F, D
        self.S = math.isqrt(self.K - 1) + 1
        self.starts = range(0, self.K, self.S)
        self.state_names = ("z_in", "scale") if act is None else ("z_in", "z_out", "scale")
        self.dstate_names = tuple(f"d{name}" for name in self.state_names if name != "scale")
        self._tensors = {name: value for name, value in x._asdict().items() if value is not None}
        self._tensors |= {"key_scores": key_scores, "zero": torch.zeros(1, dtype=torch.int32, device=x.phi.device)}
        self._numbers = {"K": self.K, "C": self.C, "S": self.S}
        self._low = str(config.operands).removeprefix("torch.")

    def scratch(self, states: list[Tensor] | None) -> dict[str, Tensor]:
        """What kernels hand over within a segment; the first state is the given one. None: it is filled in later."""
        low, wide = self.x.phi.new_empty, self.x.decay.new_empty
        G, S, C = self.G, self.S, self.C
        found = {
            "z_in": wide(G, S + 1, 2 * self.F, self.P),
            "scale": wide(G, S + 1, 3).fill_(1),
            "pre": low(G, S, C, self.P),
            "error_in": low(G, S, C, self.P),
            "last": wide(G, S, C),
        }
        if self.width:
            found |= {
                "z_out": wide(G, S + 1, 2 * self.E, self.D),
                "error_out": low(G, S, C, self.D),
                "hidden": low(G, S, C, self.E),
                "back": low(G, S, C, self.E),
                "slope_norm": wide(G, S, C),
            }
        if states is not None:
            for name, state in zip(("z_in", "z_out"), states, strict=False):
                found[name][:, 0] = state
        return found

    def gradients(self, dafter: list[Tensor]) -> dict[str, Tensor]:
        """Of all inputs, to be filled; those of states begin as what is given for the last ones."""
        names = ("phi", "v", "phi_q", "scores", "read_coef", "grad_coef", "by_initial", "q_by_initial")
        grads = {f"d{name}": torch.empty_like(self._tensors[name]) for name in names}
        summed = ("decay", "write_coef", *(("initial_out",) if self.width else ()))  # not all of it is written
        grads |= {f"d{name}": torch.zeros_like(self._tensors[name]) for name in summed}
        return grads | dict(zip(self.dstate_names, dafter, strict=True))

    def _count(self, start: int) -> int:
        return min(self.S, self.K - start)

    def learn(self, scratch: dict[str, Tensor], start: int) -> None:
        """The states of a segment, and what its chunks learn."""
        count = self._count(start)
        writes = start + count <= self.config.complete
        self._launch(
            "learn", (self.G,), scratch, radius=self.config.radius, smallest=net.SMALLEST_CURVATURE,
            start=start, count=count, passes=count + writes,
        )  # fmt: skip

    def read(self, scratch: dict[str, Tensor], start: int, y: Tensor) -> None:
        """What a segment's queries find."""
        grid = (self.G, self._count(start))
        self._launch("read", grid, scratch | {"y": y}, smallest=net.SMALLEST_CURVATURE, start=start)

    def go_on(self, scratch: dict[str, Tensor], start: int) -> None:
        """The last state of a segment is the first one of the next."""
        if start + self._count(start) <= self.config.complete:
            for name in self.state_names:
                scratch[name][:, 0] = scratch[name][:, self._count(start)]

    def last_states(self, scratch: dict[str, Tensor]) -> list[Tensor]:
        """After all complete chunks, as the ball holds them."""
        start = self.starts[-1]
        # where the last chunk has not ended, the state is the one that it began with
        at = 0 if self.config.complete == self.K else self.K - 1 - start
        states = []
        for layer, name in enumerate(self.state_names[:-1]):
            state = scratch[name][:, at].clone()
            held = scratch["scale"][:, at, 2 * layer : 2 * layer + 1 if layer else max(1, self.width)]
            half = state.size(1) // 2
            state[:, :half] = net.scaled(state[:, :half], held)
            states.append(state)
        return states

    def backward(self, scratch: dict[str, Tensor], start: int, dy: Tensor, grads: dict[str, Tensor]) -> None:
        """Back through a segment whose states are there again."""
        wide, G, S, C, count = self.x.decay.new_empty, self.G, self.S, self.C, self._count(start)
        low = self.x.phi.new_empty
        between = {"derror_in": wide(G, S, C, self.P), "share": low(G, S, C, C), "total": wide(G, S, C, C)}
        between["dkey"] = wide(G, C, self.F)
        if self.width:
            between |= {
                "dshare": wide(G, S, C, C),
                "read_pre": low(G, S, C, self.P),
                "hidden_q": low(G, S, C, self.E),
                "dback": low(G, S, C, self.E),
                "derror_out": wide(G, S, C, self.D),
                "dhidden": wide(G, S, C, self.E),
            }
        tensors = scratch | between | grads | {"dy": dy}
        self._launch("read_backward", (G, count), tensors, smallest=net.SMALLEST_CURVATURE, start=start)
        self._launch("learn_backward", (G,), tensors, start=start, count=count, complete=self.config.complete)

    def _launch(self, name: str, grid: tuple[int, ...], tensors: dict[str, Tensor], **numbers: float) -> None:
        """A kernel takes of these what it names; of what `linear` lacks, anything."""
        if simulated():
            return
        kernel = getattr(importlib.import_module(f"atlas_lm.memory.kernels.triton.{name}"), name)
        sizes = (self.C, self.F, self.E, self.D, self.width, self._low)
        constants, options = compile_time(name, *sizes)
        known = self._tensors | tensors | self._numbers | numbers | constants
        kernel[grid](**{name: known.get(name, self.x.phi) for name in kernel.arg_names}, **options)


def _block(C: int) -> int:
    """Rows of a tile of C tokens."""
    return next(size for size in (16, 32, 64) if size >= C)


def compile_time(kernel: str, C: int, F: int, E: int, D: int, width: int, low: str) -> tuple[dict[str, Any], Any]:
    """What a kernel is compiled for, and its options: three variants serve all chunk sizes."""
    import triton.language as tl

    block = _block(C)
    largest = 32 if (kernel, block) == ("learn_backward", 64) else 64  # with more, registers are not enough
    features = next(size for size in (64, 32, 16) if size <= largest and F % size == 0)
    constants = {"F": F, "E": E, "D": D, "WIDTH": width, "BLOCK_C": block, "BLOCK_F": features}
    return constants | {"LOW": getattr(tl, low)}, {"num_warps": 8, "num_stages": 1}
