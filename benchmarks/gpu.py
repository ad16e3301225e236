"""What a GPU shows, in one command of a few minutes: python -m benchmarks.gpu --out docs/results/gpu.json

Each part is a process of its own with a time limit, the most valuable first, and its figures are written when it ends:
a part that crashes or takes too long costs itself alone. `--device cpu --toy` runs all of it small, as a test.
`python -m benchmarks.gpu --draw` writes docs/gpu.md from the runs in docs/results, a column for each.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from benchmarks.gpu_kernels import kernels
from benchmarks.gpu_runs import faults, peers, safeguards
from benchmarks.kernels import table as kernel_table

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "docs" / "results" / "kernels.json"
PREDICTED = ROOT / "docs" / "results" / "memory_predicted.json"
RUNS = sorted((ROOT / "docs" / "results").glob("gpu*.json"))
Figures = dict[str, Any]


class Setting(argparse.Namespace):
    """The parts' settings: `device` (cuda or cpu), `toy` (sizes that a test can afford)."""

    device: str
    toy: bool

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def median(self, f: Callable[[], Any], repeats: int) -> float:
        """Seconds of a call, after one to warm up; of one alone where it takes many seconds."""
        times: list[float] = []
        for n in range(repeats + 1):
            if n > 1 and times[-1] > 5:
                break
            self.wait()
            start = time.perf_counter()
            f()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])


# Parts


def environment(setting: Setting) -> Figures:
    """The card and what drives it."""
    found: Figures = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    if setting.device == "cuda":
        names = "name,driver_version,memory.total"
        command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
        card = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        import triton

        found |= {"card": card, "cuda": torch.version.cuda, "triton": triton.__version__}
    return found


def ceilings(setting: Setting) -> Figures:
    """What the card reaches at most: a bf16 product, a copy."""
    n = 256 if setting.toy else 8192
    a, b = (torch.randn(n, n, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(2**20 if setting.toy else 2**31, dtype=torch.uint8, device=setting.device)
    y = torch.empty_like(x)
    return {
        "bf16_tflops": 2 * n**3 / setting.median(lambda: a @ b, 10) / 1e12,
        "copy_gb_per_s": 2 * x.numel() / setting.median(lambda: y.copy_(x), 10) / 1e9,
    }


PRECISIONS = {  # dtype, autocast to bf16, TF32 allowed
    "fp32": (torch.float32, False, False),
    "tf32": (torch.float32, False, True),
    "bf16": (torch.float32, True, False),
}


def correctness(setting: Setting) -> Figures:
    """Relative error of the memory against float64 on the CPU: outputs, worst gradient; are three runs equal."""
    return against_float64(setting, False)


def correctness_of_kernels(setting: Setting) -> Figures:
    """The same with local memories by the Triton kernels."""
    return against_float64(setting, True)


def against_float64(setting: Setting, triton: bool) -> Figures:
    """By PyTorch's operations, or by Triton kernels where they pass their trial."""
    from atlas_lm.memory.fast_memory import MemorySpec
    from atlas_lm.memory.hierarchy import Hierarchy
    from atlas_lm.memory.loop import trial
    from atlas_lm.memory.loop import triton as triton_loop

    triton_loop.DEVICES[:] = [setting.device] if triton else []

    length, dim = (40, 16) if setting.toy else (200, 64)
    found: Figures = {}
    for chunk in (7,) if setting.toy else (1, 7, 32, 64):
        torch.manual_seed(chunk)
        memory = Hierarchy(MemorySpec(2 * dim, 2, dim, (chunk,), 64, 128, rank=2 * dim - 1, hidden=dim)).double()
        heads = [nnf.normalize(torch.randn(2, 2, length, dim).double(), dim=-1) for _ in range(3)]
        inputs = [torch.randn(2, length, 2 * dim).double(), *heads]
        weight = torch.randn(2, 2, length, dim).double()
        truth = output_and_gradients(memory, inputs, weight, torch.float64, "cpu", False)
        for name, (dtype, autocast, tf32) in PRECISIONS.items():
            torch.backends.cuda.matmul.allow_tf32 = tf32
            runs = [output_and_gradients(memory, inputs, weight, dtype, setting.device, autocast) for _ in range(3)]
            floor = 1e-6 * max(float(y.norm()) for y in truth)  # a gradient that is rounding has no relative error
            errors = [float((x - y).norm() / y.norm().clamp_min(floor)) for x, y in zip(runs[0], truth, strict=True)]
            found[f"chunk {chunk} {name}"] = {
                "output": errors[0],
                "gradient": max(errors[1:]),
                "repeats_bitwise": all(torch.equal(x, y) for run in runs for x, y in zip(run, runs[0], strict=True)),
            }
        torch.backends.cuda.matmul.allow_tf32 = False
        if triton:
            found["variants that passed their trial"] = sum(trial._found.values())
            found["variants that did not"] = len(trial._found) - sum(trial._found.values())
        print(json.dumps(found), flush=True)
    return found


def output_and_gradients(
    memory: torch.nn.Module, inputs: list[Tensor], weight: Tensor, dtype: torch.dtype, device: str, autocast: bool
) -> list[Tensor]:
    """In float64 on the CPU; a parameter without a gradient has zeros."""
    memory = copy.deepcopy(memory).to(device=device, dtype=dtype)
    given = [x.to(device=device, dtype=dtype, copy=True).requires_grad_() for x in inputs]
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        y = memory(*given)[0]
    (y.double() * weight.to(device)).sum().backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (*given, *memory.parameters())]
    return [x.detach().double().cpu() for x in (y, *grads)]


VOCABULARY = 32768
FOUR_MEMORIES = {  # the settings of the GPU models until 2026-11-27, of which earlier figures are
    "local_chunks": [8, 16, 32, 64], "rank": 447, "shard": 2048, "global_chunk": 2048, "answers": "sum",
    "attention_conv": 1, "local_features": None,
}  # fmt: skip
DELTA = {
    "network": "linear", "update": "delta", "global_chunk": 64, "local_network": "gated_mlp",
    "local_update": "gradient",
}  # fmt: skip
LARGE = {  # as in LaCT
    "local_chunks": [], "memory_heads": 2, "memory_hidden": 256, "features": "linear", "weight_norm": True,
    "global_chunk": 2048, "shard": 2048,
}  # fmt: skip
STEPS: list[tuple[str, str, int, int, dict[str, Any]]] = [  # name, model, tokens a sequence, sequences, what is changed
    ("43m: 2 x 8k", "43m", 8192, 2, {}),
    ("43m: 2k", "43m", 2048, 1, {}),
    ("43m, four memories: 2k", "43m", 2048, 1, FOUR_MEMORIES),
    ("43m without memory: 2 x 8k", "43m", 8192, 2, {"memory": "none"}),
    ("43m, chunks and shards of 512: 2 x 8k", "43m", 8192, 2, {"global_chunk": 512, "shard": 512}),
    ("43m, delta memory across the sequence: 2 x 8k", "43m", 8192, 2, DELTA),
    ("43m, one large memory: 2 x 8k", "43m", 8192, 2, LARGE),
    ("125m: 4 x 8k", "125m", 8192, 4, {}),
    ("43m, local chunks [32, 64]: 2 x 8k", "43m", 8192, 2, {"local_chunks": [32, 64]}),
    ("43m, a block at a time: 2 x 8k", "43m", 8192, 2, {"checkpoint": "block"}),
    ("43m, local chunks [1]: 8k", "43m", 8192, 1, {"local_chunks": [1]}),
    ("43m, four memories: 8k", "43m", 8192, 1, FOUR_MEMORIES),
]
PROFILED = [row for row in STEPS if row[0] in ("43m: 2k", "43m, four memories: 2k")]


def training_step(setting: Setting, model: str, length: int, rows: int, changes: dict[str, Any]) -> Callable[[], Any]:
    """Forward, backward and AdamW on random tokens, in bf16."""
    from atlas_lm.config.model import ModelConfig
    from atlas_lm.model.atlas import AtlasLM
    from benchmarks.train_step import model_values

    values = model_values("tiny_deep" if setting.toy else model) | changes
    values["reset_at_document"] = False
    vocabulary = 256 if setting.toy else VOCABULARY
    net = AtlasLM(ModelConfig(**values), vocabulary).to(setting.device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    tokens = torch.randint(vocabulary, (rows, length + 1), device=setting.device)

    def step() -> None:
        with torch.autocast(setting.device, torch.bfloat16):
            logits = net(tokens[:, :-1]).logits
        nnf.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps(setting: Setting) -> Figures:
    """Tokens a second and peak memory of a training step."""
    found: Figures = {}
    for name, model, length, rows, changes in STEPS[:2] if setting.toy else STEPS:
        if setting.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        tokens = rows * (256 if setting.toy else length)
        try:
            step = training_step(setting, model, tokens // rows, rows, {} if setting.toy else changes)
            took = setting.median(step, 2)
            found[name] = {"tokens_per_second": tokens / took, "seconds": took}
        except torch.OutOfMemoryError:
            found[name] = {"tokens_per_second": None, "seconds": None, "failed": "out of memory"}
        if setting.device == "cuda":
            found[name]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        step = None  # type: ignore[assignment]
        print(json.dumps(found), flush=True)
    return found


LAUNCHES = (
    "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaStreamSynchronize",
    "cudaDeviceSynchronize", "cudaMemcpyAsync", "aten::_local_scalar_dense",
)  # fmt: skip


def launches(setting: Setting) -> Figures:
    """Kernels, waits of the host and copies of one training step of 43m at 2,048 tokens."""
    from torch.profiler import ProfilerActivity, profile

    found: Figures = {}
    for name, model, length, rows, changes in STEPS[:1] if setting.toy else PROFILED:
        step = training_step(setting, model, 256 if setting.toy else length, rows, {} if setting.toy else changes)
        step()
        setting.wait()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            step()
            setting.wait()
        counts = {event.key: event.count for event in seen.key_averages()}
        found[name] = {key: counts[key] for key in LAUNCHES if key in counts}
        print(json.dumps(found), flush=True)
    return found


def a_run(setting: Setting) -> Figures:
    """Stage 1 of `tiny` through train.py: its speed; whether a preempted and a killed run are resumed bit for bit."""
    steps = 12 if setting.toy else 24
    common = [
        "+experiment=stage1", f"trainer={'gpu' if setting.device == 'cuda' else 'cpu'}", f"optim.total_steps={steps}",
        "data.val_sequences=8", f"trainer.val_check_interval={steps // 2}", "trainer.log_every_n_steps=1",
        "callbacks.niah_probe.every_n_steps=30", "callbacks.memory_contribution.every_n_steps=1000",
        "callbacks.spike_rollback.every_n_steps=10", "callbacks.step_checkpoint.every_n_steps=10",
    ]  # fmt: skip
    if setting.toy:
        common += ["data.seq_len=128", "data.batch_size=1", "model.layers=1", "model.memory_layers=null"]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)

        def start(name: str, *overrides: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, str(ROOT / "train.py"), *common, f"name={name}", *overrides]
            with (home / f"{name}.log").open("ab") as log:
                return subprocess.Popen(command, cwd=home, stdout=log, stderr=log, start_new_session=True)

        def run_of(name: str) -> Path:
            return next(path.parent for path in home.glob(f"outputs/{name}/2*/config.yaml"))

        def rows(name: str) -> int:
            found = list(home.glob(f"outputs/{name}/2*/metrics.jsonl"))
            return len(found[0].read_bytes().splitlines()) if found else 0

        def losses(name: str) -> list[float | None]:
            lines = (run_of(name) / "metrics.jsonl").read_text().splitlines()
            return [json.loads(line).get("train/loss") for line in lines]

        def weights(name: str) -> dict[str, Tensor]:
            return torch.load(run_of(name) / "checkpoints" / "last.ckpt", "cpu", weights_only=True)["state_dict"]

        def same(one: str, other: str) -> dict[str, bool]:
            a, b = weights(one), weights(other)
            return {"weights": all(torch.equal(a[key], b[key]) for key in b), "losses": losses(one) == losses(other)}

        found: Figures = {"exit_code": start("whole").wait()}
        if found["exit_code"] != 0:
            return {**found, "log": (home / "whole.log").read_text()[-1500:]}
        report = json.loads((run_of("whole") / "report.json").read_text())
        found |= {key: report[key] for key in ("tokens_per_second", "val_loss", "status", "precision", "rollbacks")}
        print(json.dumps(found), flush=True)
        for name, number, code in (("preempted", signal.SIGTERM, 75), ("killed", signal.SIGKILL, -9)):
            process = start(name)
            while rows(name) < steps // 2 + 2 and process.poll() is None:
                time.sleep(0.01)
            os.killpg(process.pid, number)
            found[name] = {"as_documented": process.wait() == code, "resumed": start(name, "resume=auto").wait() == 0}
            found[name] |= same(name, "whole") if found[name]["resumed"] else {}
            print(json.dumps(found), flush=True)
        return found


PARTS: dict[str, tuple[Callable[[Setting], Figures], float]] = {  # and seconds that it may take
    "environment": (environment, 30),
    "ceilings": (ceilings, 40),
    "kernels": (kernels, 120),
    "correctness_of_kernels": (correctness_of_kernels, 120),
    "steps": (steps, 150),
    "run": (a_run, 200),
    "correctness": (correctness, 90),
    "safeguards": (safeguards, 120),
    "faults": (faults, 120),
    "peers": (peers, 90),
    "launches": (launches, 90),
}


# All of them


def in_a_process(name: str, setting: Setting, limit: float) -> Figures:
    """The figures of a part; what it had printed before it failed, and why it did."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--device", setting.device]
    process = subprocess.Popen(
        [*command, *(["--toy"] if setting.toy else [])], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=limit)
        why = None if process.returncode == 0 else " ".join(err.splitlines()[-3:])[-600:]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        why = f"took more than {limit:.0f} s"
    lines = [line for line in out.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if lines else {}
    return {**found, **({"failed": why} if why else {})}


# What a CPU cannot notice by itself: what went wrong on CUDA, or would have, and the test that shows it on a CPU.
SHOWN_ON_A_CPU = {
    "a memory narrower than its head answers in a subspace: 760m and 1300m lost the needle": (
        "tests/unit/model/test_gpu_models.py",
        ("test_a_needle_is_found_after_100_pairs", "test_a_memory_narrower_than_its_head_is_refused"),
    ),
    "Muon trained the gates of models with eight heads and more": (
        "tests/unit/training/test_optimizer.py", ("test_muon_takes_no_gates_however_many_heads_there_are",)),
    "TF32 rounded retentions to 1: nothing was forgotten": (
        "tests/unit/memory/test_tf32.py",
        ("test_forgetting_is_not_rounded", "test_coefficients_of_reads_are_not_rounded")),
    "after the process group was ended, votes were those of one rank": (
        "tests/unit/callbacks/test_hang_watch.py",
        ("test_a_vote_without_a_process_group_is_an_error_and_no_vote_of_one",)),
    "NCCL's watchdog would end the process before the verdict": (
        "tests/unit/callbacks/test_hang_watch.py",
        ("test_nccl_is_aborted_and_gloo_is_cut", "test_nccl_leaves_the_end_to_the_watch")),
    "cumulative sums have no order, and raise with trainer.deterministic=true": (
        "tests/unit/memory/test_on_cuda.py", ("test_nothing_is_summed_without_an_order",)),
    "autocast widened the features, and each memory copied them": (
        "tests/unit/memory/test_on_cuda.py", ("test_features_keep_the_precision_of_what_they_are_of",)),
    "half-lives were steps of bfloat16": (
        "tests/unit/memory/test_on_cuda.py", ("test_half_lives_are_no_steps_of_bfloat16",)),
    "activation checkpointing failed, and kept what chunks keep": (
        "tests/unit/model/test_checkpoint.py",
        ("test_gradients_are_bitwise_the_same", "test_what_chunks_keep_is_let_go")),
    "64 states a shard and head were kept": (
        "tests/unit/memory/test_on_cuda.py", ("test_root_of_the_states_is_kept",)),
    "a step's memory was found out by running out of it": (
        "tests/unit/training/test_budget.py", ("test_activations_are_those_of_a_real_step",)),
    "every rank kept a whole copy of each snapshot: 82 GB a rank": (
        "tests/unit/callbacks/test_spike_rollback.py", ("test_ranks_that_hold_the_same_keep_a_share_each",)),
    "a filesystem without locks let no run start": (
        "tests/unit/runs/test_lock.py", ("test_a_file_stands_for_a_lock",)),
    "the gates of all layers were copied in float32": (
        "tests/unit/callbacks/test_gate_monitor.py", ("test_a_layer_is_measured_at_a_time",)),
    "Muon of sharded parameters was not compared with Muon": (
        "tests/integration/test_strategies.py", ("test_muon_of_sharded_parameters_is_muon",)),
    "reference.py made its tensors on the CPU": (
        "tests/unit/memory/test_on_cuda.py", ("test_the_reference_runs_where_its_inputs_are",)),
    "attention took no fused kernel: all scores were computed and kept in float32": (
        "tests/unit/model/test_attention.py", ("test_a_gpu_finds_what_its_fused_kernels_take",)),
    "a validation streamed a whole sequence, one chunk after another, for one number": (
        "tests/unit/training/test_module.py", ("test_the_norm_of_a_validation_is_that_after_one_shard",)),
    "a deep model's memory_contribution was not measured": (
        "tests/unit/callbacks/test_niah_probe.py", ("test_a_deep_model_is_measured_beyond_one_window",)),
    "safeguards waited for the device some nine times a step, and sent twelve messages and barriers": (
        "tests/unit/callbacks/test_step_vote.py",
        ("test_all_safeguards_together_wait_once_a_step", "test_all_safeguards_together_send_one_message_a_step")),
    "the model waited for the device some 4,400 times a step": (
        "tests/unit/model/test_host_reads.py",
        ("test_a_step_of_the_model_reads_nothing", "test_a_stream_reads_nothing")),
}  # fmt: skip


# What is asked of a card, and the part and figure by which a run shows it; None: by another command
ASKED: dict[str, tuple[str, str] | None] = {
    "memory against float64: below 1e-5 in fp32, 5e-2 in bf16, also with TF32 allowed; three runs bitwise equal": (
        "correctness", "chunk 64 bf16"),
    "the same by the Triton kernels": ("correctness_of_kernels", "chunk 64 bf16"),
    "microseconds of a chunk by the Triton kernels, chunks of 1 to 64": ("kernels", "chunk 1: triton"),
    "SIGTERM and SIGKILL, then `resume=auto`: bit for bit": ("run", "killed"),
    "a forced spike is rolled back bit for bit": ("faults", "spike, bf16-mixed"),
    "a flipped bit on the device is found": ("faults", "BitFlip"),
    "43m, 2 × 8,192 tokens, through train.py with all safeguards: 200,000 tokens/s, 12 % of 989 TFLOP/s": (
        "safeguards", "through train.py"),
    "safeguards: 3 % of the step at most": ("safeguards", "share_by_blocks"),
    "the host waits for the device once a step": ("safeguards", "waits_a_step"),
    "43m at 0.4 of its twin's speed and more, beside full attention and a gated delta net": (
        "peers", "43m, gated delta net"),
    "ten times titans-pytorch; beside FLA's gated delta rule": ("peers", "layer: titans-pytorch"),
    "speed and memory of 43m at local chunks of 1 to 64": ("steps", "43m, local chunks [1]: 8k"),
    "125m trains on 4 × 8,192 tokens": ("steps", "125m: 4 x 8k"),
    "memory of a step within 10 % of what is predicted": ("steps", "43m: 2 x 8k"),
    "43m below its same-window twin in every bin beyond the window, at equal tokens (`benchmarks.worth`)": None,
    "two cards and more: NCCL's abort, scaling": None,
}  # fmt: skip


def shown_by(runs: list[Figures], where: tuple[str, str] | None) -> str:
    """The runs that have this figure."""
    if where is None:
        return "**not measured**"
    part, name = where
    there = [n for n, figures in enumerate(runs, 1) if figures.get(part, {}).get(name) is not None]
    return f"run {', '.join(map(str, there))}" if there else "**not measured**"


def predicted(name: str) -> Figures:
    """What the budget says of a training step: bytes on the card at most, and for one sequence's activations."""
    from atlas_lm.config.model import ModelConfig
    from atlas_lm.config.schema import OptimConfig
    from atlas_lm.training.budget import budget
    from benchmarks.train_step import model_values

    _, model, length, rows, changes = next(row for row in STEPS if row[0] == name)
    values: Any = {"name": model, **model_values(model), **changes}
    optim = OptimConfig(name="adamw", betas=[0.9, 0.95], weight_decay=0.1, lr=1e-3, memory_lr=1e-3, muon_lr=1e-3)
    found = budget(ModelConfig(**values), optim, VOCABULARY, rows, length)
    return {"peak_gib": found.peak / 2**30, "activations_gib": found.activations / 2**30}


def draw(runs: list[Figures]) -> str:
    """docs/gpu.md: a column for each run. A part that a run did not reach is empty there."""
    lines = [
        "# On a GPU", "", "`python -m benchmarks.gpu --out docs/results/gpu.json` measures, and "
        "`python -m benchmarks.gpu --draw` writes this page, with a column for each run there is. Where a card is "
        "without a network, carry the wheels of hydra-core, omegaconf and antlr4-python3-runtime, and for the peers "
        "those of fla-core and titans-pytorch with what they need: `pip download --no-deps --python-version 3.12 "
        "--only-binary :all: <names>`.", "",
        "## Shown on a CPU", "", "What went wrong on CUDA, or would have, each with the test that fails without its "
        "remedy.", "", "| what | test |", "|---|---|",
        *(f"| {what} | `{path}`: {', '.join(f'`{name}`' for name in names)} |"
          for what, (path, names) in SHOWN_ON_A_CPU.items()), "",
        "## Asked of a card", "", "The tables below say what came; most parts are newer than the runs.", "",
        "| what | part | measured |", "|---|---|---|",
        *(f"| {what} | {where[0] if where else ''} | {shown_by(runs, where)} |" for what, where in ASKED.items()), "",
        "## Kernels", "", "Local memories with chunks of up to 64 tokens run as Triton kernels "
        "(`atlas_lm/memory/kernels/triton`), each kind after a trial: where it does not agree with PyTorch's "
        "operations on this card, those run and the log says why. Tests run them by Triton's interpreter in float64 "
        "(`tests/unit/memory/test_triton.py`). Compiled for compute capability 9.0, without a card, by "
        "`python -m benchmarks.kernels` (bytes; products of matrices as wgmma and mma.sync):", "",
        kernel_table(json.loads(KERNELS.read_text())), "",
        "## Memory, predicted", "", "`python -m benchmarks.gpu --predict`: the most that a training step takes at one "
        "moment, counted without a card (`python -m atlas_lm doctor` does the same for any settings).", "",
        "| step | most at one moment, GiB | activations, GiB |", "|---|---|---|",
        *(f"| {name} | {row['peak_gib']:.1f} | {row['activations_gib']:.1f} |"
          for name, row in json.loads(PREDICTED.read_text()).items()), "",
    ]  # fmt: skip
    for part in dict.fromkeys(part for figures in runs for part in figures):
        doc = (PARTS[part][0].__doc__ or "").splitlines()[0]
        columns = [dict(flat(figures.get(part, {}))) for figures in runs]
        head = " | ".join(f"run {n}" for n in range(1, len(runs) + 1)) if len(runs) > 1 else "figure"
        lines += [f"## {part}", "", doc, "", f"| what | {head} |", "|---" * (1 + len(runs)) + "|"]
        for name in dict.fromkeys(name for column in columns for name in column):
            lines.append(f"| {name} | {' | '.join(column.get(name, '') for column in columns)} |")
        lines.append("")
    return "\n".join(lines)


def flat(found: Figures, where: str = "") -> list[tuple[str, str]]:
    """Rows of a table."""
    rows = []
    for name, value in found.items():
        if isinstance(value, dict):
            rows += flat(value, f"{where}{name}: ")
        else:
            text = str(value)
            if isinstance(value, float):
                text = f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
            rows.append((f"{where}{name}", text.replace("\n", " ").replace("|", "/")))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--predict", action="store_true", help="how much memory the steps take, without a card")
    setting = parser.parse_args(namespace=Setting())
    if setting.draw:
        (ROOT / "docs" / "gpu.md").write_text(draw([json.loads(path.read_text()) for path in RUNS]))
        return
    if setting.predict:
        found = {row[0]: predicted(row[0]) for row in STEPS}
        PREDICTED.write_text(json.dumps(found, indent=1) + "\n")
        return
    if setting.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: this machine has no CUDA device: --device cpu --toy runs everything small")
    if setting.part:
        print(json.dumps(PARTS[setting.part][0](setting)), flush=True)
        return
    figures: Figures = {}
    for name in setting.only:
        start = time.perf_counter()
        figures[name] = in_a_process(name, setting, PARTS[name][1])
        figures[name]["part_seconds"] = round(time.perf_counter() - start, 1)
        setting.out.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"{name}: {figures[name]}", flush=True)
    for name, found in figures.items():
        for row, value in flat(found):
            print(f"{name:12} {row:60} {value}")


if __name__ == "__main__":
    main()
