"EDMD, spectra, residuals and pseudospectra against systems and matrices with known answers."
import math

import pytest
import torch

from relax.dynamics import Duffing, LinearSystem, OrnsteinUhlenbeck, SlowManifold, StuartLandau
from relax.koopman import edmd, gaussians, monomials, pseudospectrum, residuals, snapshots, spectrum

F64 = torch.float64


def gen(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0, dtype=F64): return torch.randn(*shape, generator=gen(seed), dtype=dtype)


def pairs(system, lift, n_traj=40, n_steps=20, skip=0):
    return [lift(z) for z in snapshots(system.simulate(n_traj, n_steps, gen())[:, skip:])]


def missing(found, true):
    "Largest relative distance when each true eigenvalue takes its own found one."
    found, worst = found.tolist(), 0.
    for t in true.tolist():
        near = min(found, key=lambda z: abs(z - t))
        found.remove(near)
        worst = max(worst, abs(near - t) / abs(t))
    return worst


def stable(d, seed):
    A = randn(d, d, seed=seed)
    return .95 * A / torch.linalg.eigvals(A).abs().max()


TURN = torch.tensor([[math.cos(.4), -math.sin(.4)], [math.sin(.4), math.cos(.4)]], dtype=F64)


@pytest.mark.parametrize("A", [stable(1, 0), stable(3, 1), stable(5, 2), TURN, .9 * TURN, torch.diag(torch.tensor([.9, 0.]))], ids=len)
@pytest.mark.parametrize("degree", [1, 2])
def test_linear_systems_to_1e_8(A, degree):
    x, y = pairs(LinearSystem(A=A), lambda z: monomials(z, degree))
    found = spectrum(edmd(x, y))[0]
    base = torch.linalg.eigvals(A.double())
    for t in torch.cat([torch.ones(1), base] + ([base ** 2, base * base.roll(1)] if degree == 2 else [])):
        assert (found - t).abs().min() < 1e-8


@pytest.mark.parametrize("mu, lam", [(-.05, -1.), (-.1, -2.), (-.3, -.7)])
def test_slow_manifold_to_1e_8(mu, lam):
    system = SlowManifold(mu=mu, lam=lam)
    x, y = pairs(system, lambda z: monomials(z, 2))
    assert missing(spectrum(edmd(x, y))[0], system.eigenvalues(4)) < 1e-8


@pytest.mark.parametrize("delta", [.3, .5, .8])
def test_duffing_within_two_percent(delta):
    system = Duffing(delta=delta)
    x, y = pairs(system, lambda z: monomials(z, 7), n_traj=100, n_steps=121, skip=60)
    assert missing(spectrum(edmd(x, y))[0][:4], system.eigenvalues(4)) < .02


@pytest.mark.parametrize("theta", [.7, 1., 2.])
def test_ou_within_two_percent_and_residual_floor(theta):
    system = OrnsteinUhlenbeck(theta=theta)
    x, y = pairs(system, lambda z: monomials(z, 3), n_traj=4000, n_steps=600)
    l, v = spectrum(edmd(x, y))
    assert missing(l[:4], system.eigenvalues(4)) < .02
    assert torch.allclose(residuals(x, y, l, v), (1 - system.eigenvalues(4).real ** 2).sqrt(), atol=.02)


def test_stuart_landau_circle():
    system = StuartLandau(mu=.5, omega=3.)
    def lift(z):
        c = torch.view_as_complex(z.contiguous())
        return torch.stack([(c / c.abs()) ** n * (1 / c.abs() ** 2 - 2) ** k for n, k in [(0, 0), (1, 0), (-1, 0), (0, 1)]], -1)
    x, y = pairs(system, lift)
    K = edmd(x, y)
    assert K.dtype == torch.complex128 and missing(spectrum(K)[0], system.eigenvalues(4)) < 1e-8


def test_edmd_batched_equals_loop_and_normal_equations():
    x, y = randn(2, 3, 30, 5), randn(2, 3, 30, 5, seed=1)
    for ridge in (0., .3):
        K = edmd(x, y, ridge=ridge)
        assert K.shape == (2, 3, 5, 5) and torch.allclose(K[1, 2], edmd(x[1, 2], y[1, 2], ridge=ridge), atol=1e-12)
        assert torch.allclose(x.mT @ (y - x @ K), ridge * K, atol=1e-10)


def test_edmd_minimum_norm():
    x, y = randn(3, 8), randn(3, 8, seed=1)
    assert torch.allclose(edmd(x, y), torch.linalg.pinv(x) @ y, atol=1e-12)
    constant = torch.full((20, 3), .5)
    K = edmd(constant, constant)
    assert torch.allclose(constant @ K, constant, atol=1e-6) and K.isfinite().all()
    assert edmd(torch.zeros(4, 3), torch.zeros(4, 3)).abs().max() == 0


def test_edmd_long_float32_keeps_weak_directions():
    x = randn(200_000, 2, dtype=torch.float32) * torch.tensor([1., 1e-3])
    A = torch.tensor([[.9, 0.], [0., .5]])
    assert torch.allclose(edmd(x, x @ A), A, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex64, torch.complex128])
def test_dtypes(dtype):
    x, y = randn(30, 4, dtype=dtype), randn(30, 4, seed=1, dtype=dtype)
    K = edmd(x, y)
    l, v = spectrum(K)
    wide = torch.promote_types(dtype, torch.complex64)
    assert K.dtype == dtype and l.dtype == v.dtype == wide and residuals(x, y, l, v).dtype == wide.to_real()
    assert edmd(x, y, ridge=.1).dtype == dtype


def test_spectrum_order_and_eigenvectors():
    K = randn(4, 6, 6)
    l, v = spectrum(K)
    assert (l.abs().diff(dim=-1) <= 1e-12).all()
    assert torch.allclose(K.to(v.dtype) @ v, v * l[..., None, :], atol=1e-10)
    assert torch.allclose(torch.linalg.vector_norm(v, dim=-2), torch.ones(4, 6, dtype=F64))
    l, _ = spectrum(.9 * TURN)
    assert l[0].imag > 0 and l[1] == l[0].conj()


def test_residuals_are_equation_13_over_the_norm():
    x, y = randn(50, 5), randn(50, 5, seed=1)
    l, v = spectrum(edmd(x, y))
    X, Y = x.to(v.dtype), y.to(v.dtype)
    for i in range(5):
        gram = Y.mH @ Y - l[i] * (X.mH @ Y).mH - l[i].conj() * (X.mH @ Y) + l[i].abs() ** 2 * (X.mH @ X)
        want = (v[:, i].conj() @ gram @ v[:, i]).real.sqrt() / (X @ v[:, i]).norm()
        assert torch.allclose(residuals(x, y, l, v)[i], want)
    assert residuals(x, x @ edmd(x, y), l, v).max() < 1e-10


def test_residuals_invariances_and_batches():
    x, y = randn(3, 50, 5), randn(3, 50, 5, seed=1)
    l, v = spectrum(edmd(x, y))
    r = residuals(x, y, l, v)
    assert r.shape == (3, 5) and torch.allclose(r, residuals(7 * x, 7 * y, l, (2 - 3j) * v))
    assert torch.allclose(r[1, :2], residuals(x[1], y[1], l[1, :2], v[1][:, :2]))


def test_residual_of_a_silent_function_is_finite():
    x = torch.cat([randn(20, 2), torch.zeros(20, 1)], -1)
    l, v = spectrum(edmd(x, x))
    assert residuals(x, x, l, v).isfinite().all()
    assert residuals(torch.zeros(5, 2), torch.zeros(5, 2), *spectrum(torch.zeros(2, 2))).abs().max() == 0


def test_gradients():
    x, y = randn(12, 3).requires_grad_(), randn(12, 3, seed=1).requires_grad_()
    def f(x, y):
        l, v = spectrum(edmd(x, y))
        return l.abs(), residuals(x, y, l, v)
    assert torch.autograd.gradcheck(f, (x, y))
    assert torch.autograd.gradcheck(lambda x, y: edmd(x, y, ridge=.1), (x, y))


def test_pseudospectrum_of_a_closed_dictionary_is_the_matrix_one():
    q = torch.linalg.qr(randn(40, 4))[0]
    K, grid = randn(4, 4, seed=2), torch.tensor([[.1 + .5j, 1.], [-.3j, 2 - 1j]], dtype=torch.complex128)
    want = torch.stack([torch.linalg.svdvals(K - z * torch.eye(4))[-1] for z in grid.flatten()]).reshape(2, 2)
    assert torch.allclose(pseudospectrum(q, q @ K, grid), want)
    assert pseudospectrum(q, q @ K, torch.linalg.eigvals(K)).max() < 1e-12


def test_pseudospectrum_is_a_minimum_batched_and_basis_free():
    x, y = randn(2, 60, 4), randn(2, 60, 4, seed=1)
    z = torch.tensor([.2 + .1j, -1.], dtype=torch.complex128)
    tau = pseudospectrum(x, y, z)
    assert tau.shape == (2, 2) and torch.allclose(tau[1], pseudospectrum(x[1], y[1], z))
    assert torch.allclose(tau, pseudospectrum(x, y, z, chunk=1))
    M = randn(4, 4, seed=5)
    assert torch.allclose(tau, pseudospectrum(x @ M, y @ M, z))
    for seed in range(20):
        v = randn(4, 1, seed=seed, dtype=torch.complex128)
        assert (residuals(x, y, z[:1].expand(2, 1), v.expand(2, 4, 1))[:, 0] >= tau[:, 0] - 1e-12).all()
    assert pseudospectrum(x[0], y[0], torch.tensor(.5)).shape == ()


def test_pseudospectrum_ignores_dependent_observables():
    x, y = randn(60, 3), randn(60, 3, seed=1)
    z = torch.tensor([.4, .2j], dtype=torch.complex128)
    extra = lambda a: torch.cat([a, a[:, :1] + a[:, 1:2], a[:, :1]], -1)
    assert torch.allclose(pseudospectrum(extra(x), extra(y), z), pseudospectrum(x, y, z))
    assert pseudospectrum(torch.zeros(5, 2), torch.zeros(5, 2), z).tolist() == [0, 0]


def test_observables():
    x = randn(7, 2, 3)
    m = monomials(x, 3)
    assert m.shape == (7, 2, math.comb(6, 3)) and (m[..., 0] == 1).all() and torch.equal(m[..., 1:4], x)
    assert torch.allclose(m[..., 5], x[..., 0] * x[..., 1]) and torch.allclose(m[..., -1], x[..., 2] ** 3)
    assert monomials(x, 0).shape == (7, 2, 1) and monomials(torch.zeros(1, 2, requires_grad=True), 2).sum().requires_grad
    g = gaussians(x, x[0, 0][None], .5)
    assert g.shape == (7, 2, 2) and (g[..., 0] == 1).all() and g[0, 0, 1] == 1 and g.max() <= 1


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
def test_snapshots_never_read_padding(junk):
    x = randn(2, 6, 3).requires_grad_()
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1]]).bool()
    a, b = snapshots(x.masked_fill(~mask[..., None], junk), mask)
    want = torch.stack([x[0, 2], x[0, 3], x[1, 0], x[1, 4]]), torch.stack([x[0, 3], x[0, 4], x[1, 1], x[1, 5]])
    assert torch.equal(a, want[0]) and torch.equal(b, want[1])
    assert torch.autograd.grad((a * b).sum(), x)[0].isfinite().all()
    assert snapshots(x)[0].shape == (10, 3)


x, bad = torch.ones(5, 2), torch.full((5, 2), math.nan)
l, v = torch.ones(2), torch.eye(2)


@pytest.mark.parametrize("call, name", [
    (lambda: edmd(x, x[:4]), "y"), (lambda: edmd(bad, x), "x"), (lambda: edmd(x, bad), "y"), (lambda: edmd(x / 0, x), "x"), (lambda: edmd(x.long(), x), "x"),
    (lambda: edmd(x.bfloat16(), x), "x"), (lambda: edmd(x[0], x[0]), "x"), (lambda: edmd(x[:0], x[:0]), "x"), (lambda: edmd(x, x, ridge=-1.), "ridge"),
    (lambda: edmd(x, x, ridge=math.nan), "ridge"), (lambda: edmd([[1.]], x), "x"), (lambda: spectrum(bad[:2]), "K"), (lambda: spectrum(x), "K"),
    (lambda: residuals(x, x, l, torch.eye(3)), "eigenvectors"), (lambda: residuals(x, x, l[:1], v), "eigenvectors"),
    (lambda: residuals(x, x, l * math.nan, v), "eigenvalues"), (lambda: residuals(x, bad, l, v), "y"),
    (lambda: pseudospectrum(x, x, torch.tensor(math.inf)), "grid"), (lambda: pseudospectrum(bad, x, l), "x"), (lambda: monomials(x, -1), "degree"),
    (lambda: gaussians(x, torch.ones(3, 4), 1.), "centres"), (lambda: gaussians(x, x, 0.), "width"), (lambda: snapshots(x[:1]), "trajectories"),
    (lambda: snapshots(x, torch.ones(4).bool()), "mask"), (lambda: snapshots(x, torch.tensor([1, 0, 1, 0, 1])), "mask")])
def test_refusals_name_the_argument(call, name):
    with pytest.raises(ValueError, match=rf"^{name}\b"): call()
