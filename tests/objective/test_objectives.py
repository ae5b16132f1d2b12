"""Objectives against autograd through transformers' model, float64, on one process and on layouts that cut their items and rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from objective_runs import RAW, batches, distance, focal, focal_slope, items_of, of_autograd
from references import reference
from tolerances import PARITY

BOUND = PARITY[torch.float64]
LAYOUTS = ["", "cp4", "tp2 cp2 pp2", "cp2 dp2", "pp2 v2 zb-v dp2"]


@pytest.fixture(scope="module")
def exact():
    """A function: (transformers' model, batches, sums and gradients of autograd) of an objective, made once."""
    known = {}

    def of(name: str):
        if name not in known:
            model, made = reference(RAW, torch.float64), batches(name == "focal")
            known[name] = model, made, of_autograd(model, name, made)
        return known[name]

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["next_token", "focal"])
def test_sums_and_gradients_equal_autograd(exact, name, layout):
    """Weighted next-token prediction, and a loss of each item's mean log-probability whose weights need a first pass."""
    model, made, expected = exact(name)
    found = distance(layout, name, made, model, expected, reduce="micro_batch" if layout == "cp2 dp2" else "step")
    assert max(found.values()) < BOUND, found


@pytest.mark.parametrize(
    "name, layout, breakage, row",
    [
        ("focal", "cp2", "own tokens only", "gradients"),
        ("focal", "cp2", "counted by all", "sums"),
        ("focal", "", "constant slope", "gradients"),
        ("focal", "", "documents alone", "gradients"),
        ("next_token", "", "weights of neighbours", "gradients"),
        ("next_token", "", "number of labels", "sums"),
    ],
)
def test_the_comparison_sees_a_broken_objective(exact, name, layout, breakage, row):
    model, made, expected = exact(name)
    assert distance(layout, name, made, model, expected, breakage)[row] > 1e-4


def test_without_weights_and_items_every_label_and_document_is_alike(mesh):
    """The defaults are ones and document numbers, to the bit."""
    from megacpt.model.inputs import to_inputs

    (first, *_) = batches(False)
    plain = replace(first, weights=None, item=None)
    named = replace(
        first,
        weights=np.where(first.labels >= 0, 1, 0).astype(np.float32),
        item=np.arange(len(first.document_starts), dtype=np.int32),
    )
    ours, theirs = to_inputs(plain, mesh), to_inputs(named, mesh)
    assert torch.equal(ours.weights, theirs.weights) and ours.weights.dtype == torch.float32
    assert ours.items.count == theirs.items.count == len(first.document_starts)
    assert (ours.items.of_token == theirs.items.of_token).all() and (ours.items.of_token == items_of(plain)).all()
    with pytest.raises(AssertionError, match="4 items for 5 documents"):
        to_inputs(replace(first, item=np.zeros(4, np.int32)), mesh)


def test_a_step_without_labels_has_no_loss():
    from megacpt.data.loader import StepCounts
    from megacpt.objective.next_token import NEXT_TOKEN, NextToken

    by = {name: NextToken(name).normalizer for name in ("weight", "token", "item")}
    assert [of(StepCounts(0, 0.0, 0)) for of in by.values()] == [1.0] * 3
    assert [of(StepCounts(10, 0.25, 3)) for of in by.values()] == [0.25, 10.0, 3.0]
    assert NEXT_TOKEN.normalizer(StepCounts(10, 0.25, 3)) == 0.25, (
        "weights that sum to less than 1 are no reason to divide by 1"
    )


def test_the_slope_of_the_focal_loss_is_its_derivative():
    mean = torch.linspace(-5, -0.01, 20, dtype=torch.float64).requires_grad_()
    (want,) = torch.autograd.grad(focal(mean).sum(), mean)
    assert (focal_slope(mean.detach()) - want).abs().max() < 1e-14
