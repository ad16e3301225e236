"""The LightningModule: loss, logging, optimizers; what the callbacks ask of a model is offered here."""

# B batch, T tokens, V vocabulary

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as nnf
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity

from atlas_lm.config.model import ModelConfig
from atlas_lm.config.schema import OptimConfig
from atlas_lm.model.atlas import AtlasLM, Output, memory_spec
from atlas_lm.model.probes import (
    attention_reach,
    losses_after_restarts,
    losses_with_and_without_memory,
    write_and_read,
)
from atlas_lm.model.sampling import generate
from atlas_lm.training.flat_storage import lay_side_by_side
from atlas_lm.training.lightning_internals import logging_step
from atlas_lm.training.optimized import OptimizedModule, plain

UNSCORED = -100
SAMPLE_PROMPT, SAMPLE_TOKENS = "def ", 128  # what each validation writes a continuation of


def capped_polarisation_gradient(gate: Tensor, main: Tensor, weight: float, cap: float) -> Tensor:
    """∇ of weight · mean(1 − |2g − 1|) with respect to a gate, its norm at most `cap` times the main gradient's."""
    gradient = (2 * gate - 1).sign().to(main.dtype).mul_(-2 * weight / gate.numel())
    norm = torch.linalg.vector_norm(gradient)
    limit = cap * torch.linalg.vector_norm(main)
    return gradient * (limit / norm.clamp_min(torch.finfo(main.dtype).tiny)).clamp(max=1.0)


def _with_polarisation(gate: Tensor, weight: float, cap: float, main: Tensor) -> Tensor:
    return main + capped_polarisation_gradient(gate, main, weight, cap)


class AtlasModule(OptimizedModule):
    """Trains an AtlasLM on batches of `input_ids`, `targets` (B, T), −100 unscored, and `document_start`.

    `bytes_per_token`: of the validation text; None where the tokens are no text (recall): accuracy is logged then.
    `tokenizer`: its fingerprint, for the checkpoints, so that nobody reads the weights with another one.
    """

    model: AtlasLM

    def __init__(
        self,
        model: ModelConfig | dict[str, Any],
        optim: OptimConfig | dict[str, Any],
        vocab_size: int,
        bytes_per_token: float | None = None,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        model = ModelConfig(**model) if isinstance(model, dict) else model
        optim = OptimConfig(**optim) if isinstance(optim, dict) else optim
        # plain containers: a checkpoint must load with weights_only=True
        self.save_hyperparameters(
            {
                "model": plain(model),
                "optim": plain(optim),
                "vocab_size": vocab_size,
                "bytes_per_token": bytes_per_token,
                "tokenizer": tokenizer,
            }
        )
        self.model_config, self.optim_config = model, optim
        self.bytes_per_token = bytes_per_token
        self.model = AtlasLM(model, vocab_size)
        lay_side_by_side(self.model)
        # torchmetrics drops NaN by default: a validation that is partly NaN would look healthy
        self.val_loss, self.recall = MeanMetric(nan_strategy="disable"), MeanMetric(nan_strategy="disable")
        self.val_ppl = Perplexity(ignore_index=UNSCORED)
        self._last_step_ended: float | None = None
        self._gates: tuple[Tensor, ...] = ()  # of the last training step
        self.loss_weights = {"polarisation": 0.0}  # λ of M15, until a schedule sets it

    # What callbacks ask for

    @property
    def local_chunks(self) -> tuple[int, ...]:
        """C_L of the local memories, tokens; empty without a memory."""
        return self.model.local_chunks

    def set_local_chunks(self, chunks: tuple[int, ...] | list[int]) -> None:
        """Change them at run time (M13)."""
        self.model.set_local_chunks(chunks)

    def gate_values(self) -> tuple[Tensor, ...]:
        """The fusion gates of the last training step, by layer with a memory (batch, tokens, width)."""
        return self._gates

    def held_out_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch, nats per scored token."""
        return self.loss(self(batch).logits, batch["targets"])

    def memory_contribution(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean loss with the memory, and with its output zeroed, where attention cannot see the whole past (C1b)."""
        starts = batch.get("document_start")
        return losses_with_and_without_memory(self.model, batch["input_ids"], batch["targets"], starts)

    def attention_reach(self) -> tuple[int, int]:
        """Tokens of one attention window, and how many tokens back all layers' windows together reach."""
        return self.model_config.window, attention_reach(self.model_config)

    def losses_after_restarts(self, batch: dict[str, Tensor], distances: Sequence[int], block: int) -> Tensor:
        """Nats of the last `block` targets with the memory restarted so many tokens before them, and never (W1).

        See `atlas_lm.model.probes.losses_after_restarts`.
        """
        if self.model_config.memory == "none":
            raise ValueError("the model has no memory")
        starts = batch.get("document_start")
        return losses_after_restarts(self.model, batch["input_ids"], batch["targets"], distances, block, starts)

    def write_and_read(
        self, keys: Tensor, values: Tensor, query: Tensor, batch: dict[str, Tensor] | None = None
    ) -> Tensor:
        """What every memory answers after learning pairs (C1), with its gates open, or as `batch` opens them.

        See `atlas_lm.model.probes.write_and_read`.
        """
        return write_and_read(self.model, keys, values, query, None if batch is None else batch["input_ids"])

    def memory_layers(self) -> list[int]:
        """The blocks that hold a memory, counted from 0."""
        return [i for i, block in enumerate(self.model.blocks) if block.memory is not None]

    def memory_shape(self) -> tuple[int, int, int]:
        """Layers whose memory takes pairs (C1), heads, dimension of keys and values."""
        layers = sum(1 for _ in self.model.hierarchies())
        spec = memory_spec(self.model_config)
        return layers, spec.heads, spec.head_dim

    def persistent_memory(self) -> list[Tensor]:
        """The persistent keys of every layer, (heads, keys, dim) each (M10)."""
        return [hierarchy.persistent_keys.detach() for hierarchy in self.model.hierarchies()]

    # Training

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def forward(self, batch: dict[str, Tensor]) -> Output:
        return self.model(batch["input_ids"], document_start_BT=batch.get("document_start"))

    def loss(self, logits_BTV: Tensor, targets_BT: Tensor, weights_BT: Tensor | None = None) -> Tensor:
        """Mean negative log likelihood over the scored tokens, nats; a weighted mean where there are weights."""
        logits, targets = logits_BTV.float().flatten(0, 1), targets_BT.flatten()
        if weights_BT is None:
            return nnf.cross_entropy(logits, targets, ignore_index=UNSCORED)
        weights = weights_BT.flatten() * (targets != UNSCORED)
        each = nnf.cross_entropy(logits, targets, ignore_index=UNSCORED, reduction="none")
        return (weights * each).sum() / weights.sum()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self(batch)
        self._gates = tuple(gate.detach() for gate in output.gates)
        self._polarise(output.gates)
        loss = self.loss(output.logits, batch["targets"], batch.get("weights"))
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/ppl", loss.detach().exp(), prog_bar=True)
        # tensors on the host: Lightning would send a number to the device, and wait
        self.log("optim/lr", torch.tensor(float(self.trainer.optimizers[0].param_groups[-1]["lr"])))
        return loss

    def _polarise(self, gates: tuple[Tensor, ...]) -> None:
        """Add the capped gradient of the polarisation loss where the main gradient passes the gates (M15)."""
        weight = self.loss_weights["polarisation"]
        if weight == 0 or not gates:
            return
        if self._trainer is not None:  # Lightning divides the main loss so, not what hooks add to its gradient
            weight /= self.trainer.accumulate_grad_batches
        cap = self.model_config.polarisation_cap
        for gate in gates:
            gate.register_hook(partial(_with_polarisation, gate.detach(), weight, cap))
        self.log("train/polarisation", torch.stack([(1 - (2 * g.detach() - 1).abs()).mean() for g in gates]).mean())

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        now = time.perf_counter()
        if self._last_step_ended is not None:
            rate = batch["input_ids"].numel() * self.trainer.world_size / (now - self._last_step_ended)
            self.log("perf/tokens_per_second", torch.tensor(float(rate)), prog_bar=True)
        self.log(
            "train/global_step", torch.tensor(float(self.trainer.global_step))
        )  # goes back at a rollback; the loggers' step not
        self._last_step_ended = now

    def on_validation_start(self) -> None:
        self._last_step_ended = None  # a validation is no training time

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        output = self(batch)
        targets = batch["targets"]
        scored = (targets != UNSCORED).sum()
        self.val_loss.update(self.loss(output.logits, targets), weight=scored)
        self.val_ppl.update(output.logits.float(), targets)
        if self.bytes_per_token is None:
            right = (output.logits.argmax(-1) == targets)[targets != UNSCORED]
            self.recall.update(right.float())
        if batch_idx == 0 and output.gates and not self.trainer.sanity_checking:
            self._draw_gates(output.gates)
            if not self._sharded():  # a stream's first state is built of whole parameters
                self._log_memory(batch)

    def on_validation_epoch_end(self) -> None:
        loss = self.val_loss.compute()
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)
        self.log("val/ppl", self.val_ppl.compute(), sync_dist=True)
        if self.bytes_per_token is not None:
            bits = loss / math.log(2) / self.bytes_per_token
            self.log("val/bits_per_byte", bits, prog_bar=True, sync_dist=True)
        else:
            self.log("recall/accuracy", self.recall.compute(), prog_bar=True, sync_dist=True)
        for metric in (self.val_loss, self.val_ppl, self.recall):
            metric.reset()

    def _draw_gates(self, gates: tuple[Tensor, ...]) -> None:
        for board in self._boards():
            for i, gate in zip(self.memory_layers(), gates, strict=True):
                finite = gate.float()[gate.isfinite()]  # a histogram of nothing is an error of TensorBoard's
                if finite.numel():
                    board.add_histogram(f"memory/gate/layer_{i}", finite, self._logging_step())

    def _log_memory(self, batch: dict[str, Tensor]) -> None:
        """How far the fast weights have moved from W_init after the first shard, per layer: ‖W − W_init‖.

        A stream goes through its chunks one after another: a whole sequence of a GPU's model would take seconds.
        """
        starts, shard = batch.get("document_start"), self.model_config.shard
        state = self.model.initial_state(1)
        tokens = batch["input_ids"][:1, :shard]
        after = self.model(tokens, state, None if starts is None else starts[:1, :shard]).state
        for i, block in enumerate(after):
            if block.memory is None:
                continue
            norm = sum(change.square().sum() for change in block.fast_weights()) ** 0.5
            self.log(f"memory/norm/layer_{i}", norm, sync_dist=True)

    def _boards(self) -> list[Any]:
        """The TensorBoard writers of this run, on rank 0."""
        return [logger.experiment for logger in self.loggers if isinstance(logger, TensorBoardLogger)] * (
            self.global_rank == 0
        )

    def _logging_step(self) -> int:
        """The step of all loggers, which never goes back; `global_step` does at a rollback."""
        return logging_step(self.trainer)

    def on_validation_end(self) -> None:
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        boards = self._boards()
        if tokenizer is None or not boards or self.trainer.sanity_checking or self._sharded():
            return  # where parameters are sharded a forward pass takes all ranks, and the boards are on one
        try:
            text = generate(self.model, tokenizer, SAMPLE_PROMPT, SAMPLE_TOKENS)
        except FloatingPointError as error:  # the verdict says so too; a sample is no reason to lose the run
            text = f"({error})"
        for board in boards:
            board.add_text("sample", f"```\n{SAMPLE_PROMPT}{text}\n```", self._logging_step())

    def _sharded(self) -> bool:
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Chunk sizes change while training continues; who uses the weights wants those of the end."""
        checkpoint["local_chunks"] = list(self.local_chunks)
        checkpoint["sharded"] = self._trainer is not None and self._sharded()

    def configure_model(self) -> None:
        """Shard parameters block by block where the strategy asks for it (trainer=fsdp)."""
        if not self._sharded() or isinstance(self.model, FSDPModule):  # Lightning asks again before it validates
            return
        assert isinstance(self.trainer.strategy, ModelParallelStrategy)
        mesh = self.trainer.strategy.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
