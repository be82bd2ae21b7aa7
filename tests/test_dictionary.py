"The dictionary: what it spans, that it learns, that it is frozen, saved and refused as documented."
import json
import math

import pytest
import torch

from relax.dictionary import Eigenpairs, KoopmanDictionary, OBJECTIVES, centred, gram_residuals, normalized_loss, paper_loss, quality
from relax.dynamics import Duffing, Pendulum, SlowManifold
from relax.koopman import edmd, residuals, snapshots, spectrum

F64 = torch.float64


def gen(seed=0): return torch.Generator().manual_seed(seed)


def tokens(n=96, T=40, d=48, seed=0):
    "States that forget random tokens at different speeds."
    g = gen(seed)
    E, A = torch.randn(20, d, generator=g), torch.linalg.qr(torch.randn(d, d, generator=g))[0] * torch.linspace(0.2, 0.99, d)
    h, out = torch.zeros(n, d), []
    for _ in range(T):
        h = h @ A + E[torch.randint(20, (n,), generator=g)] / 2
        out.append(h / h.norm(dim=-1, keepdim=True) * d**0.5)
    return torch.stack(out, 1)


def test_equation_8_and_dtypes():
    d, x = KoopmanDictionary(5, 7, gen()), torch.randn(2, 3, 5, generator=gen(1))
    assert d.weight.shape == (7, 5) and torch.allclose(d(x), torch.sigmoid(x @ d.weight.T))
    assert torch.allclose(d(x) + d(-x), torch.ones(2, 3, 7))
    assert d(x.bfloat16()).dtype == torch.float32 and d(x.double()).dtype == F64
    assert torch.equal(KoopmanDictionary(5, 7, gen()).weight, d.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16): assert d(x).dtype == torch.float32


def test_bias_spans_even_functions():
    x = SlowManifold().initial(1000, gen())
    target, left = x[:, 0] ** 2, {}
    for bias in (False, True):
        a = torch.cat([torch.ones(1000, 1, dtype=F64), KoopmanDictionary(2, 30, gen(), bias=bias)(x).detach()], 1)
        left[bias] = ((target - a @ torch.linalg.lstsq(a, target).solution).var() / target.var()).item()
    assert left[False] > 0.9 and left[True] < 1e-4


@pytest.mark.parametrize("name", ["slow", "pendulum", "duffing"])
@pytest.mark.parametrize("bias", [False, True])
def test_beats_the_published_solver(name, bias):
    system, published = dict(slow=(SlowManifold(), 0.56), pendulum=(Pendulum(), 0.84), duffing=(Duffing(), 0.56))[name]
    def pairs(n, seed):
        if name == "duffing": return snapshots(system.simulate(n // 10, 11, gen(seed)))
        x = system.initial(n, gen(seed))
        return x, system.step(x)
    train, test = pairs(2000, 0), pairs(500, 100)
    d = KoopmanDictionary(2, 30, gen(), bias=bias)
    before, W = quality(d, *train, *test)["residual"], d.weight.detach().clone()
    d.fit(torch.stack(train, 1), generator=gen())
    gx, gy, tx, ty = (d(z).double() for z in (*train, *test))
    assert residuals(tx, ty, *spectrum(edmd(gx, gy))).median() < 0.75 * published
    assert quality(d, *train, *test)["residual"] < before and (d.weight - W).abs().mean() > 0.05


def test_learns_in_many_dimensions_and_freezes():
    h = tokens()
    held = snapshots(h[72:])
    d = KoopmanDictionary(48, 12, gen())
    history = d.fit(h[:72], test=held, generator=gen())
    assert set(history[0]) == {"step", "loss", "residual", "fvu", "feature_std"}
    assert history[-1]["fvu"] < 0.6 * history[0]["fvu"] and history[-1]["residual"] < 0.8 * history[0]["residual"]
    assert not any(p.requires_grad for p in d.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fit_is_reproducible_and_never_reads_padding(objective):
    h = tokens(40, 20, 16)
    mask = torch.ones(40, 20, dtype=torch.bool)
    mask[::2, :6], mask[1::2, 15:] = False, False
    weights = []
    for fill in (0.0, torch.nan):
        d = KoopmanDictionary(16, 5, gen())
        with torch.no_grad(): d.fit(h.masked_fill(~mask[..., None], fill), mask, objective, steps=5, generator=gen())
        weights.append(d.weight.clone())
    assert torch.equal(*weights) and not torch.equal(weights[0], KoopmanDictionary(16, 5, gen()).weight)


def test_shrinking_cheats_the_paper_and_not_the_normalised_loss():
    x, y = snapshots(tokens(40, 20, 16))
    loss = {}
    for c in (1.0, 0.01):
        d = KoopmanDictionary(16, 6, gen())
        with torch.no_grad():
            d.weight *= c
            loss[c] = paper_loss(d(x), d(y)).item(), normalized_loss(d(x), d(y)).item()
    assert loss[0.01][0] < 0.01 * loss[1.0][0] and loss[0.01][1] > 0.8 * loss[1.0][1]


def test_silent_features_do_not_pay():
    x, y = snapshots(tokens(40, 20, 16))
    d = KoopmanDictionary(16, 6, gen())
    free = normalized_loss(d(x), d(y)).item()
    with torch.no_grad(): d.weight[1:] = d.weight[0]
    assert normalized_loss(d(x), d(y)).item() > max(0.8, free)


def test_gram_residuals_equal_the_direct_ones():
    x, y = (z.double() for z in snapshots(tokens(40, 20, 6)))
    X, Y = centred(x, y)
    pairs = spectrum(edmd(X, Y))
    assert torch.allclose(gram_residuals(X.T @ X, X.T @ Y, Y.T @ Y, *pairs).sqrt(), residuals(X, Y, *pairs), rtol=1e-6)


def test_gradient_through_eigenvectors():
    "Against finite differences, on a function that asks for neither scale nor phase of an eigenvector."
    xx = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    K = torch.tensor([[0.9, 0.2, 0.0], [0.0, 0.3, 0.1], [0.1, 0.0, -0.5]], dtype=F64, requires_grad=True)
    f = lambda K: gram_residuals(xx, xx @ torch.ones_like(K) / 3, 2 * xx, *Eigenpairs.apply(K)).mean()
    step, = torch.autograd.grad(f(K), K)
    e = 1e-6
    with torch.no_grad(): numeric = torch.stack([(f(K + e * d.view(3, 3)) - f(K - e * d.view(3, 3))) / (2 * e) for d in torch.eye(9, dtype=F64)]).view(3, 3)
    assert torch.allclose(step, numeric, rtol=1e-2, atol=1e-3)     # damping costs a fraction (damp / gap)^2


def test_save_and_load(tmp_path):
    for bias in (False, True):
        d = KoopmanDictionary(6, 4, gen(), bias=bias)
        d.save_pretrained(tmp_path / "a" / str(bias))
        again = KoopmanDictionary.from_pretrained(tmp_path / "a" / str(bias))
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in d.state_dict().items())
        assert (again.bias is not None) == bias and not again.weight.requires_grad
        assert sorted(p.name for p in (tmp_path / "a" / str(bias)).iterdir()) == ["config.json", "dictionary.safetensors"]


def test_foreign_and_corrupt_files_are_refused(tmp_path):
    KoopmanDictionary(6, 4, gen()).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "dictionary.safetensors"
    good, data = config.read_text(), weights.read_bytes()
    for bad in ("{", "[]", json.dumps({"model_type": "qwen2"}), json.dumps({"model_type": "koopman_dictionary"}), good.replace("6", "null"), good.replace('"n_observables": 4', '"n_observables": 5')):
        config.write_text(bad)
        with pytest.raises(ValueError, match="expected"): KoopmanDictionary.from_pretrained(tmp_path)
    config.write_text(good)
    for bad in (b"", b"junk", data[:-5], data[:20]):
        weights.write_bytes(bad)
        with pytest.raises(ValueError, match="expected"): KoopmanDictionary.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected"): KoopmanDictionary.from_pretrained(tmp_path / "nowhere")


def test_refusals():
    with pytest.raises(ValueError, match="n_observables: got 1"): KoopmanDictionary(4, 1)
    d, h = KoopmanDictionary(4, 6, gen()), torch.randn(3, 8, 4, generator=gen())
    with pytest.raises(ValueError, match="5.*state_dim = 4"): d(torch.randn(2, 5))
    with pytest.raises(ValueError, match="objective.*'normalized', 'paper', 'authors'"): d.fit(h, objective="svd")
    with pytest.raises(ValueError, match="1 transitions.*n_observables = 6"): d.fit(h[:1, :2])
    with pytest.raises(ValueError, match="mask"): d.fit(h, torch.ones(3, 7, dtype=torch.bool))
    h[1, 2, 0] = math.nan
    with pytest.raises(ValueError, match=r"NaN or Inf.*\[1, 2\]"): d.fit(h)
