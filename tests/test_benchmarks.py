"""Oracles: hand-made problems, real gold answers where the files are at hand, hostile answers, a model whose answers are known."""
import inspect
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("math_verify")
import relax.benchmarks as room
from relax.benchmarks import (BENCHMARKS, INSTRUCTION, PAPER, check_golds, default_temperature, evaluate_benchmark, last_boxed, load_benchmark, main, outcome, outcomes,
                              prompt_ids, prompt_text, report, respond, rows_that_fit, scores)

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("RELAX_BENCHMARKS", ROOT.parent / "shared" / "data"))
PROBLEMS = [("What is 3 + 4?", "7"), ("Half of one?", r"\frac{1}{2}"), ("What is 14 / 2?", "7"), ("The root of 2?", r"\sqrt{2}")]
real = pytest.mark.parametrize("name", ["math500", "minerva", "amc23", "aime24", "aime25", "gsm8k"])
FRAME = ("Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer (without quotes) where $Answer is the answer "
         "to the problem.\n\n{}\n\nRemember to put your answer on its own line after \"Answer:\".")


def write(path, rows):
    if path.suffix == ".parquet": pd.DataFrame(rows).to_parquet(path)
    else: path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)) + "\n")
    return path


def golds(name):
    if not REAL.is_dir(): pytest.skip("no real benchmarks at hand; set RELAX_BENCHMARKS")
    try: return [p.data["answer"] for p in load_benchmark(name, REAL)]
    except ValueError as error: pytest.skip(str(error))


# ---- loading

def test_the_paper_s_benchmarks():
    assert {n: (b.hub, b.samples) for n, b in BENCHMARKS.items() if n in PAPER} == {
        "math500": ("HuggingFaceH4/MATH-500", 1), "minerva": ("math-ai/minervamath", 1), "amc22": ("AI-MO/aimo-validation-amc", 32), "amc23": ("zwhe99/amc23", 32),
        "aime24": ("HuggingFaceH4/aime_2024", 32), "aime25": ("math-ai/aime25", 32)}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("make", [lambda q, a: {"problem": q, "answer": a}, lambda q, a: {"question": q, "answer": f"work\n#### {a}"},
                                  lambda q, a: {"problem": q, "solution": rf"first \boxed{{9}}, then $\boxed{{{a}}}$."},
                                  lambda q, a: {"prompt": [{"role": "user", "content": FRAME.format(q)}], "reward_model": {"ground_truth": a, "style": "rule"}}],
                         ids=["columns", "gsm8k", "solution", "verl"])
def test_formats(tmp_path, suffix, make):
    path = write(tmp_path / f"aime2024_x{suffix}", [make(q, a) for q, a in PROBLEMS])
    for source in (path, tmp_path):
        assert [(p.prompt, p.data["answer"]) for p in load_benchmark("aime24", source)] == PROBLEMS


def test_amc22_is_told_by_the_address(tmp_path):
    rows = [{"problem": f"p{year}", "answer": 1.0, "url": f"https://x.org/{year}_AMC_12A_Problems/Problem_1"} for year in (2022, 2023, 2022)]
    found = load_benchmark("amc22", write(tmp_path / "amc22.json", rows))
    assert [p.prompt for p in found] == ["p2022", "p2022"] and found[0].data["answer"] == "1"
    with pytest.raises(ValueError, match="amc22: the column 'url' is missing"): load_benchmark("amc22", write(tmp_path / "b.json", [{"problem": "p", "answer": 1}]))
    with pytest.raises(ValueError, match="amc22: no rows with '2022' in 'url'"): load_benchmark("amc22", write(tmp_path / "c.json", rows[1:2]))


def test_loading_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="name: got 'math'.*math500"): load_benchmark("math")
    with pytest.raises(ValueError, match="source: .*nowhere does not exist"): load_benchmark("math500", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no file of amc23; its name must begin with amc23 or amc2023"): load_benchmark("amc23", tmp_path)
    with pytest.raises(ValueError, match="no column for the answer: accepted are answer, .*found are problem, level"):
        load_benchmark("math500", write(tmp_path / "m.json", [{"problem": "p", "level": 1}]))
    with pytest.raises(ValueError, match="no column for the question.*found are q"): load_benchmark("math500", write(tmp_path / "m.json", [{"q": "p"}]))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match="bad.jsonl cannot be read"): load_benchmark("math500", tmp_path / "bad.jsonl")
    datasets = pytest.importorskip("datasets")
    def offline(*a, **kw): raise ConnectionError("no network")
    monkeypatch.delenv("RELAX_BENCHMARKS", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="aime25 needs the split 'test' of math-ai/aime25.*no network.*RELAX_BENCHMARKS"): load_benchmark("aime25")


def test_hub_and_environment(tmp_path, monkeypatch):
    datasets, asked = pytest.importorskip("datasets"), []
    def fake(hub, config, split): asked.append((hub, config, split)); return [{"question": "q", "answer": "#### 3"}]
    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setenv("RELAX_BENCHMARKS", str(tmp_path))
    assert load_benchmark("gsm8k")[0].data["answer"] == "3" and asked == [("openai/gsm8k", "main", "test")]
    write(tmp_path / "gsm8k_test.jsonl", [{"question": "q", "answer": "#### 1,234"}])
    assert load_benchmark("gsm8k")[0].data["answer"] == "1234" and len(asked) == 1


@pytest.mark.parametrize("text, boxed", [(r"\boxed{1} \boxed{\frac{a}{b}}", r"\frac{a}{b}"), (r"\boxed {2}", "2"), (r"\boxed{\{1\}}", r"\{1\}"), ("none", None), (r"\boxed{1} \boxed{2", "1")])
def test_last_boxed(text, boxed): assert last_boxed(text) == boxed


@real
def test_real_files(name):
    expected = {"math500": 500, "minerva": 272, "amc23": 40, "aime24": 30, "aime25": 30, "gsm8k": 1319}
    assert len(golds(name)) == expected[name]
    problems = load_benchmark(name, REAL)
    assert all(p.prompt and p.data["answer"] and "last line of your response" not in p.prompt and "####" not in p.data["answer"] for p in problems)
    if name.startswith("ai") or name in ("amc23", "gsm8k"): assert all(float(g) == int(float(g)) for g in golds(name))
    if name == "math500": assert {p.level for p in problems} == {1, 2, 3, 4, 5}


# ---- grading

def test_outcomes_by_hand():
    pairs = {("7", r"so \boxed{7.0}"): "correct", (r"\frac{1}{2}", r"\boxed{0.5}"): "correct", (r"\frac12", "The answer is 1/2"): "correct", (r"(x+1)^2", r"\boxed{x^2+2x+1}"): "correct",
             ("7", r"\boxed{8}"): "wrong", ("7", r"\boxed{7} no, \boxed{8}"): "wrong", ("7", "no idea"): "unparsable", ("7", ""): "unparsable", ("7", r"\boxed{}"): "unparsable",
             ("", r"\boxed{7}"): "gold", ("", ""): "gold", ("7", "ünïcödé \u2028 \ud83d\ude00 \\boxed{7}\n\n"): "correct"}
    assert outcomes(*zip(*pairs)) == list(pairs.values())


@real
def test_real_golds_score_100_percent_and_shuffled_only_coincidences(name):
    answers = sorted(set(golds(name)))
    assert set(outcomes(answers, [rf"Therefore the answer is $\boxed{{{a}}}$." for a in answers])) == {"correct"}
    answers = [str(a) for a in np.random.default_rng(0).permutation(answers)[:60]]
    others = answers[1:] + answers[:1]
    found = outcomes(answers, [rf"\boxed{{{o}}}" for o in others])
    assert "gold" not in found
    for a, o, verdict in zip(answers, others, found):
        assert verdict != "correct" or same(a, o), (a, o)


def same(a, b):
    "An oracle of its own: equal after spacing and dressing are taken off, or equal as numbers."
    strip = lambda s: "".join(s.replace(r"\dfrac", r"\frac").replace(r"\left", "").replace(r"\right", "").replace(r"\!", "").replace(",", "").split()).strip("$.").lower()
    try: return abs(float(strip(a)) - float(strip(b))) < 1e-6
    except ValueError: return strip(a) == strip(b)


HOSTILE = [r"\boxed{9^{9^{9}}}", "9**9**9", r"\boxed{99999!!}", r"\boxed{\binom{10^9}{5\cdot10^8}}", r"\boxed{" + "(" * 400 + "7" + ")" * 400 + "}",
           r"\boxed{\operatorname{zeros}(99999,99999)}", '__import__("os").system("touch hostile")', r'\boxed{__import__("os").system("touch hostile")}',
           r'\boxed{\text{__import__("os").system("touch hostile")}}', r'\boxed{f(\text{open("hostile","w")}) < 3}', "exec(\"open('hostile','w')\")", "\x00\\boxed{\x00}", "$" * 3000]


def test_hostile_answers_are_bounded_and_touch_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    room.workers.cache_clear()  # new workers, which live in this folder
    start = time.perf_counter()
    found = outcomes(["7"] * len(HOSTILE), HOSTILE, seconds=0.3)
    assert set(found) <= {"wrong", "unparsable"}, dict(zip(HOSTILE, found))
    assert found[0] == "unparsable" and time.perf_counter() - start < 10 * 0.3 * len(HOSTILE) + 60
    assert list(tmp_path.iterdir()) == []
    assert outcome("7", r"\boxed{7}") == "correct"  # and the judge goes on


def guarded(code):
    "Run code in a process that has called `forbid`."
    return subprocess.run([sys.executable, "-c", "import os, sys\n" + inspect.getsource(room.forbid) + "forbid()\n" + code], capture_output=True, text=True)


@pytest.mark.parametrize("code", ["eval(\"__import__('os').getcwd()\")", "eval('print(1)')", "eval('(lambda: 1)()')", "exec('x = open')", "os.system('true')", "open('hostile', 'w')", "os.fork()",
                                  "os.remove('nothing')", "import subprocess; subprocess.run(['true'])", "import socket; socket.socket()"])
def test_the_guard_refuses(code):
    result = guarded(code)
    assert result.returncode == 1 and "PermissionError" in result.stderr and "refused while an answer is judged" in result.stderr


def test_an_answer_that_always_kills_its_judge_is_unparsable(monkeypatch):
    monkeypatch.setattr(room, "judge", judge)
    worker = room.Worker()
    assert [worker.ask("7", said, 5.0) for said in ("fine", "die", "fine")] == ["correct", "unparsable", "correct"]
    worker.stop()


def judge(gold, said):
    "A judge that one answer kills."
    import os
    if said == "die": os._exit(1)
    return "correct"


def test_the_guard_lets_numbers_and_imports_through():
    assert guarded("from dataclasses import dataclass; import decimal, colorsys; print(eval('1 + 2'), open(os.__file__).read(1))").returncode == 0


def test_threads_and_dying_workers():
    found = {}
    def ask(i): found[i] = outcome(str(i), rf"\boxed{{{i}}}" if i % 2 else r"\boxed{-1}")
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for t in threads: t.start()
    pool = room.workers(os.getpid())
    for t in threads: t.join()
    assert found == {i: "correct" if i % 2 else "wrong" for i in range(12)}
    idle = [pool.get() for _ in range(pool.qsize())]
    for w in idle:
        if w.process: w.process.kill()
        pool.put(w)
    assert {outcome("7", r"\boxed{7}") for _ in range(2 * len(idle))} == {"correct"}  # a judge that was killed from outside is no verdict


def test_import_stays_light():
    code = "import relax, relax.benchmarks, sys; print([m for m in ('math_verify', 'sympy.parsing.latex', 'datasets', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_unreadable_gold_is_named():
    from relax.tasks import Problem
    asked = [Problem("q", 0, {"answer": a}) for a in ("7", "")]
    with pytest.warns(UserWarning, match=r"problems \[1\]"): assert check_golds(asked) == [1]


# ---- asking a model

TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>")


def byte_tokenizer(template=None):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator([q for q, _ in PROBLEMS] + [INSTRUCTION] * 20, trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<eos>", "<bos>", "<turn>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", padding_side="left", chat_template=template)


def small_model(tokenizer):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                                            max_position_embeddings=256, eos_token_id=1, pad_token_id=0, bos_token_id=None))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A model that says 7 about twice as often as one half, and a folder with the four problems."
    folder, tokenizer = tmp_path_factory.mktemp("bench"), byte_tokenizer()
    model = small_model(tokenizer)
    texts = [prompt_text(tokenizer, q) + r + "<eos>" for q, _ in PROBLEMS for r in [r"\boxed{7}"] * 2 + [r"\boxed{0.5}"]]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(50):
        model(**batch, labels=labels).loss.backward()
        optimizer.step(); optimizer.zero_grad()
    model.save_pretrained(folder / "tiny"); tokenizer.save_pretrained(folder / "tiny")
    write(folder / "math500.jsonl", [{"problem": q, "answer": a, "level": i + 1} for i, (q, a) in enumerate(PROBLEMS)])
    return folder


def options(folder, **more): return dict(model=str(folder / "tiny"), bench="math500", k=8, source=folder, max_new_tokens=16, batch_rows=8) | more


def test_placements():
    plain, chat = byte_tokenizer(), byte_tokenizer(TEMPLATE)
    assert prompt_text(chat, "Q") == f"<system>{INSTRUCTION}<user>Q<assistant>" and prompt_text(chat, "Q", "user") == f"<user>Q\n{INSTRUCTION}<assistant>"
    assert prompt_text(plain, "Q") == f"{INSTRUCTION}\n\nQ\n" and prompt_text(plain, "Q", "user") == f"Q\n{INSTRUCTION}\n"
    with pytest.raises(ValueError, match="placement: got 'top'"): prompt_text(plain, "Q", "top")
    refusing = byte_tokenizer("{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}")
    with pytest.raises(ValueError, match="placement: the chat template.*'system'.*no system turn.*the other one"): prompt_text(refusing, "Q")
    assert prompt_ids(chat, ["Q", "longer"])[0][0, -1] != 0 and 2 not in prompt_ids(chat, ["Q"])[0] and prompt_ids(plain, ["Q"])[0][0, 0] == 2  # one beginning, not two


def test_answers_are_cut_at_every_end_token(monkeypatch):
    tokenizer = byte_tokenizer()
    model = small_model(tokenizer)
    model.generation_config.eos_token_id = [1, 3]
    a = tokenizer.encode("A", add_special_tokens=False)[0]
    rows = torch.tensor([[a, 3, a, a], [a, a, a, 1], [a, a, a, a]])
    fake = type("R", (), dict(ids=rows, mask=torch.ones_like(rows, dtype=torch.bool)))
    monkeypatch.setattr(room, "sample", lambda *a: fake)
    assert respond(model, tokenizer, ["x"], 3, 8, 4, 1.0, None) == [[("A", 2, True), ("AAA", 4, True), ("AAAA", 4, False)]]


def test_many_samples_of_one_prompt_are_split():
    tokenizer = byte_tokenizer()
    found = respond(small_model(tokenizer), tokenizer, ["x", "yy"], 5, 2, 3, 1.0, torch.Generator().manual_seed(0))
    assert [len(group) for group in found] == [5, 5] and all(1 <= n <= 3 for group in found for _, n, _ in group)


def test_rows_that_fit():
    model = small_model(byte_tokenizer())
    per_row = 2 * 1 * 1 * 16 * 100 * 4 + 16 * model.config.vocab_size
    assert rows_that_fit(model, 100, 2 * per_row * 5) == 5 and rows_that_fit(model, 100, 0) == 1 and rows_that_fit(model, 100, 10**12) == 1024 and rows_that_fit(model, 100) >= 1


def test_a_model_whose_score_is_known(checkpoint, tmp_path):
    run = evaluate_benchmark(**options(checkpoint, k=32, batch_rows=32, root=tmp_path))
    t = run.table("evals")
    said = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert len(said) == 128 and list(t.problem) == [0, 1, 2, 3] and list(t.level) == [1, 2, 3, 4] and (t.samples == 32).all()
    for i in range(4):  # graded by hand: the box holds 7, one half, or something else
        boxes = [last_boxed(s["response"]) for s in said if s["problem"] == i]
        assert t.correct[i] == sum(b == {0: "7", 1: "0.5", 2: "7", 3: "1.414"}[i] for b in boxes)
    assert t.correct[0] > 8 and t.correct[1] > 2 and t.correct[3] == 0
    assert run.config["temperature"] == 1.0 and run.config["placement"] == "system" and run.config["task"] == "math500"
    assert scores(run)["mean@k"].startswith(f"{100 * t.correct.sum() / 128:.1f} [") and scores(run)["pass@32"] and "Mean over the 2 benchmarks" in report([run, run])


def test_interrupted_and_resumed_is_the_same(checkpoint, tmp_path, monkeypatch):
    whole = evaluate_benchmark(**options(checkpoint, root=tmp_path / "a"))
    calls, true_log = [], room.Run.log
    def dying(self, *a):  # dies between the answers and the counts of the third problem
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        true_log(self, *a)
    monkeypatch.setattr(room.Run, "log", dying)
    with pytest.raises(KeyboardInterrupt): evaluate_benchmark(**options(checkpoint, root=tmp_path / "b"))
    monkeypatch.undo()
    half = room.Run(whole.id, tmp_path / "b")
    assert len(half.rows("evals")) == 2 and len((half.folder / "samples.jsonl").read_text().splitlines()) == 24
    with (half.folder / "samples.jsonl").open("a") as file: file.write('{"step": 0, "prob')  # killed while writing
    again = evaluate_benchmark(**options(checkpoint, root=tmp_path / "b", batch_rows=None))  # goes on with the batches it began with
    for name in ("evals.csv", "samples.jsonl"): assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    monkeypatch.setattr(room, "respond", None)
    assert len(evaluate_benchmark(**options(checkpoint, root=tmp_path / "b")).rows("evals")) == 4  # finished: read back, not asked


def test_a_run_of_other_settings_is_refused(checkpoint, tmp_path):
    evaluate_benchmark(**options(checkpoint, k=1, problems=1, root=tmp_path, run_id="x"))
    for changed in (dict(seed=1), dict(problems=2), dict(placement="user"), dict(batch_rows=4)):
        with pytest.raises(ValueError, match=f"run_id: x was begun with other settings.*{'eval_problems' if 'problems' in changed else next(iter(changed))}"):
            evaluate_benchmark(**options(checkpoint, k=1, root=tmp_path, run_id="x") | dict(problems=1) | changed)


def test_wrong_options(checkpoint, tmp_path):
    for wrong, message in ((dict(temperature=0), "temperature: got 0 with k = 8"), (dict(temperature=-1), "temperature: got -1"), (dict(k=-1), "k: got -1"), (dict(bench="x"), "name: got 'x'"),
                           (dict(max_new_tokens=4000), "max_new_tokens: got 4000, but the longest prompt"), (dict(model="nothing/here"), "name_or_path"), (dict(placement="x"), "placement: got 'x'")):
        with pytest.raises(ValueError, match=message): evaluate_benchmark(**options(checkpoint, root=tmp_path, **wrong))
    assert not list(tmp_path.iterdir()) and default_temperature(1) == 0 and default_temperature(32) == 1


def test_command_line(checkpoint, tmp_path, capsys):
    command = ["--model", str(checkpoint / "tiny"), "--bench", "math500", "--k", "2", "--source", str(checkpoint), "--max_new_tokens", "16", "--root", str(tmp_path), "--problems", "2"]
    main(command)
    out = capsys.readouterr().out
    assert "mean@k" in out and str(tmp_path / "tiny-math500-system-t1-k2-s0" / "evals.csv") in out
    with pytest.raises(SystemExit, match="relax.benchmarks: bench: got .'math501'"): main(command[:2] + ["--bench", "math500,math501"])
    recipe = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "relax.benchmarks" in line)
    assert recipe.startswith("\t") and all(f"$({v})" in recipe for v in ("MODEL", "BENCH", "K", "ARGS"))
