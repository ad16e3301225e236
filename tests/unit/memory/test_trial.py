"""A form of the loop that is wrong on this device, or fails, is not used, and the log says so."""

import pytest
import torch

from atlas_lm.memory import chunked
from atlas_lm.memory.loop import autograd, trial
from atlas_lm.memory.loop import cpu as cpu_loop
from atlas_lm.memory.loop import triton as triton_loop
from atlas_lm.memory.state import Rule
from tests.support.memory_cases import make_case, run

KINDS = ("gated_mlp", "mlp", "linear")


@pytest.fixture(autouse=True)
def another_form(monkeypatch):
    """Stands for the kernels: PyTorch's form, to be spoilt. Counts its calls."""
    calls = []

    def form(config, given, inputs):
        calls.append(inputs.phi.size(1))
        return autograd._in_pytorch(config, given, inputs)

    monkeypatch.setattr(cpu_loop, "can_run", lambda *_: False)
    monkeypatch.setattr(triton_loop, "can_run", lambda *_: True)
    monkeypatch.setattr(triton_loop, "run", form)
    monkeypatch.setattr(trial, "_found", {})
    return calls


def use(kind: str = "gated_mlp", dtype=torch.float64) -> torch.Tensor:
    case = make_case(kind, 40, dtype=dtype)
    return run(chunked, Rule(case.network, 8, 1, "gradient", "token", radius=2.0), case)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_right_form_is_tried_once_and_used(kind, dtype, another_form, caplog):
    for _ in range(2):
        use(kind, dtype)
    assert another_form == [trial.K, 5, 5]
    assert not caplog.records


def test_bfloat16_is_no_difference(another_form, caplog):
    with torch.autocast("cpu", torch.bfloat16):
        use(dtype=torch.float32)
    assert another_form == [trial.K, 5]
    assert not caplog.records


class Wrong(torch.autograd.Function):
    """The identity, with a gradient of the wrong sign."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return -dx


def spoilt(form, name):
    def wrong(config, given, inputs):
        return form(config, given, inputs._replace(**{name: Wrong.apply(getattr(inputs, name))}))

    return wrong


@pytest.mark.parametrize("name", ["phi", "write_coef", "grad_coef", "initial_out"])
def test_a_wrong_gradient_is_seen(name, another_form, monkeypatch, caplog):
    right = use()
    trial._found.clear()
    monkeypatch.setattr(triton_loop, "run", spoilt(triton_loop.run, name))
    another_form.clear()
    assert torch.equal(use(), right)
    assert another_form == [trial.K], "tried, and not used"
    assert f"the gradient of {name} differs by 2 of its size" in caplog.text


def test_a_wrong_output_is_seen(another_form, monkeypatch, caplog):
    right, form = use(), triton_loop.run
    trial._found.clear()
    monkeypatch.setattr(triton_loop, "run", lambda *a: (form(*a)[0] * 1.01, form(*a)[1]))
    assert torch.equal(use(), right)
    assert "the output differs by 0.01 of its size" in caplog.text


def test_a_form_that_fails_is_not_used(another_form, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(triton_loop, "run", fails)
    use()
    assert "RuntimeError: out of resource: shared memory" in caplog.text


def test_a_trial_changes_no_random_numbers_and_runs_under_inference_mode(another_form):
    with torch.no_grad():
        case = make_case("gated_mlp", 40)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with torch.inference_mode():
        run(chunked, Rule(case.network, 8, 1, "gradient", "token", radius=2.0), case)
    assert another_form[0] == trial.K
    assert torch.equal(torch.rand(3), expected)
