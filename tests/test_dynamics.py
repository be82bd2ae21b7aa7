"Reference systems: flows against integrators and conserved quantities, spectra against linear algebra, refusals by name."
import cmath
import math

import pytest
import torch

from relax.dynamics import (Duffing, LinearSystem, OrnsteinUhlenbeck, Pendulum, SlowManifold, StuartLandau, System, VanDerPol,
                            lattice, rk4)

ALL = [LinearSystem(A=[[.9, .2], [0., .7]]), LinearSystem(A=torch.eye(5) * .5, noise=.1), SlowManifold(), Pendulum(), Duffing(),
       OrnsteinUhlenbeck(), VanDerPol(), StuartLandau(), StuartLandau(mu=-.3), StuartLandau(mu=0.)]


def gen(seed=0): return torch.Generator().manual_seed(seed)


def stable(d, seed):
    A = torch.randn(d, d, generator=gen(seed), dtype=torch.float64)
    return .9 * A / torch.linalg.eigvals(A).abs().max()


@pytest.mark.parametrize("system", ALL, ids=str)
def test_simulate_shape_dtype_seed(system):
    a, b, c = (system.simulate(3, 7, gen(s)) for s in (1, 1, 2))
    assert a.shape == (3, 7, system.dim) and a.dtype == torch.float64 and a.isfinite().all()
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(a[:, 0], system.initial(3, gen(1)))
    assert isinstance(system, System) and system.simulate(2, 1).shape == (2, 1, system.dim)


@pytest.mark.parametrize("system", [s for s in ALL if not getattr(s, "noise", 0) and s.dim == 2], ids=str)
def test_simulate_is_repeated_step(system):
    x0 = torch.tensor([.3, -.4])
    path = system.simulate(2, 4, x0=x0)
    assert torch.equal(path[:, 0], x0.double().expand(2, 2))
    assert torch.allclose(system.step(path[:, :-1]), path[:, 1:], atol=1e-14)


@pytest.mark.parametrize("kind, kw", [(SlowManifold, dict(mu=-.1, lam=-2.)), (SlowManifold, dict(mu=-.5, lam=-1.)), (StuartLandau, dict(mu=.5, omega=-1.)),
                                      (StuartLandau, dict(mu=-.5)), (StuartLandau, dict(mu=0.)), (Pendulum, {}), (Duffing, dict(delta=.8)), (VanDerPol, dict(mu=3.))])
def test_two_half_steps_make_one(kind, kw):
    half, whole = kind(dt=.1, **kw), kind(dt=.2, **kw)
    x = whole.initial(50, gen())
    assert torch.allclose(half.step(half.step(x)), whole.step(x), atol=1e-6)


@pytest.mark.parametrize("system, field", [
    (SlowManifold(mu=-.1, lam=-2.), lambda x: torch.stack([-.1 * x[:, 0], -2 * (x[:, 1] - x[:, 0] ** 2)], -1)),
    (StuartLandau(mu=.7, omega=3.), lambda x: x * (.7 - (x ** 2).sum(-1, keepdim=True)) + 3 * torch.stack([-x[:, 1], x[:, 0]], -1)),
    (StuartLandau(mu=-.7, omega=3.), lambda x: x * (-.7 - (x ** 2).sum(-1, keepdim=True)) + 3 * torch.stack([-x[:, 1], x[:, 0]], -1))])
def test_exact_flow_solves_its_equation(system, field):
    x = system.initial(40, gen())
    assert torch.allclose(system.step(x), rk4(field, x, system.dt, .002), atol=1e-9)


def test_energy():
    energy = lambda x: x[..., 1] ** 2 / 2 - x[..., 0].cos()
    e = energy(Pendulum().simulate(20, 50, gen()))
    assert (e - e[:, :1]).abs().max() < 1e-6
    energy = lambda x: x[..., 1] ** 2 / 2 - x[..., 0] ** 2 / 2 + x[..., 0] ** 4 / 4
    e = energy(Duffing(delta=0.).simulate(20, 50, gen()))
    assert (e - e[:, :1]).abs().max() < 1e-5
    e = energy(Duffing(delta=.3).simulate(20, 50, gen()))
    assert (e.diff(dim=1) <= 1e-9).all()


def test_ou_stationary_law_and_transition():
    ou = OrnsteinUhlenbeck(theta=2., diffusion=3., dt=.3)
    x = ou.simulate(20_000, 4, gen())[..., 0]
    for t in range(4): assert abs(x[:, t].var() - 1.5) < .08 and abs(x[:, t].mean()) < .05
    assert abs((x[:, 0] * x[:, 1]).mean() / 1.5 - math.exp(-.6)) < .03


def test_linear_noise_is_per_coordinate():
    y = LinearSystem(A=torch.zeros(3, 3), noise=.5).step(torch.zeros(50_000, 3), gen())
    assert torch.allclose(torch.cov(y.T), .25 * torch.eye(3, dtype=y.dtype), atol=.01)


@pytest.mark.parametrize("d", [1, 3, 5])
def test_linear_lattice(d):
    A = stable(d, d)
    base, got = torch.linalg.eigvals(A), LinearSystem(A=A).eigenvalues(30)
    assert got.dtype == torch.complex128 and got.shape == (30,) and got[0] == 1
    assert (got.abs().diff() <= 1e-9).all()
    for b in base:
        if b.abs() > got[-1].abs() + 1e-9: assert (got - b).abs().min() < 1e-10
    products = torch.cat([torch.ones(1), base, *(base[i] * base[i:] for i in range(d))])   # all of degree up to two
    for p in products[products.abs() > got[-1].abs() + 1e-9]: assert (got - p).abs().min() < 1e-10


def test_lattice_order_and_multiplicity():
    assert torch.allclose(lattice([.9, .7], 6).real, torch.tensor([1, .9, .81, .729, .7, .6561], dtype=torch.float64))
    assert torch.allclose(lattice([.5, .5], 6).real, torch.tensor([1, .5, .5, .25, .25, .25], dtype=torch.float64))
    turn = cmath.exp(.7j)
    assert torch.allclose(lattice([turn, turn.conjugate()], 3), torch.tensor([1, turn, turn.conjugate()], dtype=torch.complex128))
    assert lattice([0.], 3).tolist() == [1, 0, 0]
    with pytest.raises(NotImplementedError, match="> 1"): LinearSystem(A=[[1.1]]).eigenvalues(2)


@pytest.mark.parametrize("mu, lam, dt", [(-.05, -1., .1), (-.1, -2., .1), (-.5, -.8, .3)])
def test_slow_manifold_spectrum(mu, lam, dt):
    got = SlowManifold(mu=mu, lam=lam, dt=dt).eigenvalues(12).real
    four = sorted([1, math.exp(mu * dt), math.exp(2 * mu * dt), math.exp(lam * dt)], reverse=True)
    assert torch.allclose(got[:4], torch.tensor(four, dtype=torch.float64), atol=1e-14)
    want = lattice([math.exp(mu * dt), math.exp(lam * dt)], 9).real
    for w in want[:6]: assert (got - w).abs().min() < 1e-12
    assert len(SlowManifold(mu=.1).eigenvalues(4)) == 4
    assert len({round(v, 12) for v in SlowManifold(mu=-.05, lam=-1.).eigenvalues(12).real.tolist()}) == 12


def test_slow_manifold_default_numbers():
    want = torch.tensor([1, .99501248, .99004983, .90483742], dtype=torch.float64)
    assert torch.allclose(SlowManifold().eigenvalues(4).real, want, atol=1e-8)


@pytest.mark.parametrize("delta", [.3, .5, .8, 4.])
def test_duffing_spectrum_is_the_wells_twice(delta):
    duffing = Duffing(delta=delta)
    got = duffing.eigenvalues(12)
    jacobian = torch.autograd.functional.jacobian(duffing.step, torch.tensor([1., 0.], dtype=torch.float64))   # of one step, at the bottom
    pair = torch.linalg.eigvals(jacobian)
    assert got[:2].tolist() == [1, 1]
    for p in pair:
        if p.abs() > got[-1].abs() + 1e-6: assert ((got - p).abs() < 1e-7).sum() == 2
    if delta == .5: assert abs(got[2] - (.8831062 + .3203441j)) < 1e-6 and got[3] == got[2].conj()


def test_stuart_landau_spectra():
    got = StuartLandau(mu=.4, omega=3., dt=.2).eigenvalues(6)
    want = [cmath.exp((1j * n * 3 - 2 * k * .4) * .2) for n, k in [(0, 0), (1, 0), (-1, 0), (0, 1), (2, 0), (-2, 0)]]
    assert torch.allclose(got, torch.tensor(want, dtype=torch.complex128))
    fixed = StuartLandau(mu=-.4, omega=3., dt=.2)
    jacobian = torch.autograd.functional.jacobian(fixed.step, torch.zeros(2, dtype=torch.float64))
    assert torch.allclose(fixed.eigenvalues(8), lattice(sorted(torch.linalg.eigvals(jacobian).tolist(), key=lambda z: -z.imag), 8))


@pytest.mark.parametrize("theta", [1., 2.])
def test_ou_spectrum(theta):
    want = torch.exp(-theta * .2 * torch.arange(5, dtype=torch.float64))
    assert torch.allclose(OrnsteinUhlenbeck(theta=theta).eigenvalues(5), want.to(torch.complex128))


@pytest.mark.parametrize("system, word", [(VanDerPol(), "period"), (Pendulum(), "continuous"), (Duffing(delta=0.), "continuous"), (StuartLandau(mu=0.), "mu = 0")])
def test_no_formula_says_why(system, word):
    with pytest.raises(NotImplementedError, match=word): system.eigenvalues(3)
    if isinstance(system, Pendulum): assert system.eigenvalues(1).tolist() == [1]


@pytest.mark.parametrize("make, name", [
    (lambda: LinearSystem(A=[[1., 2.]]), "A"), (lambda: LinearSystem(A=[[math.nan]]), "A"), (lambda: LinearSystem(A="x"), "A"),
    (lambda: LinearSystem(A=[[.5]], noise=-1), "noise"), (lambda: SlowManifold(dt=0.), "dt"), (lambda: SlowManifold(mu=math.nan), "mu"),
    (lambda: SlowManifold(lam="fast"), "lam"), (lambda: Pendulum(dt=-1.), "dt"), (lambda: Duffing(delta=-.1), "delta"),
    (lambda: OrnsteinUhlenbeck(theta=0.), "theta"), (lambda: OrnsteinUhlenbeck(diffusion=-1.), "diffusion"), (lambda: VanDerPol(mu=-1.), "mu"),
    (lambda: StuartLandau(omega=math.inf), "omega"), (lambda: Duffing().simulate(0, 5), "n_traj"), (lambda: Duffing().simulate(2, 0), "n_steps"),
    (lambda: Duffing().simulate(2, 2.5), "n_steps"), (lambda: Duffing().simulate(2, 3, x0=torch.zeros(3, 2)), "x0"),
    (lambda: Duffing().step(torch.zeros(4, 3)), "x"), (lambda: Duffing().step([math.nan, 0.]), "x"), (lambda: Duffing().eigenvalues(0), "n")])
def test_refusals_name_the_argument(make, name):
    with pytest.raises(ValueError, match=rf"^{name}\b.*accepted"): make()
