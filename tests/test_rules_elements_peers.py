"""Elementwise methods beside PEFT's merge_utils and mergekit's merge_tensors.

Both draw their random numbers from torch's global generator: here they are given ours, so that what
is compared is the arithmetic. Where a tool differs by more than its convention, that is named.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from tests.test_rules_elements import adapters, bits_of, close, run

WEIGHTS = [[0.7, 0.4, 0.5], [1.0, 1.0, 1.0], [0.7, -0.4, 0.5], [0.6, 0.0, 0.4]]


def weights_id(value):
    return "/".join(map(str, value)) if isinstance(value, list) else None


def given_masks(monkeypatch, D):
    """torch.bernoulli(p) draws, one call an adapter, from the bits of `draws`."""
    remaining = iter(bits_of(D).astype(np.float64))

    def bernoulli(probabilities):
        levels = torch.round(probabilities.double() * 65536).clamp(1, 65536)
        return (torch.from_numpy(next(remaining)) < levels).to(probabilities.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)


@pytest.fixture(scope="module")
def peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft.utils import merge_utils
    return merge_utils


@pytest.fixture(scope="module")
def merge_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("mergekit.merge_methods")
    return module.merge_tensors


def peft_result(function, D, w, *args, **given):
    tensors = [torch.from_numpy(each) for each in D]
    return function(tensors, torch.tensor(w, dtype=tensors[0].dtype), *args, **given).numpy()


def mergekit_result(merge_tensors, name, D, w, **given):
    """mergekit merges models: the base is zero, the models are the deltas."""
    tensors = [torch.zeros(D.shape[1:], dtype=torch.from_numpy(D).dtype)]
    tensors += [torch.from_numpy(each) for each in D]
    if w is not None:
        given["weight"] = w
    return merge_tensors(tensors, name, base_index=0, parameters=given).numpy()


@pytest.mark.parametrize("w", WEIGHTS, ids=weights_id)
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.77])
def test_peft_ties(peft, density, majority, w):
    D = adapters(dtype=np.float32)
    theirs = peft_result(peft.ties, D, w, density, majority)
    ours = run("ties", D, w, density=density, majority_sign_method=majority, convention="peft")
    close(ours, theirs, 1e-6)


@pytest.mark.parametrize("w", WEIGHTS, ids=weights_id)
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_peft_dare_ties(peft, monkeypatch, majority, w):
    D = adapters(dtype=np.float32)
    given_masks(monkeypatch, D)
    theirs = peft_result(peft.dare_ties, D, w, 0.25, majority)
    given = {"density": 0.25, "majority_sign_method": majority}
    close(run("dare_ties", D, w, convention="peft", **given), theirs, 1e-6)


@pytest.mark.parametrize("w", WEIGHTS, ids=weights_id)
def test_peft_dare_linear(peft, monkeypatch, w):
    D = adapters(dtype=np.float32)
    given_masks(monkeypatch, D)
    close(run("dare_linear", D, w, density=0.25), peft_result(peft.dare_linear, D, w, 0.25), 1e-6)


def test_peft_dare_divides_by_the_density_not_by_the_probability(peft, monkeypatch):
    """Where density is no multiple of 2⁻¹⁶ the drawn probability is another by up to 2⁻¹⁷."""
    D = adapters(1, dtype=np.float32)
    given_masks(monkeypatch, D)
    theirs = peft_result(peft.dare_linear, D, [1.0], 0.1)
    ours = run("dare_linear", D, [1], density=0.1)
    close(ours, theirs, 2.0**-17 / 0.1)
    assert ours[ours != 0] / theirs[theirs != 0] == pytest.approx(0.1 * 65536 / 6554, abs=1e-6)


@pytest.mark.parametrize("w", WEIGHTS, ids=weights_id)
def test_peft_magnitude_prune(peft, w):
    D = adapters(m=16, n=20, dtype=np.float32)
    theirs = peft_result(peft.magnitude_prune, D, w, 0.3)
    close(run("magnitude_prune", D, w, density=0.3), theirs, 1e-6)


def test_peft_rounds_the_number_of_entries_down(peft):
    D = adapters(1, 3, 3, dtype=np.float32)
    assert (peft_result(peft.magnitude_prune, D, [1.0], 0.3) != 0).sum() == 2
    assert (run("magnitude_prune", D, [1], density=0.3) != 0).sum() == 3
    followed = run("magnitude_prune", D, [1], density=0.3, convention="peft")
    assert (followed != 0).sum() == 2
    assert (run("ties", D, [1], density=0.3, convention="peft") != 0).sum() == 2


def test_peft_and_mergekit_break_ties_with_a_limit_by_position(peft):
    D = np.array([[[3.0, 2, 2, 2, 1, 1, 0, 0]]], np.float32)
    assert (peft_result(peft.magnitude_prune, D, [1.0], 0.25) != 0).sum() == 2
    assert (run("magnitude_prune", D, [1], density=0.25) != 0).sum() == 4


@pytest.mark.parametrize("w", WEIGHTS, ids=weights_id)
@pytest.mark.parametrize("normalize", [True, False])
def test_mergekit_ties(merge_tensors, normalize, w):
    D = adapters(dtype=np.float32)
    given = {"density": 0.3, "normalize": normalize, "lambda": 1.5}
    theirs = mergekit_result(merge_tensors, "ties", D, w, **given)
    close(run("ties", D, w, convention="mergekit", **given), theirs, 1e-6)


@pytest.mark.parametrize("name", ["ties", "dare_ties", "dare_linear", "breadcrumbs", "della"])
def test_mergekits_defaults_of_what_both_have(merge_tensors, monkeypatch, name):
    """`normalize`, `rescale`, `lambda`, `gamma`, `epsilon` are as there, the densities given."""
    D, w = adapters(dtype=np.float32), [0.7, 0.4, 0.5]
    given_masks(monkeypatch, D)
    theirs = mergekit_result(merge_tensors, name, D, w, density=0.5)
    close(run(name, D, w, density=0.5, convention="mergekit"), theirs, 1e-6)


@pytest.mark.parametrize("w", WEIGHTS, ids=weights_id)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_mergekit_dare(merge_tensors, monkeypatch, name, rescale, w):
    """Rescaled to the L1 norm before the drop, which is another factor each time."""
    D = adapters(dtype=np.float32)
    given = {"density": 0.25, "rescale": rescale, "normalize": True}
    given_masks(monkeypatch, D)
    theirs = mergekit_result(merge_tensors, name, D, w, **given)
    close(run(name, D, w, convention="mergekit", **given), theirs, 2e-6)
    if rescale:
        assert np.abs(run(name, D, w, **given) - theirs).max() > 0.01 * np.abs(theirs).max()


@pytest.mark.parametrize("w", WEIGHTS, ids=weights_id)
@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_mergekit_della(merge_tensors, monkeypatch, name, w):
    D = adapters(dtype=np.float32)
    given = {"density": 0.4, "epsilon": 0.3}
    given_masks(monkeypatch, D)
    theirs = mergekit_result(merge_tensors, name, D, w, **given)
    close(run(name, D, w, convention="mergekit", **given), theirs, 2e-6)


@pytest.mark.parametrize("w", WEIGHTS, ids=weights_id)
@pytest.mark.parametrize("gamma", [0.01, 0.2, 0.8])
@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
def test_mergekit_breadcrumbs(merge_tensors, name, gamma, w):
    D = adapters(dtype=np.float32)
    given = {"density": 0.6, "gamma": gamma}
    theirs = mergekit_result(merge_tensors, name, D, w, **given)
    close(run(name, D, w, convention="mergekit", **given), theirs, 1e-6)


def test_mergekit_lets_a_divisor_cancel(merge_tensors):
    D = np.array([[[1.0]], [[-1.0]]], np.float32)
    theirs = mergekit_result(merge_tensors, "ties", D, [1, -0.999])
    assert theirs == pytest.approx(1999, rel=1e-3)
    assert run("ties", D, [1, -0.999], density=1, convention="mergekit") == pytest.approx(theirs)


@pytest.mark.parametrize("select_topk", [1.0, 0.5, 0.1])
def test_mergekit_sce(merge_tensors, select_topk):
    D = adapters(m=16, n=20, dtype=np.float32) * np.array([1, 2, 3], np.float32)[:, None, None]
    theirs = mergekit_result(merge_tensors, "sce", D, None, select_topk=select_topk)
    close(run("sce", D, [1, 1, 1], select_topk=select_topk), theirs, 1e-6)


def test_mergekit_sce_forgets_energies_of_small_deltas(merge_tensors):
    """Below a mean square of 10⁻⁶, where most adapters are, and clamps the divisor there."""
    D = adapters(dtype=np.float32) * np.array([1, 2, 3], np.float32)[:, None, None]
    small = D * np.float32(2.0**-20)
    theirs = mergekit_result(merge_tensors, "sce", small, None) * 2.0**20
    ours = run("sce", small, [1, 1, 1]) * 2.0**20
    close(ours, mergekit_result(merge_tensors, "sce", D, None), 1e-6)
    assert np.abs(ours - theirs).max() > 0.01 * np.abs(ours).max()


def test_mergekit_sce_counts_its_share_in_variances_above_zero(merge_tensors):
    D = np.zeros((2, 4, 5), np.float32)
    D[0, 0] = [1, 2, 3, 4, 5]
    theirs = mergekit_result(merge_tensors, "sce", D, None, select_topk=0.4)
    assert (theirs != 0).sum() == 2  # of the five that vary
    assert (run("sce", D, [1, 1], select_topk=0.4) != 0).sum() == 5  # eight of the twenty, so all
