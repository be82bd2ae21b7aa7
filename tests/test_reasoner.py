"Room 06: tokenizer, small models, pretraining, one door for all checkpoints."
import json
import random

import pytest
import torch

from relax.reasoner import ARCHITECTURES, RECIPES, SIZES, load_reasoner, new_reasoner, pretrain, sft_batch, sft_loss, thin, word_tokenizer
from relax.record import data_dir
from relax.tasks import TASKS

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    "No test reaches for the network."
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.name)
def test_one_token_a_word(task):
    words = word_tokenizer(task.words)
    p = task.problems(1)[0]
    text = p.prompt + " " + task.demonstration(p, random.Random(0))
    ids = words(text).input_ids
    assert len(ids) == len(text.split()) and words.decode(ids) == text and words.padding_side == "left"


def test_new_reasoner_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(5); before = torch.get_rng_state()
    (a, _), (b, _), (c, _) = (new_reasoner(TASKS["countdown"], "tiny", seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    weight = lambda m: m.model.embed_tokens.weight
    assert torch.equal(weight(a), weight(b)) and not torch.equal(weight(a), weight(c))


def test_unknown_size():
    with pytest.raises(ValueError, match="size.*huge.*small"): new_reasoner(TASKS["countdown"], "huge")
    with pytest.raises(ValueError, match="architecture.*mamba.*llama"): new_reasoner(TASKS["countdown"], "tiny", architecture="mamba")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_families_are_alike_in_size_and_learn(architecture):
    usual = sum(p.numel() for p in new_reasoner(TASKS["countdown"])[0].parameters())
    model, words = new_reasoner(TASKS["countdown"], architecture=architecture)
    assert model.config.model_type == architecture and abs(sum(p.numel() for p in model.parameters()) / usual - 1) < 0.1
    assert model.config.head_dim == 32 if architecture == "qwen3" else True
    tiny, _ = new_reasoner(TASKS["countdown"], "tiny", architecture=architecture)
    losses = pretrain(tiny, words, TASKS["countdown"], 25, batch_size=16, lr=5e-3, progress=False)
    assert losses[-1] < 0.8 * losses[0]


def test_sizes_differ():
    tiny, small, large = (sum(p.numel() for p in new_reasoner(TASKS["countdown"], s)[0].parameters()) for s in SIZES)
    assert 4 * tiny < small < 1_000_000 < 10_000_000 < large < 100_000_000


def test_loss_forgets_prompt_and_padding():
    task = TASKS["countdown"]
    model, words = new_reasoner(task, "tiny")
    ids, weight = sft_batch(task, words, task.problems(4), random.Random(0))
    n = len(words.encode(task.problems(4)[0].prompt))
    assert weight[0, :n].sum() == 0 and (weight[ids == words.pad_token_id] == 0).all() and weight.max() == 4.0
    longer = torch.nn.functional.pad(ids, (0, 5), value=7), torch.nn.functional.pad(weight, (0, 5))
    torch.testing.assert_close(sft_loss(model, ids, weight), sft_loss(model, *longer))


def test_pretraining_learns_and_repeats():
    def run():
        model, words = new_reasoner(TASKS["countdown"], "tiny")
        return pretrain(model, words, TASKS["countdown"], 25, batch_size=16, lr=5e-3, progress=False)
    first = run()
    assert first == run() and first[-1] < 0.75 * first[0]


def test_thin_keeps_the_mean():
    curve = thin([float(i) for i in range(120)])
    assert len(curve) == 60 and curve[0] == 0.5 and sum(curve) / 60 == 59.5


@pytest.mark.parametrize("name", RECIPES)
def test_shipped(name):
    file = data_dir() / "reasoner" / name / "training.json"
    if not file.exists(): pytest.skip("not trained yet")
    (model, words), record = load_reasoner(name), json.loads(file.read_text())
    assert model.config.model_type == RECIPES[name].get("architecture", "qwen2") and record["recipe"] == RECIPES[name] and record["loss"][-1] < 0.3 * record["loss"][0]
    task = TASKS[RECIPES[name]["task"]]
    p = task.problems(1, "heldout")[0]
    assert words(p.prompt).input_ids == word_tokenizer(task.words)(p.prompt).input_ids
    ids, weight = sft_batch(task, words, task.problems(8, "heldout"), random.Random(0))
    with torch.no_grad(): assert sft_loss(model, ids, weight) < 0.8  # an untrained one has ln(vocabulary), about 4


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_other_architectures_by_the_same_door(tmp_path, kind):
    import transformers
    words = word_tokenizer(TASKS["countdown"].words)
    config = getattr(transformers, kind + "Config")(vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                                    num_attention_heads=2, num_key_value_heads=2)
    made = getattr(transformers, kind + "ForCausalLM")(config)
    made.save_pretrained(tmp_path); words.save_pretrained(tmp_path)
    model, loaded = load_reasoner(str(tmp_path))
    ids = loaded("8 3 7 = 59 :", return_tensors="pt").input_ids
    assert ids.shape == (1, 6)
    with torch.no_grad(): torch.testing.assert_close(model(ids).logits, made.eval()(ids).logits)


@pytest.mark.parametrize("name", ["Qwen/no-such-model-here", "countdown-smal", "/no/such/folder"])
def test_what_cannot_be_reached_says_what_to_do(name):
    with pytest.raises(ValueError, match="name_or_path.*countdown-small"): load_reasoner(name)
