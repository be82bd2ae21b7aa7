"Runs: reproducible, killed and resumed to the same bits, refused when they would overwrite or mix."
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from relax import demo
from relax.demo import findings, results, verdict
from relax.dictionary import FITS
from relax.evaluate import evaluate_model, from_counts, report
from relax.experiments import keep_policy
from relax.grpo import GRPO, group_advantages
from relax.objective import Calibration
from relax.reasoner import load_reasoner
from relax.record import Run, data_dir
from relax.train import METHODS, StopRequest, TrainConfig, Trainer, main, make_method, parse, steps_done, train, train_all

REASONERS = data_dir() / "reasoner"
SMALL = dict(model="countdown-tiny", prompts=2, group_size=4, steps=6, checkpoint_every=2, probe_every=2, eval_problems=3, eval_samples=4)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setitem(FITS, "normalized", FITS["normalized"] | {"steps": 20})


def bytes_of(run, names=("metrics.csv", "probe.csv", "evals.csv", "samples.jsonl")):
    return [(run.folder / n).read_bytes() for n in names]


def test_same_seed_same_bits_other_seed_other_bits(tmp_path):
    a, b, c = (train(TrainConfig(**SMALL, method="relax", seed=s), name, root=tmp_path, progress=False) for name, s in (("a", 0), ("b", 0), ("c", 1)))
    assert bytes_of(a) == bytes_of(b) != bytes_of(c)


def test_killed_and_resumed_is_bit_identical(tmp_path):
    config = TrainConfig(**SMALL, method="relax", seed=3)
    whole = train(config, "whole", root=tmp_path, progress=False)
    code = (f"import torch; torch.set_num_threads(1); from relax.dictionary import FITS; FITS['normalized']['steps'] = 20; from relax.train import *; "
            f"train(TrainConfig(**{SMALL}, method='relax', seed=3), 'cut', root={str(tmp_path)!r}, progress=False)")
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and steps_done("cut", tmp_path) < 3: time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= steps_done("cut", tmp_path) <= SMALL["steps"]
    cut = train(config, "cut", resume=True, root=tmp_path, progress=False)
    assert bytes_of(whole) == bytes_of(cut)


def test_a_run_has_one_writer(tmp_path):
    config = TrainConfig(**SMALL)
    train(config, "mine", root=tmp_path, progress=False)
    holder = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "mine/checkpoint/lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    before = bytes_of(Run("mine", tmp_path))
    with pytest.raises(ValueError, match="run_id: mine is being trained by another process"): train(config, "mine", resume=True, root=tmp_path, progress=False)
    process.kill()
    process.wait()
    assert bytes_of(train(config, "mine", resume=True, root=tmp_path, progress=False)) == before


def test_interrupt_ends_cleanly_and_resumes(tmp_path, monkeypatch):
    config = TrainConfig(**SMALL)
    plain = Trainer.train_step
    def interrupted(self):
        out = plain(self)
        if self.step == 3: os.kill(os.getpid(), signal.SIGINT)
        return out
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    train(config, "run", root=tmp_path, progress=False)
    assert steps_done("run", tmp_path) == 3 and (tmp_path / "run/checkpoint/step-000003").exists()
    monkeypatch.setattr(Trainer, "train_step", plain)
    run = train(config, "run", resume=True, root=tmp_path, progress=False)
    assert bytes_of(run) == bytes_of(train(config, "whole", root=tmp_path, progress=False))


def test_second_interrupt_is_raised():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist ignores it
    try:
        with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally: signal.signal(signal.SIGINT, before)


def test_folders_are_never_overwritten_nor_mixed(tmp_path):
    config = TrainConfig(**SMALL | {"steps": 1})
    train(config, "run", root=tmp_path, progress=False)
    with pytest.raises(ValueError, match="already exists"): train(config, "run", root=tmp_path, progress=False)
    with pytest.raises(ValueError, match="started with another"): train(TrainConfig(**SMALL), "run", resume=True, root=tmp_path, progress=False)


@pytest.mark.parametrize("broken", ["state.json", "optimizer.safetensors", "model.safetensors"])
def test_corrupt_checkpoint_is_refused(tmp_path, broken):
    config = TrainConfig(**SMALL | {"steps": 1})
    run = train(config, "run", root=tmp_path, progress=False)
    (run.folder / "checkpoint/step-000001" / broken).write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a checkpoint of relax"): train(config, "run", resume=True, root=tmp_path, progress=False)


@pytest.mark.parametrize("change, named", [
    ({"task": "chess"}, "task"), ({"method": "ppo"}, "method"), ({"group_size": 1}, "group_size"), ({"steps": 0}, "steps"),
    ({"method_options": {"alhpa": 1}}, "alhpa"), ({"method_options": {"n_observables": 50}}, "n_observables"), ({"level": 9}, "level")])
def test_wrong_configuration_names_the_argument(change, named):
    with pytest.raises(ValueError, match=named): TrainConfig(**SMALL | change)


def test_foreign_weights_are_refused(tmp_path):
    config = TrainConfig(**SMALL | {"steps": 1})
    run = train(config, "run", root=tmp_path, progress=False)
    path = run.folder / "checkpoint/step-000001/model.safetensors"
    weights = load_file(path)
    for other in ({k: v for k, v in weights.items() if "layers.1" not in k}, weights | {"more": torch.zeros(1)},
                  weights | {"model.norm.weight": torch.zeros(7)}):
        save_file(other, path)
        with pytest.raises(ValueError, match="not a checkpoint of relax"): train(config, "run", resume=True, root=tmp_path, progress=False)


def test_resume_by_id_alone_takes_the_configuration_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("RELAX_DATA", str(tmp_path))
    (tmp_path / "reasoner").symlink_to(REASONERS)
    config = TrainConfig(**SMALL | {"steps": 2}, method="uniform_kl", seed=5)
    whole = bytes_of(train(config, "run", progress=False), ("metrics.csv", "evals.csv"))
    run = Run("run")
    run.truncate(1)
    shutil.rmtree(run.folder / "checkpoint")
    main(["--resume", "--run_id", "run"])
    assert bytes_of(Run("run"), ("metrics.csv", "evals.csv")) == whole


PAIR = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts programs that ignore it
from relax.train import TrainConfig, train_all
if __name__ == "__main__":
    train_all({i: TrainConfig(**%r, seed=n) for n, i in enumerate("ab")}, root=%r, progress=False)
"""


def test_interrupting_many_runs_leaves_all_resumable(tmp_path):
    options = SMALL | {"steps": 30, "eval_problems": 2}
    script = tmp_path / "pair.py"
    script.write_text(PAIR % (options, str(tmp_path)))
    process = subprocess.Popen([sys.executable, script], start_new_session=True, stderr=subprocess.DEVNULL)
    while process.poll() is None and min(steps_done(i, tmp_path) for i in "ab") < 2: time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(300) != 0  # a step on a busy machine
    done = [steps_done(i, tmp_path) for i in "ab"]
    assert all(2 <= n < 30 and (tmp_path / i / f"checkpoint/step-{n:06d}").exists() for n, i in zip(done, "ab"))


def test_workers_end_with_their_killed_parent(tmp_path):
    script = tmp_path / "pair.py"
    script.write_text(PAIR % (SMALL | {"steps": 10_000, "checkpoint_every": 10_000}, str(tmp_path)))
    process = subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL)
    while process.poll() is None and min(steps_done(i, tmp_path) for i in "ab") < 2: time.sleep(0.05)
    process.kill()
    process.wait()
    saved = lambda i: (tmp_path / i / f"checkpoint/step-{steps_done(i, tmp_path):06d}").exists()
    until = time.time() + 60
    while time.time() < until and not all(map(saved, "ab")): time.sleep(0.05)
    done = [steps_done(i, tmp_path) for i in "ab"]
    time.sleep(2)
    assert all(map(saved, "ab")) and done == [steps_done(i, tmp_path) for i in "ab"]


def test_findings_need_seeds(tmp_path):
    runs = [fake_run(tmp_path, m, [3] * 5) for m in ("base", "grpo", "uniform_kl", "relax")]
    with pytest.raises(ValueError, match="one seed"): findings(runs)


def test_methods_are_values():
    assert make_method("relax", {"alpha": 0.3}).alpha == 0.3 and METHODS["relax"].alpha == 0.1
    assert make_method("uniform_kl").needs_reference and not make_method("grpo").needs_reference


def test_uniform_kl_with_zero_weight_is_grpo_and_relax_with_zero_weights_too(tmp_path):
    runs = [train(TrainConfig(**SMALL | {"steps": 4}, method=m, method_options=o), m, root=tmp_path, progress=False).table("metrics")
            for m, o in (("grpo", None), ("uniform_kl", {"kl": 0.0}), ("relax", {"alpha": 0.0, "beta": 0.0}))]
    same = [r[["reward", "entropy", "loss"]] for r in runs]
    assert same[0].notna().all(axis=1).sum() >= 2  # a step whose groups are all alike updates nothing
    for other in same[1:]: assert same[0].equals(other)


def test_a_checkpoint_is_a_folder_that_loads_as_a_model_and_a_kept_policy_too(tmp_path):
    run = train(TrainConfig(**SMALL | {"steps": 1}, method="relax"), "run", root=tmp_path, progress=False)
    keep_policy(run)
    newest, = (run.folder / "checkpoint").glob("step-*")
    for folder in (newest, run.folder / "policy"):
        model, tokenizer = load_reasoner(str(folder))
        assert model.config.model_type == "qwen2" and len(tokenizer) == model.config.vocab_size
        assert Calibration.load(folder / "calibration").dictionary.state_dim == model.config.hidden_size
    assert not list((run.folder / "policy").glob("optimizer*"))


def test_a_refreshed_dictionary_is_learnt_again_only_when_due():
    trainer = Trainer(TrainConfig(**SMALL | {"probe_every": 0}, method="relax", method_options={"refresh": 2}))
    seen = []
    for _ in range(4):
        trainer.train_step()
        seen.append(trainer.calibration.dictionary.weight.clone())
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3])


def test_many_runs_refuse_another_configuration(tmp_path):
    c = TrainConfig(**SMALL)
    train_all({"a": c}, root=tmp_path, progress=False)
    with pytest.raises(ValueError, match="^config: run a was started with another one"):
        train_all({"b": c, "a": replace(c, lr=c.lr / 4)}, root=tmp_path, progress=False)
    assert not (tmp_path / "b").exists()


def test_judged_rollouts_carry_rewards_and_keys_that_agree():
    trainer = Trainer(TrainConfig(**SMALL | {"prompts": 8, "group_size": 8}))
    r, verdicts = trainer.sample(trainer.task.problems(8), trainer.generator(0))
    assert r.rewards.tolist() == [float(v.correct) for v in verdicts] and 0 < r.rewards.sum() < len(r)
    assert ((r.keys >= 0) == (r.rewards == 1)).all()
    for i, a in enumerate(verdicts):
        for j, b in enumerate(verdicts):
            if a.correct and b.correct: assert (r.keys[i] == r.keys[j]) == (a.answer == b.answer)
    kept = r[r.rewards == 1]
    assert (kept.rewards == 1).all() and len(kept.keys) == len(kept)


def test_rewards_are_shaped_before_advantages():
    class Short(GRPO):
        def shape_rewards(self, rewards, mask, limit): return rewards - mask.sum(1) / limit
    trainer = Trainer(TrainConfig(**SMALL))
    trainer.method, (r, _) = Short(), trainer.sample(trainer.task.problems(4), trainer.generator(0))
    b = trainer.batch(r)
    assert torch.allclose(b.advantages, group_advantages(r.rewards - r.mask.sum(1) / trainer.limit, 4)) and torch.equal(b.rewards, r.rewards)


def test_updates_change_the_policy_and_not_the_reference():
    trainer = Trainer(TrainConfig(**SMALL, method="relax"))
    before = [p.clone() for p in trainer.reference.parameters()]
    for _ in range(2): trainer.train_step()
    moved = sum((a - b).abs().sum().item() for a, b in zip(trainer.model.parameters(), trainer.reference.parameters()))
    assert moved > 0 and all(torch.equal(a, b) for a, b in zip(before, trainer.reference.parameters()))


def test_the_demo_asks_base_and_methods_the_same_number_of_problems(monkeypatch):
    asked = {}
    monkeypatch.setattr(demo, "evaluate_model", lambda *args, **options: asked.update(options))
    monkeypatch.setattr(demo, "train_all", lambda configs: asked.update(configs=configs) or [])
    monkeypatch.setattr(demo, "show", lambda runs, slug: asked.update(slug=slug))
    demo.main([])
    assert {c.eval_problems for c in asked["configs"].values()} == {asked["problems"]}
    assert asked["slug"] == "demo_live"  # figures/demo.* hold all recorded seeds, and git tracks them


def test_the_demo_runs_every_control_and_tells_its_arms_apart():
    configs = demo.demo_configs(seed=3)
    arms = [demo.arm_of(SimpleNamespace(id=i, config=asdict(c))) for i, c in configs.items()]
    assert arms == ["grpo", "uniform_kl", "half_lr", "relax"] and list(configs) == [f"demo-{a}-s3" for a in arms]
    grpo, half = configs["demo-grpo-s3"], configs["demo-half_lr-s3"]
    assert half == replace(grpo, lr=TrainConfig.lr / 2, steps=half.steps) and grpo.steps < half.steps < 1.1 * grpo.steps  # equal tokens, not steps
    with pytest.raises(ValueError, match="run: got x with method 'grpo' and learning rate 0.1"): demo.arm_of(SimpleNamespace(id="x", config={"method": "grpo", "lr": 0.1}))


def test_only_the_recorded_demo_draws_the_tracked_figure(monkeypatch, capsys):
    saved = []
    monkeypatch.setattr(demo, "save_figure", lambda fig, slug, *rest: saved.append(slug))
    demo.main(["--recorded"])
    assert saved == ["demo"] and "figures/demo.png" in capsys.readouterr().out
    tracked = subprocess.run(["git", "check-ignore", "figures/demo_live.png", "figures/demo_live.json", "figures/demo.png"], cwd=demo.data_dir().parent, capture_output=True, text=True)
    assert tracked.returncode == 128 or tracked.stdout.split() == ["figures/demo_live.png", "figures/demo_live.json"]  # 128: not a git checkout


def fake_run(root, method, correct, seed=0):
    run = Run.create(f"{method}-{seed}", {"method": method, "seed": seed, "task": "countdown", "eval_problems": len(correct)}, root)
    run.log("evals", *({"step": 0, "problem": i, "samples": 32, "correct": c} for i, c in enumerate(correct)))
    return run


@pytest.mark.parametrize("relax, said", [(20, "is above"), (0, "is below"), (4, "cannot be told from")])
def test_verdict_follows_the_numbers(tmp_path, relax, said):
    counts = {"base": 3, "grpo": 4, "uniform_kl": 4, "relax": relax}
    runs = [fake_run(tmp_path, m, [c] * 20) for m, c in counts.items()]
    assert verdict(runs).count(said) == 2 and "One seed" in verdict(runs)
    assert list(results(runs).index) == ["base", "GRPO", "GRPO + uniform KL", "ReLaX"]


def test_from_counts():
    assert from_counts([0, 2, 4], 4).sum(1).tolist() == [0, 2, 4]


def test_run_tables_grow_columns_and_truncate(tmp_path):
    run = Run.create("r", {"method": "grpo", "seed": 0}, tmp_path)
    run.log("metrics", {"step": 1, "reward": 0.1}); run.log("metrics", {"step": 2, "reward": 1 / 3, "loss": 2.0})
    again = Run("r", tmp_path)
    assert float(again.rows("metrics")[1]["reward"]) == 1 / 3 and again.rows("metrics")[0]["loss"] == ""
    again.truncate(1)
    assert len(Run("r", tmp_path).rows("metrics")) == 1
    with pytest.raises(ValueError, match="not a run"): Run("nothing", tmp_path)


def test_evaluation_is_kept_reproducible_and_never_mixed(tmp_path):
    ask = dict(model="countdown-small", task="countdown", problems=3, samples=4)
    a, b = (evaluate_model(**ask, run_id=i, root=tmp_path) for i in "ab")
    assert a.rows("evals") == b.rows("evals") and len(a.rows("evals")) == 3 and "pass@1" in report(a)
    assert evaluate_model(**ask, run_id="a", root=tmp_path).rows("evals") == a.rows("evals")
    with pytest.raises(ValueError, match="another evaluation"): evaluate_model(**ask | {"samples": 5}, run_id="a", root=tmp_path)
    with pytest.raises(ValueError, match="task"): evaluate_model(**ask | {"task": "chess"})


def test_a_model_that_is_not_there_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="name_or_path"): train(TrainConfig(**SMALL | {"model": "no/such-model"}), "run", root=tmp_path)
    assert not (tmp_path / "run").exists()


def test_command_line_says_what_is_wrong():
    with pytest.raises(SystemExit, match="steps: got 0"): main(["--steps", "0"])
    with pytest.raises(SystemExit, match="alhpa"): main(["--method", "relax", "--method_options", '{"alhpa": 1}'])
    config, extra = parse(["--method", "relax", "--method_options", '{"alpha": 0.3}', "--resume"])
    assert config.method_options == {"alpha": 0.3} and extra.resume and extra.device is None


def test_the_device_reaches_the_trainer(monkeypatch):
    asked = []
    def made(config, device=None):
        asked.append(device)
        raise ValueError("enough")
    monkeypatch.setattr("relax.train.Trainer", made)
    for arguments in ([], ["--device", "cuda:1"]):
        with pytest.raises(SystemExit, match="enough"): main(arguments)
    assert asked == [None, "cuda:1"]
