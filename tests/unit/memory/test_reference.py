"""The reference itself, checked another way: autograd of the inner loss, and the recursion on whole matrices."""

import pytest
import torch

from atlas_lm.memory import network as net
from atlas_lm.memory import reference
from atlas_lm.memory.newton_schulz import newton_schulz
from atlas_lm.memory.state import Rule
from tests.support.memory_cases import B, D, E, make_case, run


def matrices(g: net.Gradient) -> list[torch.Tensor]:
    return [x.unsqueeze(-1) * e.unsqueeze(-2) for x, e in zip(g.inputs, g.errors, strict=True)]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("kind", ["gated_mlp", "mlp", "linear"])
def test_closed_form_gradient_is_that_of_autograd(kind, residual):
    """M3: ∇ ½‖M(W; k) − v‖², float64."""
    torch.manual_seed(0)
    network = net.build_network(kind, residual)
    k, v, phi = (torch.randn(3, 1, n, dtype=torch.float64) for n in (D, D, 9))
    weights = [torch.randn(3, *s, dtype=torch.float64, requires_grad=True) for s in network.shapes(D, 9, E)]
    loss = 0.5 * (net.read(network, lambda l, x: x @ weights[l], k, phi) - v).square().sum()
    truth = torch.autograd.grad(loss, weights)
    with torch.inference_mode():
        closed = matrices(net.gradient(network, [net.plain_layer(w.detach()) for w in weights], k, phi, v))
    for a, b in zip(truth, closed, strict=True):
        torch.testing.assert_close(b.squeeze(1), a, rtol=1e-10, atol=1e-10)


def test_curvature_bounds_the_true_blocks():
    """κ_ij against the norm of the block of tokens i, j in the curvature, built from Jacobians (M16)."""
    torch.manual_seed(0)
    network = net.build_network("gated_mlp", residual=False)
    T, F = 6, 9
    k, v, phi = (torch.randn(1, T, n, dtype=torch.float64) for n in (D, D, F))
    weights = tuple(torch.randn(1, *s, dtype=torch.float64) for s in network.shapes(D, F, E))

    def outputs(*w):
        return net.read(network, lambda l, x: x @ w[l], k, phi)[0]

    jacobians = torch.autograd.functional.jacobian(outputs, weights)
    flat = torch.cat([j.flatten(2) for j in jacobians], dim=-1)  # (T, D, all weights)
    blocks = torch.einsum("idw,jew->ijde", flat, flat)
    norms = torch.linalg.matrix_norm(blocks, ord=2)
    g = net.gradient(network, [net.plain_layer(w) for w in weights], k, phi, v)
    assert (net.curvature(g, phi @ phi.mT)[0] >= norms).all()


def by_recursion(rule, case):
    """M5 literally, on whole matrices, without the sharing of curvature: S_t = θ S + g_t, W_t = α W − η U(S_t).

    At chunk 1 the sharing is a division by c κ_tt alone.
    """
    phi_k, phi_q = case.features(case.tokens.k), case.features(case.q)
    W0 = [w.expand(B, *w.shape) for w in case.initial]
    change, S = [torch.zeros_like(w) for w in W0], [torch.zeros_like(w) for w in W0]
    outputs = []
    for t in range(case.q.size(2)):
        now = slice(t, t + 1)
        alpha, eta, theta, gamma = (gate[..., now, None] for gate in case.tokens.gates)
        weights = [w0 + w for w0, w in zip(W0, change, strict=True)]
        layers = [net.plain_layer(w) for w in weights]
        g = net.gradient(case.network, layers, case.tokens.k[:, :, now], phi_k[:, :, now], case.tokens.v[:, :, now])
        own = 1.0 if rule.update == "newton_schulz" else net.curvature(g, g.inputs[0] @ g.inputs[0].mT)
        if rule.update == "newton_schulz":
            read = weights
        S = [theta * s + (1 - theta) * gamma / own * m.squeeze(2) for s, m in zip(S, matrices(g), strict=True)]
        U = S if rule.update == "gradient" else net.join_matrices(
            case.network, [newton_schulz(s) for s in net.split_matrices(case.network, tuple(S))])  # fmt: skip
        change = [alpha * w - eta * u for w, u in zip(change, U, strict=True)]
        if rule.update == "gradient":
            read = [w0 + w for w0, w in zip(W0, change, strict=True)]
        outputs.append(net.read(case.network, lambda l, x, w=read: x @ w[l], case.q[:, :, now], phi_q[:, :, now]))
    return torch.cat(outputs, dim=2), change


@pytest.mark.parametrize("update", ["gradient", "newton_schulz"])
@pytest.mark.parametrize("kind", ["gated_mlp", "linear"])
def test_chunk_one_is_the_token_rule(kind, update):
    """M7: C = 1 gives the exact token rule."""
    case = make_case(kind, 20, eta_max=1.0 if update == "gradient" else 0.01)
    rule = Rule(case.network, 1, 1, update)
    y, state = run(reference, rule, case)
    truth, change = by_recursion(rule, case)
    torch.testing.assert_close(y, truth, rtol=1e-10, atol=1e-10)
    for a, b in zip(state.change, change, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_newton_schulz_orthogonalises():
    """M6: singular values end near 1, a zero matrix stays zero with a finite gradient."""
    torch.manual_seed(0)
    x = torch.randn(3, 8, 5, dtype=torch.float64)
    values = torch.linalg.svdvals(newton_schulz(x))
    assert values.min() > 0.6
    assert values.max() < 1.3
    zero = torch.zeros(1, 4, 4, requires_grad=True)
    newton_schulz(zero).sum().backward()
    assert zero.grad is not None
    assert torch.isfinite(zero.grad).all()
