"""The Triton kernels, run by Triton's interpreter in float64: outputs, final state, every gradient as `reference`."""

import importlib
import inspect
import linecache
import types
from pathlib import Path

import pytest
import torch

from atlas_lm.memory import chunked, network, reference
from atlas_lm.memory.loop import autograd, trial
from atlas_lm.memory.loop import cpu as cpu_loop
from atlas_lm.memory.loop import triton as triton_loop
from atlas_lm.memory.state import Rule
from tests.support.memory_cases import everything, gradients, make_case, relative_errors, run
from tests.support.pairwise import every_pair

pytest.importorskip("triton", minversion="3.9", reason="older interpreters do not know today's NumPy")
SIZES = (16, 16, 31)  # 48 features: three tiles
CHUNKS = (1, 2, 7, 16, 32, 64)
KINDS = ("gated_mlp", "mlp", "linear")


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The launches: a test that ran something else shows nothing."""
    monkeypatch.setattr(triton_loop, "DEVICES", ["cpu"])
    monkeypatch.setattr(cpu_loop, "can_run", lambda *_: False)
    monkeypatch.setattr(autograd, "agrees", lambda *_: True)  # see test_the_trial
    launched = []
    launch = triton_loop._Segments._launch

    def counted(self, which, *arguments, **numbers):
        launched.append(which)
        launch(self, which, *arguments, **numbers)

    monkeypatch.setattr(triton_loop._Segments, "_launch", counted)
    return launched


def case_of(kind: str, T: int, dtype=torch.float64):
    return make_case(kind, T, dtype=dtype, sizes=SIZES, batch=1)


def rule_of(case, chunk: int, radius: float = 2.0) -> Rule:
    return Rule(case.network, chunk, 1, "gradient", "token", radius=radius)


def errors_of(case, rule, cuts: tuple[int, ...] = ()) -> float:
    """The largest relative error of outputs, final state and every gradient."""
    truth, fast = run(reference, rule, case), run(chunked, rule, case, cuts)
    of_values = relative_errors(everything(truth), everything(fast))
    return max(of_values + relative_errors(gradients(truth, case), gradients(fast, case)))


def long(T: int, chunk: int, **_: object) -> bool:
    """The interpreter takes a tenth of a second for a chunk and a head."""
    return 2 * chunk < T or T == 100


@every_pair(T=[1, 7, 63, 100], chunk=CHUNKS, kind=KINDS, radius=[2.0, 0.001], slow=long)
def test_the_kernels_equal_the_reference(T, chunk, kind, radius, launched):
    """Inside the ball and held by it."""
    case = case_of(kind, T)
    rule = rule_of(case, chunk, radius)
    assert errors_of(case, rule) <= 1e-9
    if chunk <= T and radius < 1:
        sizes = torch.cat(network.sizes(case.network, run(chunked, rule, case)[1].change), dim=-1)
        assert (sizes > 0.999 * radius).any(), "the ball is never reached"
    assert set(launched) == {"learn", "read", "read_backward", "learn_backward"}


@pytest.mark.parametrize(
    "cuts", [(1,), *(pytest.param(cuts, marks=pytest.mark.slow) for cuts in ((20, 21), (7, 14, 35)))]
)
def test_pieces_equal_one_call(cuts):
    """A stream: states are given, and come back with their gradients."""
    case = case_of("gated_mlp", 40)
    assert errors_of(case, rule_of(case, 16), cuts) <= 1e-9


@pytest.mark.slow
def test_float32():
    case = case_of("gated_mlp", 40, dtype=torch.float32)
    assert errors_of(case, rule_of(case, 16)) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "before", "after"),
    [
        ("learn", "theta * s_gate + product", "alpha * s_gate + product"),
        ("read", "out -= product(weights", "out += product(weights"),
        ("read_backward", "dx += by_s", "dx -= by_s"),
        ("learn_backward", "ds = theta * ds + beta * dw", "ds = theta * ds - beta * dw"),
    ],
)
def test_a_planted_error_is_seen(kernel, before, after, monkeypatch):
    """The comparison can fail: a wrong sign in any of the kernels does."""
    module = importlib.import_module(f"atlas_lm.memory.kernels.triton.{kernel}")
    path = Path(inspect.getfile(module))
    text = path.read_text(encoding="utf-8")
    assert before in text
    planted = types.ModuleType("planted")
    lines = text.replace(before, after).splitlines(keepends=True)
    name = f"{path}.planted"
    linecache.cache[name] = (len(text), None, lines, name)  # Triton reads the source of what it compiles
    exec(compile("".join(lines), name, "exec"), planted.__dict__)
    monkeypatch.setattr(module, kernel, getattr(planted, kernel))
    case = case_of("gated_mlp", 16)
    assert errors_of(case, rule_of(case, 4)) > 1e-6


def test_second_derivatives_are_refused():
    case = case_of("gated_mlp", 7)
    y = run(chunked, rule_of(case, 4), case)[0]
    with pytest.raises(RuntimeError, match="no second derivatives: call backward without create_graph"):
        torch.autograd.grad(y.square().sum(), case.q, create_graph=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trial(kind, launched, monkeypatch):
    """Right kernels pass the trial that they have to stand on a card."""
    monkeypatch.setattr(trial, "_found", {})
    monkeypatch.setattr(autograd, "agrees", trial.agrees)
    case = case_of(kind, 7)
    run(chunked, rule_of(case, 4), case)
    assert list(trial._found.values()) == [True]
    assert launched[:2] == ["learn", "read"]
    assert launched[-1] == "read", "used after it"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"update": "newton_schulz"}, "no kernel for update: newton_schulz"),
        ({"context": 4}, "no kernel for context: 4"),
        ({"chunk": 100}, "no kernel for chunks of 100 tokens"),
    ],
)
def test_what_the_kernels_do_not_know_runs_in_pytorch(change, why, launched, caplog):
    triton_loop._say.cache_clear()
    case = case_of("gated_mlp", 100)
    for _ in range(2):
        run(chunked, rule_of(case, 16)._replace(**change), case)
    assert launched == []
    assert [record.message.split(": ", 1)[1] for record in caplog.records] == [why], "it is said once"


def test_reads_at_a_chunks_start_are_for_pytorch(launched, caplog):
    """A global memory has few and long chunks: nothing is wrong, and nothing is said."""
    case = case_of("gated_mlp", 20)
    run(chunked, rule_of(case, 16)._replace(read="chunk"), case)
    assert launched == []
    assert not caplog.records


def test_a_head_that_is_no_power_of_two_runs_in_pytorch(launched, caplog):
    triton_loop._say.cache_clear()
    case = make_case("gated_mlp", 20)
    run(chunked, rule_of(case, 7), case)
    assert launched == []
    assert "no kernel for" in caplog.text


def test_without_triton_pytorch_runs(launched, monkeypatch, caplog):
    triton_loop._say.cache_clear()
    monkeypatch.setattr(triton_loop, "_installed", lambda: False)
    case = case_of("gated_mlp", 20)
    run(chunked, rule_of(case, 7), case)
    assert launched == []
    assert "triton is not installed" in caplog.text
