"""Every metric against a slow form in float64, one number at a time."""

import math

import pytest
import torch

from atlas_lm.inspection import metrics

GENERATOR = torch.Generator().manual_seed(0)


def logits(*shape, scale=3.0):
    return torch.randn(*shape, generator=GENERATOR) * scale


def probabilities(row):
    most = max(row)
    weights = [math.exp(x - most) for x in row]
    return [w / sum(weights) for w in weights]


def entropy(p):
    return -sum(x * math.log2(x) for x in p if x > 0)


@pytest.mark.parametrize("vocabulary", [2, 11, 5000])
@pytest.mark.parametrize("scale", [0.0, 1.0, 12.0])
def test_logit_metrics(vocabulary, scale):
    rows = logits(3, vocabulary, scale=scale)
    found = metrics.logit_metrics(rows, k=10)
    bits = metrics.surprisal_bits(rows, torch.tensor([0, 1, vocabulary - 1]))
    for i, row in enumerate(rows.double().tolist()):
        p = probabilities(row)
        largest = sorted(p, reverse=True)
        assert float(found.entropy_bits[i]) == pytest.approx(entropy(p), rel=1e-6, abs=1e-6)
        assert float(found.perplexity[i]) == pytest.approx(2 ** entropy(p), rel=1e-5)
        assert float(found.margin[i]) == pytest.approx(largest[0] - largest[1], abs=1e-6)
        assert float(found.top_k_mass[i]) == pytest.approx(sum(largest[:10]), abs=1e-6)
        assert found.top_k_probabilities[i].tolist() == pytest.approx(largest[:10], abs=1e-6)
        token = [0, 1, vocabulary - 1][i]
        assert float(bits[i]) == pytest.approx(-math.log2(p[token]), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("vocabulary", [4096, 5000, 40_007])
def test_the_likeliest_tokens_of_a_large_vocabulary(vocabulary):
    rows = logits(4, vocabulary)
    rows[0, -3:] = 50.0  # in the last part, which is padded
    rows[1, :20] = 40.0  # more of the same than are asked for
    rows[2, 1000:] = -math.inf
    found = metrics.logit_metrics(rows, k=10)
    wanted = rows.double().softmax(-1).topk(10)
    assert torch.allclose(found.top_k_probabilities.double(), wanted.values, atol=1e-7)
    assert torch.equal(rows.gather(-1, found.top_k_tokens), rows.topk(10).values)
    assert all(len(set(row)) == 10 for row in found.top_k_tokens.tolist())


def test_fewer_possible_tokens_than_are_asked_for():
    rows = torch.full((1, 5001), -math.inf)
    rows[0, 4999:] = 1.0
    found = metrics.logit_metrics(rows, k=10)
    assert found.top_k_probabilities[0].tolist() == [0.5, 0.5, *[0.0] * 8]
    assert found.top_k_tokens.max() == 5000
    assert float(found.entropy_bits) == pytest.approx(1.0)


def test_an_impossible_token_has_no_entropy_and_a_broken_row_has_no_figure():
    rows = torch.tensor([[0.0, 0.0, -math.inf], [0.0, math.nan, 0.0], [math.inf, 0.0, 0.0]])
    found = metrics.logit_metrics(rows)
    assert float(found.entropy_bits[0]) == pytest.approx(1.0)
    assert torch.isnan(found.entropy_bits[1:]).all()


def a_head(queries, keys, window=None):
    """Causal weights, and which keys each query may see."""
    scores = logits(queries, keys)
    may = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    if window:
        may &= torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries - window + 1)
    return scores.masked_fill(~may, -math.inf).softmax(-1), may.sum(-1)


@pytest.mark.parametrize("window", [None, 4])
def test_head_metrics_and_their_summary(window):
    weights, seen = zip(*(a_head(7, 9, window) for _ in range(3)), strict=True)
    weights = torch.stack(weights)
    found = metrics.head_metrics(weights, seen[0])
    over = metrics.over_heads(found)
    for q in range(7):
        values = [entropy(weights[h, q].double().tolist()) for h in range(3)]
        largest = [max(weights[h, q].tolist()) for h in range(3)]
        relative = [v / math.log2(seen[0][q]) if seen[0][q] > 1 else 1.0 for v in values]
        assert found.entropy_bits[:, q].tolist() == pytest.approx(values, abs=1e-6)
        assert found.relative_entropy[:, q].tolist() == pytest.approx(relative, abs=1e-6)
        assert found.concentration[:, q].tolist() == pytest.approx(largest, abs=1e-6)
        assert float(over.entropy_mean[q]) == pytest.approx(sum(values) / 3, abs=1e-6)
        assert float(over.entropy_min[q]) == pytest.approx(min(values), abs=1e-6)
        assert float(over.entropy_max[q]) == pytest.approx(max(values), abs=1e-6)
        assert int(over.collapsed[q]) == sum(r < 0.03 for r in relative)
        assert int(over.focused[q]) == sum(x > 0.9 for x in largest)


def test_a_head_that_sees_one_key_is_collapsed_and_the_first_token_is_not():
    weights = torch.zeros(1, 2, 5)
    weights[0, :, 0] = 1.0
    over = metrics.over_heads(metrics.head_metrics(weights, torch.tensor([1, 5])))
    assert over.collapsed.tolist() == [0, 1]
    assert over.focused.tolist() == [1, 1]


def test_seen_keys_are_those_above_the_threshold():
    weights = torch.tensor([[[0.5, 0.495, 0.005], [0.98, 0.01, 0.01]]])
    assert metrics.seen_keys(weights).tolist() == [1.5]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("tokens", [3, 9, 50])
def test_the_basin_of_uniform_attention_is_its_null(tokens, window):
    uniform = torch.stack([row / row.sum() for row in a_head(tokens, tokens, window)[0].gt(0).double()])
    null = metrics.uniform_mass(tokens, window)
    assert torch.allclose(null, uniform.sum(0))
    assert float(metrics.relative_basin(uniform.sum(0), window)) == pytest.approx(1.0)


def test_the_plain_basin_of_uniform_attention_lies_on_the_threshold_of_others():
    assert float(metrics.basin(metrics.uniform_mass(9))) == pytest.approx(0.341, abs=1e-3)
    assert float(metrics.basin(metrics.uniform_mass(3000))) == pytest.approx(0.312, abs=1e-3)


def test_the_basin_falls_where_the_middle_is_neglected_and_is_1_under_three_tokens():
    weights, _ = a_head(30, 30)
    neglected = weights.clone()
    neglected[:, 10:20] *= 0.1
    neglected /= neglected.sum(-1, keepdim=True)
    ordinary, low = (float(metrics.relative_basin(w.double().sum(0))) for w in (weights, neglected))
    mass = weights.double().sum(0).tolist()
    assert ordinary == pytest.approx(
        sum(mass[10:20]) / (sum(mass) - sum(mass[10:20])) / float(metrics.basin(metrics.uniform_mass(30))), abs=1e-6
    )
    assert low < ordinary / 2
    assert metrics.relative_basin(torch.tensor([[2.0, 0.0]])).tolist() == [1.0]


def test_hidden_metrics_and_transformation():
    below, above = logits(4, 6), logits(4, 6)
    found = metrics.hidden_metrics(below)
    cosines = []
    for b, a, norm in zip(below.double().tolist(), above.double().tolist(), found.norm.tolist(), strict=True):
        assert norm == pytest.approx(math.sqrt(sum(x * x for x in b)), rel=1e-6)
        dot = sum(x * y for x, y in zip(b, a, strict=True))
        cosines.append(dot / math.sqrt(sum(x * x for x in b) * sum(x * x for x in a)))
    assert float(metrics.transformation(below, above)) == pytest.approx(1 - sum(cosines) / 4, abs=1e-6)
    broken = torch.tensor([1.0, math.nan, math.inf])
    assert int(metrics.hidden_metrics(broken).nonfinite) == 2
    assert float(metrics.hidden_metrics(torch.full((4,), 300.0, dtype=torch.float16)).norm) == pytest.approx(600.0)


def test_memory_health():
    initial, before, after = (tuple(logits(2, *shape) for shape in ((3, 4), (4, 2))) for _ in range(3))
    norms = metrics.weight_norm(before)
    moved = metrics.relative_change(before, after, initial)
    for h in range(2):
        flat = [x for m in before for x in m[h].double().flatten().tolist()]
        assert float(norms[h]) == pytest.approx(math.sqrt(sum(x * x for x in flat)), rel=1e-6)
        change = [float(y - x) ** 2 for b, a in zip(before, after, strict=True)
                  for x, y in zip(b[h].double().flatten(), a[h].double().flatten(), strict=True)]  # fmt: skip
        now = [float(w + x) ** 2 for i, a in zip(initial, after, strict=True)
               for w, x in zip(i[h].double().flatten(), a[h].double().flatten(), strict=True)]  # fmt: skip
        assert float(moved[h]) == pytest.approx(math.sqrt(sum(change) / sum(now)), rel=1e-6)
    alpha = torch.tensor([0.5, 0.25])
    assert float(metrics.half_life(alpha)) == pytest.approx(1 / 1.5, rel=1e-6)
    assert float(metrics.half_life(torch.ones(3))) == math.inf
    assert float(metrics.saturation(torch.tensor([0.01, 0.5, 0.99, 0.97]))) == 0.5
    assert float(metrics.residual(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))) == pytest.approx(0.8)
    assert float(metrics.residual(torch.zeros(2), torch.tensor([3.0, 4.0]))) == 1.0
    assert float(metrics.output_ratio(torch.ones(2, 3), 2 * torch.ones(2, 3))) == 0.5


def test_effective_rank():
    assert float(metrics.effective_rank(torch.eye(5))) == pytest.approx(5.0)
    assert float(metrics.effective_rank(torch.ones(3, 7))) == pytest.approx(1.0, abs=1e-3)
    assert float(metrics.effective_rank(torch.zeros(3, 7))) == 0.0
    assert math.isnan(float(metrics.effective_rank(torch.tensor([[math.nan, 1.0]]))))
    matrix = logits(2, 9, 4)
    for found, one in zip(metrics.effective_rank(matrix), matrix.double(), strict=True):
        values = torch.linalg.svdvals(one).tolist()
        share = [v / sum(values) for v in values]
        assert float(found) == pytest.approx(math.exp(-sum(s * math.log(s) for s in share)), rel=1e-6)
