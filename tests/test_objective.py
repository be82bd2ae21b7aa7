"Equations 10 to 12 by value and by gradient."
import math

import pytest
import torch

from relax.dictionary import KoopmanDictionary
from relax.grpo import GRPO, Batch, sampled_kl
from relax.objective import Calibration, ReLaX, adaptive_kl, calibrate, exploration_loss, over_dispersed, response_dsd, threshold


def test_equation_10_by_value_and_gradient():
    d = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    loss = exploration_loss(d)
    assert abs(loss.item() - math.log((math.exp(-0.5) + math.exp(-1) + math.exp(-2)) / 3)) < 1e-6
    assert torch.allclose(torch.autograd.grad(loss, d)[0], -torch.softmax(-d, 0))
    assert abs(exploration_loss(torch.full((7,), 3.0)).item() + 3) < 1e-6 and exploration_loss(torch.tensor([1e4, 1e4])).isfinite()


def test_equation_11_by_value_and_gradient():
    d, A = torch.tensor([0.5, 1.0, 2.0], requires_grad=True), torch.tensor([2.0, -3.0, 0.0])
    loss = exploration_loss(d, A)
    assert abs(loss.item() - math.log((math.exp(-1) + 2) / 3)) < 1e-6
    grad = torch.autograd.grad(loss, d)[0]
    assert grad[0] < 0 and grad[1] == grad[2] == 0


@pytest.mark.parametrize("args, named", [((torch.zeros(0),), "dsd"), ((torch.zeros(2, 2),), "dsd"), ((torch.zeros(2), torch.zeros(3)), "advantages")])
def test_exploration_loss_names_what_is_wrong(args, named):
    with pytest.raises(ValueError, match=named): exploration_loss(*args)


def test_gate_is_strict_and_needs_a_number():
    assert over_dispersed(torch.tensor([1.0, 2.0, 3.0]), 2).tolist() == [False, False, True]
    assert not over_dispersed(torch.tensor([1.0, 2.0]), math.inf).any()
    for bad in ("q90", float("nan"), None):
        with pytest.raises(ValueError, match="xi"): over_dispersed(torch.zeros(1), bad)


def test_adaptive_kl_none_some_all():
    logp, ref, mask = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    kl = sampled_kl(logp, ref)
    def of(gate, **kw): return adaptive_kl(logp.masked_fill(~mask, float("nan")), ref, mask, torch.tensor(gate), **kw)
    assert of([False] * 3) == 0
    assert torch.allclose(of([True] * 3), kl[mask].mean())
    assert torch.allclose(of([True, False, True]), (kl[0].sum() + kl[2, 0]) / 7)
    assert torch.allclose(of([False, True, False], aggregation="sum"), kl[1, :2].sum())
    assert torch.allclose(of([False, True, False], aggregation="sequence"), kl[1, :2].mean() / 3)


def test_adaptive_kl_names_what_is_wrong():
    z, m = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="ref_logp"): adaptive_kl(z, torch.zeros(2, 4), m, m[:, 0])
    with pytest.raises(ValueError, match="gate"): adaptive_kl(z, z, m, torch.ones(3, dtype=torch.bool))


def test_threshold():
    d = torch.arange(11.0)
    assert threshold("q90", d) == 9.0 and threshold("q12.5", d) == 1.25 and threshold(10, d) == 10.0
    for bad in ("q101", "90", "q", "qq5", None, float("nan")):
        with pytest.raises(ValueError, match="xi"): threshold(bad, d)


@pytest.fixture
def states():
    g = torch.Generator().manual_seed(0)
    walk = torch.randn(8, 30, 6, generator=g).cumsum(1) * 0.3
    mask = torch.arange(30) < torch.tensor([30, 30, 25, 20, 28, 30, 15, 22])[:, None]
    return walk.requires_grad_(), mask


def batch(states, advantages, calibration, ref=0.0):
    hidden, mask = states
    logp = torch.full(mask.shape, -1.0, requires_grad=True)
    return Batch(None, mask, logp, logp.detach(), None, hidden, None, advantages, 4, logp.detach() + ref, calibration)


def test_calibration_round_trip(states, tmp_path):
    a = calibrate(*states, n_observables=4, generator=torch.Generator().manual_seed(1))
    a.save(tmp_path)
    b = Calibration.load(tmp_path)
    assert torch.equal(a.dictionary.weight, b.dictionary.weight) and (a.xi, a.initial_dsd) == (b.xi, b.initial_dsd)
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(ValueError, match="calibration"): Calibration.load(tmp_path)


def test_with_zero_weights_relax_is_grpo(states):
    b = batch(states, torch.randn(8), calibrate(*states, n_observables=4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(ReLaX(alpha=0.0, beta=0.0).loss(b)[0], GRPO().loss(b)[0])


@pytest.mark.parametrize("options, reached", [
    ({}, lambda A, over: (A > 0) & ~over), ({"freeze_over": False}, lambda A, over: A > 0), ({"shaping": False}, lambda A, over: ~over),
    ({"shaping": False, "freeze_over": False}, lambda A, over: torch.ones_like(over))])
def test_exploration_reaches_whom_it_should(states, options, reached):
    A = torch.tensor([1.0, -1, 1, -1, 1, 1, -1, 1])
    b = batch(states, A, calibrate(*states, n_observables=4, xi="q60", generator=torch.Generator().manual_seed(0)))
    loss, metrics = ReLaX(alpha=1.0, beta=0.0, **options).loss(b)
    grad, = torch.autograd.grad(loss, b.hidden)
    from relax.dsd import dsd
    over = over_dispersed(dsd(b.hidden, b.calibration.dictionary, b.mask), b.calibration.xi)
    assert 0 < over.sum() < 8 and torch.equal(grad.abs().amax((1, 2)) > 0, reached(A, over))
    assert (grad[~b.mask] == 0).all() and abs(metrics["over_xi"].item() - over.float().mean().item()) < 1e-6


def test_a_step_down_the_exploration_loss_raises_dsd(states):
    from relax.dsd import dsd
    calibration = calibrate(*states, n_observables=4, xi=float("inf"), generator=torch.Generator().manual_seed(0))
    b = batch(states, torch.ones(8), calibration)
    grad, = torch.autograd.grad(ReLaX(alpha=1.0, beta=0.0).loss(b)[0], b.hidden)
    before, after = (dsd(h, calibration.dictionary, b.mask).mean() for h in (b.hidden, b.hidden - 0.05 * grad / grad.norm()))
    assert after > before


def test_kl_gates(states):
    calibration = calibrate(*states, n_observables=4, xi="q60", generator=torch.Generator().manual_seed(0))
    b = batch(states, torch.zeros(8), calibration, ref=0.7)
    loss = {g: ReLaX(alpha=0.0, beta=1.0, gate=g).loss(b)[0].item() for g in ("none", "adaptive", "all")}
    assert loss["none"] == 0 < loss["adaptive"] < loss["all"] and abs(loss["all"] - sampled_kl(torch.tensor(-1.0), torch.tensor(-0.3)).item()) < 1e-6


def test_uniform_kl_survives_a_gate_that_is_shut(states):
    calibration = calibrate(*states, n_observables=4, generator=torch.Generator().manual_seed(0))
    method = ReLaX(kl=0.5, alpha=0.0, beta=0.0)
    assert method.needs_reference and not method.gated
    loss, metrics = method.loss(batch(states, torch.ones(8), calibration, ref=0.3))
    assert torch.allclose(loss, metrics["policy_loss"] + 0.5 * metrics["kl"]) and metrics["kl"] > 0


def test_kl_aggregation_is_its_own_switch(states):
    calibration = calibrate(*states, n_observables=4, xi=0.0, generator=torch.Generator().manual_seed(0))
    kl = {a: ReLaX(kl_aggregation=a).loss(batch(states, torch.ones(8), calibration, ref=0.3))[1]["gated_kl"].item() for a in (None, "token", "sum")}
    assert kl[None] == kl["token"] and kl["sum"] == pytest.approx(kl["token"] * states[1].sum().item(), rel=1e-4)


def test_dsd_of_the_beginning_only(states):
    calibration = calibrate(*states, n_observables=4, dsd_tokens=12, generator=torch.Generator().manual_seed(0))
    whole = calibrate(*states, n_observables=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(calibration.dictionary.weight, whole.dictionary.weight) and calibration.initial_dsd != whole.initial_dsd
    b = batch(states, torch.ones(8), calibration)
    loss, _ = ReLaX(alpha=1.0, dsd_tokens=12, freeze_over=False).loss(b)
    grad, = torch.autograd.grad(loss, b.hidden)
    assert grad[:, 12:].abs().sum() == 0 < grad[:, :12].abs().sum()


def test_scale_is_explicit(states):
    calibration = calibrate(*states, n_observables=4, xi=float("inf"), generator=torch.Generator().manual_seed(0))
    b = batch(states, torch.ones(8), calibration)
    raw, scaled = (ReLaX(alpha=1.0, beta=0.0, dsd_scale=s).loss(b)[1]["exploration_loss"].item() for s in ("raw", "initial"))
    assert scaled < raw < 0 and isinstance(calibration.dictionary, KoopmanDictionary)


def test_closed_rows_never_matter():
    logp = torch.tensor([[-1.0, -1.0], [-200.0, -1.0], [float("nan"), -1.0]], requires_grad=True)
    kl = adaptive_kl(logp, torch.full((3, 2), -0.5), torch.ones(3, 2, dtype=torch.bool), torch.tensor([True, False, False]))
    grad, = torch.autograd.grad(kl, logp)
    assert kl.isfinite() and kl > 0 and grad.isfinite().all() and (grad[1:] == 0).all() and (grad[0] != 0).all()


def test_states_that_never_moved_calibrate_to_a_finite_loss():
    constant, mask = torch.zeros(8, 12, 5), torch.ones(8, 12, dtype=torch.bool)
    calibration = calibrate(constant, mask, n_observables=3, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(8, 12, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss, _ = ReLaX(freeze_over=False).loss(batch((hidden, mask), torch.tensor([1.0, -1.0] * 4), calibration))
    assert calibration.initial_dsd == 0 and loss.isfinite() and torch.autograd.grad(loss, hidden)[0].isfinite().all()


@pytest.mark.parametrize("text", ["{}", "[]", '{"xi": "a", "initial_dsd": 1}', '{"xi": 1, "initial_dsd": null}', "\xff"])
def test_a_foreign_calibration_is_refused(states, tmp_path, text):
    calibrate(*states, n_observables=4, generator=torch.Generator().manual_seed(0)).save(tmp_path)
    (tmp_path / "calibration.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="^folder"): Calibration.load(tmp_path)


def test_unknown_choices_and_numbers_that_are_none_are_named():
    for wrong in ("gate", "dsd_scale", "aggregation"):
        with pytest.raises(ValueError, match=f"{wrong}: got 'x'"): ReLaX(**{wrong: "x"})
    with pytest.raises(ValueError, match="^dsd"): exploration_loss(torch.tensor([1.0, float("inf")]), torch.tensor([1.0, -1.0]))


def test_a_response_of_one_token_is_still_and_harms_nobody(states):
    from relax.dsd import dsd
    hidden, mask = states
    short = mask.clone()
    short[2] = torch.arange(30) < 1
    calibration = calibrate(hidden, short, n_observables=4, xi=float("inf"), generator=torch.Generator().manual_seed(0))
    spread = response_dsd(hidden, calibration.dictionary, short)
    others = torch.arange(8) != 2
    assert spread[2] == 0 and torch.allclose(spread[others], dsd(hidden[others], calibration.dictionary, short[others]))
    loss, _ = ReLaX(alpha=1.0).loss(batch((hidden, short), torch.ones(8), calibration))
    grad, = torch.autograd.grad(loss, hidden)
    assert grad.isfinite().all() and (grad[2] == 0).all() and (grad[0] != 0).any()
    assert (response_dsd(hidden, calibration.dictionary, short & (torch.arange(30) < 1)) == 0).all()
    with pytest.raises(ValueError, match="two tokens"): calibrate(hidden, short & (torch.arange(30) < 1), n_observables=4)
