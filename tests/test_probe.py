"Readouts by hand, and a probe that tells moved states from moved text."
import math

import pytest
import torch

from relax.dsd import ESTIMATORS, dsd
from relax.grpo import encode, sample, score
from relax.objective import ReLaX, calibrate, first_tokens
from relax.probe import cosine_step, effective_rank, matched_dsd, probe, readouts
from relax.reasoner import load_reasoner
from relax.tasks import TASKS


@pytest.fixture(scope="module")
def scene():
    torch.set_num_threads(1)
    (model, tok), task = load_reasoner("countdown-tiny"), TASKS["countdown"]
    r = sample(model, *encode(tok, [p.prompt for p in task.problems(8)]), task.max_new_tokens, tok.eos_token_id, tok.pad_token_id, 8,
               generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): hidden = score(model, r)[2]
    return model, r, hidden, calibrate(hidden, r.mask, generator=torch.Generator().manual_seed(0))


def test_effective_rank_by_hand():
    real = torch.ones(1, 4, dtype=torch.bool)
    states = torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.0]))[None]
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(states, real).item() == pytest.approx(expected, rel=1e-5)
    assert effective_rank(7 * states, real).item() == pytest.approx(expected, rel=1e-5)
    assert effective_rank(torch.eye(4)[None], real).item() == pytest.approx(4)
    assert effective_rank(torch.zeros(1, 4, 5), real).item() == 1 and effective_rank(torch.ones(1, 4, 5), real).item() == pytest.approx(1, rel=1e-4)


def test_cosine_step_by_hand():
    x = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, True, False]])
    assert cosine_step(x, mask).item() == pytest.approx(math.sqrt(0.5), rel=1e-6)
    assert cosine_step(x, torch.tensor([[True, False, False, False]])).item() == 0


def test_padding_never_matters():
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(3, 10, 6, generator=g), torch.arange(10) < torch.tensor([10, 6, 3])[:, None]
    dirty = x.masked_fill(~mask[..., None], float("nan"))
    for f in (effective_rank, cosine_step): assert torch.allclose(f(x, mask), f(dirty, mask)) and f(dirty, mask).isfinite().all()


def test_effective_rank_has_the_right_gradient_and_a_finite_one_on_states_of_low_rank():
    x, mask = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]]).bool()
    assert torch.autograd.gradcheck(lambda h: effective_rank(h, mask), x.requires_grad_())
    for flat in (torch.zeros(1, 4, 3), torch.ones(1, 4, 3)):
        grad, = torch.autograd.grad(effective_rank(h := flat.requires_grad_(), mask[:1]).sum(), h)
        assert grad.isfinite().all()


def test_matched_dsd_looks_at_equal_beginnings(scene):
    _, r, hidden, calibration = scene
    long = r.mask.sum(1) >= calibration.length
    assert 0 < long.sum() < len(r) and calibration.length == r.mask.sum(1).median()
    cut = [h[m][:calibration.length] for h, m in zip(hidden[long], r.mask[long])]
    assert torch.allclose(matched_dsd(hidden, r.mask, calibration), dsd(torch.stack(cut), calibration.dictionary))
    nobody = first_tokens(r.mask, calibration.length - 1)
    assert len(matched_dsd(hidden, nobody, calibration)) == 0 and math.isnan(readouts(hidden, nobody, calibration)["dsd_matched"])


def test_first_tokens():
    mask = torch.tensor([[False, True, True, True], [True, True, False, False]])
    assert first_tokens(mask, 2).tolist() == [[False, True, True, False], [True, True, False, False]] and first_tokens(mask, None) is mask


def test_an_untrained_policy_has_nothing_to_hide(scene):
    model, r, _, calibration = scene
    out = probe(model, model, r, calibration, ReLaX(), torch.Generator().manual_seed(1))
    assert all(out[f"own_{e}"] == out[f"base_{e}"] for e in ESTIMATORS)
    assert 0 < out["fvu_frozen"] < 1.5 and 0 < out["fvu_refit"] < 1.5


def test_moved_states_move_own_and_not_base(scene):
    model, r, _, calibration = scene
    moved = load_reasoner("countdown-tiny")[0]
    with torch.no_grad():
        for p in moved.parameters(): p.add_(0.1 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    a, b = (probe(m, model, r, calibration, ReLaX(), torch.Generator().manual_seed(1)) for m in (model, moved))
    assert all(a[f"base_{e}"] == b[f"base_{e}"] and a[f"own_{e}"] != b[f"own_{e}"] for e in ESTIMATORS)
