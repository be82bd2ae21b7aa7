"Every rival against numbers worked out by hand, and what must not matter to any of them."
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import relax.baselines
import relax.train
from relax.baselines import (BASELINES, SOURCES, Bonus, ClipCov, DAPO, DCPO, EffectiveRank, Entropy, FR3E, HICRA, HighEntropy, KLCov, Rival, ZeroDiv,
                             block_factors, constants, fork_points, length_free, one_of_each, prefixes, rarity, rejoin, smooth_advantages,
                             z_scores)
from relax.dsd import dsd, pool_groups
from relax.grpo import GRPO, Batch, Rollouts, decode, encode, sample, score
from relax.objective import calibrate, response_dsd
from relax.tasks import TASKS
from relax.train import TrainConfig, Trainer

LN2 = math.log(2)


def small(ratio=1.0, **change):
    "Two responses of one prompt: a right one of two tokens (A = 1), a wrong one of one token (A = -1). Probabilities 1/2, 1/4; 1/2."
    logp = torch.tensor([[0.5, 0.25], [0.5, 0.125]]).log()
    b = Batch(ids=torch.tensor([[3, 4], [3, 0]]), mask=torch.tensor([[True, True], [True, False]]), logp=logp.clone().requires_grad_(),
              old_logp=logp - torch.as_tensor(ratio).log(), entropy=torch.tensor([[0.3, 0.9], [0.6, 7.0]], requires_grad=True),
              hidden=torch.zeros(2, 2, 3, requires_grad=True), rewards=torch.tensor([1.0, 0.0]), advantages=torch.tensor([1.0, -1.0]), group_size=2,
              keys=torch.tensor([0, -1]), limit=4)
    return replace(b, **change)


def slope(method, b, wrt="logp"):
    return torch.autograd.grad(method.loss(b)[0], getattr(b, wrt))[0]


@pytest.fixture(scope="module")
def real(policy):
    "A real batch of 4 prompts x 8 responses, one update away from the policy that sampled it, and what FR3E needs."
    model, tok, task = *policy, TASKS["countdown"]
    problems = task.problems(4, seed=1)
    asked = [p for p in problems for _ in range(8)]
    r = sample(model, *encode(tok, [p.prompt for p in problems]), task.max_new_tokens, tok.eos_token_id, tok.pad_token_id, 8,
               generator=torch.Generator().manual_seed(0))
    verdicts = [task.verify(p, text) for p, text in zip(asked, decode(tok, r))]
    names = sorted({v.answer for v in verdicts if v.correct})
    logp, entropy, hidden = (x.detach() for x in score(model, r))
    noise = 0.2 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(1))
    rewards = torch.tensor([float(v.correct) for v in verdicts])
    advantages = (rewards.view(-1, 8) - rewards.view(-1, 8).mean(1, keepdim=True)).flatten()
    b = Batch(r.ids, r.mask, logp + noise, r.logp, entropy, hidden, rewards, advantages, 8, r.logp, calibrate(hidden, r.mask), hidden + 0.1,
              torch.tensor([names.index(v.answer) if v.correct else -1 for v in verdicts]), task.max_new_tokens)
    assert 0 < rewards.sum() < 32
    return b, r, asked


def bound(method, tok): return method.bind(tok) if isinstance(method, HICRA) else method


# the family

@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant", "sum"])
def test_a_rival_that_changes_nothing_is_grpo(real, aggregation):
    b = real[0]
    for ref in (None, b.ref_logp):
        b = replace(b, logp=b.logp.detach().requires_grad_(), ref_logp=ref)
        a, c = Rival(aggregation=aggregation, kl=0.1), GRPO(aggregation=aggregation, kl=0.1)
        assert torch.allclose(slope(a, b), slope(c, b), atol=1e-7) and torch.allclose(a.loss(b)[0], c.loss(b)[0])
        assert torch.allclose(a.loss(b)[1]["clipped"], c.loss(b)[1]["clipped"])


def test_every_name_has_a_value_and_a_source():
    wanted = "grpo_static simplerl dr_grpo dapo kl_cov clip_cov entropy zero_div high_entropy dcpo hicra fr3e effective_rank".split()
    assert set(BASELINES) == {*wanted, *(f"bonus_{s}" for s in ("random", "rarity", "dsd", "ref_dsd", "pooled_dsd", "novelty"))} == set(SOURCES)
    for method in BASELINES.values():
        assert isinstance(method, GRPO) and constants(method)
        with pytest.raises(AttributeError): method.kl = 1.0


@pytest.mark.parametrize("name", BASELINES)
def test_gradients_are_finite_and_padding_never_matters(real, policy, name):
    method, found = bound(BASELINES[name], policy[1]), []
    for junk in (0.0, 1e4):
        b = replace(real[0], **{f: getattr(real[0], f).masked_fill(~real[0].mask, junk).requires_grad_() for f in ("logp", "entropy")},
                    old_logp=real[0].old_logp.masked_fill(~real[0].mask, -junk), ref_logp=real[0].ref_logp.masked_fill(~real[0].mask, junk),
                    **{f: getattr(real[0], f).masked_fill(~real[0].mask[..., None], junk).requires_grad_() for f in ("hidden", "ref_hidden")},
                    ids=real[0].ids.masked_fill(~real[0].mask, 1 + int(junk)))
        loss, metrics = method.loss(b)
        grads = torch.autograd.grad(loss, [b.logp, b.entropy, b.hidden], allow_unused=True)
        found.append([loss.detach(), *(g for g in grads if g is not None), *metrics.values()])
        assert all(torch.isfinite(torch.as_tensor(x)).all() for x in found[-1])
        assert grads[0].masked_select(b.mask).abs().max() > 0 and (grads[0][~b.mask] == 0).all()
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(c)) for a, c in zip(*found))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_groups_all_wrong_or_all_right_and_responses_of_one_token(real, policy, name, outcome):
    one = real[0].mask & (torch.arange(real[0].mask.shape[1]) < 1)
    b = replace(real[0], logp=real[0].logp.detach().requires_grad_(), mask=one, rewards=torch.full((32,), outcome), advantages=torch.zeros(32),
                keys=torch.full((32,), int(outcome) - 1))
    assert slope(bound(BASELINES[name], policy[1]), b).isfinite().all()


# weights

def test_dr_grpo_by_hand():
    b = small(advantages=torch.tensor([0.5, -0.5]))
    assert abs(BASELINES["dr_grpo"].loss(b)[0].item() + (0.5 + 0.5 - 0.5) / (2 * 4)) < 1e-7
    assert BASELINES["dr_grpo"].scale == "none"


def test_high_entropy_by_hand():
    method = HighEntropy(top=1 / 3)  # one of three tokens: the one of entropy 0.9; padding has 7
    assert method.forking(small()).tolist() == [[False, True], [False, False]]
    assert abs(method.loss(small([[1.05, 1.2], [1.1, 1.0]]))[0].item() + 1.2 / 3) < 1e-6  # all three would give 1.15


@pytest.mark.parametrize("method, low", [(DAPO(), 0.8), (FR3E(), 0.78)])
def test_where_dapo_and_fr3e_clip_by_hand(method, low):
    b = small([[1.27, 1.4], [0.7, 1.0]])  # A = 1, 1; -1: the first is free, the others stop at 1.28 and `low`
    assert method.loss(b)[0].item() == pytest.approx(-(1.27 + 1.28 - low) / 3, abs=1e-6)


def test_hicra_by_hand():
    method = HICRA(planning=(3,))  # the first token of each response
    assert method.weigh(small()).tolist()[0] == pytest.approx([1.2, 1.0]) and method.weigh(small())[1, 0].item() == pytest.approx(-0.8)
    assert abs(method.loss(small())[0].item() + (1.2 + 1.0 - 0.8) / 3) < 1e-6


def test_hicra_binds_words_and_names_what_is_wrong(policy):
    assert HICRA().bind(policy[1]).planning == tuple(policy[1].convert_tokens_to_ids(["?", "!"]))
    assert HICRA(planning=(5,)).bind(policy[1]).planning == (5,)
    with pytest.raises(ValueError, match="planning.*bind"): HICRA().loss(small())
    with pytest.raises(ValueError, match="planning.*perhaps"): HICRA(planning=("perhaps",)).bind(policy[1])


def test_fork_points_by_hand():
    entropy, mask = torch.tensor([[0.1, 0.9, 0.2, 0.8, 9.0], [5.0, 9.0, 9.0, 9.0, 9.0]]), torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]).bool()
    assert fork_points(entropy, mask, 2).tolist() == [[1, 3], [0, 0]]
    assert fork_points(entropy[:, :1], mask[:, :1], 3).tolist() == [[0, 0, 0]] * 2


def test_block_factors_by_hand():
    found = block_factors(torch.tensor([[1, 3]]), torch.tensor([[0.75, 0.25]]), torch.tensor([0.5]), 5)
    assert found[0].tolist() == pytest.approx([1, math.exp(-0.25), math.exp(-0.25), math.exp(0.5), math.exp(0.5)])


def test_one_right_and_one_wrong_of_each_group():
    assert one_of_each(torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0]), 3).tolist() == [1, 0, 3]


def test_fr3e_scores_its_prefixes_by_the_judge(real, policy):
    model, tok = policy
    b, r, asked = real
    method, seen = FR3E(top_k=2, endings=3), {}
    def judge(tried, rows):
        seen.update(tried=tried, rows=rows)
        return (torch.arange(len(rows)) % 6 < 3).float()  # all endings from the first cut are right, all from the second wrong
    options = dict(group_size=8, limit=61, eos=tok.eos_token_id, pad=tok.pad_token_id)
    factors, tokens = method.branch(model, r, b.entropy, b.rewards, judge, **options, generator=torch.Generator().manual_seed(0))
    rows, start = one_of_each(b.rewards, 8), b.rewards.view(-1, 8).mean(1).repeat_interleave(8)
    assert tokens >= int(seen["tried"].mask.sum()) - 3 * int(fork_points(b.entropy, r.mask, 2)[rows].sum()) > 0  # endings that ran too long were cut
    assert seen["rows"].tolist() == rows.repeat_interleave(6).tolist()
    for i in range(32):
        if i not in rows: assert (factors[i] == 1).all()
        else:
            first, last = fork_points(b.entropy, r.mask, 2)[i].tolist()
            assert factors[i, :first].eq(1).all() and torch.allclose(factors[i, first:last], (start[i] - 1).exp())
            assert torch.allclose(factors[i, last:], torch.tensor(math.e))
    for j, i in enumerate(seen["rows"].tolist()):  # the judge reads whole responses: the prefix as it was, then an ending, at most 61 tokens
        tried, cut = seen["tried"], fork_points(b.entropy, r.mask, 2)[i, j % 6 // 3]
        assert torch.equal(tried.ids[j, :cut], r.ids[i, :cut]) and torch.equal(tried.prompt_ids[j], r.prompt_ids[i]) and tried.mask[j, :cut].all()
        n = int(tried.mask[j].sum())
        assert cut < n <= 61 and tried.mask[j, :n].all() and (n == 61 or tried.ids[j, n - 1] == tok.eos_token_id)
        assert (tried.ids[j, :n - 1] != tok.eos_token_id).all()


def test_prefixes_and_rejoined_responses_by_hand():
    def rollouts(prompts, rows):
        ids = torch.tensor(rows)
        return Rollouts(torch.tensor(prompts), torch.tensor(prompts) > 0, ids, ids > 0, -ids.float())
    base, cuts = rollouts([[0, 7]], [[1, 2, 3]]), torch.tensor([[0, 2]])
    ids, mask = prefixes(base, cuts)
    assert ids.tolist() == [[0, 0, 7], [7, 1, 2]] and mask.tolist() == [[False, False, True], [True] * 3]
    endings = rollouts([[0, 0, 7], [7, 1, 2]], [[4, 5, 0], [5, 6, 8]])
    tried = rejoin(base, cuts, endings, 4)  # 4 5 | 1 2 5 6, the 8 being one token too many
    assert (tried.ids * tried.mask).tolist() == [[4, 5, 0, 0], [1, 2, 5, 6]] and tried.prompt_ids.tolist() == [[0, 7]] * 2
    assert (tried.logp * tried.mask).tolist() == [[-4, -5, 0, 0], [-1, -2, -5, -6]]
    assert rejoin(base, cuts, endings, 9).mask.sum(1).tolist() == [2, 5]


def test_fr3e_endings_come_from_the_policy(real, policy):
    "Log-probabilities of the whole responses, as a fresh forward pass sees them, are those that prefix and ending were sampled with."
    model, tok = policy
    b, r, _ = real
    def judge(tried, rows):
        assert torch.allclose(score(model, tried)[0][tried.mask], tried.logp[tried.mask], atol=1e-3)
        return torch.zeros(len(rows))
    FR3E().branch(model, r, b.entropy, b.rewards, judge, 8, 61, tok.eos_token_id, tok.pad_token_id, generator=torch.Generator().manual_seed(0))


# clips

def test_dcpo_bounds_by_hand():
    low, high = DCPO().bounds(small(old_logp=torch.tensor([[1.0, 0.1], [0.002, 1.0]]).log()))
    assert high[0].tolist() == pytest.approx([0.5 + 0.5 * math.sqrt(1.8), 2.0], rel=1e-5) and high[1, 0].item() == pytest.approx(10.0)
    assert low[0].tolist() == pytest.approx([0.8, 0.5], rel=1e-5)


def test_dcpo_by_hand():
    b = small([[1.0, 9.0], [1.0, 1.0]])  # old probability of the second token: 1/36, so rho may reach .5 + .5 sqrt(1 + .8 * 36)
    assert abs(DCPO().loss(b)[0].item() + ((1 + 0.5 + 0.5 * math.sqrt(29.8)) / 2 - 1) / 2) < 1e-5
    assert DCPO().aggregation == "sequence" and not DCPO().dynamic_sampling


def test_smoothed_advantages_by_hand():
    new, total = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.2, -1.2, 0.6])
    assert torch.equal(smooth_advantages(total, total, 1), total)  # asked once: nothing to smooth
    # third time: (2 new + total) / 3 = .733, -1.067, .2 and (new + 2 total) / 3 = .467, -1.133, .4
    assert smooth_advantages(new, total, 3).tolist() == pytest.approx([1.4 / 3, -3.2 / 3, 0.2])


def covariance_batch(old=0.0):
    "One response each, of one token: A = 2, -1, -1 (mean 0), log-probabilities -1, -2, -3 (mean -2): c = 2, 0, 1."
    logp = torch.tensor([[-1.0, 5.0], [-2.0, 5.0], [-3.0, 5.0]], requires_grad=True)
    return small(ids=torch.tensor([[1, 0], [2, 0], [3, 0]]), mask=torch.tensor([[True, False]] * 3), logp=logp, old_logp=logp.detach() - old,
                 entropy=torch.zeros(3, 2), advantages=torch.tensor([2.0, -1.0, -1.0]), rewards=torch.tensor([1.0, 0, 0]), keys=None, group_size=3)


def test_kl_cov_by_hand():
    assert KLCov(ratio=1 / 3).punished(covariance_batch()).tolist() == [[True, False], [False, False], [False, False]]
    b = covariance_batch(LN2)  # rho = 2, far outside PPO's clip: J = (2 * 2 - ln 2, -2, -2)
    assert abs(KLCov(ratio=1 / 3, beta=1.0).loss(b)[0].item() + (4 - LN2 - 2 - 2) / 3) < 1e-6
    assert slope(KLCov(ratio=1 / 3), b)[:, 0].tolist() == pytest.approx([-(4 - 1) / 3, 2 / 3, 2 / 3], rel=1e-5)


def test_clip_cov_by_hand():
    method = ClipCov(lowest=0.5, highest=5.0, ratio=0.5)  # two candidates, c = 2 and 1; int(.5 * 3) = 1 goes
    dropped = method.dropped(covariance_batch())
    assert dropped.sum() == 1 and not dropped[1].any() and torch.equal(dropped, method.dropped(covariance_batch()))
    assert ClipCov(lowest=1.5, ratio=1e-9).dropped(covariance_batch())[:, 0].tolist() == [True, False, False]  # at least one
    assert not ClipCov(lowest=2.5).dropped(covariance_batch()).any()
    assert slope(ClipCov(lowest=1.5), covariance_batch())[:, 0].tolist() == pytest.approx([0, 1 / 3, 1 / 3])


def test_clip_cov_leaves_alone_what_is_clipped_already():
    assert not ClipCov(lowest=1.5).dropped(covariance_batch(math.log(2.5))).any()  # rho = 2.5 is above 1 + 1


def test_what_is_inert_on_policy_and_what_is_not(real):
    on = replace(real[0], logp=real[0].logp.detach().requires_grad_(), old_logp=real[0].logp.detach(), ref_logp=None)
    off = replace(on, old_logp=real[0].old_logp)
    plain = {a: GRPO(aggregation=a) for a in ("token", "sequence")}
    for inert in (KLCov(), DCPO(), GRPO(clip_high=3.0)):
        assert torch.allclose(slope(inert, on), slope(plain[inert.aggregation], on), atol=1e-7)
        assert not torch.allclose(slope(inert, off), slope(plain[inert.aggregation], off), atol=1e-7)
    some = ClipCov(lowest=0.05)
    assert some.dropped(on).any() and not torch.allclose(slope(some, on), slope(plain["token"], on), atol=1e-7)


def test_last_digits_do_not_wake_kl_cov():
    b = covariance_batch(1e-6)
    assert torch.allclose(slope(KLCov(), b), slope(GRPO(), b), atol=1e-5) and not torch.allclose(slope(KLCov(rounding=0), b), slope(GRPO(), b), atol=1e-2)


# terms of the loss

def test_entropy_by_hand():
    assert abs(Entropy(coefficient=0.5).loss(small())[0].item() + 1 / 3 + 0.5 * (0.3 + 0.9 + 0.6) / 3) < 1e-6
    assert slope(Entropy(coefficient=0.5), small(), "entropy").flatten().tolist() == pytest.approx([-1 / 6, -1 / 6, -1 / 6, 0])


def test_simplerl_by_hand():
    method, b = BASELINES["simplerl"], small(ref_logp=torch.tensor([[0.25, 0.25], [0.5, 0.5]]).log())
    kl = (0.5 + LN2 - 1) / 3  # exp(d) - d - 1 with d = -ln 2 on one of three tokens
    assert abs(method.loss(b)[0].item() - (-1 / 3 - 0.001 * 0.6 + 0.0001 * kl)) < 1e-7
    assert method.needs_reference and (method.clip_low, method.clip_high) == (0.2, 0.2)


def test_zero_div_by_hand():
    method, b = ZeroDiv(coefficient=0.3), small([[1.0, 1.2], [1.0, 1.0]])
    diversity = (LN2 + 1.2 * 2 * LN2) / 2  # -rho log pi over the right response, probabilities 1/2 and 1/4
    assert abs(method.loss(b)[0].item() - (-(1 + 1.2 - 1) / 3 - 0.3 * diversity / 2)) < 1e-6
    assert ZeroDiv().loss(small(keys=torch.tensor([-1, -1])))[0].item() == pytest.approx(-1 / 3)


def test_effective_rank_term_by_hand():
    b = small(hidden=torch.tensor([[[3.0, 0, 0], [0, 1, 0]], [[1, 2, 2], [9, 9, 9]]]))  # ranks 4 / 3^.75 and 1: the last state is padding
    assert abs(EffectiveRank(coefficient=0.5).loss(b)[0].item() - (-1 / 3 - 0.5 * math.log(4 / 3**0.75) / 2)) < 1e-6


# rewards and advantages

def test_overlong_shaping_by_hand():
    lengths = torch.tensor([50, 80, 90, 95, 100])  # limit 100: free up to 80, then half of a right answer for 20 tokens
    shaped = DAPO().shape_rewards(torch.ones(5), torch.arange(100) < lengths[:, None], 100)
    assert shaped.tolist() == pytest.approx([1, 1, 0.75, 0.625, 0.5])
    assert DAPO(overlong=0).shape_rewards(torch.ones(1), torch.ones(1, 100).bool(), 100).item() == 1


def test_z_scores_by_hand():
    x, keep = torch.tensor([1.0, 3, 9, 4, 7, 5, 2, 2]), torch.tensor([1, 1, 0, 0, 1, 0, 0, 0]).bool()
    # only the pair in the first group can differ: -1, 1; spread sqrt(2 / (1 + 0))
    assert z_scores(x, keep, 4).tolist() == pytest.approx([-1 / 2**0.5, 1 / 2**0.5, 0, 0, 0, 0, 0, 0], abs=1e-5)
    assert (z_scores(torch.ones(8), torch.ones(8).bool(), 4) == 0).all()


def test_length_free_by_hand():
    keep, lengths = torch.ones(6).bool(), torch.tensor([10, 20, 30, 5, 10, 15])
    assert length_free(2.0 * lengths + torch.tensor([7.0] * 3 + [1.0] * 3), lengths, keep, 3).abs().max() < 1e-9
    assert length_free(torch.tensor([1.0, -2, 1, 0, 0, 0]), lengths, keep, 3).tolist() == pytest.approx([1, -2, 1, 0, 0, 0])  # no slope in it


def test_rarity_by_hand():
    b = small(keys=torch.tensor([7, 7, 2, -1, -1, 5, -1, -1]), group_size=4)
    assert rarity(b).tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 0, 0, 0, 0, 0])


def test_rarity_bonus_by_hand():
    keys = torch.tensor([7, 7, 2, -1])  # rarity 1/3, 1/3, 2/3: mean 4/9, deviations -1/9, -1/9, 2/9, spread sqrt((1 + 1 + 4) / 81 / 2)
    z = torch.tensor([-1, -1, 2]) / 3**0.5
    b = Batch(torch.arange(4)[:, None], torch.ones(4, 1).bool(), *torch.zeros(3, 4, 1), torch.zeros(4, 1, 2), (keys >= 0).float(),
              torch.tensor([0.5, 0.5, 0.5, -1.5]), 4, keys=keys)
    assert Bonus(signal="rarity", coefficient=0.3).bonus(b).tolist() == pytest.approx([*(0.3 * z).tolist(), 0], abs=1e-4)
    gain = torch.autograd.grad(Bonus(signal="rarity", coefficient=0.3).loss(replace(b, logp=(x := b.logp.requires_grad_())))[0], x)[0]
    assert (-4 * gain[:, 0]).tolist() == pytest.approx([*(0.5 + 0.3 * z).tolist(), -1.5], abs=1e-4)
    assert Bonus(signal="rarity", coefficient=2.0).loss(b)[1]["correct_pushed_down"].item() == pytest.approx(2 / 3)


def test_novelty_by_hand():
    states = torch.tensor([[[0.0, 0], [0, 0]], [[0, 0], [6, 8]], [[0, 4], [99, 99]], [[50, 50], [50, 50]]])  # pooled: (0,0), (3,4), (0,4); the last is wrong
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1]]).bool()
    b = small(mask=mask, ref_hidden=states, keys=torch.tensor([0, 0, 0, -1]), group_size=4)
    assert relax.baselines.novelty(b)[:3].tolist() == pytest.approx([(5 + 4) / 2, (5 + 3) / 2, (4 + 3) / 2])


@pytest.mark.parametrize("signal, states", [("dsd", "hidden"), ("ref_dsd", "ref_hidden")])
def test_dsd_bonus_is_dsd_without_length(real, signal, states):
    b, ok = real[0], real[0].keys >= 0
    spread, length = response_dsd(getattr(b, states), b.calibration.dictionary, b.mask), b.mask.sum(1).double()
    rows = [g[ok[g]] for g in torch.arange(32).view(4, 8)]  # by a plain regression, group by group
    y, l = (torch.cat([x[g] - x[g].mean() for g in rows if len(g)]) for x in (spread, length))
    rest = y - l * (y * l).sum() / (l * l).sum()
    expected = 0.5 * rest / (rest.square().sum() / sum(len(g) - 1 for g in rows if len(g))).sqrt()
    assert torch.allclose(Bonus(signal=signal).bonus(b)[torch.cat(rows)].double(), expected, atol=1e-3)
    other = replace(b, **{"ref_hidden" if states == "hidden" else "hidden": torch.zeros_like(b.hidden)})
    assert torch.equal(Bonus(signal=signal).bonus(b), Bonus(signal=signal).bonus(other))


def test_pooled_dsd_is_what_leaving_one_out_takes_away(real):
    b, ok = real[0], real[0].keys >= 0
    def spread(rows):
        states, mask = pool_groups(b.ref_hidden[rows], b.mask[rows], len(rows))
        return float(dsd(states, b.calibration.dictionary, mask))
    g = next(g for g in torch.arange(32).view(4, 8) if ok[g].sum() > 2)
    rows = g[ok[g]]
    adds = torch.tensor([spread(rows) - spread(rows[rows != i]) for i in rows], dtype=torch.float64)
    without_length = relax.baselines.pooled_dsd(b, Bonus(signal="pooled_dsd"))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(relax.baselines, "length_free", lambda x, *_: x)
        assert torch.allclose(relax.baselines.pooled_dsd(b, Bonus(signal="pooled_dsd"))[rows].double(), adds, atol=1e-6)
    assert not torch.allclose(without_length[rows].double(), adds, atol=1e-6)


@pytest.mark.parametrize("signal", relax.baselines.SIGNALS)
def test_a_bonus_sums_to_zero_in_each_group_and_goes_to_the_correct_only(real, signal):
    b = replace(real[0], hidden=real[0].hidden.detach().requires_grad_(), logp=real[0].logp.detach(), ref_logp=None)
    bonus = Bonus(signal=signal).bonus(b)
    assert bonus.abs().max() > 0 and (bonus[b.keys < 0] == 0).all() and bonus.view(-1, 8).sum(1).abs().max() < 1e-5
    assert torch.equal(bonus, Bonus(signal=signal).bonus(b))
    assert not Bonus(signal=signal).loss(b)[0].requires_grad  # nothing flows through the states


def test_what_a_bonus_asks_of_the_loop():
    assert {s for s in relax.baselines.SIGNALS if Bonus(signal=s).needs_reference_hidden} == {"ref_dsd", "pooled_dsd", "novelty"}
    assert Bonus(kl=0.02).needs_reference and not Bonus().needs_reference
    with pytest.raises(ValueError, match="signal"): Bonus(signal="luck")


# the loop

def one_step(name, monkeypatch, **change):
    "One small training step; returns the trainer and the batches that the method saw."
    trainer, seen = Trainer(TrainConfig(model="countdown-tiny", method=name, prompts=4, group_size=4, steps=1, probe_every=0, **change)), []
    loss = type(trainer.method).loss
    monkeypatch.setattr(type(trainer.method), "loss", lambda self, b: (seen.append(b), loss(self, b))[1])
    trainer.train_step()
    return trainer, seen


def test_the_loop_binds_words(monkeypatch):
    trainer, seen = one_step("hicra", monkeypatch)
    assert trainer.method.planning == tuple(trainer.tokenizer.convert_tokens_to_ids(["?", "!"])) and len(seen) == 2
    with pytest.raises(ValueError, match="planning"): Trainer(TrainConfig(task="waypoints", model="waypoints-small", method="hicra"))
    assert Trainer(TrainConfig(task="waypoints", model="waypoints-small", method="hicra", method_options={"planning": ["+", "-"]})).method.planning


def test_the_loop_scales_advantages_by_what_fr3e_found(monkeypatch):
    found, branch = [], FR3E.branch
    monkeypatch.setattr(FR3E, "branch", lambda self, *args, **kw: (found.append((args[1], branch(self, *args, **kw))), found[-1][1])[1])
    trainer, seen = one_step("fr3e", monkeypatch)
    (r, (factors, tokens)), = found
    A, ids = torch.cat([b.advantages for b in seen]), torch.cat([b.ids for b in seen])
    assert torch.equal(ids, r.ids) and A.shape == factors.shape and (factors != 1).any()
    mean, std = (x.repeat_interleave(4)[:, None] for x in (r.rewards.view(-1, 4).mean(1), r.rewards.view(-1, 4).std(1)))
    assert torch.allclose(A, factors * (r.rewards[:, None] - mean) / (std + 1e-6), atol=1e-5)


@pytest.mark.parametrize("name", ["grpo_static", "dapo", "fr3e"])
def test_a_step_logs_every_token_that_was_sampled(name, monkeypatch):
    "Those of groups that were replaced, and FR3E's endings, too."
    counted = []
    for m in (relax.train, relax.baselines):
        monkeypatch.setattr(m, "sample", lambda *args, inner=m.sample, **kw: (counted.append(inner(*args, **kw)), counted[-1])[1])
    trainer = Trainer(TrainConfig(model="countdown-tiny", method=name, prompts=4, group_size=4))
    for _ in range(2):
        counted.clear()
        assert trainer.train_step()["timing"]["tokens"] == sum(int(r.mask.sum()) for r in counted) > 0
        assert len(counted) > 1 or name == "grpo_static"


@pytest.mark.parametrize("name", [n for n in BASELINES if n not in ("hicra", "fr3e")])
def test_the_loop_trains_every_value(name, monkeypatch):
    trainer, seen = one_step(name, monkeypatch)
    assert all(b.advantages.isfinite().all() for b in seen) and (trainer.method.needs_reference_hidden <= (seen[0].ref_hidden is not None))


# the notebook

def test_folded_solutions_run(real):
    "The first solution is a new rival with its test; the others must at least run."
    notebook = Path(__file__).resolve().parents[1] / "nbs" / "09_baselines.ipynb"
    text = "".join("".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "markdown")
    solutions = [part.split("```")[0] for part in text.split("<summary>Solution</summary>\n\n```python\n")[1:]]
    scope = {**vars(relax.baselines), "second": replace(real[0], ref_logp=None), "ok": real[0].keys >= 0}
    assert len(solutions) == 3
    for code in solutions: exec(code, scope)
    assert issubclass(scope["WeightedReinforce"], Rival)
    with pytest.raises(AssertionError): exec(solutions[0].replace("self.right * A", "A"), scope)  # its test can fail
