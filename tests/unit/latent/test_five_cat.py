"""The tests that decide over a model let a perfect one pass, and none that knows nothing."""

import math

import pytest
import torch
from torch import Tensor

from atlas_lm.latent import baselines, five_cat
from atlas_lm.latent.baselines import Oracle, Pairs, Predictor, WindowPredictor, pairs_of
from atlas_lm.latent.five_cat import Measured, Sets, centre_of, gates, measure, passed_by_test
from tests.support.latent_toys import CONTEXT, turning_documents

TRAIN, HELD_OUT, OTHER = ([torch.from_numpy(x) for x in turning_documents(20, 24, seed=seed)] for seed in (0, 1, 2))
MEAN = torch.cat(TRAIN).mean(0)
FITTED, DEV = pairs_of(TRAIN[:15], CONTEXT), pairs_of(TRAIN[15:], CONTEXT)
RIDGE = baselines.ridge(FITTED, DEV)[0]
TRIVIAL: dict[str, Predictor] = {
    "train mean": baselines.train_mean(MEAN, CONTEXT),
    "last frame": baselines.last_frame(CONTEXT),
    "context mean": baselines.context_mean(CONTEXT),
    "scalar mix": baselines.scalar_mix(FITTED, MEAN),
    "shuffled context": baselines.rearranged(RIDGE, "shuffled", CONTEXT),
    "reversed context": baselines.rearranged(RIDGE, "reversed", CONTEXT),
}


def judged(predictor: Predictor) -> tuple[Measured, Measured, list[five_cat.Gate]]:
    centre = centre_of(predictor, TRAIN, CONTEXT)
    held_out, other = (measure(predictor, Sets(part, MEAN, CONTEXT, 400), centre) for part in (HELD_OUT, OTHER))
    return held_out, other, gates(held_out, other, CONTEXT)


def oracle() -> Oracle:
    return Oracle([*TRAIN, *HELD_OUT, *OTHER], MEAN, CONTEXT)


def test_the_oracle_passes_every_gate() -> None:
    held_out, _, found = judged(oracle())
    assert {gate.name: gate.value for gate in found if gate.passed is not True} == {}
    assert len(found) == 2 * (len(five_cat.AT_LEAST) + len(five_cat.AT_MOST)) + 1
    assert passed_by_test(found) == dict.fromkeys("ABCDE", True)
    assert held_out.peak(True, CONTEXT)[0] == held_out.peak(False, CONTEXT)[0] == 1
    assert held_out.mean("accuracy") == held_out.mean("recall_at_1") == 1
    assert held_out.effective_rank == pytest.approx(held_out.data_rank)
    assert held_out.spread == pytest.approx(1)


@pytest.mark.parametrize("name", TRIVIAL)
def test_what_knows_nothing_fails(name: str) -> None:
    assert any(gate.passed is False for gate in judged(TRIVIAL[name])[2])


def test_what_can_be_learned_is_learned_and_needs_its_context_in_order() -> None:
    """One rotation: a linear predictor of two frames knows the next one but for its noise."""
    held_out, _, found = judged(RIDGE)
    assert held_out.mean("cosine") > 0.9
    assert passed_by_test(found)["A"]
    assert passed_by_test(found)["C"]
    shuffled = measure(TRIVIAL["shuffled context"], Sets(HELD_OUT, MEAN, CONTEXT), MEAN)
    assert shuffled.mean("cosine") < held_out.mean("cosine") - 0.15


def test_offset_one_is_the_target_and_zero_the_last_frame_seen() -> None:
    """Upstream took the target for offset 0 and its successor for +1: there the oracle failed."""
    sets = Sets(HELD_OUT, MEAN, CONTEXT)
    persistent = measure(TRIVIAL["last frame"], sets, MEAN, whole=False)
    assert persistent.offsets[0] == pytest.approx(1, abs=1e-5)
    assert persistent.peak(True, CONTEXT)[0] == 0
    assert measure(oracle(), sets, MEAN, whole=False).offsets[1] == pytest.approx(1, abs=1e-5)


def test_the_peak_over_unseen_frames_leaves_the_context_out() -> None:
    found = Measured(offsets={-7: 0.2, -6: 0.2, -5: 0.4, -4: 0.6, -1: 0.7, 0: 0.9, 1: 0.5, 2: 0.3, 3: math.nan})
    assert found.peak(False, CONTEXT) == (1, pytest.approx(0.1))
    found.offsets |= {-3: 0.1, -2: 0.1}
    assert found.peak(True, CONTEXT) == (0, pytest.approx(-0.4))


def test_without_other_text_a_gate_is_not_measured_and_so_not_passed() -> None:
    held_out = judged(oracle())[0]
    found = gates(held_out, None, CONTEXT)
    assert [gate.passed for gate in found if gate.test == "E"] == [None]
    assert not passed_by_test(found)["E"]


def test_a_single_document_has_no_other_to_take_a_context_from() -> None:
    found = measure(oracle(), Sets(HELD_OUT[:1], MEAN, CONTEXT), MEAN)
    assert math.isnan(found.ablations["of another document"])
    assert not math.isnan(found.ablations["shuffled"])
    gate = next(gate for gate in gates(found, None, CONTEXT) if gate.name == "of another document: change")
    assert gate.passed is None


def test_a_history_longer_than_a_context_reaches_the_predictor_that_can_read_it() -> None:
    seen: list[int] = []

    class Long(WindowPredictor):
        def history(self, frames_BLD: Tensor) -> Tensor:
            seen.append(frames_BLD.size(1))
            return frames_BLD[:, -1]

    long = Long(lambda x: x[:, -1], CONTEXT)
    long.reach = 1000
    measure(long, Sets(HELD_OUT, MEAN, CONTEXT), MEAN)
    assert set(seen) >= {5, 8, 16}


def test_knn_finds_what_it_has_seen() -> None:
    predictor, k = baselines.knn(FITTED, FITTED)
    assert k == 1
    assert torch.allclose(predictor.history(FITTED.contexts_NCD), FITTED.targets_ND, atol=1e-5)


def test_the_mix_finds_the_weights_that_made_the_data() -> None:
    contexts = torch.nn.functional.normalize(torch.randn(200, CONTEXT, 8), dim=-1)
    w = torch.tensor([0.0, 0.1, 0.0, 0.3, 0.5])
    targets = torch.einsum("c,ncd->nd", w, contexts)
    predictor = baselines.scalar_mix(Pairs(contexts, targets), torch.full((8,), 0.1))
    assert torch.allclose(predictor.history(contexts), torch.nn.functional.normalize(targets, dim=-1), atol=1e-4)
