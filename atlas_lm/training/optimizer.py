"""The outer optimizer: AdamW, or Muon for the 2-D weights with AdamW for the rest; warm-up and cosine (T5)."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from atlas_lm.config.schema import OptimConfig
from atlas_lm.training.flat_storage import flat_storage
from atlas_lm.training.muon import BatchedMuon


class MuonAdamW(Optimizer):
    """Two optimizers with one interface: Lightning steps, saves and schedules a single optimizer.

    Both share this object's parameter groups and state, so that state_dict() is that of any optimizer.
    """

    def __init__(self, muon_groups: list[dict[str, Any]], adamw_groups: list[dict[str, Any]], **adamw: Any) -> None:
        on_a_card = all(p.is_cuda for group in adamw_groups for p in group["params"])
        adamw["fused"] = on_a_card or None  # one kernel instead of some; Lightning clips before
        self.parts: tuple[Optimizer, ...] = (BatchedMuon(muon_groups), AdamW(adamw_groups, **adamw))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._laid_out = 0  # parameters whose moments lie side by side
        self._share()

    def _share(self) -> None:
        """Point both parts at this object's groups and state: loading a checkpoint replaces both."""
        count = len(self.parts[0].param_groups)
        self.parts[0].param_groups = self.param_groups[:count]
        self.parts[1].param_groups = self.param_groups[count:]
        for part in self.parts:
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if not isinstance(self.state, defaultdict):
            self.state = defaultdict(dict, self.state)
        self._laid_out = 0
        self._share()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.state:
            self._laid_out = 0
        for part in self.parts:
            part.step()
        if len(self.state) != self._laid_out:
            self._lay_out()
        return loss

    def _lay_out(self) -> None:
        """The parts make their moments one by one; move them together, where there is memory for both."""
        kinds: dict[Any, list[tuple[dict[str, Any], str]]] = defaultdict(list)
        for state in self.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and not isinstance(value, DTensor):
                    kinds[value.dtype, value.device].append((state, name))
        for places in kinds.values():
            with contextlib.suppress(torch.OutOfMemoryError):  # it costs speed alone
                copies = flat_storage(state[name] for state, name in places)
                for (state, name), copy in zip(places, copies, strict=True):
                    state[name] = copy
        self._laid_out = len(self.state)


def parameter_groups(model: nn.Module, config: OptimConfig) -> tuple[list[nn.Parameter], dict[str, list[nn.Parameter]]]:
    """The 2-D weights that Muon takes, and the rest by whether it decays; apart what a memory's capacity hangs on.

    Muon orthogonalises matrices that map activations to activations: not embeddings, not the gates' small heads, and
    not W_init, whose matrices are per head and are themselves a memory's content. Vectors never decay. W_init and the
    feature map (`memory`) start where a memory holds most: they have a learning rate of their own and no decay.
    """
    matrices, memory, decayed, plain = [], [], [], []
    heads = {id(p) for name, p in model.named_parameters() if name.endswith("gates.weight")}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if ".hierarchy." in name and (".initial." in name or "features." in name):
            memory.append(p)
        elif config.name == "muon" and p.dim() == 2 and id(p) not in embeddings | heads and min(p.shape) >= 32:
            matrices.append(p)
        elif p.dim() >= 2 and "conv" not in name:
            decayed.append(p)
        else:
            plain.append(p)
    return matrices, {"decayed": decayed, "plain": plain, "memory": memory}


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """One optimizer for all parameters. ValueError: a name that is none of ours."""
    matrices, rest = parameter_groups(model, config)
    adamw = [
        {"params": rest["decayed"], "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": rest["memory"], "lr": config.memory_lr, "weight_decay": 0.0},
        {"params": rest["plain"], "lr": config.lr, "weight_decay": 0.0},
    ]
    betas = (float(config.betas[0]), float(config.betas[1]))
    if config.name == "adamw":
        return AdamW(adamw, lr=config.lr, betas=betas)
    if config.name != "muon":
        raise ValueError(f"optim.name={config.name} must be adamw or muon: correct it")
    muon = {"params": matrices, "lr": config.muon_lr, "weight_decay": config.weight_decay}
    return MuonAdamW([muon], adamw, lr=config.lr, betas=betas)


def learning_rate_factor(step: int, config: OptimConfig) -> float:
    """Share of the peak learning rate at an optimizer step: linear warm-up, then a cosine down to `min_lr_ratio`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(optimizer: Optimizer, config: OptimConfig) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))


def apply_settings(checkpoint: dict[str, Any], optimizer: Optimizer, config: OptimConfig) -> None:
    """Let a checkpoint's optimizer and schedule continue with the settings of now, in place; moments and steps stay.

    Lightning would restore learning rates, decay and all other settings of a group as they were saved. `optimizer` is a
    new one of the same model and kind. ValueError: the checkpoint's has other groups.
    """
    states, schedules = checkpoint.get("optimizer_states", []), checkpoint.get("lr_schedulers", [])
    for state, schedule in zip(states, schedules, strict=True):
        saved, wanted = state["param_groups"], optimizer.param_groups
        if len(saved) != len(wanted):
            raise ValueError(
                f"the checkpoint's optimizer has {len(saved)} groups of parameters and this one {len(wanted)}: it was "
                "written by another version of atlas-lm; start a new run from its weights with init_from="
            )
        factor = learning_rate_factor(schedule["last_epoch"], config)
        schedule["base_lrs"] = [group["lr"] for group in wanted]
        schedule["_last_lr"] = [peak * factor for peak in schedule["base_lrs"]]
        for group, settings, rate in zip(saved, wanted, schedule["_last_lr"], strict=True):
            group.update({name: value for name, value in settings.items() if name != "params"})
            group.update(initial_lr=settings["lr"], lr=rate)
