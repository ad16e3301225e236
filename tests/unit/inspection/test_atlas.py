"""Our models under inspection: the tokens are as without, every figure equals a slow form, and nothing grows."""

import gc
import math

import pytest
import torch

from atlas_lm.inspection import atlas
from atlas_lm.inspection.capture import AT_ONCE, CAPTURES, SAMPLED_EVERY, Plan
from atlas_lm.inspection.memory import MemoryHealth, residuals
from atlas_lm.model.sampling import generate_tokens
from tests.support.model_cases import VOCABULARY, build_model, make_tokens

SMALL = dict(shard=240, context=1)


def names(ids):
    return [f"<{i}>" for i in ids]


def inspected(model, ids, **plan):
    return atlas.inspect(model, ids, Plan(**{"tokens": 40, "top_k": VOCABULARY, **plan}), names)


@pytest.fixture(scope="module")
def model():
    return build_model(**SMALL).eval()


@pytest.fixture(scope="module")
def ids():
    return make_tokens(23, batch=1)[0].tolist()


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("settings", [{}, {"attention_conv": 3, "share_qkv": True, "conv": 1}, {"memory": "none"}])
def test_the_tokens_are_those_of_plain_generation(ids, capture, temperature, settings):
    model = build_model(**SMALL, **settings).eval()
    plain = generate_tokens(model, torch.tensor([ids]), 70, temperature, VOCABULARY, seed=3)[0].tolist()
    trace = inspected(model, ids, tokens=70, capture=capture, temperature=temperature, seed=3)
    assert trace.steps.token_ids == plain
    assert trace.layers.steps == {"full": list(range(70)), "sampled": [0, 64], "off": []}[capture]
    columns = [getattr(trace.steps, name) for name in type(trace.steps).model_fields if name != "tokens"]
    assert {len(column) for column in columns} == {70}


def slow_attention(model, layer, tokens):
    """Per head, query and key, one number at a time, from a pass over the whole sequence."""
    block = model.blocks[layer]
    seen = []
    handles = [block.attention.qkv.register_forward_hook(lambda _, __, output: seen.append(output[0]))]
    states = []
    handles.append(block.register_forward_hook(lambda _, __, output: states.append(output[0][0])))
    with torch.no_grad():
        logits = model(tokens).logits[0]
    for handle in handles:
        handle.remove()
    heads, dim, base = block.attention.heads, block.attention.head_dim, block.attention.rope_base
    T = tokens.size(1)
    q, k = (part.view(T, heads, dim).tolist() for part in seen[0].chunk(3, dim=-1)[:2])

    def turned(vector, position):
        half = dim // 2
        found = [0.0] * dim
        for i in range(half):
            angle = position * base ** (-2 * i / dim)
            x, y = vector[i], vector[half + i]
            found[i] = x * math.cos(angle) - y * math.sin(angle)
            found[half + i] = x * math.sin(angle) + y * math.cos(angle)
        return found

    weights = torch.zeros(heads, T, T, dtype=torch.float64)
    for h in range(heads):
        for t in range(T):
            first = max(0, t - block.attention.window + 1)
            query = turned(q[t][h], t)
            scores = [
                sum(a * b for a, b in zip(query, turned(k[j][h], j), strict=True)) / math.sqrt(dim)
                for j in range(first, t + 1)
            ]
            total = sum(math.exp(s) for s in scores)
            for j, score in zip(range(first, t + 1), scores, strict=True):
                weights[h, t, j] = math.exp(score) / total
    return weights, states[0], logits


def entropy(values):
    return -sum(p * math.log2(p) for p in values if p > 0)


def test_every_figure_equals_a_slow_form(model, ids):
    trace = inspected(model, ids, temperature=0.7)
    steps, layers, prompt = trace.steps, trace.layers, trace.prompt
    tokens = torch.tensor([ids + steps.token_ids])
    P = len(ids)
    for layer in range(2):
        weights, states, logits = slow_attention(model, layer, tokens)
        window = model.config.window
        for i in range(40):
            t = P - 1 + i
            heads = [entropy(weights[h, t].tolist()) for h in range(2)]
            most = [max(weights[h, t].tolist()) for h in range(2)]
            possible = math.log2(min(t + 1, window))
            assert layers.entropy_mean[i][layer] == pytest.approx(sum(heads) / 2, abs=1e-6)
            assert layers.entropy_min[i][layer] == pytest.approx(min(heads), abs=1e-6)
            assert layers.entropy_max[i][layer] == pytest.approx(max(heads), abs=1e-6)
            assert layers.concentration_mean[i][layer] == pytest.approx(sum(most) / 2, abs=1e-6)
            assert layers.concentration_max[i][layer] == pytest.approx(max(most), abs=1e-6)
            assert layers.collapsed[i][layer] == sum(x / possible < 0.03 for x in heads)
            assert layers.focused[i][layer] == sum(x > 0.9 for x in most)
            assert layers.norm[i][layer] == pytest.approx(math.sqrt(sum(x * x for x in states[t].tolist())), rel=1e-6)
        of_heads = [[entropy(weights[h, P - 1 + i].tolist()) for i in range(40)] for h in range(2)]
        assert layers.head_entropy[layer] == pytest.approx([sum(x) / 40 for x in of_heads], abs=1e-6)
        of_prompt = weights[:, :P, :P]
        assert prompt.entropy_mean[layer] == pytest.approx(
            sum(entropy(of_prompt[h, t].tolist()) for h in range(2) for t in range(P)) / (2 * P), abs=1e-6
        )
        seen = [sum(x > 0.01 for x in of_prompt[h].flatten().tolist()) / P for h in range(2)]
        assert prompt.seen_keys[layer] == pytest.approx(seen, abs=1e-6)
        uniform = torch.zeros(P, P, dtype=torch.float64)
        for t in range(P):
            first = max(0, t - window + 1)
            uniform[t, first : t + 1] = 1 / (t + 1 - first)

        def basin(w):
            middle = float(w[:, P // 3 : P - P // 3].sum())
            return middle / (float(w.sum()) - middle)

        assert prompt.basin[layer] == pytest.approx([basin(of_prompt[h]) / basin(uniform) for h in range(2)], abs=1e-6)
        norms = [math.sqrt(sum(x * x for x in states[t].tolist())) for t in range(P)]
        assert prompt.norm[layer] == pytest.approx(sum(norms) / P, rel=1e-6)
    for i in range(40):
        p = logits[P - 1 + i].softmax(-1).tolist()
        assert steps.entropy_bits[i] == pytest.approx(entropy(p), abs=1e-6)
        assert steps.surprisal_bits[i] == pytest.approx(-math.log2(p[steps.token_ids[i]]), abs=1e-6)
    for i in range(1, P):
        bits = -math.log2(logits[i - 1].softmax(-1).tolist()[ids[i]])
        assert prompt.surprisal_bits[i - 1] == pytest.approx(bits, abs=1e-6)


@torch.no_grad()
def test_memory_health_equals_a_slow_form(ids):
    model = build_model(
        **SMALL, network="linear", update="delta", local_chunks=[], memory_layers=[1], global_chunk=8
    ).eval()
    trace = inspected(model, ids, temperature=0.0, tokens=100)
    columns = trace.memory
    assert columns.labels == ["layer 1 global"]
    assert columns.steps == [0, 63, 99]
    tokens = torch.tensor([ids + trace.steps.token_ids])
    hierarchy = model.blocks[1].memory.hierarchy
    memory, features = hierarchy.global_memory, hierarchy.features
    keys = []
    handle = hierarchy.register_forward_pre_hook(lambda _, a: keys.append((a[0], a[2], a[3])))
    states = {}
    session = model.stream()
    with torch.no_grad():
        for t in range(tokens.size(1) - 1):
            session.read(tokens[:, t : t + 1])
            states[t] = session.state[1].memory.global_memory
    handle.remove()
    x, k, v = (torch.cat(parts, dim=1 if n == 0 else 2) for n, parts in enumerate(zip(*keys, strict=True)))
    P = len(ids)
    for row, step in enumerate(columns.steps):
        t = P - 1 + step
        change = states[t].change[0][0]
        norm = sum(math.sqrt(sum(a * a for a in change[h].flatten().tolist())) for h in range(2)) / 2
        assert columns.weight_norm[row][0] == pytest.approx(norm, rel=1e-6)
        alpha, eta, _, _ = memory.open(x[:, (0 if row == 0 else P + columns.steps[row - 1]) : t + 1])
        assert columns.write_strength[row][0] == pytest.approx(float(eta.mean()), rel=1e-6)
        assert columns.half_life[row][0] == pytest.approx(math.log(0.5) / float(alpha.log().mean()), rel=1e-6)
        if row:
            before = states[P - 1 + columns.steps[row - 1]].change[0][0]
            whole = [memory.weights()[0][h] + change[h] for h in range(2)]
            moved = sum(float((change[h] - before[h]).norm() / whole[h].norm()) for h in range(2)) / 2
            assert columns.relative_change[row][0] == pytest.approx(moved / (step - columns.steps[row - 1]), rel=1e-6)
        if columns.residual[row][0][0] is None:
            continue
        for lag, found in zip(columns.lags, columns.residual[row][0], strict=True):
            if t - lag < 0:
                assert found is None
                continue
            errors = []
            for h in range(2):
                phi = features(k[:, :, t - lag : t - lag + 1])[0, h, 0]
                answer = phi @ (memory.weights()[0][h] + change[h])
                wanted = v[0, h, t - lag]
                errors.append(float((answer - wanted).norm() / wanted.norm()))
            assert found == pytest.approx(sum(errors) / 2, rel=1e-6)
    assert columns.residual[-1][0][0] is not None


@torch.no_grad()
def test_a_memory_of_chunks_is_asked_for_what_it_has_written(ids):
    model = build_model(**SMALL, local_chunks=[3], global_chunk=8).eval()
    session = model.stream()
    kept = []
    hierarchy = model.blocks[0].memory.hierarchy
    handle = hierarchy.register_forward_pre_hook(lambda _, a: kept.append((a[2][0], a[3][0])))
    with torch.no_grad():
        session.read(torch.tensor([ids]))  # 23 tokens: 16 are in the global memory's weights
    handle.remove()
    state = session.state[0].memory.global_memory
    assert state.filled == 7
    k, v = kept[0]
    at_15 = residuals(hierarchy.global_memory, hierarchy.features, state, k[:, :16], v[:, :16], [-7])
    found = residuals(hierarchy.global_memory, hierarchy.features, state, k, v, [0, 1000])
    assert float(found[0]) == float(at_15[0])
    assert math.isnan(float(found[1]))


def test_a_hook_that_never_fires_is_an_error(ids):
    model = build_model(**SMALL).eval()
    block = model.blocks[1]
    project = block.attention.qkv.forward
    block.attention.project = lambda x, state: (project(x), None)  # past the module, as a fused kernel would be
    with pytest.raises(RuntimeError, match="layer 1"):
        inspected(model, ids)
    inspected(model, ids, capture="off")


def test_a_memory_whose_hooks_never_fired_is_an_error(model):
    with pytest.raises(RuntimeError, match="layer 0"):
        MemoryHealth(model, [0, 1]).measure(0, model.stream().state)


def test_layers_can_be_chosen(model, ids):
    trace = inspected(model, ids, layers=(1,))
    assert len(trace.layers.norm[0]) == len(trace.prompt.norm) == 1
    assert trace.layers.norm == [[row[1]] for row in inspected(model, ids).layers.norm]
    with pytest.raises(ValueError, match="layers=2"):
        inspected(model, ids, layers=(2,))


def test_logits_that_are_not_finite_end_the_generation_and_are_in_the_trace(ids):
    model = build_model(**SMALL).eval()
    calls = []

    def broken(_, __, output):
        calls.append(1)
        return (output[0] * float("nan"), *output[1:]) if len(calls) == 6 else None

    model.blocks[1].register_forward_hook(broken)
    trace = inspected(model, ids)
    assert len(trace.steps.token_ids) == 6  # five were drawn; the sixth had nothing to be drawn from
    assert math.isnan(trace.steps.entropy_bits[-1])
    assert trace.layers.nonfinite[-1][1] > 0
    assert "step 5" in trace.warnings[0]


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="empty"):
        inspected(model, [])


def tensor_bytes():
    gc.collect()
    return sum(x.numel() * x.element_size() for x in gc.get_objects() if issubclass(type(x), torch.Tensor))


@pytest.mark.long
@pytest.mark.parametrize("steps", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_what_is_kept_does_not_grow_with_the_steps(model, ids, steps):
    held = []
    flushes = []

    def on_flush(trace):
        flushes.append(len(trace.steps.token_ids))
        if len(flushes) % 2 == 0:
            held.append(tensor_bytes())

    atlas.inspect(model, ids, Plan(tokens=steps), names, on_flush=on_flush)
    # the ring of last hidden states, of a fixed length, fills within 128 steps
    assert max(held) <= 1.05 * held[1], held


def test_a_generation_that_ends_with_a_row_has_residuals_in_it(model, ids):
    columns = inspected(model, ids, tokens=AT_ONCE).memory
    assert columns.steps == [0, AT_ONCE - 1]
    assert columns.residual[-1][0][0] is not None


def test_a_sample_has_the_figures_of_its_steps_and_the_loops_of_all(model, ids):
    full = inspected(model, ids, tokens=150, temperature=0.0)
    found = inspected(model, ids, tokens=150, temperature=0.0, capture="sampled")
    assert found.steps.token_ids == full.steps.token_ids
    assert found.layers.steps == list(range(0, 150, SAMPLED_EVERY))
    for i in range(150):
        captured = i % SAMPLED_EVERY == 0
        assert found.steps.has_logits(i) == captured
        assert found.steps.entropy_bits[i] == (pytest.approx(full.steps.entropy_bits[i]) if captured else None)
        assert found.steps.top_tokens[i] == (full.steps.top_tokens[i] if captured else [])
    assert found.steps.repetition_tokens == full.steps.repetition_tokens
    for n, i in enumerate(found.layers.steps):
        assert found.layers.entropy_mean[n] == pytest.approx(full.layers.entropy_mean[i])
