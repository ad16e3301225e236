"""What the module adds to a language model: gate polarisation (M15), one storage, one gradient norm a step."""

import lightning
import pytest
import torch

from atlas_lm.config.model import ModelConfig
from atlas_lm.config.schema import OptimConfig
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.training.module import UNSCORED, AtlasModule, capped_polarisation_gradient
from atlas_lm.training.optimized import OptimizedModule

VOCABULARY = 11


def make_module(weight: float, cap: float, **changes) -> AtlasModule:
    values = dict(
        name="small", dim=10, layers=2, heads=2, head_dim=4, window=5, ffn_multiple=2.0, fusion="multiplicative",
        memory="atlas", local_chunks=[3, 7], global_chunk=8, shard=24, network="gated_mlp", residual=False,
        features="sketch", rank=6, memory_hidden=5, context=1, update="gradient", persistent_keys=3, eta_max=1.0,
        half_life=64.0, radius=8.0, conv=4, reset_at_document=False, polarisation_cap=cap,
        rope_base=10000.0,
    )  # fmt: skip
    optim = OptimConfig(
        name="adamw", lr=1e-3, muon_lr=0.02, memory_lr=1e-3, weight_decay=0.1, betas=[0.9, 0.95], warmup_steps=1,
        total_steps=10, min_lr_ratio=0.1, clip=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    module = AtlasModule(ModelConfig(**(values | changes)), optim, VOCABULARY).double()
    module.set_loss_weight("polarisation", weight)
    module.log = lambda *args, **kwargs: None
    return module


def make_batch(T: int = 30) -> dict[str, torch.Tensor]:
    tokens = torch.randint(VOCABULARY, (2, T + 1), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:].clone()}


def polarisation(gates) -> torch.Tensor:
    return sum((1 - (2 * g - 1).abs()).mean() for g in gates)


def test_gradient_of_one_gate_is_that_of_the_loss():
    torch.manual_seed(0)
    gate = torch.rand(2, 7, 5, dtype=torch.float64, requires_grad=True)
    (truth,) = torch.autograd.grad(0.3 * polarisation([gate]), gate)
    main = torch.randn_like(gate)
    found = capped_polarisation_gradient(gate.detach(), main, 0.3, cap=1e6)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("cap", [0.01, 0.1, 0.5])
def test_gradient_is_capped_by_a_share_of_the_main_one(cap):
    torch.manual_seed(0)
    gate, main = torch.rand(2, 7, 5), 1e-3 * torch.randn(2, 7, 5)
    found = capped_polarisation_gradient(gate, main, 100.0, cap)
    torch.testing.assert_close(found.norm(), cap * main.norm())
    free = capped_polarisation_gradient(gate, main, 100.0, 1e9)
    torch.testing.assert_close(found / found.norm(), free / free.norm())


def test_gradient_is_zero_where_it_has_nothing_to_say():
    main = torch.randn(3, 4)
    assert (capped_polarisation_gradient(torch.full((3, 4), 0.5), main, 1.0, 0.1) == 0).all()
    assert (capped_polarisation_gradient(torch.rand(3, 4), torch.zeros(3, 4), 1.0, 0.1) == 0).all()
    assert (capped_polarisation_gradient(torch.rand(3, 4), main, 0.0, 0.1) == 0).all()


def backward(module: AtlasModule, extra: float = 0.0) -> dict[str, torch.Tensor]:
    """Gradients of a training step, or of its loss plus `extra` · polarisation by autograd."""
    batch = make_batch()
    output = module(batch)
    if not extra:
        module._polarise(output.gates)
    loss = module.loss(output.logits, batch["targets"])
    (loss.double() + extra * polarisation(output.gates)).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_hooks_on_the_gates_add_the_gradient_of_the_loss():
    """In every parameter, both layers: the same as adding the term to the loss, while the cap is out of reach."""
    found, truth = backward(make_module(0.3, cap=1e9)), backward(make_module(0.0, cap=1e9), extra=0.3)
    assert found.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(found[name], truth[name], rtol=1e-5, atol=1e-9)
    plain = backward(make_module(0.0, cap=1e9))
    assert any((found[name] - plain[name]).abs().max() > 1e-4 for name in truth)


def test_capped_polarisation_hardly_moves_the_gradient():
    """The lesson of a run that guard losses destroyed: a weight of a million adds no more than the cap."""
    plain, found = backward(make_module(0.0, cap=0.1)), backward(make_module(1e6, cap=0.1))
    name = "model.blocks.1.fusion.gate.bias"
    assert (found[name] - plain[name]).norm() > 0
    total = torch.cat([g.flatten() for g in plain.values()]).norm()
    moved = torch.cat([(found[name] - plain[name]).flatten() for name in plain]).norm()
    assert moved < total


def test_a_model_without_gates_is_left_alone():
    module = make_module(1.0, cap=0.1, memory="none")
    assert module(make_batch()).gates == ()
    backward(module)


def test_unscored_targets_do_not_count():
    module, batch = make_module(0.0, 0.1), make_batch()
    logits = module(batch).logits
    half = batch["targets"].clone()
    half[:, :15] = UNSCORED
    torch.testing.assert_close(module.loss(logits, half), module.loss(logits[:, 15:], batch["targets"][:, 15:]))
    rolled = logits.clone()
    rolled[:, :15] = 0
    torch.testing.assert_close(module.loss(logits, half), module.loss(rolled, half))


def test_parameters_lie_in_one_storage_as_the_seed_made_them():
    module = make_module(0.0, 0.1)
    fresh = AtlasModule(module.model_config, module.optim_config, VOCABULARY)
    assert len({p.untyped_storage().data_ptr() for p in fresh.model.parameters()}) == 1
    torch.manual_seed(0)
    again = AtlasLM(module.model_config, VOCABULARY)
    for (name, ours), theirs in zip(module.model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs.double()), name


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: rows[index % 2] for name, rows in make_batch().items()}


def fit(module: AtlasModule, *callbacks: lightning.Callback, **changes) -> lightning.Trainer:
    del module.log  # the trainer's
    torch.manual_seed(0)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=3, max_epochs=-1, callbacks=[*callbacks], logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, **({"gradient_clip_val": 0.05} | changes),
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(Tokens(), batch_size=2)
    trainer.fit(module.float(), loader, loader)
    return trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.parametrize("changes", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_algorithm": "value"}])
def test_it_clips_as_lightning_does_with_the_norm_of_the_step(changes, monkeypatch):
    asked = []

    class Ask(lightning.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            asked.append((float(pl_module.gradient_norm()), float(torch.nn.utils.get_total_norm(gradients))))

    module = make_module(0.0, 0.1)
    trainer = fit(module, Ask(), **changes)
    plain = make_module(0.0, 0.1)
    with monkeypatch.context() as patched:
        patched.delattr(OptimizedModule, "configure_gradient_clipping")
        fit(plain, **changes)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    assert len({norm for norm, _ in asked}) == 3, "each step has its own"
    assert asked == [(pytest.approx(truth), truth) for _, truth in asked]
    assert asked[0][0] > 0.05, "the test would clip nothing"
    assert float(trainer.callback_metrics["optim/grad_norm"]) == asked[-1][0], "before clipping"


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_the_norm_is_of_the_gradients_as_they_are():
    class Change(lightning.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            before = pl_module.gradient_norm()
            for p in pl_module.parameters():
                if p.grad is not None:
                    p.grad.mul_(2)
            torch.testing.assert_close(pl_module.gradient_norm(), 2 * before)
            optimizer.zero_grad(set_to_none=True)
            assert float(pl_module.gradient_norm()) == 0

    trainer = fit(make_module(0.0, 0.1), Change())
    assert "optim/grad_norm" not in trainer.callback_metrics, "a skipped step has none"


def test_layers_are_those_that_hold_a_memory(monkeypatch):
    """The needle's pairs, and the names of metrics."""
    module = make_module(0.0, 0.1, memory_layers=[1])
    layers, heads, dim = module.memory_shape()
    assert layers == 1
    keys = torch.nn.functional.normalize(torch.randn(layers, heads, 3, 5, dim).double(), dim=-1)
    assert module.write_and_read(keys, keys, keys[..., 0, :]).shape == (1, 3, heads, 3, dim)
    logged = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value)}))
    with torch.no_grad():
        module._log_memory(make_batch())
    assert list(logged) == ["memory/norm/layer_1"]
    assert logged["memory/norm/layer_1"] > 0


def test_the_norm_of_a_validation_is_that_after_one_shard(monkeypatch):
    """A stream goes through its chunks one by one: of a long sequence that took seconds on a GPU."""
    module = make_module(0.0, 0.1, shard=8, global_chunk=8)
    read, logged = [], {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value)}))
    forward = module.model.forward
    monkeypatch.setattr(module.model, "forward", lambda x, *rest: read.append(x.shape) or forward(x, *rest))
    with torch.no_grad():
        module._log_memory(make_batch())
    assert read == [(1, 8)]
    assert all(value > 0 for value in logged.values())
    assert len(logged) == len(module.model.blocks)
