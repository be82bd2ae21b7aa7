"Hand computations, and that padding, buckets and the cache never matter."
import math

import pytest
import torch

from relax.grpo import (GRPO, Batch, Rollouts, clipped_loss, decode, encode, group_advantages, informative, masked_mean, pick, positions, sample,
                        sampled_kl, score, score_rows, stack)
from relax.tasks import TASKS


@pytest.fixture(scope="module")
def rollouts(policy):
    model, tok = policy
    prompts = encode(tok, ["1 2 5 = 10 :", "8 3 7 9 = 59 :"])  # of different length
    return sample(model, *prompts, 40, tok.eos_token_id, tok.pad_token_id, 4, generator=torch.Generator().manual_seed(0))


def test_advantages_by_hand():
    A = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0]), 3)
    assert torch.allclose(A, torch.tensor([2 / 3, -1 / 3, -1 / 3, -2 / 3, 1 / 3, 1 / 3]) * math.sqrt(3), atol=1e-5)
    assert torch.allclose(group_advantages(torch.tensor([1.0, 0.0]), 2, scale="none"), torch.tensor([0.5, -0.5]))
    assert (group_advantages(torch.ones(8), 4) == 0).all() and group_advantages([1, 0], 2).dtype == torch.float32


@pytest.mark.parametrize("args, named", [
    (([1.0, 0.0], 1), "group_size"), (([1.0, 0.0, 1.0], 2), "rewards"), (([], 2), "rewards"), (([1.0, float("nan")], 2), "rewards"), (([1.0, 0.0], 2, "max"), "scale")])
def test_advantages_name_what_is_wrong(args, named):
    with pytest.raises(ValueError, match=named): group_advantages(torch.tensor(args[0]), *args[1:])


def test_clipped_loss_by_hand():
    ratio, mask = torch.tensor([[1.5, 1.0], [0.5, 9.0]]), torch.tensor([[True, True], [True, False]])
    args = ratio.log(), torch.zeros(2, 2), torch.tensor([1.0, -1.0]), mask
    assert abs(clipped_loss(*args).item() + (1.2 + 1.0 - 0.8) / 3) < 1e-6
    assert abs(clipped_loss(*args, clip_high=0.28).item() + (1.28 + 1.0 - 0.8) / 3) < 1e-6
    assert abs(clipped_loss(*args, aggregation="sequence").item() + (1.1 - 0.8) / 2) < 1e-6


def test_clipping_stops_the_gradient_only_in_the_wanted_direction():
    logp = torch.tensor([[1.5], [0.5], [1.5], [0.5]]).log().requires_grad_()
    loss = clipped_loss(logp, torch.zeros(4, 1), torch.tensor([1.0, -1.0, -1.0, 1.0]), torch.ones(4, 1, dtype=torch.bool))
    assert (torch.autograd.grad(loss, logp)[0][:, 0] != 0).tolist() == [False, False, True, True]


def test_padding_never_matters_to_the_loss():
    logp, mask = torch.randn(2, 3).requires_grad_(), torch.tensor([[True, True, False], [True, False, False]])
    def value(fill): return clipped_loss(logp.masked_fill(~mask, fill), torch.zeros(2, 3), torch.tensor([1.0, -1.0]), mask)
    a, b = value(0.0), value(float("nan"))
    assert a == b and torch.equal(*(torch.autograd.grad(x, logp)[0] for x in (a, b)))


@pytest.mark.parametrize("change, named", [
    (dict(mask=torch.zeros(2, 3, dtype=torch.bool)), "mask"), (dict(advantages=torch.zeros(3)), "advantages"), (dict(old_logp=torch.zeros(2, 2)), "old_logp")])
def test_clipped_loss_names_what_is_wrong(change, named):
    good = dict(logp=torch.zeros(2, 3), old_logp=torch.zeros(2, 3), advantages=torch.zeros(2), mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=named): clipped_loss(**good | change)


def test_unknown_aggregation_is_named():
    with pytest.raises(ValueError, match="aggregation"): masked_mean(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), "max")


def test_aggregations_by_hand():
    x, mask = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]]), torch.tensor([[True, True, False], [True, False, False]])
    got = {a: masked_mean(x, mask, a, 10).item() for a in ("token", "sequence", "constant", "sum")}
    assert got == pytest.approx({"token": 7 / 3, "sequence": (1.5 + 4) / 2, "constant": 7 / 20, "sum": 7.0})
    with pytest.raises(ValueError, match="limit"): masked_mean(x, mask, "constant")


def test_an_advantage_a_token_is_the_same_as_one_a_row_where_they_agree():
    logp, A, mask = -torch.rand(3, 5), torch.tensor([1.0, -1.0, 0.5]), torch.ones(3, 5, dtype=torch.bool)
    old = logp + 0.1 * torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(clipped_loss(logp, old, A, mask), clipped_loss(logp, old, A[:, None].expand(3, 5), mask))


def test_logits_in_chunks_give_the_same_scores_and_gradients(policy, rollouts):
    model, _ = policy
    out = []
    for budget in (2**26, 300):
        logp, entropy, hidden = score_rows(model, rollouts, 0.7, budget)
        loss = (logp * rollouts.mask).sum() + (entropy * rollouts.mask).mean()
        out.append((logp, entropy, *torch.autograd.grad(loss, list(model.parameters()))))
    for a, b in zip(*out): assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_logits_never_stand_in_memory_at_once(policy, rollouts):
    seen, head = [], policy[0].get_output_embeddings()
    hook = head.register_forward_hook(lambda m, a, out: seen.append(out.shape[:-1].numel()))
    try: score_rows(policy[0], rollouts, budget=10 * head.weight.shape[0])
    finally: hook.remove()
    assert max(seen) <= max(10, len(rollouts)) and sum(seen) > rollouts.ids.numel()


def test_a_head_with_soft_capping_is_refused(policy, rollouts):
    hook = policy[0].register_forward_hook(lambda m, a, out: out.__setitem__("logits", out.logits / 30))
    try:
        with pytest.raises(ValueError, match="soft-capping"): score_rows(policy[0], rollouts)
    finally: hook.remove()


def test_sampler_and_scorer_agree(policy, rollouts):
    logp, entropy, hidden = score(policy[0], rollouts)
    assert torch.allclose(logp[rollouts.mask], rollouts.logp[rollouts.mask], atol=1e-4)
    assert (entropy[rollouts.mask] >= -1e-5).all() and hidden.shape == (*rollouts.ids.shape, 128)


@pytest.mark.parametrize("n_buckets", [1, 2, 3, 8])
def test_buckets_never_matter(policy, rollouts, n_buckets):
    for a, b in zip(score(policy[0], rollouts, n_buckets=n_buckets), score_rows(policy[0], rollouts)):
        assert torch.allclose(a[rollouts.mask], b[rollouts.mask], atol=1e-3)


def test_what_padding_holds_never_matters(policy, rollouts):
    noise = torch.Generator().manual_seed(1)
    def junk(ids, mask): return torch.where(mask, ids, torch.randint(2, 60, ids.shape, generator=noise))
    other = Rollouts(junk(rollouts.prompt_ids, rollouts.prompt_mask), rollouts.prompt_mask, junk(rollouts.ids, rollouts.mask), rollouts.mask, rollouts.logp)
    for a, b in zip(score(policy[0], rollouts), score(policy[0], other)): assert torch.allclose(a[rollouts.mask], b[rollouts.mask], atol=1e-4)


def test_wider_padding_never_matters(policy, rollouts):
    wide = stack([rollouts, Rollouts(*(torch.nn.functional.pad(x, p) for x, p in (
        (rollouts.prompt_ids, (3, 0)), (rollouts.prompt_mask, (3, 0)), (rollouts.ids, (0, 5)), (rollouts.mask, (0, 5)), (rollouts.logp, (0, 5)))))])
    a, b = (x[wide.mask[:8]] for x in score(policy[0], wide)[0].chunk(2))
    assert len(wide) == 16 and torch.allclose(a, b, atol=1e-4)


def test_a_seed_gives_the_same_responses_and_greedy_needs_none(policy):
    model, tok = policy
    prompts = encode(tok, [p.prompt for p in TASKS["countdown"].problems(3)])
    def texts(seed, t): return decode(tok, sample(model, *prompts, 30, tok.eos_token_id, tok.pad_token_id, 2, t, torch.Generator().manual_seed(seed)))
    assert texts(0, 1.0) == texts(0, 1.0) != texts(1, 1.0) and texts(0, 0) == texts(1, 0)


def test_too_long_is_refused(policy):
    model, tok = policy
    with pytest.raises(ValueError, match="max_new_tokens: got 600"): sample(model, *encode(tok, ["1 2 = 10 :"]), 600, 1, 0)


def test_informative_groups():
    assert informative(torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), 2).tolist() == [False, False, True, True, False, False]


def test_sampled_kl_is_zero_at_home_and_positive_elsewhere():
    logp = torch.randn(50)
    assert (sampled_kl(logp, logp) == 0).all() and (sampled_kl(logp, logp + torch.randn(50)) >= 0).all()


def test_uniform_kl_is_added():
    logp, mask = torch.randn(4, 3), torch.ones(4, 3, dtype=torch.bool)
    b = Batch(None, mask, logp, logp, None, None, None, torch.tensor([1.0, -1.0, 1.0, -1.0]), 2, ref_logp=logp + 0.5)
    expected = GRPO().loss(b)[0] + 0.3 * sampled_kl(logp, logp + 0.5).mean()
    assert torch.allclose(GRPO(kl=0.3).loss(b)[0], expected)


@pytest.mark.parametrize("value, n", [(0.7, 7), (100.3, 7), (1.1, 12)])
def test_equal_rewards_give_exact_zeros(value, n):
    assert (group_advantages(torch.full((n,), value), n) == 0).all() and not informative(torch.full((n,), value), n).any()


@pytest.mark.parametrize("change, named", [
    (dict(prompt_mask=torch.tensor([[True, False]])), "prompt_mask"), (dict(prompt_mask=torch.zeros(1, 2, dtype=torch.bool)), "prompt_mask"),
    (dict(prompt_ids=torch.zeros(1, 0, dtype=torch.long), prompt_mask=torch.zeros(1, 0, dtype=torch.bool)), "prompt_ids"),
    (dict(prompt_mask=torch.ones(1, 3, dtype=torch.bool)), "prompt_ids"), (dict(max_new_tokens=0), "max_new_tokens"),
    (dict(group_size=0), "group_size"), (dict(temperature=-1.0), "temperature")])
def test_sample_names_what_is_wrong(policy, change, named):
    good = dict(prompt_ids=torch.tensor([[5, 6]]), prompt_mask=torch.ones(1, 2, dtype=torch.bool), max_new_tokens=3, eos=1, pad=0)
    with pytest.raises(ValueError, match=f"^{named}"): sample(policy[0], **good | change)


def test_cache_and_naive_reading_draw_the_same_tokens(policy, rollouts):
    model, tok = policy
    ids, mask, done = rollouts.prompt_ids, rollouts.prompt_mask, torch.zeros(8, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(rollouts.ids.shape[1]):
            logits = model(ids, attention_mask=mask.long(), position_ids=positions(mask)).logits[:, -1]
            token = torch.full((8,), tok.pad_token_id)
            token[~done] = pick(logits[~done], 1.0, generator)[0]
            ids, mask = torch.cat([ids, token[:, None]], 1), torch.cat([mask, ~done[:, None]], 1)
            done = done | (token == tok.eos_token_id)
    assert torch.equal(ids[:, rollouts.prompt_ids.shape[1]:], rollouts.ids)


def test_informative_and_choices_name_what_is_wrong():
    with pytest.raises(ValueError, match="rewards"): informative(torch.tensor([1.0, 0.0, 1.0]), 2)
    for wrong in ("scale", "aggregation"):
        with pytest.raises(ValueError, match=f"{wrong}: got 'x'"): GRPO(**{wrong: "x"})
