"One GPU, as far as it can be tested without: files that parse, arithmetic that counts right, 4-bit adapters that learn and sample; the rest needs CUDA and skips."
import os
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
from accelerate.commands.config.config_args import load_config_from_file
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from relax.trl import DataConfig, ReLaXConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").glob("qwen*.yaml"))


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
