"One GPU, as far as it can be tested without: files that parse, arithmetic that counts right, 4-bit adapters that learn and sample; the rest needs CUDA and skips."
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

import relax.trl
from relax.gpu import (CARDS, FORWARD, MFU, Card, QWEN, Live, Recipe, Setup, Shape, Tower, activations, advice, bench_gpu, changes, counted, forward_flops, kv_cache, logit_peaks, main, make_batch, memory, peak,
                       plan, random_model, rollouts_differ, setup_of, shape_of, static, step_seconds, update_seconds)
from relax.grpo import encode, sample, score
from relax.objective import ReLaX, calibrate
from relax.reasoner import word_tokenizer
from relax.record import data_dir
from relax.tasks import TASKS
from relax.trl import DataConfig, ReLaXConfig
from relax.vision import ask_noise, inner, random_seer

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").glob("qwen*.yaml") if "-vl-" not in p.name)  # those are in test_vision.py


@pytest.fixture(autouse=True)
def one_thread(): torch.set_num_threads(1)


def parsed(path, *more): return TrlParser((DataConfig, ReLaXConfig, ModelConfig)).parse_args_and_config(["--config", str(path), *more])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_says_what_it_does(path):
    "On a machine without GPU: TRL's parser takes the file, ReLaXConfig takes the values, and the sum in its comment is true."
    data, args, model = parsed(path)
    text = path.read_text()
    rows, accumulated, world, total = map(int, re.search(r"# Batch: (\d+) x (\d+) x (\d+) = (\d+) responses an update", text).groups())
    assert (rows, accumulated) == (args.per_device_train_batch_size, args.gradient_accumulation_steps)
    assert rows * accumulated * world == total and f"{total // args.num_generations} prompts" in text
    sampled = rows * args.steps_per_generation * world
    assert re.search(rf"\b{sampled}( responses)?\b", text) and sampled % args.num_generations == 0
    assert args.gradient_accumulation_steps % args.steps_per_generation == 0 or args.steps_per_generation % args.gradient_accumulation_steps == 0
    assert args.n_observables * 2 <= args.max_completion_length and args.n_observables == 50
    assert (args.alpha, args.beta, args.num_generations, args.max_completion_length, args.temperature, args.max_grad_norm) == (0.1, 0.01, 16, 3072, 1.0, 1.0)
    assert args.bf16 and args.gradient_checkpointing and data.dataset_name == "SteveZ25/Div-MATH-22k" and "\\boxed{}" in data.instruction


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_names_its_model_and_adapters(path):
    data, args, model = parsed(path)
    size, kind = re.match(r"qwen2.5-([\d.]+b)-(lora|qlora|full)", path.stem).groups()
    assert model.model_name_or_path == f"Qwen/Qwen2.5-{size.upper()}" and args.output_dir == f"out/{path.stem}"
    lora, four_bit = get_peft_config(model), get_quantization_config(model)
    assert (lora is not None) == (kind != "full") and (four_bit is not None) == (kind == "qlora")
    if lora: assert (lora.r, lora.target_modules, lora.lora_dropout, model.dtype) == (32, "all-linear", 0.0, "bfloat16")
    else: assert model.dtype == "float32"  # a step of 1e-6 is lost in bfloat16
    if four_bit:
        assert four_bit.bnb_4bit_quant_type == "nf4" and four_bit.bnb_4bit_use_double_quant and four_bit.bnb_4bit_compute_dtype == torch.bfloat16
        assert not args.use_vllm  # TRL would merge 4-bit adapters


def test_every_departure_has_a_reason():
    for path in CONFIGS:
        marks = re.findall(r"\[departs: ([^\]]+)\]", path.read_text().replace("\n# ", " "))
        assert len(marks) >= 2 and all(len(m) > 30 for m in marks), path.name


@pytest.mark.parametrize("name, kind, processes", [("single", "NO", 1), ("fsdp", "FSDP", 8), ("zero3", "DEEPSPEED", 8)])
def test_accelerate_reads_its_files(name, kind, processes):
    c = load_config_from_file(str(ROOT / f"configs/accelerate/{name}.yaml"))
    assert str(c.distributed_type).endswith(kind) and c.num_processes == processes and c.mixed_precision == "bf16"


# ---------------------------------------------------------------- arithmetic against the real thing, at tiny shapes

SMALL = Shape(3, 128, 4, 2, 256, 500, True, 32)


def storage(parameters): return sum(p.untyped_storage().nbytes() for p in {id(p): p for p in parameters}.values())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["Qwen2", "Llama"])
def test_parameters_and_adapters_are_those_of_the_model(arch, tied):
    s = replace(SMALL, tied=tied, bias=arch == "Qwen2")
    config = getattr(transformers, f"{arch}Config")(vocab_size=s.vocab, hidden_size=s.d, intermediate_size=s.ff, num_hidden_layers=s.layers, num_attention_heads=s.heads,
                                                    num_key_value_heads=s.kv_heads, head_dim=s.head_dim, tie_word_embeddings=tied)
    with torch.device("meta"): model = getattr(transformers, f"{arch}ForCausalLM")(config)
    assert s.parameters == sum(p.numel() for p in model.parameters())
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert s.adapters(8) == sum(p.numel() for n, p in model.named_parameters() if "lora" in n)


def test_shapes_are_those_of_the_model_cards():
    "Billions of parameters as printed on the cards of Qwen2.5."
    assert [round(QWEN[k].parameters / 1e9, 2) for k in ("0.5B", "1.5B", "3B", "7B")] == [0.49, 1.54, 3.09, 7.62]
    assert QWEN["0.5B"].parameters == 494032768 and QWEN["7B"].parameters == 7615616512


def test_static_bytes_are_those_of_the_real_model():
    "LoRA: weights, gradients and Adam's moments of a model that has made a step; NF4: packed weights and their scales."
    s = Shape(2, 256, 4, 2, 512, 300, True, 64)
    expected = static(s, Setup(rank=8))
    model = random_model(s, rank=8)
    learning = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(learning, lr=1e-3)
    model(torch.zeros(1, 4, dtype=torch.long)).logits.float().mean().backward()
    adam.step()
    assert storage(p for p in model.parameters() if not p.requires_grad) == expected["weights"]
    assert storage(learning) == expected["adapters"] and storage([p.grad for p in learning]) == expected["gradients"]
    assert sum(x.nbytes for state in adam.state.values() for x in state.values() if x.ndim) == expected["optimizer"]
    four_bit = random_model(s, rank=0, weights="nf4")
    scales = [m.weight.quant_state for m in four_bit.modules() if type(m).__name__ == "Linear4bit"]
    there = storage(four_bit.parameters()) + sum(q.absmax.nbytes + q.state2.absmax.nbytes for q in scales)
    assert len(scales) == 14 and there == pytest.approx(static(s, Setup("nf4", rank=0))["weights"], rel=2e-3)


def test_kv_cache_is_that_of_a_real_one():
    model = random_model(SMALL, rank=0).eval()
    with torch.no_grad(): cache = model(torch.zeros(2, 10, dtype=torch.long), use_cache=True).past_key_values
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == kv_cache(SMALL, 20)


def test_live_counts_what_lives():
    with Live() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)  # no bytes of its own
        c = (b + 1).sum()
        del a, b
    assert (live.now, live.peak) == (4, 8004) and c == 1000


def test_fake_counts_are_real_counts_and_chunks_stay_away():
    "Fake tensors and real ones give one count; without chunks the logits are in the peak, with chunks they are not."
    s = Shape(2, 64, 4, 2, 128, 4000, True, 16)
    chunked, whole = counted(s, 4, 2, 128, budget=2**15), counted(s, 4, 2, 128, budget=2**30)
    logits = 4 * 2 * 128 * s.vocab
    assert chunked["size"] == whole["size"] and chunked["kept"] == whole["kept"]
    assert whole["peak"] > 3 * logits and chunked["peak"] < whole["peak"] / 3
    assert 2 * 2 * 128 * s.d * s.layers <= chunked["kept"] < 4 * 2 * 2 * 128 * s.d * s.layers


def test_formula_agrees_with_the_count():
    "At a shape that is not one of those from which its multiples were read."
    s, rows, tokens = Shape(3, 512, 8, 2, 2048, 1000, True, 64), 4, 512
    a = activations(s, rows, tokens)
    assert a["block inputs"] + a["one block"] + 4 * s.adapters(16) == pytest.approx(counted(s, 16, rows, tokens)["peak"], rel=0.15)


def test_terms_of_a_tower_are_those_of_a_real_one():
    "At a tiny shape: what its forward pass keeps under checkpointing grows by the input of a block a layer; a forward pass without gradient takes the multiples that `reading` has."
    def found(layers):
        s = Shape(1, 64, 4, 2, 128, 300, True, 16, tower=Tower(layers, 128, 4, 352, 14, 2, 56, (layers - 1,)))
        model = random_seer(s, 4)
        pixels, grid = ask_noise(model, 1, 4, (336, 336))["images"].prompts[0]
        assert pixels.shape[1] == s.tower.pixels
        pixels = pixels.bfloat16()
        def look(then):
            with Live() as live:
                for x in (pixels, *model.parameters()): live.add(x.untyped_storage())
                size = live.now
                out = inner(model).get_image_features(pixels, grid, return_dict=True).pooler_output
                return then(live) - size, len(pixels), s.tower, out
        kept = look(lambda live: live.now)[0]
        model.gradient_checkpointing_disable()
        with torch.no_grad(): peak, n, t, _ = look(lambda live: live.peak)
        return kept, peak, n, t
    (a, _, n, t), (b, peak, *_) = found(2), found(4)
    assert b - a == 2 * 2 * n * t.d  # as in memory: 2 bytes, d numbers a patch and block
    assert peak == pytest.approx(2 * n * (FORWARD[0] * t.ff + FORWARD[1] * t.d), rel=0.15)


def test_a_model_that_sees_reads_in_a_phase_of_its_own():
    s, c = replace(QWEN["3B"], tower=Tower()), Setup("nf4", rows=8, sampled=32, image=1280)
    blind, seen = memory(QWEN["3B"], replace(c, image=0), CARDS[24]), memory(s, c, CARDS[24])
    assert set(blind) == {"always", "sampling", "update"} and set(seen) == {*blind, "reading"}
    assert seen["update"]["tower's block inputs"] == 2 * 8 * 5120 * 1280 * 32 and seen["reading"]["KV cache"] == kv_cache(s, 32 * (256 + 1280))
    assert seen["always"]["pixels"] == 4 * 32 * 5120 * 1176
    assert seen["always"]["weights"] - blind["always"]["weights"] == pytest.approx(s.in_tower * 0.516 + 2 * s.tower.elsewhere(s.d), rel=1e-3)
    assert peak(memory(s, replace(c, sampled=128), CARDS[24])) > 2 * peak(seen)  # the reason for the few steps_per_generation of that file
    r = Recipe()
    assert step_seconds(s, c, CARDS[24], r)["update"] > step_seconds(QWEN["3B"], c, CARDS[24], r)["update"] and step_seconds(s, c, CARDS[24], r)["reading"] > 0


def test_shapes_of_models_that_see(tmp_path):
    assert shape_of("Qwen/Qwen2.5-VL-3B-Instruct") == replace(QWEN["3B"], tower=Tower())
    tiny = Shape(2, 64, 4, 2, 128, 300, True, 16, tower=Tower(2, 32, 2, 48, 8, 2, 32, (1,)))
    random_seer(tiny, 0).config.save_pretrained(tmp_path / "qwen")
    assert shape_of(str(tmp_path / "qwen")) == tiny
    transformers.Qwen2VLConfig().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="qwen2_vl, which sees; accepted are"): shape_of(str(tmp_path / "other"))


def test_recorded_counts_agree_with_the_formula():
    for r in json.loads((data_dir() / "bench_count.json").read_text())["counts"]:
        a, s = activations(QWEN[r["model"]], r["rows"], r["tokens"]), QWEN[r["model"]]
        assert a["block inputs"] + max(a["one block"], a["logits"]) + 4 * s.adapters(r["rank"]) == pytest.approx(r["peak"], rel=0.15)
        assert r["model"] != "7B" or static(s, Setup("nf4"))["weights"] + 3 * 4 * s.adapters(32) + r["peak"] < 22e9  # QLoRA, 16 x 1024, expected under 24 GB


def test_chunked_log_probabilities_take_less_than_half():
    "Measured now, in fresh processes, at a vocabulary of 150,000; and as recorded."
    if sys.platform != "linux": pytest.skip("resident memory is read from Linux's /proc")
    now = logit_peaks(tokens=1024)
    recorded = json.loads((data_dir() / "bench_memory.json").read_text())["runs"]
    for r in recorded: assert r["vocab"] > 150_000 and r["chunked"] < r["plain"] / 2
    assert now["chunked"] < now["plain"] / 2
    assert now["plain"] > 2 * now["logits"]


# ---------------------------------------------------------------- plan, advice, command line

def test_every_config_is_expected_to_fit():
    for path in CONFIGS:
        _, args, model = parsed(path)
        world = 8 if "8gpu" in path.stem else 1
        s, c, card = shape_of(model.model_name_or_path), setup_of(args, model, world), CARDS[80 if world == 8 else 24]
        assert c.weights == {"lora": "bf16", "qlora": "nf4", "8gpu": "fp32"}[path.stem.split("-")[-1]] and c.sharded == (world == 8)
        assert advice(s, c, card) == [] and peak(memory(s, c, card)) < card.memory


@pytest.mark.parametrize("name, gb", [("3b-lora", 80), ("3b-qlora", 24), ("7b-qlora", 48)])
def test_every_config_of_a_model_that_sees_is_expected_to_fit(name, gb, capsys):
    "On the card that its first line names."
    path = ROOT / f"configs/qwen2.5-vl-{name}.yaml"
    assert f"one GPU of {gb} GB" in path.read_text().splitlines()[0]
    main(["plan", "--config", str(path), "--gb", str(gb)])
    *_, counted_with, last = capsys.readouterr().out.splitlines()  # no advice behind it
    assert "1280 tokens, 5120 patches" in counted_with and float(re.search(r"peak ([\d.]+) of", last).group(1)) < gb


def test_advice_names_changes_that_help():
    s, card = QWEN["7B"], CARDS[24]
    c = Setup("bf16", sampled=128)
    said = advice(s, c, card)
    assert any(line.startswith("load_in_4bit") for line in said) and any("split_groups: true" in line for line in said)
    needs = [peak(memory(s, c, card)) / 1e9, *(float(re.search(r": ([\d.]+) GB", line).group(1)) for line in said)]
    assert all(b < a for a, b in zip(needs, needs[1:])) and needs[-1] < 24 < needs[-2]
    assert advice(s, Setup("nf4", rows=1, sampled=1, longest=300), Card("small", 4e9, 1e12, 1e12))[-1].startswith("nothing more")
    for other in changes(c).values(): assert other != c


def test_more_of_anything_needs_more_memory():
    base, s = Setup(), QWEN["1.5B"]
    total = lambda c: sum(sum(t.values()) for t in memory(s, c, CARDS[80]).values())
    for more in ({"rows": 32}, {"sampled": 256}, {"longest": 4096}, {"rank": 64}, {"rank": 0, "weights": "fp32"}): assert total(replace(base, **more)) > total(base), more
    for less in ({"weights": "nf4"}, {"rank": 0, "weights": "fp32", "reference": False, "world": 64, "sharded": True, "sampled": 1}): assert total(replace(base, **less)) < total(base), less


def test_plan_covers_sizes_cards_and_worlds():
    rows = plan()
    assert len(rows) == 4 * 2 * 3 and all(r["recipe, h"] > 0 for r in rows if r["trained"] != "nothing fits")
    for a, b in zip(rows, rows[1:]):
        if (a["model"], a["card"], a["trained"]) == (b["model"], b["card"], b["trained"]): assert b["recipe, h"] < a["recipe, h"]
    r, s, c = Recipe(), QWEN["7B"], Setup("nf4", rows=4, sampled=64)
    assert step_seconds(s, c, CARDS[24], replace(r, prompts=2 * r.prompts))["update"] == pytest.approx(2 * step_seconds(s, c, CARDS[24], r)["update"])


def test_update_time_is_operations_over_speed():
    "By hand: a pass of 7B is 2 x 7.07e9 operations a token (input embeddings are looked up, not multiplied) and attention."
    s, r = QWEN["7B"], Recipe(prompts=1, group=1, prompt=0, response=1000, padding=1.0)
    pass_ = 2 * (7615616512 - 152064 * 3584 - 28 * 4608 - 57 * 3584) + 4 * 28 * 3584 * 500
    assert forward_flops(s, 500) == pass_
    assert update_seconds(s, Setup(reference=False), CARDS[80], r) == pytest.approx(3 * 1000 * pass_ / (312e12 * MFU))


def test_command_line(capsys):
    main(["plan", "--config", str(ROOT / "configs/qwen2.5-1.5b-qlora.yaml")])
    assert "expected peak" in capsys.readouterr().out
    with pytest.raises(SystemExit): main(["plan"])
    with pytest.raises(SystemExit): main(["bench", "70B"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="CUDA"): main(["bench"])


# ---------------------------------------------------------------- 4-bit adapters on tiny checkpoints

TASK = TASKS["countdown"]
TOKENIZER = word_tokenizer(TASK.words)
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    def make(arch):
        folder = root / arch
        if folder.exists(): return str(folder)
        config = getattr(transformers, f"{arch}Config")(vocab_size=len(TOKENIZER), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                                        head_dim=16, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.2)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            getattr(transformers, f"{arch}ForCausalLM")(config).save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
        return str(folder)
    return make


def four_bit(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0))


def shake(model, std=0.2):
    for i, (n, p) in enumerate(model.named_parameters()):
        if "lora_B" in n: torch.nn.init.normal_(p, std=std, generator=torch.Generator().manual_seed(i))


def some_rollouts(model, n=2):
    ids, mask = encode(TOKENIZER, [p.prompt for p in TASK.problems(n)])
    r = sample(model, ids, mask, 16, 1, 0, 4, generator=torch.Generator().manual_seed(0))
    r.rewards = (torch.arange(len(r)) % 2).float()
    return r


@pytest.mark.parametrize("arch", ["Qwen2", "Llama", "Qwen3"])
def test_four_bit_policy_samples_learns_and_comes_back(checkpoint, tmp_path, arch):
    "Rollouts follow the adapters; ReLaX reaches each of them, with gradient checkpointing too; saved and reloaded it is the same policy and goes on the same way."
    model = four_bit(checkpoint(arch)).train()  # in eval mode bitsandbytes repacks weights on some CPUs, and they lose their gradient
    ids, mask = encode(TOKENIZER, [p.prompt for p in TASK.problems(8)])
    assert rollouts_differ(model, ids, mask, 16, 1, 0) == 0
    shake(model)
    assert rollouts_differ(model, ids, mask, 16, 1, 0) > 0.5
    r = some_rollouts(model)
    method = ReLaX(alpha=1.0, beta=0.1, n_observables=4)
    with torch.no_grad(): calibration = calibrate(score(model, r)[2], r.mask, 4, generator=torch.Generator().manual_seed(0))
    b = make_batch(model, model, r, method, calibration, 4)
    with torch.no_grad(), model.disable_adapter(): base = score(model, r, n_buckets=1)[0]
    torch.testing.assert_close(b.ref_logp, base)  # the reference is the model without its adapters
    assert (b.logp - b.ref_logp)[r.mask].abs().mean() > 0.01
    def loss(model): return method.loss(make_batch(model, model, r, method, calibration, 4))[0]
    def step(model):
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loss(model).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        adam.step(), adam.zero_grad()
        return gradients
    before = loss(model).item()
    model.save_pretrained(tmp_path)
    gradients = step(model)
    assert len(gradients) == 2 * 7 * 2 and all(g.abs().sum() > 0 for g in gradients.values())
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint(arch), quantization_config=NF4), tmp_path, is_trainable=True)
    again.enable_input_require_grads()
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again.train()
    assert loss(again).item() == pytest.approx(before, abs=1e-6)
    for n, g in step(again).items(): torch.testing.assert_close(g, gradients[n], atol=1e-6, rtol=1e-4)
    assert loss(again).item() == pytest.approx(loss(model).item(), abs=1e-5)


def test_merging_a_four_bit_adapter_makes_another_policy(checkpoint):
    "Merged into NF4 weights, a small adapter is lost: the log-probabilities err by about as much as the adapter had moved them. In float32 merging is exact."
    def moves(model):
        with torch.no_grad():
            adapted = score(model, r)[0]
            with model.disable_adapter(): base = score(model, r)[0]
            model.merge_adapter()
            merged = score(model, r)[0]
        return ((adapted - base)[r.mask].abs().mean() / (merged - adapted)[r.mask].abs().mean().clamp(min=1e-12)).item()
    model = four_bit(checkpoint("Qwen2")).train()
    r = some_rollouts(model)
    shake(model, 1e-3)
    with pytest.warns(UserWarning, match="rounding"): assert moves(model) < 3
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint("Qwen2")), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    shake(plain, 1e-3)
    assert moves(plain.eval()) > 100


def test_the_qlora_file_trains_a_tiny_model(checkpoint, tmp_path):
    "configs/qwen2.5-1.5b-qlora.yaml through the command line on a CPU; what is overridden is size, data and bfloat16."
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(json.dumps({"prompt": p.prompt, "answer": "1"}) for p in TASK.problems(8)))
    relax.trl.main(["--config", str(ROOT / "configs/qwen2.5-1.5b-qlora.yaml"), "--model_name_or_path", checkpoint("Qwen2"), "--dataset_name", str(problems), "--instruction", "",
                    "--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--max_completion_length", "20", "--n_observables", "4", "--num_generations", "4", "--per_device_train_batch_size", "4",
                    "--gradient_accumulation_steps", "1", "--steps_per_generation", "1", "--dtype", "float32", "--bf16", "false", "--save_steps", "2", "--disable_tqdm", "true", "--max_refills", "0"])
    state = json.loads((tmp_path / "run/checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in state] == [1, 2] and all("relax/exploration_loss" in row and "kl" in row for row in state)
    assert (tmp_path / "run/adapter_model.safetensors").exists() and not (tmp_path / "run/model.safetensors").exists()


# ---------------------------------------------------------------- the bench, tiny and true

@pytest.mark.parametrize("weights, rank", [("bf16", 4), ("nf4", 4), ("fp32", 0)])
def test_bench_runs_on_a_tiny_shape(weights, rank):
    small = Shape(2, 64, 4, 2, 128, 300, True, 16)
    record = bench_gpu(small, weights, rank, prompts=1, group=4, prompt=6, response=30, rows=4, rounds=1, device="cpu")
    assert record["update_ratio"]["grpo"] == record["step_ratio"]["grpo"] == 1 and all(t > 0 for t in record["update_seconds"].values())
    assert record["parameters"] == small.parameters and record["responses"] == 4 and record["env"]["hardware"] and record["fit_seconds"] > 0
    json.dumps(record)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: pytest tests/test_gpu.py -k cuda")
def test_cuda_peak_is_the_counted_one():
    "One update of a real model on the GPU against the arithmetic."
    s = replace(QWEN["0.5B"], layers=6)
    record = bench_gpu(s, "bf16", 32, prompts=1, group=8, prompt=64, response=448, rows=8, rounds=1)
    a, fixed = activations(s, 8, 512), static(s, Setup())
    assert record["peak_bytes"]["grpo"] == pytest.approx(sum(fixed.values()) + a["block inputs"] + max(a["one block"], a["logits"]), rel=0.3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU of 24 GB: pytest tests/test_gpu.py -k cuda")
def test_cuda_qlora_7b_fits_24_gb():
    record = bench_gpu(QWEN["7B"], "nf4", 32, prompts=1, group=16, prompt=64, response=960, rows=16, rounds=1)
    assert max(record["peak_bytes"].values()) < 24e9
