"""Parts of `benchmarks.gpu`: the Triton kernels, right and fast."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.memory import chunked
from atlas_lm.memory.loop import cpu as cpu_loop
from atlas_lm.memory.loop import trial
from atlas_lm.memory.loop import triton as triton_loop
from atlas_lm.memory.network import build_network
from atlas_lm.memory.state import Gates, Rule, Tokens

SHARDS, HEADS, SHARD = 8, 8, 2048  # as a step of 43m on two sequences of 8,192 tokens
CHUNKS = (64, 32, 16, 8, 4, 1)


def problem(setting: Any, features: int, width: int) -> tuple[list[Tensor], tuple[Tensor, ...], Tokens, Tensor]:
    """Random leaves; W_init, tokens and features of queries made of them."""
    shards, heads, length = (1, 1, 32) if setting.toy else (SHARDS, HEADS, SHARD)
    generator = torch.Generator(setting.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=setting.device).requires_grad_()

    q, k, v = (normal(shards, heads, length, width) for _ in range(3))
    phi, phi_q = (normal(shards, heads, length, features) for _ in range(2))
    gates = [normal(shards, heads, length) for _ in range(4)]
    shapes = build_network("gated_mlp", False).shapes(width, features, width)
    initial = tuple(normal(heads, *shape) for shape in shapes)
    tokens = Tokens(
        nnf.normalize(k, dim=-1), nnf.normalize(phi, dim=-1), v,
        Gates(*((gate + shift).sigmoid() for gate, shift in zip(gates, (6.0, 0.0, 0.0, 1.0), strict=True))), None,
    )  # fmt: skip
    return [q, k, v, phi, phi_q, *gates, *initial], initial, tokens, nnf.normalize(phi_q, dim=-1)


def kernels(setting: Any) -> dict[str, Any]:
    """The Triton kernels at each chunk size, G = 64 heads, 2,048 tokens: do they pass their trial; microseconds of a
    chunk forward and with the way back, in bf16, and PyTorch's operations beside; are three runs bitwise equal."""
    if setting.device == "cpu":  # Triton's interpreter, instead of the compiled loop
        cpu_loop.can_run = lambda *_: False  # type: ignore[assignment]
    found: dict[str, Any] = {}
    features, width = (48, 16) if setting.toy else (256, 64)
    for chunk in (16,) if setting.toy else CHUNKS:
        leaves, initial, tokens, phi_q = problem(setting, features, width)
        rule = Rule(build_network("gated_mlp", False), chunk, 1, "gradient", "token", radius=8.0)

        def forward(rule=rule, initial=initial, leaves=leaves, phi_q=phi_q, tokens=tokens) -> Tensor:  # type: ignore[no-untyped-def]
            # the interpreter's products of bfloat16 are wrong
            with torch.autocast(setting.device, torch.bfloat16, enabled=setting.device != "cpu"):
                return chunked.scan_shard(rule, initial, leaves[0], phi_q, tokens)

        def both(leaves=leaves, forward=forward) -> list[Tensor]:  # type: ignore[no-untyped-def]
            y = forward()
            return [y, *torch.autograd.grad(y.float().square().sum(), leaves, retain_graph=True, allow_unused=True)]

        chunks = tokens.k.size(2) / chunk
        for form in ("triton", "pytorch"):
            if form == "pytorch" and chunk not in (64, 16):
                continue
            triton_loop.DEVICES[:] = [setting.device] if form == "triton" else []
            row: dict[str, Any] = {}
            with torch.no_grad():
                row["forward_us"] = setting.median(forward, 3) / chunks * 1e6
            row["both_us"] = setting.median(both, 3) / chunks * 1e6
            runs = [[x for x in both() if x is not None] for _ in range(3)]
            row["repeats_bitwise"] = all(
                torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True)
            )
            if form == "triton":
                row["passed_trial"] = all(trial._found.values()) and bool(trial._found)
            found[f"chunk {chunk}: {form}"] = row
            print(json.dumps(found), flush=True)
    return found
