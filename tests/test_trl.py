"The TRL path: one batch, one loss, one gradient with the from-scratch path; killed and resumed to the same bits; refused before it breaks."
import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback, TrainerState
from trl import GRPOConfig, GRPOTrainer

from relax.baselines import BASELINES
from relax.dictionary import FITS
from relax.grpo import GRPO, Batch, Rollouts, group_advantages, sample, score
from relax.objective import ReLaX, calibrate
from relax.reasoner import word_tokenizer
from relax.record import data_dir
from relax.tasks import TASKS
from relax.trl import DataConfig, DSDCallback, ReLaXConfig, ReLaXTrainer, conversation, last_checkpoint, load_data, main, merge, response_mask, shuffled, take

ROOT = Path(__file__).resolve().parents[1]
TASK = TASKS["countdown"]
TOKENIZER = word_tokenizer(TASK.words)
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
SMALL = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=20, n_observables=4, max_steps=2, logging_steps=1, use_cpu=True,
             bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", learning_rate=1e-3)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setitem(FITS, "normalized", FITS["normalized"] | {"steps": 20})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A function from an architecture to the folder of a tiny random model of it."
    root = tmp_path_factory.mktemp("models")
    def make(arch="Qwen2"):
        import transformers
        folder = root / arch
        if folder.exists(): return str(folder)
        config = getattr(transformers, f"{arch}Config")(
            vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
            max_position_embeddings=1024, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.3)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, f"{arch}ForCausalLM")(config)
        model.generation_config.eos_token_id = 1
        model.save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
        return str(folder)
    return make


def reward(completions, **kwargs): return [float(len(c) % 3) for c in completions]


def prompts(n=16): return Dataset.from_list([{"prompt": p.prompt, "number": i} for i, p in enumerate(TASK.problems(n))])


def trainer(model, folder, method=None, reward=reward, data=None, cls=ReLaXTrainer, config=ReLaXConfig, callbacks=None, peft_config=None,
            quantization_config=None, **options):
    more = {"method": method} if cls is ReLaXTrainer else {}
    torch.manual_seed(0)  # adapters are drawn before TRL 1.14 seeds, after it in 1.16
    return cls(model, reward, config(str(folder), **SMALL | options), data or prompts(), processing_class=TOKENIZER, callbacks=callbacks,
               peft_config=peft_config, quantization_config=quantization_config, **more)


class Gradients(TrainerCallback):
    "Keeps weights and gradients of each optimizer step, before it is made."
    def __init__(self): self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters() if p.requires_grad})


def from_scratch(t, inputs, calibration, reference) -> tuple:
    "Loss, metrics of the from-scratch path on TRL's rollouts."
    r = Rollouts(inputs["prompt_ids"], inputs["prompt_mask"].bool(), inputs["completion_ids"], inputs["completion_mask"].bool(), None)
    r.logp = torch.zeros(r.ids.shape)
    logp, entropy, hidden = score(t.model, r, t.args.temperature, n_buckets=1)
    r.logp = inputs.get("old_per_token_logps", logp.detach())
    shaped = t.method.shape_rewards(inputs["rewards"], r.mask, t.max_completion_length)
    ref_logp = reference(r) if t.method.needs_reference else None
    return t.method.loss(Batch(r.ids, r.mask, logp, r.logp, entropy, hidden, inputs["rewards"], group_advantages(shaped, 4, t.method.scale), 4,
                               ref_logp, calibration, limit=t.max_completion_length))


METHODS = {"uniform_kl": GRPO(kl=0.3, n_observables=4), "relax": ReLaX(alpha=1.0, beta=0.3, n_observables=4, xi="q50", dsd_tokens=12),
           **{name: replace(BASELINES[name], n_observables=4) for name in ("kl_cov", "dapo", "dr_grpo", "effective_rank", "bonus_dsd")}}


@pytest.mark.parametrize("name, lora", [*((name, False) for name in METHODS), ("uniform_kl", True), ("relax", True), ("effective_rank", True)])
def test_same_loss_and_gradient_as_from_scratch(checkpoint, tmp_path, name, lora):
    "Two optimizer steps on one generation batch, so that the second is off-policy, each accumulated over two micro-batches."
    seen, t = Gradients(), None
    t = trainer(checkpoint(), tmp_path, METHODS[name], callbacks=[seen], peft_config=LORA if lora else None, gradient_accumulation_steps=2,
                steps_per_generation=4, max_grad_norm=0, temperature=0.9, learning_rate=5e-3, max_refills=0)
    if lora:
        for n, p in t.model.named_parameters():
            if "lora_B" in n: torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    t.train()
    logged = t.state.log_history
    model, base = t.model, AutoModelForCausalLM.from_pretrained(checkpoint())
    def at(step):
        for n, p in model.named_parameters():
            if p.requires_grad: p.data.copy_(seen.steps[step][n][0])
    def reference(r):
        with torch.no_grad(): return score(base, r, t.args.temperature, n_buckets=1)[0]
    for step in (0, 1):
        at(step)
        model.zero_grad()
        totals = []
        for inputs in t._buffered_inputs[2 * step:2 * step + 2]:
            loss, metrics = from_scratch(t, inputs, t.calibration, reference)
            (loss / 2).backward()
            totals.append({"loss": loss.item()} | {k: v.item() for k, v in metrics.items()})
        mean = {k: sum(x[k] for x in totals) / 2 for k in totals[0]}
        assert logged[step]["loss"] == pytest.approx(mean["loss"], abs=1e-5)
        for key in totals[0].keys() - {"loss"}:
            there = {"kl": "kl", "clipped": "clip_ratio/region_mean", "over_xi": "dsd/over_xi"}.get(key, f"relax/{key}")
            assert logged[step][there] == pytest.approx(mean[key], abs=1e-5), key
        for n, p in model.named_parameters():
            if p.requires_grad: torch.testing.assert_close(p.grad, seen.steps[step][n][1], atol=1e-5, rtol=1e-3)


def test_calibration_is_the_from_scratch_one(checkpoint, tmp_path, monkeypatch):
    seen = []
    plain = ReLaXTrainer._calibrate
    monkeypatch.setattr(ReLaXTrainer, "_calibrate", lambda self, out: (seen.append(out), plain(self, out)))
    t = trainer(checkpoint(), tmp_path, per_device_train_batch_size=8, max_steps=3, dictionary_refresh=0)
    before = {k: v.clone() for k, v in t.model.state_dict().items()}
    t.train()
    assert len(seen) == 1
    t.model.load_state_dict(before)
    out, m = seen[0], t.method
    r = Rollouts(out["prompt_ids"], out["prompt_mask"].bool(), out["completion_ids"], out["completion_mask"].bool(), torch.zeros(out["completion_ids"].shape))
    with torch.no_grad(): hidden = score(t.model, r, n_buckets=1)[2]
    own = calibrate(hidden, r.mask, m.n_observables, m.estimator, m.xi, torch.Generator().manual_seed(t.args.seed))
    torch.testing.assert_close(own.dictionary.weight, t.calibration.dictionary.weight, atol=1e-4, rtol=1e-3)
    assert own.xi == pytest.approx(t.calibration.xi, rel=1e-3) and own.initial_dsd == pytest.approx(t.calibration.initial_dsd, rel=1e-3)


TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def history(t): return [{k: v for k, v in row.items() if k not in TIMES} for row in t.state.log_history if "train_runtime" not in row]


class Diary(TrainerCallback):
    "Writes the number of finished steps into a file."
    def __init__(self, path): self.path = path

    def on_step_end(self, args, state, control, **kwargs): self.path.write_text(str(state.global_step))


RESUME = dict(steps_per_generation=2, max_steps=14, save_strategy="steps", save_steps=3, max_refills=1)


def sometimes(completions, number, **kwargs):
    "A reward that gives some prompts nothing to learn from, so that dynamic sampling has work."
    return [float(len(c) % 3) if n % 2 else 0.0 for c, n in zip(completions, number)]


def test_killed_and_resumed_is_bit_identical(checkpoint, tmp_path):
    "Three epochs, checkpoints also between two updates on one generation batch, killed at a step chosen at random."
    build = lambda name, callbacks=None: trainer(checkpoint(), tmp_path / name, reward=sometimes, data=prompts(6), callbacks=callbacks, **RESUME)
    whole = build("whole")
    whole.train()
    diary, step = tmp_path / "step", int.from_bytes(os.urandom(2), "big") % 10 + 3
    diary.write_text("0")
    process = multiprocessing.get_context("fork").Process(target=lambda: build("cut", [Diary(diary)]).train())
    process.start()
    while process.is_alive() and int(diary.read_text() or 0) < step: time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    cut = build("cut")
    cut.train(resume_from_checkpoint=True)
    assert history(cut) == history(whole), f"killed at step {step}"
    for a, b in zip(cut.model.parameters(), whole.model.parameters()): assert torch.equal(a, b)
    again = build("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-9"))  # second epoch, between two updates
    assert history(again) == history(whole)


def test_half_written_checkpoints_are_passed_over(tmp_path):
    for step, text in ((2, '{"global_step": 2}'), (4, '{"global_st'), (6, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text: (folder / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2") and last_checkpoint(tmp_path / "nothing") is None


def test_refills_until_groups_teach(checkpoint, tmp_path):
    "Half of the prompts teach nothing. What comes out is whole groups, each row still with its own reward, prompt and log-probability."
    t = trainer(checkpoint(), tmp_path, reward=sometimes, per_device_train_batch_size=8, steps_per_generation=2, max_refills=20, max_steps=1)
    t.train()
    parts = t._buffered_inputs
    assert t.state.log_history[0]["dynamic_sampling/informative"] == 1 and t.state.log_history[0]["dynamic_sampling/refills"] > 0
    by_prompt = {row["prompt"]: row["number"] for row in prompts()}
    for b in parts:
        assert b["rewards"].shape == (8,) and b["rewards"].view(2, 4).std(1).min() > 0
        torch.testing.assert_close(b["advantages"], group_advantages(b["rewards"], 4))
        texts = [TOKENIZER.decode(ids[mask.bool()], skip_special_tokens=True) for ids, mask in zip(b["completion_ids"], b["completion_mask"])]
        asked = [TOKENIZER.decode(ids[mask.bool()], skip_special_tokens=True) for ids, mask in zip(b["prompt_ids"], b["prompt_mask"])]
        assert b["rewards"].tolist() == sometimes(texts, [by_prompt[p] for p in asked])
        assert all(len(set(asked[i:i + 4])) == 1 for i in (0, 4))


def test_refills_are_bounded_and_batches_stay_full(checkpoint, tmp_path):
    calls = []
    def constant(completions, **kwargs):
        calls.append(len(completions))
        return [1.0] * len(completions)
    t = trainer(checkpoint(), tmp_path, reward=constant, max_refills=3, max_steps=1, beta=0.0)
    t.train()
    row = t.state.log_history[0]
    assert calls == [4, 4, 4, 4] and row["dynamic_sampling/refills"] == 3 and row["dynamic_sampling/informative"] == 0
    assert row["relax/policy_loss"] == 0 and len(t._buffered_inputs[0]["rewards"]) == 4


def test_a_resumed_run_draws_the_same_new_prompts(checkpoint, tmp_path):
    t = trainer(checkpoint(), tmp_path)
    draw = lambda step, attempt: (setattr(t, "_step", step), [x["number"] for x in t._new_prompts(3, attempt)])[1]
    assert draw(4, 0) == draw(4, 0) != draw(4, 1) and draw(5, 0) != draw(4, 0)
    assert all(a == b for a, b in zip(draw(4, 0)[::4], draw(4, 0)[3::4]))


def test_rows_are_shuffled_by_group():
    order = shuffled(12, 4)
    assert sorted(order.tolist()) == list(range(12)) and (order.view(3, 4) == order.view(3, 4)[:, :1] + torch.arange(4)).all()
    batch = {"prompt_ids": torch.tensor([[1, 2]]), "completion_ids": torch.tensor([[3]]), "old_per_token_logps": torch.tensor([[-1.0]]), "n": torch.tensor(1.0)}
    wide = merge([batch, {"prompt_ids": torch.tensor([[1, 2, 3]]), "completion_ids": torch.tensor([[3, 4]]), "old_per_token_logps": torch.zeros(1, 2), "n": torch.tensor(1.0)}], 9)
    assert wide["prompt_ids"].tolist() == [[9, 1, 2], [1, 2, 3]] and wide["completion_ids"].tolist() == [[3, 9], [3, 4]]
    assert take({"a": ["x", "y"], "b": torch.tensor([1, 2]), "c": torch.tensor(3)}, torch.tensor([1])) == {"a": ["y"], "b": torch.tensor([2]), "c": torch.tensor(3)}


def test_no_verdict_is_no_signal(checkpoint, tmp_path):
    "A reward function may answer None: that row gets the mean of its group, hence no advantage."
    t = trainer(checkpoint(), tmp_path, reward=lambda completions, **k: [None if i == 0 else float(i) for i in range(len(completions))], max_steps=1)
    t.train()
    rows = t._buffered_inputs[0]
    assert sorted(rows["rewards"].tolist()) == [1, 2, 2, 3] and rows["advantages"].isfinite().all()


def test_alpha_zero_only_watches(checkpoint, tmp_path):
    def run(*args, **options):
        t = trainer(checkpoint(), *args, **options)
        t.train()
        return t
    a, b = run(tmp_path / "a", alpha=0.0, beta=0.0), run(tmp_path / "b", GRPO(n_observables=4))
    for x, y in zip(history(a), history(b)):
        assert x["loss"] == y["loss"] and {k: v for k, v in x.items() if k in y} == y and x["dsd/mean"] > 0
    assert a.ref_model is None


def test_callback_watches_and_changes_nothing(checkpoint, tmp_path):
    build = lambda name: trainer(checkpoint(), tmp_path / name, cls=GRPOTrainer, config=lambda folder, n_observables, **o: GRPOConfig(folder, **o), peft_config=LORA,
                                 gradient_accumulation_steps=2, save_strategy="steps", save_steps=1)
    plain = build("plain")
    plain.train()
    watched = build("watched")
    callback = DSDCallback(watched, GRPO(n_observables=4))
    watched.add_callback(callback)
    watched.train()
    new = {"dsd/mean", "dsd/over_xi"}
    assert [{k: v for k, v in row.items() if k not in new} for row in history(watched)] == history(plain)
    assert all(new <= row.keys() and row["dsd/mean"] > 0 for row in history(watched)) and history(watched)[0]["dsd/over_xi"] > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.model.modules() if "Model" in type(m).__name__)
    again = DSDCallback(watched, GRPO(n_observables=4))
    again.on_train_begin(watched.args, watched.state, None)
    assert torch.equal(again.calibration.dictionary.weight, callback.calibration.dictionary.weight)
    again.on_train_end(None, None, None)


def test_response_mask_of_old_and_new_trl():
    attention, labels = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), torch.tensor([[-100, -100, 5, 6, -100], [-100, -100, 5, 6, 7]])
    new, old = response_mask(labels=labels, attention_mask=attention), response_mask(logits_to_keep=4, attention_mask=attention)
    assert torch.equal(new, old) and new.sum().item() == 5 and response_mask(attention_mask=attention) is None


class Report(TrainerCallback):
    "What TensorBoard, trackio and W&B do: read what on_log is given."
    def __init__(self): self.keys = set()

    def on_log(self, args, state, control, logs=None, **kwargs): self.keys |= logs.keys()


def test_reporters_see_our_keys_next_to_those_of_trl(checkpoint, tmp_path):
    report = Report()
    t = trainer(checkpoint(), tmp_path, callbacks=[report])
    t.train()
    assert {"reward", "entropy", "kl", "clip_ratio/region_mean", "dsd/mean", "dsd/over_xi", "relax/exploration_loss", "relax/gated_kl"} <= report.keys


def test_calibration_keeps_few_rows(checkpoint, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("relax.trl.calibrate", lambda hidden, mask, *rest: (seen.append((hidden.shape, mask.shape)), calibrate(hidden, mask, *rest))[1])
    t = trainer(checkpoint(), tmp_path / "a", per_device_train_batch_size=8, steps_per_generation=2, calibration_rows=12)
    t.train()
    assert seen[0][0][:2] == seen[0][1] and seen[0][1][0] == 12
    w = trainer(checkpoint(), tmp_path / "b", cls=GRPOTrainer, config=lambda folder, n_observables, **o: GRPOConfig(folder, **o), gradient_accumulation_steps=4)
    w.add_callback(DSDCallback(w, GRPO(n_observables=4), rows=10))
    w.train()
    assert seen[1][1][0] == 10 and all("dsd/mean" in row for row in history(w))


def test_dictionary_is_refreshed_only_when_asked(checkpoint, tmp_path, monkeypatch):
    fits = []
    plain = ReLaXTrainer._calibrate
    monkeypatch.setattr(ReLaXTrainer, "_calibrate", lambda self, out: (fits.append(self._step), plain(self, out)))
    for every, expected in ((0, [0]), (2, [0, 2, 4])):
        trainer(checkpoint(), tmp_path / str(every), max_steps=5, dictionary_refresh=every, max_refills=0).train()
        assert fits == expected
        fits.clear()


def test_rollouts_come_from_the_adapted_policy(checkpoint, tmp_path):
    t = trainer(checkpoint(), tmp_path, peft_config=LORA, top_k=1, max_refills=0)
    for n, p in t.model.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=1.0, generator=torch.Generator().manual_seed(0))
    t.model.train()
    b = t._generate_and_score_completions([row for row in prompts(2) for _ in range(4)])
    greedy = lambda model: sample(model, b["prompt_ids"], b["prompt_mask"].bool(), 20, 1, 0, temperature=0)
    adapted = greedy(t.model)
    with t.model.disable_adapter(): base = greedy(t.model)
    assert torch.equal(b["completion_ids"] * b["completion_mask"], adapted.ids * adapted.mask)
    assert base.ids.shape != adapted.ids.shape or not torch.equal(base.ids, adapted.ids)


def test_rollouts_know_no_dropout(checkpoint, tmp_path):
    t = trainer(checkpoint(), tmp_path, peft_config=replace(LORA, lora_dropout=0.5), top_k=1, max_refills=0)
    for n, p in t.model.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=1.0, generator=torch.Generator().manual_seed(0))
    t.model.train()
    b = t._generate_and_score_completions([prompts(1)[0]] * 4)
    assert (b["completion_ids"] == b["completion_ids"][0]).all()


@pytest.mark.parametrize("arch", ["Qwen2", "Llama", "Qwen3"])
def test_4bit_lora_trains_saves_and_goes_on(checkpoint, tmp_path, arch):
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    seen = Gradients()
    build = lambda name, callbacks=None: trainer(checkpoint(arch), tmp_path / name, callbacks=callbacks, peft_config=LORA, quantization_config=four_bit,
                                                 max_steps=4, save_strategy="steps", save_steps=2, shuffle_dataset=arch != "Llama")
    whole = build("whole", [seen])
    assert type(whole.model.get_base_model().model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    assert {p.dtype for p in whole.model.parameters() if p.requires_grad} == {torch.float32}
    whole.train()
    trained = {n for n, p in whole.model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in n for n in trained)
    assert {n for n, (_, grad) in seen.steps[1].items() if grad.abs().sum() > 0} == trained
    again = build("whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert history(again) == history(whole)


def test_merging_into_rounded_weights_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="use_vllm=False"):
        trainer(checkpoint("Llama"), tmp_path, peft_config=LORA, quantization_config=BitsAndBytesConfig(load_in_4bit=True), use_vllm=True,
                vllm_importance_sampling_mode="sequence_mask")


def test_every_parameter_gets_gradient_from_exploration_alone(checkpoint, tmp_path):
    "The exploration term reaches every weight below the head: advantages are switched off."
    t = trainer(checkpoint("Llama"), tmp_path, ReLaX(alpha=1.0, beta=0.0, shaping=False, freeze_over=False, n_observables=4), max_refills=0)
    t.model.train()
    inputs = t._prepare_inputs([row for row in prompts(1) for _ in range(4)])
    t.current_gradient_accumulation_steps = 1
    t.compute_loss(t.model, inputs | {"advantages": torch.zeros(4)}).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in t.model.named_parameters() if "lm_head" not in n)


@pytest.mark.parametrize("options, said", [
    ({"use_liger_kernel": True}, "use_liger_kernel"), ({"n_observables": 11}, "max_completion_length"), ({"dsd_tokens": 6}, "n_observables"),
    ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, "split_groups=True"), ({"loss_type": "dapo"}, "loss_type"),
    ({"scale_rewards": "batch"}, "scale_rewards"), ({"entropy_coef": 0.1}, "entropy_coef"), ({"top_entropy_quantile": 0.2}, "top_entropy_quantile"),
    ({"xi": "ninety"}, "xi"), ({"estimator": "best"}, "estimator"), ({"mask_truncated_completions": True}, "mask_truncated_completions")])
def test_wrong_settings_are_refused_at_once(tmp_path, options, said):
    with pytest.raises(ValueError, match=said): ReLaXConfig(str(tmp_path), **SMALL | options)


@dataclass(frozen=True)
class Curious(GRPO):
    needs_reference_hidden = True


@pytest.mark.parametrize("method, said", [
    (replace(BASELINES["fr3e"], n_observables=4), "branch"), (Curious(n_observables=4), "needs_reference_hidden"), (GRPO(n_observables=30), "n_observables"),
    (replace(BASELINES["bonus_rarity"], n_observables=4), "keys")])
def test_methods_that_trl_cannot_serve_are_refused(checkpoint, tmp_path, method, said):
    with pytest.raises(ValueError, match=said): trainer(checkpoint(), tmp_path, method)


def test_methods_that_compare_within_groups_refuse_split_groups(checkpoint, tmp_path):
    split = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, split_groups=True)
    with pytest.raises(ValueError, match="whole groups"): trainer(checkpoint(), tmp_path, METHODS["bonus_dsd"], **split)
    t = trainer(checkpoint(), tmp_path, **split)
    t.train()
    assert [len(b["rewards"]) for b in t._buffered_inputs] == [2, 2]


def test_a_model_without_hidden_states_is_refused(checkpoint, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(checkpoint())
    monkeypatch.setattr(type(model), "base_model", None)
    monkeypatch.setattr("relax.trl.rehearse", lambda *a: None)
    with pytest.raises(ValueError, match="model: "): trainer(model, tmp_path, beta=0.0)


def test_out_of_memory_comes_with_advice(checkpoint, tmp_path, monkeypatch):
    def full(*args): raise torch.OutOfMemoryError("CUDA out of memory")
    t = trainer(checkpoint(), tmp_path)
    monkeypatch.setattr(t, "_compute_loss", full)
    with pytest.raises(torch.OutOfMemoryError, match="max_completion_length"): t.train()


def test_without_trl_the_import_says_what_to_install(monkeypatch):
    spec = importlib.util.find_spec("relax.trl")
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"\[trl\]"): spec.loader.exec_module(importlib.util.module_from_spec(spec))


def one_rank(rank, port, build, queue):
    "A process of two, on gloo."
    from accelerate.state import AcceleratorState, GradientState, PartialState
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    AcceleratorState._reset_state(True), GradientState._reset_state()
    t = build()
    t.train()
    queue.put((rank, {"weight": t.calibration.dictionary.weight.tolist(), "xi": t.calibration.xi, "history": history(t), "sizes": [len(b["rewards"]) for b in t._buffered_inputs],
                      "rewards": t._buffered_inputs[0]["rewards"].tolist(), "advantages": t._buffered_inputs[0]["advantages"].tolist(),
                      "parameters": sum(p.double().sum().item() for p in t.model.parameters())}))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_two_processes_share_calibration_and_weights(checkpoint, tmp_path, split):
    "Refills with different needs on each rank; or groups that span both ranks."
    options = dict(per_device_train_batch_size=2, split_groups=True, dynamic_sampling=False) if split else dict(max_refills=3)
    build = lambda: trainer(checkpoint(), tmp_path, reward=reward if split else sometimes, ddp_backend="gloo", **options)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # a port that is free now
        port = s.getsockname()[1]
    workers = [context.Process(target=one_rank, args=(rank, port, build, queue)) for rank in (0, 1)]
    for w in workers: w.start()
    (_, a), (_, b) = sorted(queue.get(timeout=240) for _ in workers)
    for w in workers: w.join()
    assert a["weight"] == b["weight"] and a["xi"] == b["xi"] and a["parameters"] == b["parameters"] and a["sizes"] == b["sizes"]
    assert a["history"][-1]["dsd/mean"] == b["history"][-1]["dsd/mean"]
    if split:
        both = torch.tensor(a["rewards"] + b["rewards"]), torch.tensor(a["advantages"] + b["advantages"])
        torch.testing.assert_close(both[1].sort()[0], group_advantages(both[0], 4).sort()[0])


def byte_tokenizer():
    "A byte-level tokenizer like Qwen2's, but of 300 tokens."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(["what is two plus three ?"], trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                                            special_tokens=["<|endoftext|>", "<|im_end|>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="left")


def example() -> str:
    "The lines under 'Use it in your own run' of the notebook."
    cells = json.loads((ROOT / "nbs/12_trl.ipynb").read_text())["cells"]
    page = next("".join(c["source"]) for c in cells if "Use it in your own run" in "".join(c["source"]))
    return page.split("```python\n")[1].split("```")[0]


def test_the_ten_lines_run_as_written(tmp_path, monkeypatch):
    "In a folder where the hub's name is a tiny local model."
    from transformers import Qwen2Config, Qwen2ForCausalLM
    monkeypatch.chdir(tmp_path)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                                         max_position_embeddings=1024, eos_token_id=1, bos_token_id=None))
    model.generation_config.eos_token_id = list(range(1, 20))  # so that untrained responses end long before 512 tokens
    model.save_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
    byte_tokenizer().save_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
    Path("problems.jsonl").write_text('{"prompt": "what is two plus three ?", "answer": "e"}\n')
    assert 8 <= len(example().splitlines()) <= 12
    names = {}
    exec(example(), names)
    assert names["trainer"].state.global_step == 3 and any("dsd/mean" in row for row in names["trainer"].state.log_history)


def test_readme_shows_the_same_lines():
    readme = (ROOT / "README.md").read_text()
    if "ReLaXTrainer" not in readme: pytest.skip("not in the README yet")
    assert example() in readme


def test_command_line_trains_resumes_and_trains_rivals(tmp_path):
    run = ["--config", str(ROOT / "configs/tiny-cpu.yaml"), "--output_dir", str(tmp_path / "run"), "--save_steps", "1", "--disable_tqdm", "true",
           "--per_device_train_batch_size", "8", "--problems", "20"]
    main([*run, "--max_steps", "1"])
    main([*run, "--max_steps", "2", "--resume_from_checkpoint", "true"])
    state = json.loads((tmp_path / "run/checkpoint-2/trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"]] == [1, 2] and (tmp_path / "run/model.safetensors").exists()
    assert all("relax/exploration_loss" in row for row in state["log_history"])
    main([*run[:3], str(tmp_path / "rival"), *run[4:], "--max_steps", "1", "--method", "uniform_kl", "--method_options", '{"kl": 0.1}', "--use_peft", "--lora_target_modules", "q_proj", "v_proj"])
    assert (tmp_path / "rival/adapter_model.safetensors").exists()


def test_command_line_says_what_is_wrong(tmp_path):
    run = ["--config", str(ROOT / "configs/tiny-cpu.yaml"), "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="n_observables"): main([*run, "--n_observables", "40"])
    with pytest.raises(SystemExit, match="method: got 'ppo'"): main([*run, "--method", "ppo"])
    file = tmp_path / "data.jsonl"
    file.write_text('{"question": "1 + 1", "answer": 2}\n')
    with pytest.raises(SystemExit, match=r"lacks \['prompt'\]"): main([*run, "--dataset_name", str(file)])


def test_local_files_and_instructions(tmp_path):
    pytest.importorskip("math_verify")
    rows = [{"prompt": "1 + 1", "answer": 2}, {"prompt": "half of 1", "answer": 0.5}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    for name in ("a.parquet", "a.jsonl"):
        data, grade = load_data(DataConfig(dataset_name=str(tmp_path / name), instruction="Box it.", instruction_turn="system"))
        assert data[1]["prompt"] == [{"role": "system", "content": "Box it."}, {"role": "user", "content": "half of 1"}]
        said = [[{"role": "assistant", "content": "\\boxed{2}"}], [{"role": "assistant", "content": "\\boxed{\\frac{1}{3}}"}]]
        assert grade(completions=said, answer=data["answer"]) == [1.0, 0.0]
    with ThreadPoolExecutor(1) as pool: assert pool.submit(grade, said, data["answer"]).result() == [1.0, 0.0]  # off the main thread too
    seen = {}
    grade(completions=["\\boxed{2}", "no idea"], answer=["2", "2"], log_metric=seen.__setitem__)
    assert seen == {"unparsable": 0.5}
    assert conversation("1 + 1", DataConfig(instruction="Box it.")) == [{"role": "user", "content": "1 + 1\nBox it."}] and conversation("x", DataConfig()) == "x"


def test_evaluation_is_that_of_trl(checkpoint, tmp_path):
    t = ReLaXTrainer(checkpoint(), reward, ReLaXConfig(str(tmp_path), **SMALL | dict(per_device_eval_batch_size=4, eval_on_start=True, eval_strategy="steps", eval_steps=1)),
                     prompts(), prompts(2), processing_class=TOKENIZER)
    t.train()
    assert [row["eval_reward"] is not None for row in t.state.log_history if "eval_reward" in row] == [True] * 3
