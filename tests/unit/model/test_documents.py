"""`reset_at_document`: a packed document is the document alone, whatever lies beside it."""

from itertools import pairwise

import pytest
import torch

from atlas_lm.model import documents
from tests.support.model_cases import VOCABULARY, build_model, make_tokens

CHANGES = [{}, {"memory": "none"}, {"memory": "gated_delta"}, {"network": "linear", "update": "delta", "context": 1},
           {"update": "newton_schulz", "eta_max": 0.05}, {"attention_conv": 3, "share_qkv": True},
           {"global_chunk": None}]  # fmt: skip
every_model = pytest.mark.parametrize("changes", CHANGES, ids=str)
EDGES = ([0, 5, 6, 30, 61], [0, 61])  # of the documents in each row


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    tokens, starts = make_tokens(61), torch.zeros(2, 61, dtype=torch.bool)
    for row, edges in enumerate(EDGES):
        starts[row, edges[:-1]] = True
    starts[1, 0] = False  # continues a document of an earlier batch: it begins here all the same
    return tokens, starts


@every_model
def test_a_packed_document_is_the_document_alone(changes) -> None:
    model, (tokens, starts) = build_model(reset_at_document=True, **changes), packed()
    with torch.inference_mode():
        output = model(tokens, document_start_BT=starts)
        for row, edges in enumerate(EDGES):
            for a, b in pairwise(edges):
                alone = model(tokens[row : row + 1, a:b])
                assert (output.logits[row, a:b] - alone.logits[0]).abs().max() <= 1e-12
                for gate, gate_alone in zip(output.gates, alone.gates, strict=True):
                    assert (gate[row, a:b] - gate_alone[0]).abs().max() <= 1e-12
    together = build_model(**changes)
    assert (together(tokens).logits - output.logits)[0, 30:].abs().max() > 1e-3, "without it they are one text"


@every_model
def test_no_document_moves_another_by_a_bit(changes) -> None:
    """Exactly 0 in float64."""
    model, (tokens, starts) = build_model(reset_at_document=True, **changes), packed()
    tokens = tokens[:1]
    truth = model(tokens, document_start_BT=starts[:1]).logits
    other = tokens.clone()
    other[:, 6:30] = (other[:, 6:30] + 1) % VOCABULARY
    found = model(other, document_start_BT=starts[:1]).logits
    assert torch.equal(found[:, :6], truth[:, :6])
    assert torch.equal(found[:, 30:], truth[:, 30:])
    assert not torch.equal(found[:, 6:30], truth[:, 6:30])


@every_model
def test_a_stream_restarts_where_a_document_does(changes) -> None:
    model, (tokens, starts) = build_model(reset_at_document=True, **changes), packed()
    tokens, starts = tokens[:1], starts[:1]
    with torch.inference_mode():
        state, parts = model.initial_state(1), []
        for a, b in ((0, 5), (5, 20), (20, 48), (48, 61)):
            output = model(tokens[:, a:b], state, starts[:, a:b])
            state = output.state
            parts.append(output.logits)
        alone, last = model.initial_state(1), None
        for a, b in ((30, 31), (31, 61)):
            last = model(tokens[:, a:b], alone)
            alone = last.state
    assert (torch.cat(parts, 1)[:, 31:] - last.logits).abs().max() <= 1e-9


def test_rows_of_a_stream_must_agree() -> None:
    model, (tokens, starts) = build_model(reset_at_document=True), packed()
    with pytest.raises(ValueError, match="token 0 does so in some: stream the rows one by one"):
        model(tokens, model.initial_state(2), starts)


def test_gradients_are_those_of_the_documents_alone() -> None:
    model, (tokens, starts) = build_model(reset_at_document=True), packed()
    weights = torch.randn(2, 61, VOCABULARY, dtype=torch.float64)
    (model(tokens, document_start_BT=starts).logits * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row, edges in enumerate(EDGES):
        for a, b in pairwise(edges):
            (model(tokens[row : row + 1, a:b]).logits * weights[row : row + 1, a:b]).sum().backward()
    for name, p in model.named_parameters():
        assert (found[name] - p.grad).abs().max() <= 1e-10 * p.grad.abs().max().clamp_min(1), name


def test_the_number_of_parts_depends_on_the_length_alone_where_ranks_must_agree() -> None:
    _, starts = packed()
    parts = [documents.apart(s, every_length=True) for s in (starts, torch.zeros(2, 61, dtype=torch.bool))]
    assert len(parts[0]) == len(parts[1]) == 6
    x = torch.arange(2 * 61).unflatten(0, (2, 61))
    for rows in parts:
        assert torch.equal(documents.together(rows, [row.take(x) for row in rows], x.shape), x)


def test_rows_are_padded_to_less_than_twice_their_tokens() -> None:
    starts = torch.rand(8, 500, generator=torch.Generator().manual_seed(0)) < 0.03
    rows = documents.apart(starts)
    assert sum(row.kept_M.numel() for row in rows) == 8 * 500
    assert sum(row.source_NL.numel() for row in rows) < 2 * 8 * 500


def test_restarts_are_not_for_streams() -> None:
    model, (tokens, starts) = build_model(), packed()
    with pytest.raises(ValueError, match="restarts are for whole sequences"):
        model(tokens, model.initial_state(2), restart_BT=starts)


def test_no_rows_at_all() -> None:
    model = build_model(reset_at_document=True)
    tokens = torch.zeros(0, 5, dtype=torch.long)
    assert model(tokens, document_start_BT=tokens > 0).logits.shape == (0, 5, VOCABULARY)
