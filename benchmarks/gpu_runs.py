"""Parts of `benchmarks.gpu` that train: what safeguards cost and wait for, faults on the device, peers."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.nn import functional as nnf

from atlas_lm.config.model import ModelConfig
from atlas_lm.memory.features import build_features
from atlas_lm.model.atlas import AtlasLM
from benchmarks.memory_layer import useful_of_head

ROOT = Path(__file__).parents[1]
Figures = dict[str, Any]


# Safeguards


class Waits(lightning.Callback):
    """How often the host waits for the device in each step, from its first hook to the last before records."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        self.counts.append(0)

    def on_train_batch_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Count torch's warnings, each time; the others are shown."""
        show = warnings.showwarning

        def count(message: Any, *args: Any, **kwargs: Any) -> None:
            if "called a synchronizing CUDA operation" in str(message) and self.counts:
                self.counts[-1] += 1
            else:
                show(message, *args, **kwargs)

        with warnings.catch_warnings():
            warnings.filterwarnings("always", message=".*called a synchronizing CUDA operation")
            warnings.showwarning = count
            yield


def safeguards(setting: Any) -> Figures:
    """A model for this card, through train.py with all safeguards: tokens a second, useful operations. Their share, by
    blocks of steps in turn with and without them; waits of the host in a step."""
    from benchmarks.safeguards import BLOCK, CONF, PROBES, train

    model, length, rows = ("tiny", 128, 1) if setting.toy else ("43m", 8192, 2)
    # a multiple of each probe's interval is more than there is time for: they are counted on a CPU
    common = [
        "+experiment=stage1", f"trainer={'gpu' if setting.device == 'cuda' else 'cpu'}", f"model={model}",
        f"data.seq_len={length}", f"data.batch_size={rows}", "data.val_sequences=4",
        *(["model.layers=1", "model.memory_layers=null"] if setting.toy else []),
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", common)
    found: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        steps = 12 if setting.toy else 60
        settings = [*common, f"optim.total_steps={steps}", f"paths.outputs={folder}", "name=x"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *settings], cwd=folder, capture_output=True, text=True
        )
        reports = list(Path(folder).glob("x/*/report.json"))
        if done.returncode or not reports:
            return {"failed": done.stderr[-600:]}
        report = json.loads(reports[0].read_text())
        speed = report["tokens_per_second"]
    flops = flops_per_token(ModelConfig(**cfg.model), instantiate(cfg.data).vocab_size)
    found["through train.py"] = {
        "tokens_per_second": speed, "verdict": report["verdict"][:60],
        "mflop_a_token": {name: value / 1e6 for name, value in flops.items()} | {"all": sum(flops.values()) / 1e6},
        "share_of_989_tflops": speed * sum(flops.values()) / 989e12,
    }  # fmt: skip
    print(json.dumps(found), flush=True)
    without = [f"~callbacks.{name}" for name in PROBES if name in cfg.callbacks]
    train([*common, *without], 3)  # compiles
    steps = (1 if setting.toy else 3) * 2 * BLOCK
    waits = Waits()
    with waits.listening():
        run = train([*common, *without], steps, more=[waits])
    found |= {
        "share_in_hooks": sum(run["during"].values()) / run["seconds"],
        "waits_a_step": statistics.median(waits.counts) if setting.device == "cuda" else None,
    }
    print(json.dumps(found), flush=True)
    ratios = train([*common, *without], steps + 2 * BLOCK, switched=True)["ratios"]
    return found | {"share_by_blocks": statistics.median(ratios)}


def flops_per_token(config: ModelConfig, vocabulary: int) -> dict[str, float]:
    """Useful operations of a training step, by part: 6 for each weight of a matrix, 12 · layers · window · dim of the
    attention (half of its window each way), and those of `benchmarks.memory_layer` for each memory.

    What is computed again in the way back is not counted.
    """
    model = AtlasLM(config, vocabulary)
    blocks = sum(p.numel() for name, p in model.blocks.named_parameters() if p.dim() == 2 and ".initial." not in name)
    found = {
        "matrices": 6.0 * blocks, "logits": 6.0 * config.dim * vocabulary,
        "window": 12.0 * config.layers * config.window * config.heads * config.head_dim,
    }  # fmt: skip
    if config.memory != "atlas":
        return found
    layers = config.layers if config.memory_layers is None else len(config.memory_layers)
    heads = config.memory_heads or config.heads
    width = config.heads * config.head_dim // heads

    def memory(kind: str, features: str, rank: int, chunk: int, rule: str) -> float:
        F = build_features(features, width, rank).dim_out
        return 2 * layers * heads * useful_of_head(kind, F, width, config.memory_hidden, chunk, rule)

    if config.global_chunk is not None:
        found["global memory"] = memory(
            config.network, config.features, config.rank, config.global_chunk, config.update
        )
    local_rank = config.rank if config.local_features is None else config.local_rank
    for chunk in config.local_chunks:
        found[f"local memory, chunk {chunk}"] = memory(
            config.local_network or config.network, config.local_features or config.features, local_rank, chunk,
            config.local_update or config.update,
        )  # fmt: skip
    return found


# Faults


def faults(setting: Any) -> Figures:
    """A spike is rolled back bit for bit, on this device; a run through train.py with a flipped bit, and one with a NaN
    gradient: who notices, after how many steps, how it ends."""
    from tests.support.rollback_cases import oracle

    found: Figures = {}
    accelerator = "gpu" if setting.device == "cuda" else "cpu"
    for precision in ("32-true",) if setting.toy else ("32-true", "bf16-mixed"):
        seen = oracle(1, accelerator=accelerator, precision=precision)
        found[f"spike, {precision}"] = {
            "rollbacks": seen["facts"]["rollbacks"], "bitwise": not seen["different"], "first": seen["different"][:1],
        }  # fmt: skip
        print(json.dumps(found), flush=True)
    for target in ("BitFlip",) if setting.toy else ("BitFlip", "NaNGradient"):
        found[target] = struck(setting, target)
        print(json.dumps(found), flush=True)
    return found


def struck(setting: Any, target: str) -> Figures:
    """Stage 1 of `tiny`, hit at batch 8."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            "+experiment=stage1", f"trainer={'gpu' if setting.device == 'cuda' else 'cpu'}", "optim.total_steps=16",
            "data.val_sequences=8", "trainer.log_every_n_steps=1", "callbacks.spike_rollback.every_n_steps=4",
            "callbacks.memory_contribution.every_n_steps=1000", "callbacks.memory_horizon.every_n_steps=1000",
            f"+callbacks.fault._target_=benchmarks.injection.{target}", f"+callbacks.fault.folder={folder}",
            "+callbacks.fault.at=8", f"paths.outputs={folder}/outputs", "name=f",
        ]  # fmt: skip
        if setting.toy:
            settings += ["data.seq_len=128", "data.batch_size=1", "model.layers=1", "model.memory_layers=null"]
        command = [sys.executable, str(ROOT / "train.py"), *settings]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        records = next(Path(folder).glob("outputs/f/*/metrics.jsonl"), None)
        rows = [json.loads(line) for line in records.read_text().splitlines()] if records else []
        counters = ("weight_integrity/corruptions", "nonfinite_guard/skipped_steps", "spike_rollback/count",
                    "outlier_guard/outliers")  # fmt: skip
        first = next(((row["step"], name) for row in rows for name in counters if row.get(name)), (None, None))
        end = {"exit_code": done.returncode, "noticed_by": first[1]}
        if first[0] is None:
            return end | {"log": done.stderr[-600:]}
        return end | {"steps_to_detection": first[0] - 7 + 1}  # batch 8 is step 7


# Peers


def peers(setting: Any) -> Figures:
    """Tokens a second of a training step at the size of 43m, two sequences of 8,192 tokens: ours, its twin, full
    attention, a gated delta net; and of one layer forward and back: ours, FLA's kernel, titans-pytorch."""
    from benchmarks.gpu import training_step

    length, rows = (128, 1) if setting.toy else (8192, 2)
    model = "tiny" if setting.toy else "43m"
    found: Figures = {}
    for name, changes in {
        "43m": {}, "43m, no memory": {"memory": "none"}, "43m, full attention": {"memory": "none", "window": length},
        "43m, gated delta net": {"memory": "gated_delta"},
    }.items():  # fmt: skip
        found[name] = timed(
            setting, lambda changes=changes: training_step(setting, model, length, rows, changes), length * rows
        )  # type: ignore[misc]
        print(json.dumps(found), flush=True)
    for name, make in {
        "layer: ours": our_layer,
        "layer: FLA": fla_layer,
        "layer: titans-pytorch": titans_layer,
    }.items():
        found[name] = timed(setting, lambda make=make: make(setting.device, setting.toy), layer_tokens(setting.toy))  # type: ignore[misc]
        print(json.dumps(found), flush=True)
    return found


def timed(setting: Any, make: Callable[[], Callable[[], Any]], tokens: int) -> Figures:
    """Tokens a second and peak memory; why not, where a peer is not installed or does not fit."""
    cuda = setting.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        step = make()
        found: Figures = {"tokens_per_second": tokens / setting.median(step, 3)}
    except (ImportError, torch.OutOfMemoryError, RuntimeError, ValueError) as error:
        return {"tokens_per_second": None, "failed": f"{type(error).__name__}: {error}"[:200]}
    return found | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if cuda else {})


HEADS, WIDTH, CHUNK = 8, 64, 64  # of 43m


def layer_tokens(toy: bool) -> int:
    return 128 if toy else 2 * 8192


def heads(device: str, toy: bool, requires_grad: bool = True) -> list[torch.Tensor]:
    """Queries, keys, values, one row."""
    shape = (2, layer_tokens(toy) // 2, HEADS, WIDTH)
    return [torch.randn(shape, device=device, requires_grad=requires_grad) for _ in range(3)]


def our_layer(device: str, toy: bool) -> Callable[[], Any]:
    from atlas_lm.memory.fast_memory import MemorySpec
    from atlas_lm.memory.hierarchy import Hierarchy

    memory = Hierarchy(MemorySpec(HEADS * WIDTH, HEADS, WIDTH, (CHUNK,), 2048, 2048, rank=191, hidden=WIDTH)).to(device)
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in heads(device, toy))
    x = torch.randn(2, q.size(2), HEADS * WIDTH, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            y = memory(x, nnf.normalize(q, dim=-1), nnf.normalize(k, dim=-1), v)[0]
        y.float().square().mean().backward()

    return step


def fla_layer(device: str, toy: bool) -> Callable[[], Any]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]

    q, k, v = (x.detach().bfloat16().requires_grad_() for x in heads(device, toy))
    g = torch.full(q.shape[:3], math.log(0.99), device=device, requires_grad=True)
    beta = torch.full(q.shape[:3], 0.5, device=device, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        y = chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]
        y.float().square().mean().backward()

    return step


def titans_layer(device: str, toy: bool) -> Callable[[], Any]:
    from titans_pytorch import MemoryMLP, NeuralMemory  # type: ignore[import-untyped]

    network = MemoryMLP(dim=WIDTH, depth=2, expansion_factor=1)
    memory = NeuralMemory(
        dim=HEADS * WIDTH, heads=HEADS, dim_head=WIDTH, chunk_size=CHUNK, batch_size=CHUNK, model=network
    ).to(device)
    x = torch.randn(2, layer_tokens(toy) // 2, HEADS * WIDTH, device=device, requires_grad=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            y = memory(x)[0]
        y.float().square().mean().backward()

    return step
