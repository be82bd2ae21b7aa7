"DSD against systems of known dispersion, against the loop, and under padding, precision and degenerate input."
import json
from dataclasses import replace

import pytest
import torch

from relax.bench import dsd_passes, host_copies
from relax.dictionary import Eigenpairs, KoopmanDictionary
from relax.dsd import ESTIMATORS, Estimator, dsd, dsd_loop, koopman_spectrum, pool_groups
from relax.dynamics import LinearSystem
from relax.record import data_dir

F64 = torch.float64
NAMES = list(ESTIMATORS)


def gen(seed=0): return torch.Generator().manual_seed(seed)
def walk(B, T, d, seed=0, dtype=F64): return (torch.randn(B, T, d, generator=gen(seed), dtype=F64).cumsum(1) * 0.2).to(dtype)
def ruler(d, m, seed=1, dtype=F64): return KoopmanDictionary(d, m, gen(seed)).to(dtype).requires_grad_(False)


def flat(d, scale=0.02):
    "One half plus a small multiple of each coordinate."
    dictionary = KoopmanDictionary(d, d).double().requires_grad_(False)
    dictionary.weight.copy_(scale * torch.eye(d))
    return dictionary


def system(radii, seed=0, skew=0.3):
    Q = torch.linalg.qr(torch.randn(len(radii), len(radii), generator=gen(seed), dtype=F64))[0]
    Q = Q + skew * torch.triu(torch.ones_like(Q), 1)
    return Q @ torch.diag(torch.tensor(radii, dtype=F64)) @ torch.linalg.inv(Q)


def padded(h, lengths, side):
    "h with every row cut to its length, the rest NaN, real tokens at the given side or in the middle."
    out, mask = torch.full_like(h, torch.nan), torch.zeros(h.shape[:2], dtype=torch.bool)
    for b, n in enumerate(lengths):
        start = {"right": 0, "left": h.shape[1] - n, "both": (h.shape[1] - n) // 2}[side]
        out[b, start:start + n], mask[b, start:start + n] = h[b, :n], True
    return out, mask


@pytest.mark.parametrize("radii", [[0.1, 0.5, 0.9, 0.95], [0.7, 0.7, 0.7], [0.2, 0.4, 0.6, 0.8, 0.9]])
def test_known_dispersion(radii):
    h = LinearSystem(system(radii), noise=1.0).simulate(3, 6000, gen())
    truth = torch.tensor(radii, dtype=F64)
    est = Estimator(weight=None, ridge=1e-6)
    assert torch.allclose(dsd(h, flat(len(radii)), None, est), truth.var(correction=0).expand(3), atol=0.02)
    assert torch.allclose(koopman_spectrum(h, flat(len(radii)), None, est).abs().sort().values, truth.sort().values.expand(3, -1), atol=0.08)


def test_orders_systems_by_their_true_dispersion():
    sets = [[0.7] * 4, [0.6, 0.65, 0.75, 0.8], [0.4, 0.6, 0.8, 0.9], [0.1, 0.2, 0.9, 0.95]]
    h = torch.cat([LinearSystem(system(r), noise=1.0).simulate(1, 4000, gen(3)) for r in sets])
    for name in ("robust", "paper"): assert (dsd(h, flat(4), None, name).diff() > 0).all(), name


def embedded(radii, T, seed, d=64):
    "A trajectory of `system` with each radius twice, as a hidden state (1, T, d) of mean square one."
    x = LinearSystem(system(sorted(2 * radii), seed, skew=0.1), noise=1.0).simulate(1, T, gen(seed))
    h = x @ torch.randn(x.shape[-1], d, generator=gen(seed + 50), dtype=F64)
    return h / h.square().mean().sqrt()


@pytest.mark.parametrize("m", [25, 50])
def test_fewer_modes_than_features(m):
    sets = [[0.6] * 4, [0.5, 0.55, 0.65, 0.7], [0.3, 0.5, 0.6, 0.8], [0.2, 0.3, 0.7, 0.8], [0.05, 0.15, 0.8, 0.9]]
    truth = torch.tensor(sets, dtype=F64).var(-1, correction=0)
    found = torch.stack([dsd(torch.cat([embedded(r, 512, seed) for r in sets]), ruler(64, m)) for seed in range(3)]).mean(0)
    assert (found.diff() > 0).all() and ((found - truth).abs() < 0.15 * truth + 0.008).all()


def test_white_noise_has_hardly_any_dispersion_and_a_system_the_same_at_any_length():
    noise = torch.randn(16, 512, 32, generator=gen(), dtype=F64)
    assert dsd(noise, ruler(32, 10)).max() < 1e-3
    h = torch.cat([embedded([0.2, 0.3, 0.7, 0.8], 512, seed) for seed in range(16)])
    means = torch.stack([dsd(h[:, :T], ruler(64, 25)).mean() for T in (128, 256, 512)])
    assert means.max() < 1.15 * means.min()


@pytest.mark.parametrize("name", NAMES)
def test_rotated_features_say_the_same(name):
    h, one, two = walk(4, 60, 8), ruler(8, 6), ruler(8, 6)
    two.weight.copy_(torch.linalg.qr(torch.randn(6, 6, generator=gen(8), dtype=F64))[0] @ one.weight)
    one.activation = two.activation = torch.nn.Identity()
    assert torch.allclose(dsd(h, one, None, name), dsd(h, two, None, name), rtol=1e-6)


def test_permuting_the_batch_permutes_the_result():
    h, order = walk(5, 40, 8), torch.tensor([3, 0, 4, 2, 1])
    assert torch.allclose(dsd(h, ruler(8, 6))[order], dsd(h[order], ruler(8, 6)), rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_never_matters(name, side):
    h, dictionary, lengths = walk(4, 30, 8), ruler(8, 5), [30, 17, 9, 2]
    alone = torch.cat([dsd(h[b:b + 1, :n], dictionary, None, name) for b, n in enumerate(lengths)])
    dirty, mask = padded(h, lengths, side)
    dirty.requires_grad_()
    value = dsd(dirty, dictionary, mask, name)
    value.sum().backward()
    assert torch.allclose(value, alone, rtol=1e-5, atol=1e-7)
    assert dirty.grad.isfinite().all() and (dirty.grad[~mask] == 0).all() and dirty.grad[mask].abs().max() > 0


def test_padding_with_a_trainable_dictionary():
    dirty, mask = padded(walk(2, 20, 6), [20, 9], "left")
    dictionary = KoopmanDictionary(6, 4, gen()).double()
    dsd(dirty, dictionary, mask).sum().backward()
    assert dictionary.weight.grad.isfinite().all() and dictionary.weight.grad.abs().max() > 0


def test_unmasked_switch_takes_padding_for_zero_states():
    h, mask = padded(walk(2, 20, 6), [20, 9], "right")
    est, dictionary = replace(ESTIMATORS["authors"], masked=False), ruler(6, 4)
    assert torch.allclose(dsd(h, dictionary, mask, est), dsd(h.nan_to_num(0.0), dictionary, None, "authors"))
    assert abs(dsd(h, dictionary, mask, est)[1] - dsd(h, dictionary, mask, "authors")[1]) > 1e-3
    assert torch.allclose(dsd(h, dictionary, mask, est), dsd_loop(h, dictionary, mask, est))


@pytest.mark.parametrize("est", [*NAMES, Estimator(weight=None, ddof=1), Estimator(weight="residual", level=0.3), Estimator(order=1, edge=0), Estimator(gram="sources", centre=False), Estimator("singular", weight=None)])
def test_batched_equals_loop(est):
    h, dictionary = walk(6, 40, 8), ruler(8, 6)
    mask = torch.rand(6, 40, generator=gen(4)) < 0.85
    mask[:, 10:13] = True
    grads = []
    for f in (dsd, dsd_loop):
        x = h.masked_fill(~mask[..., None], torch.inf).requires_grad_()
        value = f(x, dictionary, mask, est)
        grads.append((value.detach(), torch.autograd.grad(value.sum(), x)[0]))
    assert torch.allclose(grads[0][0], grads[1][0], rtol=1e-6, atol=1e-9)
    assert torch.allclose(grads[0][1], grads[1][1], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("est", ["paper", "authors", Estimator(weight=None)])
def test_gradcheck(est):
    h = torch.randn(2, 10, 4, generator=gen(2), dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dsd(x, ruler(4, 3), None, est), h)


def test_gradient_agrees_with_torch_through_complex_eigenvalues():
    K = torch.randn(5, 6, 6, generator=gen(), dtype=F64, requires_grad=True)
    ours, = torch.autograd.grad((Eigenpairs.apply(K)[0].abs().square() + 1e-3).sqrt().var(-1).sum(), K)
    theirs, = torch.autograd.grad((torch.linalg.eigvals(K).abs().square() + 1e-3).sqrt().var(-1).sum(), K)
    assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_degenerate_input_is_finite(name, dtype):
    g, dictionary = gen(5), ruler(12, 6, dtype=dtype)
    for h in (torch.ones(2, 30, 12), torch.zeros(2, 30, 12), torch.randn(2, 1, 12, generator=g).repeat(1, 30, 1), torch.randn(2, 2, 12, generator=g),
              torch.randn(2, 2, 12, generator=g).repeat(1, 15, 1), 1e4 * torch.randn(2, 9, 12, generator=g)):
        h = h.to(dtype).requires_grad_()
        value = dsd(h, dictionary, None, name)
        value.sum().backward()
        assert value.isfinite().all() and (value >= 0).all() and h.grad.isfinite().all()


@pytest.mark.parametrize("m", [8, 25])
@pytest.mark.parametrize("est", [*NAMES, Estimator(order=1, ridge=1e-2, weight="residual", level=0.3, short=0, edge=0, shrink=0)])
def test_eigenvalues_of_rounding_are_not_asked_of_lapack(m, est):
    for seed in range(6):
        h, dictionary = torch.full((4, 30, 64), 1.0 + seed, dtype=F64, requires_grad=True), ruler(64, m, seed)
        value = dsd(h, dictionary, None, est)
        value.sum().backward()
        assert value.isfinite().all() and h.grad.isfinite().all()
        assert torch.allclose(value, dsd_loop(h, dictionary, None, est), atol=1e-9)


def test_constant_trajectory_has_the_documented_value():
    h, dictionary = torch.full((1, 20, 12), 0.3), ruler(12, 8)
    assert dsd(h, dictionary).item() == pytest.approx(0, abs=1e-12)
    assert dsd(h, dictionary, None, "paper").item() == pytest.approx(1 / 8, abs=1e-4)


def test_defective_matrix_has_a_finite_gradient():
    K = (0.5 * torch.eye(3, dtype=F64) + torch.diag(torch.ones(2, dtype=F64), 1))[None].requires_grad_()
    Eigenpairs.apply(K)[0].abs().sum().backward()
    assert K.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_precision_and_dtype(name):
    h, dictionary = walk(4, 200, 16), ruler(16, 8, dtype=torch.float32)
    wide, narrow = dsd(h, dictionary, None, name), dsd(h.float(), dictionary, None, name)
    assert wide.dtype == narrow.dtype == F64 and torch.allclose(wide, narrow, rtol=1e-2)
    x = h.bfloat16().requires_grad_()
    dsd(x, dictionary, None, name).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all()


def test_spectrum():
    h, dictionary = walk(3, 40, 8), ruler(8, 6)
    for name in NAMES:
        values = koopman_spectrum(h, dictionary, None, name)
        assert values.shape == (3, 6) and values.dtype == torch.complex128 and (values.abs().diff() <= 1e-12).all()
    assert torch.allclose(koopman_spectrum(h, dictionary, None, "paper").abs().var(-1), dsd(h, dictionary, None, "paper"), atol=1e-6)
    assert (koopman_spectrum(h, dictionary).abs() <= 1 + 1e-9).all()


@pytest.mark.parametrize("m,T", [(4, 20), (10, 64), (25, 128), (25, 20)])
def test_leverage_bound(m, T):
    h, dictionary, est = torch.cat([walk(50, T, 16), torch.randn(50, T, 16, generator=gen(9), dtype=F64)]), ruler(16, m), ESTIMATORS["paper"]
    psi = dictionary(h)
    G = psi[:, :-1].mT @ psi[:, :-1]
    r = est.ridge * G.diagonal(dim1=1, dim2=2).mean(-1) + est.floor
    lev = (psi[:, -1:] @ torch.linalg.solve(G + r[:, None, None] * torch.eye(m, dtype=F64), psi[:, -1:].mT)).flatten()
    assert (koopman_spectrum(h, dictionary, None, est).abs().amax(1) <= (1 + lev).sqrt() * (1 + 1e-6)).all()
    assert (dsd(h, dictionary, None, est) <= torch.minimum((1 + lev) / 4 * m / (m - 1), (m + lev) / (m - 1)) + 1e-6).all()


def test_refusals():
    h, dictionary, mask = walk(3, 12, 6), ruler(6, 4), torch.ones(3, 12, dtype=torch.bool)
    for bad in (torch.nan, torch.inf):
        broken = h.clone()
        broken[1, 4, 2] = bad
        with pytest.raises(ValueError, match=r"hidden.*\[1, 4\]"): dsd(broken, dictionary, mask)
        with pytest.raises(ValueError, match="hidden"): koopman_spectrum(broken, dictionary, mask, "authors")
    lonely = mask.clone()
    lonely[2] = torch.arange(12) % 2 == 0
    cases = [((h, dictionary, lonely), r"mask.*\[2\]"), ((h, dictionary, mask[:2]), "mask"), ((h[0], dictionary), "hidden"), ((h[..., :5], dictionary), "state_dim = 6"),
             ((h.long(), dictionary), "hidden.*int64"), ((h[:0], dictionary), "hidden"), ((h[:, :1], dictionary), "T = 1")]
    for args, message in cases:
        with pytest.raises(ValueError, match=message): dsd(*args)
    with pytest.raises(ValueError, match="'robust', 'paper', 'authors'"): dsd(h, dictionary, mask, "svd")
    with pytest.raises(ValueError, match="spectrum"): Estimator("eigen")
    with pytest.raises(ValueError, match="weight"): Estimator(weight=0.3)
    with pytest.raises(ValueError, match="order"): Estimator(order=3)
    with pytest.raises(ValueError, match="weight"): Estimator("singular")


def test_pooled_groups_share_their_transitions_and_no_more():
    h, dictionary = walk(6, 20, 8), ruler(8, 5)
    rows, real = pool_groups(h, None, 3)
    assert rows.shape == (2, 63, 8) and int((real[:, :-1] & real[:, 1:]).sum()) == 6 * 19
    psi = dictionary(h[:3]).flatten(0, 1)
    psi = (psi - psi.mean(0)).unflatten(0, (3, 20))
    K = torch.linalg.solve(psi.flatten(0, 1).T @ psi.flatten(0, 1) + 1e-3 * torch.eye(5, dtype=F64), torch.einsum("kti,ktj->ij", psi[:, :-1], psi[:, 1:]))
    found = koopman_spectrum(rows, dictionary, real, Estimator(order=1, ridge=0, floor=1e-3, weight=None))[0]
    assert torch.allclose(found.abs().sort().values, torch.linalg.eigvals(K).abs().sort().values)
    alone, every = pool_groups(h, None, 1)
    assert torch.allclose(dsd(alone, dictionary, every), dsd(h, dictionary))
    dirty, mask = padded(h, [20, 9, 15, 7, 20, 12], "left")
    assert torch.allclose(dsd(*[pool_groups(dirty, mask, 3)[0], dictionary, pool_groups(dirty, mask, 3)[1]]),
                          dsd(*[pool_groups(dirty.nan_to_num(5.0), mask, 3)[0], dictionary, pool_groups(dirty, mask, 3)[1]]))
    with pytest.raises(ValueError, match="group_size = 4"): pool_groups(h, None, 4)


def test_pooling_finds_what_short_responses_hide():
    radii = [0.2, 0.3, 0.7, 0.8]
    x = LinearSystem(system(sorted(2 * radii), 1, skew=0.1), noise=1.0).simulate(24, 32, gen(1)) @ torch.randn(8, 64, generator=gen(2), dtype=F64)
    rows, real = pool_groups(x / x.square().mean().sqrt(), None, 24)
    assert dsd(rows, ruler(64, 25), real).item() == pytest.approx(torch.tensor(radii).var(correction=0).item(), rel=0.3)


def test_a_dict_of_changes_is_an_estimator():
    g = torch.Generator().manual_seed(0)
    states, dictionary = torch.randn(2, 30, 6, generator=g), KoopmanDictionary(6, 4, g)
    assert torch.equal(dsd(states, dictionary, estimator={"weight": None, "ridge": 0.1}), dsd(states, dictionary, estimator=Estimator(weight=None, ridge=0.1)))
    with pytest.raises(ValueError, match="a dict of fields"): dsd(states, dictionary, estimator={"wait": None})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: pytest tests/test_dsd.py -k cuda")
def test_cuda_copies_to_the_processor_do_not_grow_with_the_trajectories():
    few, many = (host_copies(dsd_passes(B, 64, 32, 5, "cuda")[0]) for B in (2, 32))
    assert few == many > 0


def test_what_a_gpu_recorded():
    "As many copies for 64 trajectories as for 8, on the card that data/bench_cuda.json names."
    record = json.loads((data_dir() / "bench_cuda.json").read_text())
    assert record["copies"]["met"] and record["copies"]["ratio"] <= 1 and record["dsd_loop"]["ratio"] > 3
    assert all("no GPU" not in r["hardware"] for r in record.values())
