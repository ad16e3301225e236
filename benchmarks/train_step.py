"""One whole training step of small models on bytes: python -m benchmarks.train_step [--peers] [--json FILE]

Loss, gradients and an AdamW step; batch 2. Ours (`--model`, with `--layers` and `--dim`) beside, with --peers, a plain
transformer of the same dims (full causal attention by SDPA, rotary positions, SwiGLU) and titans-pytorch's
memory-as-context transformer, whose segments and memory chunks are as long as our chunk, so that its weights move as
ours do. Every length is a process of its own, models interleaved, medians; peak memory comes from further processes.

Multiply-adds are not counted here: `matmul_share` is null.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as nnf

from atlas_lm.config.model import ModelConfig
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.model.attention import rotate
from atlas_lm.model.block import SwiGLU
from benchmarks import measuring

MODULE = "benchmarks.train_step"
CONF = Path(__file__).parents[1] / "conf" / "model"
BATCH, VOCABULARY = 2, 256


@dataclass(frozen=True)
class Case:
    """One row of conditions."""

    model: str
    dim: int
    layers: int
    chunk: int
    length: int
    dtype: str
    device: str

    @property
    def heads(self) -> int:
        return self.dim // 64


class Plain(nn.Module):
    """A transformer with full causal attention."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, case.dim)
        self.layers = nn.ModuleList(PlainLayer(case) for _ in range(case.layers))
        self.norm = nn.RMSNorm(case.dim)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return nnf.linear(self.norm(x), self.embed.weight)


class PlainLayer(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.heads = case.heads
        self.norm, self.ffn_norm = nn.RMSNorm(case.dim), nn.RMSNorm(case.dim)
        self.qkv = nn.Linear(case.dim, 3 * case.dim, bias=False)
        self.out = nn.Linear(case.dim, case.dim, bias=False)
        self.ffn = SwiGLU(case.dim, round(2.667 * case.dim))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)
        q, k = rotate(q, 0, 10_000.0), rotate(k, 0, 10_000.0)
        y = nnf.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.ffn(self.ffn_norm(x))


def model_values(name: str) -> dict[str, Any]:
    """The settings of a file of conf/model, with those of the files that it stands on."""

    def read(name: str) -> Any:
        path = CONF / f"{name}.yaml"
        if not path.exists():
            known = sorted(found.stem for found in CONF.glob("[!_]*.yaml"))
            raise SystemExit(f"no model {name!r}; choose one of {', '.join(known)}")
        own: Any = OmegaConf.load(path)
        return OmegaConf.merge(*(read(base) for base in own.pop("defaults", []) if base != "_self_"), own)

    values: Any = OmegaConf.to_container(read(name), resolve=True)
    return {key: value for key, value in values.items() if key != "name"}


class Ours(nn.Module):
    """`conf/model/<model>.yaml` at this depth, width and local chunk."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        values = model_values(case.model)
        values |= {"dim": case.dim, "layers": case.layers, "heads": case.heads, "head_dim": 64}
        values["local_chunks"] = [case.chunk] * len(values["local_chunks"])
        self.model = AtlasLM(ModelConfig(**values), VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


def titans(case: Case) -> nn.Module:
    """titans-pytorch's memory as context."""
    return measuring.need_titans().MemoryAsContextTransformer(
        num_tokens=VOCABULARY, dim=case.dim, depth=case.layers, segment_len=case.chunk, heads=case.heads,
        neural_memory_batch_size=case.chunk,
    )  # fmt: skip


MAKERS: dict[str, Callable[[Case], nn.Module]] = {"atlas-lm": Ours, "transformer": Plain, "titans-pytorch MAC": titans}


def step_of(name: str, case: Case) -> Callable[[], None]:
    """A function that takes one training step."""
    torch.manual_seed(0)
    model = MAKERS[name](case).to(case.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(VOCABULARY, (BATCH, case.length + 1), device=case.device)

    def step() -> None:
        with torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bf16"):
            logits = model(tokens[:, :-1])
        nnf.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        measuring.wait(case.device)

    return step


def worker(request: str) -> None:
    asked = json.loads(request)
    case = Case(**asked["case"])
    if "peak" in asked:
        print(json.dumps(measuring.peak_bytes(step_of(asked["peak"], case), case.device)))
        return
    found = measuring.medians({name: step_of(name, case) for name in asked["names"]}, asked["repeats"], warm=2)
    tokens = BATCH * case.length
    print(json.dumps([{"name": name, "tokens_per_second": tokens / median} for name, median in found.items()]))


def main() -> None:
    parser = measuring.arguments(MODULE, __doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny_deep", help="a file of conf/model")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--chunks", type=int, nargs="+", default=[64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--dtypes", nargs="+", choices=list(measuring.DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--peers", action="store_true", help="a plain transformer and titans-pytorch beside ours")
    parser.add_argument("--without", nargs="+", choices=list(MAKERS), default=[], help="leave these out")
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    names = [name for name in (MAKERS if args.peers else ["atlas-lm"]) if name not in args.without]
    cases = [
        Case(args.model, args.dim, args.layers, chunk, length, dtype, args.device)
        for dtype, length, chunk in product(args.dtypes, args.lengths, args.chunks)
    ]
    rows: list[dict[str, Any]] = []
    for i, case in enumerate(cases):
        measuring.progress(f"{i + 1}/{len(cases)} chunk {case.chunk} length {case.length} {case.dtype}")
        request = {"case": asdict(case), "names": names, "repeats": args.repeats}
        for row in measuring.in_process(MODULE, request):
            peak = measuring.in_process(MODULE, {"case": asdict(case), "peak": row["name"]})
            rows.append({**asdict(case), "rule": "gradient", "matmul_share": None, **row, "peak_bytes": peak})
    columns = {
        "model": lambda row: row["name"],
        "dtype": lambda row: row["dtype"],
        "chunk": lambda row: str(row["chunk"]),
        "length": lambda row: str(row["length"]),
        "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        "peak MiB": lambda row: f"{row['peak_bytes'] / 2**20:,.0f}",
    }
    measuring.publish(rows, columns, args.json)


if __name__ == "__main__":
    main()
