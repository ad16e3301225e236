"""What a model is given by mistake: one ValueError that names the value and what to do."""

import pytest
import torch

from atlas_lm.memory.kernels import norm as cpu_norm
from atlas_lm.model.norm import RMSNorm, normalised_heads
from tests.support.model_cases import VOCABULARY, build

IDS = torch.zeros(2, 5, dtype=torch.long)


@pytest.mark.parametrize("memory", ["atlas", "none"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (IDS[:, :0], r"T at least 1, got \(2, 0\)"),
        (IDS[0], r"\(batch, T\) .* got \(5,\); one sequence is tokens\[None\]"),
        (IDS[..., None], r"got \(2, 5, 1\)"),
        (IDS.float(), r"ids of torch.int64 or torch.int32, got torch.float32"),
        (IDS + VOCABULARY, "token 11 is outside the vocabulary of 11"),
        (IDS - 1, "token -1 is outside the vocabulary of 11"),
    ],
)
def test_tokens_that_are_none(tokens, message, streaming, memory):
    model = build(memory=memory)
    with pytest.raises(ValueError, match=message):
        model(tokens, model.initial_state(2) if streaming else None)


def test_tokens_of_int32_are_ids_too():
    model = build()
    assert torch.equal(model(IDS.int()).logits, model(IDS).logits)


@pytest.mark.parametrize("starts", [torch.zeros(2, 4, dtype=torch.bool), torch.zeros(5, dtype=torch.bool), IDS])
def test_document_starts_of_another_shape_or_kind(starts):
    with pytest.raises(ValueError, match=r"document starts must be torch.bool of the tokens' shape \(2, 5\), got"):
        build(reset_at_document=True)(IDS, document_start_BT=starts)


@pytest.mark.parametrize("memory", ["atlas", "none"])
def test_a_state_of_another_batch(memory):
    model = build(memory=memory)
    with pytest.raises(ValueError, match=r"is \(3, .* need \(2, .* \(batch"):
        model(IDS, model.initial_state(3))
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        model.initial_state(-1)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([3, 2.7], r"whole number of tokens, got 2\.7"),
        ([3, True], "whole number of tokens, got True"),
        ([3, 25], "chunk of 25 tokens is longer than a shard, model.shard=24"),
        ([3], r"2 local memories, got 1 sizes: \[3\]"),
        ([3, 7, 9], r"2 local memories, got 3 sizes: \[3, 7, 9\]"),
        ([5, 0], "at least 1, got 0"),
    ],
)
def test_chunk_sizes_that_cannot_be_set_change_nothing(chunks, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        model.set_local_chunks(chunks)
    assert {block.memory.hierarchy.local_chunks for block in model.blocks} == {(3, 7)}


def test_chunk_sizes_of_a_model_without_memory():
    with pytest.raises(ValueError, match=r"no local memory to set chunk sizes \[3\] of"):
        build(memory="none").set_local_chunks([3])


@pytest.mark.parametrize("through_torch", [False, True])
def test_a_norm_of_another_width(through_torch, monkeypatch):
    if through_torch:
        monkeypatch.setattr(cpu_norm, "can_run", lambda *_: False)
    for call in (
        lambda: RMSNorm(4)(torch.rand(2, 3, 64)),
        lambda: normalised_heads(RMSNorm(4), torch.rand(2, 3, 5, 64)),
    ):
        with pytest.raises(ValueError, match=r"64\) for a norm of \(4,\)"):
            call()


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 0, 10), (2, 2, 0, 4), (2, 2, 0, 4)),
        ((2, 5, 10), (2, 5, 4), (2, 5, 4)),
        ((2, 5, 10), (2, 2, 5, 4), (2, 2, 6, 4)),
        ((2, 6, 10), (2, 2, 5, 4), (2, 2, 5, 4)),
        ((2, 5, 10), (2, 3, 5, 4), (2, 3, 5, 4)),
        ((2, 5, 9), (2, 2, 5, 4), (2, 2, 5, 4)),
    ],
)
def test_a_memory_refuses_what_does_not_fit(shapes):
    x, q, k = (torch.rand(*shape) for shape in shapes)
    with pytest.raises(ValueError, match="got"):
        build().blocks[0].memory.hierarchy(x, q, k, k)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("memory", ["atlas", "none"])
def test_a_model_compiles_at_its_defaults(memory):
    """One length after the other, which makes the compiler's sizes dynamic; the memory runs as it is."""
    torch.manual_seed(0)
    model = build(memory=memory)
    compiled = torch.compile(model)
    for T in (30, 41, 17):
        tokens = torch.randint(VOCABULARY, (2, T))
        gradients = []
        for run in (compiled, model):
            model.zero_grad()
            logits = run(tokens).logits
            logits.square().sum().backward()
            gradients.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
