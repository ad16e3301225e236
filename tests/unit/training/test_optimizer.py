"""Parameter groups, Muon and AdamW after one interface, warm-up and cosine (T5)."""

import copy
import io
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from atlas_lm.config.schema import OptimConfig
from atlas_lm.memory.fast_memory import MemorySpec
from atlas_lm.memory.hierarchy import Hierarchy
from atlas_lm.training.optimizer import (
    MuonAdamW,
    build_optimizer,
    build_schedule,
    learning_rate_factor,
    parameter_groups,
)

both = pytest.mark.parametrize("name", ["adamw", "muon"])


def optim_config(name: str = "muon", **changes) -> OptimConfig:
    values = dict(
        name=name, lr=1e-2, muon_lr=0.02, memory_lr=1e-3, weight_decay=0.1, betas=[0.9, 0.95], warmup_steps=5,
        total_steps=50, min_lr_ratio=0.1, clip=1.0,
    )  # fmt: skip
    return OptimConfig(**(values | changes))


class Net(nn.Module):
    """One parameter of every sort."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        self.big = nn.Linear(32, 40)
        self.small_head = nn.Linear(32, 4)
        self.initial = nn.Parameter(torch.randn(2, 32, 32))
        self.conv = nn.Linear(64, 64, bias=False)  # stands for a convolution's weight by its name
        self.frozen = nn.Parameter(torch.randn(64, 64), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.big(self.embed(ids))[..., :32] @ self.initial[0] @ self.initial[1] / 32
        return self.small_head(x).square().mean() + (x @ self.conv.weight[:32, :32]).square().mean()


def train(net: Net, optimizer, steps: int, schedule=None, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randint(50, (4, 6), generator=generator)).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def names(net: nn.Module, parameters) -> set[str]:
    wanted = {id(p) for p in parameters}
    return {name for name, p in net.named_parameters() if id(p) in wanted}


@both
def test_groups_hold_every_trained_parameter_exactly_once(name):
    net = Net()
    optimizer = build_optimizer(net, optim_config(name))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in net.parameters() if p.requires_grad}


def test_what_muon_takes_and_what_decays():
    net = Net()
    matrices, rest = parameter_groups(net, optim_config("muon"))
    assert names(net, matrices) == {"big.weight", "conv.weight"}
    assert names(net, rest["decayed"]) == {"embed.weight", "small_head.weight", "initial"}
    assert names(net, rest["plain"]) == {"big.bias", "small_head.bias"}
    matrices, rest = parameter_groups(net, optim_config("adamw"))
    assert matrices == []
    assert "big.weight" in names(net, rest["decayed"])
    assert "conv.weight" in names(net, rest["plain"])
    decays = [group["weight_decay"] for group in build_optimizer(net, optim_config("adamw")).param_groups]
    assert decays == [0.1, 0.0, 0.0]


@both
def test_what_a_memory_hangs_on_learns_at_its_own_rate_and_does_not_decay(name):
    """W_init and the feature map: at the rate of the other weights they lose the needle (docs/decisions/0021)."""
    spec = MemorySpec(
        dim=32,
        heads=2,
        head_dim=32,
        local_chunks=(4,),
        global_chunk=8,
        shard=8,
        rank=40,
        local_features="sketch",
        local_rank=40,
    )
    net = nn.ModuleDict({"hierarchy": Hierarchy(spec)})
    net = nn.ModuleDict({"block": net})
    optimizer = build_optimizer(net, optim_config(name, memory_lr=1e-4))
    (group,) = (g for g in optimizer.param_groups if g["lr"] == 1e-4)
    assert group["weight_decay"] == 0
    found = names(net, group["params"])
    assert {n.split(".")[-2] for n in found} == {"initial", "features", "local_features"}
    assert len(found) == 2 + 2 + 2 * 2


@pytest.mark.parametrize("heads", [2, 8, 16])
def test_muon_takes_no_gates_however_many_heads_there_are(heads):
    """Their rows are logits of half-lives and write strengths, no map of activations."""
    spec = MemorySpec(
        dim=64, heads=heads, head_dim=4, local_chunks=(4, 8), global_chunk=8, shard=8, rank=40, answers="gated"
    )
    net = nn.ModuleDict({"hierarchy": Hierarchy(spec), "other": nn.Linear(64, 64)})
    matrices, rest = parameter_groups(net, optim_config("muon"))
    assert names(net, matrices) == {"other.weight"}
    assert {f"hierarchy.{m}.gates.weight" for m in ("global_memory", "local_memories.0")} < names(net, rest["decayed"])


def test_muon_and_adamw_are_what_they_are_apart():
    """After one interface each part does bitwise what torch's own does."""
    together, apart = Net(), Net()
    optimizer = build_optimizer(together, optim_config("muon"))
    matrices, rest = parameter_groups(apart, optim_config("muon"))
    parts = [
        torch.optim.Muon([{"params": matrices, "lr": 0.02, "weight_decay": 0.1}]),
        torch.optim.AdamW(
            [{"params": rest["decayed"], "weight_decay": 0.1}, {"params": rest["plain"], "weight_decay": 0.0}],
            lr=1e-2, betas=(0.9, 0.95),
        ),
    ]  # fmt: skip
    assert isinstance(optimizer, MuonAdamW)
    train(together, optimizer, 4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        apart.zero_grad()
        apart(torch.randint(50, (4, 6), generator=generator)).backward()
        for part in parts:
            part.step()
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(a, b)


@both
def test_a_loaded_optimizer_continues_bitwise(name):
    """Through a file, with its schedule, as a resumed run does."""
    config = optim_config(name)
    net = Net()
    optimizer = build_optimizer(net, config)
    schedule = build_schedule(optimizer, config)
    train(net, optimizer, 7, schedule)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, file)
    train(net, optimizer, 5, schedule, seed=1)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Net()
    again.load_state_dict(saved["net"])
    resumed = build_optimizer(again, config)
    resumed_schedule = build_schedule(resumed, config)
    resumed.load_state_dict(saved["optimizer"])
    resumed_schedule.load_state_dict(saved["schedule"])
    train(again, resumed, 5, resumed_schedule, seed=1)
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in optimizer.param_groups]


def test_a_rollback_in_place_loads_again_and_again():
    """Loading replaces groups and state: both parts must follow, each time."""
    net = Net()
    optimizer = build_optimizer(net, optim_config("muon"))
    train(net, optimizer, 3)
    weights, saved = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    results = []
    for _ in range(3):
        net.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(saved))
        train(net, optimizer, 3, seed=2)
        results.append(copy.deepcopy(net.state_dict()))
    for other in results[1:]:
        assert all(torch.equal(results[0][key], other[key]) for key in other)


def test_the_schedule_reaches_both_parts():
    optimizer = build_optimizer(Net(), optim_config("muon"))
    assert isinstance(optimizer, MuonAdamW)
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(2):
        optimizer.step()
        schedule.step()
    muon, adamw = optimizer.parts
    assert [group["lr"] for group in muon.param_groups] == [0.02 / 4]
    assert [group["lr"] for group in adamw.param_groups] == [0.01 / 4, 0.001 / 4, 0.01 / 4]
    optimizer.load_state_dict(optimizer.state_dict())
    schedule.step()
    assert muon.param_groups[0]["lr"] == adamw.param_groups[0]["lr"] * 2 == 0.02 / 8


def test_a_rate_of_zero_moves_nothing():
    """The effect, not the number: both parts obey the groups that the schedule writes to."""
    net = Net()
    optimizer = build_optimizer(net, optim_config("muon"))
    LambdaLR(optimizer, lambda step: 0.0)
    before = [p.detach().clone() for p in net.parameters()]
    train(net, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_learning_rate_at_its_ends():
    config = optim_config(warmup_steps=10, total_steps=110, min_lr_ratio=0.1)
    factor = [learning_rate_factor(step, config) for step in range(200)]
    assert factor[0] == pytest.approx(0.1)  # the first step already learns
    assert factor[9] == 1.0
    assert factor[10] == 1.0
    assert factor[60] == pytest.approx(0.55)  # half way down the cosine
    assert factor[110] == pytest.approx(0.1)
    assert set(factor[110:]) == {factor[110]}
    assert all(a <= b for a, b in pairwise(factor[:11]))
    assert all(a >= b for a, b in pairwise(factor[10:]))


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (10, 10), (20, 10), (1, 1)])
def test_learning_rate_of_odd_runs_is_a_share(warmup, total):
    config = optim_config(warmup_steps=warmup, total_steps=total)
    assert all(0 < learning_rate_factor(step, config) <= 1 for step in range(50))


def storages(optimizer: torch.optim.Optimizer) -> int:
    moments = [x for state in optimizer.state.values() for x in state.values()]
    return len({x.untyped_storage().data_ptr() for x in moments})


def test_muons_moments_lie_side_by_side_and_train_as_if_they_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    net, plain = Net(), Net()
    optimizer = build_optimizer(net, optim_config())
    train(net, optimizer, 3)
    assert storages(optimizer) == 1
    with monkeypatch.context() as patched:
        patched.setattr(MuonAdamW, "_lay_out", lambda self: None)
        apart = build_optimizer(plain, optim_config())
        train(plain, apart, 3)
    assert storages(apart) > 5
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert file.tell() < 1.2 * sum(x.nbytes for state in optimizer.state.values() for x in state.values()) + 20_000
    optimizer.load_state_dict(copy.deepcopy(apart.state_dict()))
    train(net, optimizer, 1, seed=5)
    assert storages(optimizer) == 1, "again after a checkpoint"
    optimizer.state.clear()  # a rollback to the start of a run
    train(net, optimizer, 1)
    assert storages(optimizer) == 1
