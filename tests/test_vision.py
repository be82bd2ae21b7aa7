"Vision: pictures that say what the scene says, prompts that do not, a model that reads both; wrong pictures refused, all of them, before anything happens."
import importlib.util
import io
import json
import random
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from relax import vision
from relax.dictionary import FITS
from relax.evaluate import evaluate
from relax.gpu import CONTESTANTS, QWEN, Shape, Tower, answers, make_batch
from relax.grpo import Rollouts, ask, informative, reading, sample, score, stack
from relax.hidden import backbone, capture_hidden
from relax.objective import ReLaX, calibrate
from relax.reasoner import load_reasoner, pretrain
from relax.record import data_dir
from relax.tasks import TASKS, Problem
from relax.train import METHODS, TrainConfig, Trainer
from relax.vision import (COLOURS, IMAGE, PICTURES, QWEN_VL, SUITES, VERSIONS, VISUAL, Patches, PictureError, Variants, ask_noise, bench_vision, blind_guess, check_pictures, grading_command, load_visual, new_seer, open_picture,
                          parts_of, prepare_virl, random_seer, read_scores, seen_batch, seen_loss, shown, trl_rows, visual_prompt, with_placeholders)

ROOT = Path(__file__).resolve().parents[1]
LEVELS = {name: i + 1 for i, name in enumerate(SUITES)}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setitem(FITS, "normalized", FITS["normalized"] | {"steps": 20})


@pytest.fixture(scope="module")
def seer():
    "A small model that sees, with weights large enough that words differ in probability, and its processor."
    model, processor = new_seer(PICTURES.words, width=32, layers=2, heads=2, vision_width=32, vision_layers=1)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3 if p.ndim > 1 else 1)
    return model.eval(), processor


@pytest.fixture(scope="module")
def folder(seer, tmp_path_factory):
    "The same as a checkpoint."
    path = tmp_path_factory.mktemp("seer")
    for part in seer: part.save_pretrained(path)
    return str(path)


def rollouts(seer, problems, group_size=2, T=12, seed=0):
    model, processor = seer
    return sample(model, **ask(processor, problems), max_new_tokens=T, eos=processor.eos_token_id, pad=processor.pad_token_id, group_size=group_size,
                  generator=torch.Generator().manual_seed(seed))


# suites

@pytest.mark.parametrize("name", SUITES)
def test_a_careful_viewer_is_right_and_the_picture_is_the_scene(name):
    rng, suite = random.Random(0), SUITES[name]
    for p in PICTURES.problems(20, level=LEVELS[name]):
        scene, tokens = p.data["scene"], PICTURES.demonstration(p, rng).split()
        assert set(tokens) | set(p.prompt.split()) <= set(PICTURES.words) and len(tokens) < PICTURES.max_new_tokens
        if name != "tiles": assert suite.verify(scene, suite.demonstration(scene, rng, 0.0)).correct
        image = p.data["images"][0]
        assert image.size == (64, 64) and image.tobytes() == suite.paint(scene).tobytes()
    a, b = (PICTURES.problems(2, level=LEVELS[name], seed=s)[0].data["images"][0].tobytes() for s in (0, 1))
    assert a != b


@pytest.mark.parametrize("name", SUITES)
def test_verdicts(name):
    p = PICTURES.problems(1, level=LEVELS[name], seed=3)[0]
    assert PICTURES.verify(p, "").outcome == PICTURES.verify(p, "see").outcome == PICTURES.verify(p, "= 5").outcome == "unparsable"
    assert PICTURES.verify(p, "see 1 ; = 99 !").outcome == "wrong"


def test_pixels_say_what_the_text_does_not():
    "Bars, cells and dots are counted from the pixels, by nothing but their colour."
    for p in PICTURES.problems(10, level=1):
        pixels = np.array(p.data["images"][0])
        for colour, height in p.data["scene"]["bars"]: assert (pixels == COLOURS[colour]).all(-1).sum() == 9 * 6 * height
    for p in PICTURES.problems(10, level=3):
        s, pixels = p.data["scene"], np.array(p.data["images"][0])
        filled = (pixels[4::8, 4::8] == COLOURS[s["colour"]]).all(-1).sum()
        assert filled == s["size"][0] * s["size"][1] - s["cut"][0] * s["cut"][1]
        if s["asked"] == "area": assert SUITES["geometry"].answer(s) == str(filled)
    for p in PICTURES.problems(10, level=4):
        d, pixels = SUITES["variants"].details(p.data["scene"]), np.array(p.data["images"][0])
        for colour, n in zip(d["colours"], d["counts"]): assert (pixels[8::16, 4::8] == COLOURS[colour]).all(-1).sum() == n


def test_versions_move_the_question_from_text_to_picture():
    suite = SUITES["diagrams"]
    prompts = [suite.prompt({"width": 4, "height": 3, "asked": "area", "version": v}) for v in VERSIONS]
    assert [sum(w.isdigit() for w in p.split()) for p in prompts] == [2, 2, 1, 0, 0] and "area" not in prompts[-1]
    assert len({suite.key({"width": 4, "height": 3, "asked": "area", "version": v}) for v in VERSIONS}) == 1


def test_controls_are_held_out_and_in_order():
    found = PICTURES.controls(PICTURES.problems(6, "heldout"), questions=3)
    assert all(p.data["images"] == [] for p in found["blind"]) and len(found["blind"]) == 6
    assert [p.data["scene"]["version"] for p in found["versions"]] == list(VERSIONS) * 3
    assert [p.data["scene"]["variant"] for p in found["variants"]] == list(range(Variants.n)) * 3
    assert len({p.prompt for p in found["variants"][:10]}) == 1 and len({p.data["images"][0].tobytes() for p in found["variants"][:10]}) == 10
    trained = {PICTURES.key(p) for p in PICTURES.problems(300)}
    assert not trained & {PICTURES.key(p) for ps in found.values() for p in ps}


def test_the_best_blind_reader_misses_every_question_of_the_sixth_suite():
    for p in PICTURES.problems(30, level=6):
        s = p.data["scene"]
        assert blind_guess(s["suite"], p.prompt) not in (None, SUITES[s["suite"]].answer(s["scene"]))
    assert blind_guess("plots", "never asked") is None


# from pictures to a forward pass

def test_patches_are_the_picture(seer):
    "The first patch of the processor is the top left corner, channel by channel, twice (for the two moments of a video), normalised."
    p, processor = PICTURES.problems(1, level=1)[0], seer[1]
    images = ask(processor, [p])["images"]
    ip, (patches, grid) = processor.image_processor, images.prompts[0]
    corner = (np.array(p.data["images"][0], dtype=np.float32)[:8, :8] / 255 - np.array(ip.image_mean)) / np.array(ip.image_std)
    assert grid.tolist() == [[1, 8, 8]] and patches.shape == (64, 2 * 3 * 64)
    assert np.allclose(patches[0].view(3, 2, 8, 8)[:, 0], corner.transpose(2, 0, 1), atol=1e-5)


def test_our_forward_is_that_of_transformers(seer):
    model, processor = seer
    problems = PICTURES.problems(3)
    asked = ask(processor, problems)
    ours = model(**reading(model, asked["prompt_ids"], asked["prompt_mask"], asked["images"])).logits
    batch = processor(images=[p.data["images"] for p in problems], text=[with_placeholders(p.prompt, 1) for p in problems], return_tensors="pt", padding=True)
    theirs, mask = model(**batch).logits, asked["prompt_mask"]
    assert torch.equal(batch["input_ids"], asked["prompt_ids"]) and torch.allclose(ours[mask], theirs[mask], atol=1e-4)


def test_sampler_and_scores_agree_also_where_pictures_are_missing_or_many(seer):
    model, processor = seer
    a, b, c = PICTURES.problems(3)
    problems = [a, replace(b, data=b.data | {"images": []}), Problem("plot <image> read <image> :", 1, {"images": c.data["images"] + a.data["images"]})]
    r = rollouts(seer, problems)
    logp, _, hidden = score(model, r)
    assert torch.allclose(logp[r.mask], r.logp[r.mask], atol=1e-3) and hidden.shape == (6, r.ids.shape[1], 32)
    alone = rollouts(seer, problems[2:], seed=1)
    again = score(model, alone)[0]
    assert torch.allclose(again[alone.mask], alone.logp[alone.mask], atol=1e-3)  # without the padding of the others


def test_the_picture_matters_and_rows_do_not_mix(seer):
    model, processor = seer
    p, q = PICTURES.problems(2, level=1)
    swapped = replace(p, data=p.data | {"images": q.data["images"]})
    r, s = (stack([rollouts(seer, [x]), rollouts(seer, [q])]) for x in (p, swapped))
    s = replace(r, images=s.images)
    a, b = score(model, r)[0], score(model, s)[0]
    assert (a[:2] - b[:2])[r.mask[:2]].abs().max() > 1e-3 and torch.allclose(a[2:][r.mask[2:]], b[2:][r.mask[2:]], atol=1e-5)


def test_a_written_placeholder_stays_a_word(seer):
    "Pictures are no part of a response, not even where the policy writes their token: nothing is put there, and the rest is scored as ever."
    model, processor = seer
    r = rollouts(seer, PICTURES.problems(2))
    forged = replace(r, ids=r.ids.clone())
    forged.ids[:, 3] = model.config.image_token_id
    for x in (r, forged):
        logp, _, hidden = score(model, x)
        assert logp[x.mask].isfinite().all() and hidden.shape[:2] == x.ids.shape
    ids, mask = torch.cat([forged.prompt_ids, forged.ids], 1), torch.cat([forged.prompt_mask, forged.mask], 1)
    embeds = reading(model, ids, mask, forged.images)["inputs_embeds"]
    assert torch.equal(embeds[:, r.prompt_ids.shape[1] + 3], model.get_input_embeddings()(forged.ids[:, 3]))


def test_missing_placeholders_are_refused(seer):
    model, processor = seer
    asked = ask(processor, PICTURES.problems(2))
    with pytest.raises(ValueError, match=r"placeholders a row for pictures of \[16, 16\] tokens"):
        reading(model, asked["prompt_ids"].masked_fill(asked["prompt_ids"] == model.config.image_token_id, 5), asked["prompt_mask"], asked["images"])


def test_hidden_states_are_caught_and_gradients_reach_the_vision_tower(seer):
    model, processor = seer
    r = rollouts(seer, PICTURES.problems(4), T=16)
    with capture_hidden(model) as tap:
        ids, mask = torch.cat([r.prompt_ids, r.ids], 1), torch.cat([r.prompt_mask, r.mask], 1)
        out = model(**reading(model, ids, mask, r.images))
        assert torch.allclose(model.get_output_embeddings()(tap.states), out.logits, atol=1e-4)
    assert type(backbone(model)).__name__ == "Qwen2_5_VLTextModel"
    _, _, hidden = score(model, r)
    from relax.dictionary import KoopmanDictionary
    from relax.dsd import dsd
    model.zero_grad()
    dsd(hidden, KoopmanDictionary(32, 4, torch.Generator().manual_seed(0)), r.mask).mean().backward()
    grads = {n: p.grad.abs().max().item() for n, p in model.named_parameters() if ".visual." in n}
    assert grads and all(g > 0 for g in grads.values()), {n: g for n, g in grads.items() if not g}
    model.zero_grad()


def test_each_picture_is_looked_at_once(seer, monkeypatch):
    model, _ = seer
    r, seen = rollouts(seer, PICTURES.problems(2), group_size=4), []
    tower = model.model.get_image_features
    monkeypatch.setattr(model.model, "get_image_features", lambda pixels, grids, **kw: seen.append(len(grids)) or tower(pixels, grids, **kw))
    score(model, r, n_buckets=1)
    assert seen == [2]


def test_rows_are_chosen_and_joined(seer):
    a, b = (rollouts(seer, PICTURES.problems(2, seed=s)) for s in (0, 1))
    whole = stack([a, b])
    assert len(whole.images) == len(whole) == 8 and torch.equal(whole.images.prompts[whole.images.row[5]][0], b.images.prompts[b.images.row[1]][0])
    some = whole[torch.tensor([7, 0])]
    assert [torch.equal(some.images.prompts[some.images.row[i]][0], x.images.prompts[x.images.row[j]][0]) for i, x, j in ((0, b, 3), (1, a, 0))] == [True, True]


# training

def test_demonstrations_teach_reading(seer):
    model, processor = new_seer(PICTURES.words, width=32, layers=1, heads=2, vision_width=32, vision_layers=1)
    losses = pretrain(model, processor, PICTURES, steps=30, batch_size=16, lr=5e-3, progress=False, loss_of=shown)
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:3])
    batch = seen_batch(PICTURES, processor, PICTURES.problems(8), random.Random(0), p_blind=0.5)
    assert sum(len(g) for _, g in batch[2].prompts) in range(1, 8)  # some have no picture
    a, b = (seen_loss(model, *batch, processor.pad_token_id, n_buckets=n) for n in (1, 3))
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("method", ("grpo", "uniform_kl", "relax", "entropy", "kl_cov"))
def test_the_same_values_train_it(method, folder, tmp_path):
    "The loop and the method values of text, unchanged; the vision tower learns too; a checkpoint comes back to the bit."
    config = TrainConfig(task="pictures", model=folder, method=method, method_options={"n_observables": 4}, steps=2, prompts=2, group_size=4, max_new_tokens=12,
                         eval_problems=2, eval_samples=2, lr=1e-2)
    trainer = Trainer(config)
    coin = iter(range(10**6))
    trainer.task = replace(PICTURES)
    object.__setattr__(trainer.task, "verify", lambda p, text: vision.Verdict("correct" if next(coin) % 2 else "wrong", text))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    rows = trainer.train_step()
    moved = {n: (p - before[n]).abs().max().item() > 0 for n, p in trainer.model.named_parameters()}
    assert rows["metrics"]["groups"] == 2 and np.isfinite(rows["metrics"]["loss"]) and any(m for n, m in moved.items() if ".visual." in n)
    trainer.save(tmp_path)
    other = Trainer(config)
    assert other.load(tmp_path) and all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), other.model.parameters()))


def test_evaluation_and_its_controls(seer, folder, tmp_path):
    from relax.evaluate import log_controls
    from relax.record import Run
    model, processor = seer
    problems = PICTURES.problems(3, "heldout")
    rows = evaluate(model, processor, PICTURES, problems, 2, max_new_tokens=8)
    assert [r["samples"] for r in rows] == [2, 2, 2]
    run = Run.create("x", {"task": "pictures", "method": "base", "model": "x", "seed": 0}, tmp_path)
    small = replace(PICTURES)
    object.__setattr__(small, "controls", lambda ps: PICTURES.controls(ps, questions=1))
    log_controls(run, 4, model, processor, small, problems, samples=1, max_new_tokens=6)
    assert [len(run.table(t)) for t in ("blind", "versions", "variants")] == [3, 5, 10]
    log_controls(run, 4, *load_reasoner("countdown-tiny"), TASKS["countdown"], TASKS["countdown"].problems(1))  # a task without controls logs nothing


def test_fr3e_is_refused_on_pictures(folder):
    trainer = Trainer(TrainConfig(task="pictures", model=folder, method="fr3e", prompts=1, group_size=2, max_new_tokens=20))
    r, _ = trainer.sample(PICTURES.problems(1), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="which pictures share"): trainer.branch(r)


# wrong pictures

def png(image, **options):
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def bomb(side=60_000):
    "A PNG of a few hundred bytes whose header promises 3.6 billion pixels."
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


GOOD = Image.new("RGB", (64, 64), "red")
WRONG = {"cut off": (png(Image.effect_noise((64, 64), 50).convert("RGB"))[:-600], "cut off or broken"), "no picture": (b"hello", "cannot be opened"), "empty": (b"", "cannot be opened"),
         "bomb": (bomb(), "DecompressionBombError"), "large": (bomb(7000), "size 7000 x 7000"), "mode": (Image.new("F", (64, 64)), "mode 'F'"), "thin": (Image.new("RGB", (2, 800)), "too long and thin"),
         "type": (42, "got int"), "missing file": ("/nowhere/x.png", "cannot be opened"), "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be opened")}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_pictures_say_why(kind):
    source, why = WRONG[kind]
    with pytest.raises(ValueError, match=why): open_picture(source)


def test_right_pictures_of_many_kinds(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(GOOD))
    for source in (GOOD, png(GOOD), path, str(path), {"bytes": png(GOOD), "path": None}, {"bytes": None, "path": str(path)}, GOOD.convert("P"), GOOD.convert("L"), GOOD.convert("CMYK")):
        assert open_picture(source).mode == "RGB" and open_picture(source).size == (64, 64)
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert open_picture(clear).getpixel((0, 0)) == (255, 255, 255)  # transparency is white, not the colour beneath


def test_nothing_of_a_batch_is_lost(seer):
    "All wrong rows are named at once, nothing is sampled, no generator moves; the other rows then give what they would have given."
    good = PICTURES.problems(3)
    broken = [replace(good[0], data=good[0].data | {"images": [s]}) for s, _ in WRONG.values()]
    batch = [good[0], broken[0], good[1], *broken[1:], good[2], replace(good[1], prompt="<image> <image> plot :"), replace(good[1], prompt=f"{IMAGE} plot :")]
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    with pytest.raises(PictureError) as error: ask(seer[1], batch)
    wrong = error.value.wrong
    right = {i for i, p in enumerate(batch) if any(p is g for g in good)}
    assert set(wrong) == set(range(len(batch))) - right and torch.equal(generator.get_state(), before)
    assert all(f"row {i}" in str(error.value) for i in wrong) and "accepted" in str(error.value)
    assert "1 pictures for 2 placeholders" in wrong[len(batch) - 2] and "model's own" in wrong[len(batch) - 1]
    rest = ask(seer[1], [p for i, p in enumerate(batch) if i not in wrong])
    alone = ask(seer[1], good)
    assert torch.equal(rest["prompt_ids"], alone["prompt_ids"]) and all(torch.equal(a[0], b[0]) for a, b in zip(rest["images"].prompts, alone["images"].prompts))


def test_a_step_with_a_wrong_picture_can_be_repeated(folder, monkeypatch):
    "The trainer stands where it stood: the same step, with the picture repaired, gives what it would have given."
    config = TrainConfig(task="pictures", model=folder, prompts=2, group_size=2, max_new_tokens=20, method_options={"dynamic_sampling": False})
    trainer, calm = Trainer(config), Trainer(config)
    paint = vision.Plots.paint
    for suite in SUITES.values(): monkeypatch.setattr(type(suite), "paint", lambda self, s: b"broken")
    with pytest.raises(PictureError): trainer.train_step()
    assert trainer.step == 0
    monkeypatch.undo()
    torch.set_num_threads(1)
    a, b = trainer.collect()[0], calm.collect()[0]
    assert torch.equal(a.ids, b.ids) and paint is vision.Plots.paint


# the real benchmarks

ROWS = {
    "mathvista": dict(pid="1", question="How many?", query="Hint: answer with an integer.\nQuestion: How many?", image="images/1.jpg", decoded_image=..., choices=None, unit=None, precision=None, answer="3",
                      question_type="free_form", answer_type="integer", metadata={"split": "testmini"}),
    "mathverse": dict(sample_index="1", problem_index="1", problem_version="Text Dominant", question="As shown", query_wo="Find x.\nChoices:\nA:1\nB:2", query_cot="..", image=..., answer="B",
                      question_type="multi-choice", metadata={}, question_for_eval="Find x."),
    "mathvision": dict(id="4", question="Which one? <image1>", options=["A", "B"], image="images/4.jpg", decoded_image=..., answer="B", solution=None, level=2, subject="counting"),
    "dynamath": dict(id="9", question="What is the slope?", image="images/9.png", decoded_image=..., ground_truth="2.0", answer_type="float", subject="algebra", knowledge_level="high school"),
    "mmmu": dict(id="validation_Art_1", question="Compare <image 1> and <image 2>: which?", options="['first', '<image 1>']", explanation="", image_1=..., image_2=..., image_3=None, answer="A",
                 question_type="multiple-choice", subfield="x", topic_difficulty="Easy", img_type="['Paintings']"),
    "mmstar": dict(index=7, question="What is it?\nOptions: A: cat, B: dog", image=..., answer="A", category="math", l2_category="geometry", meta_info={}),
    "emma": dict(pid="m1", question="Continue <image_1>", options=["A1", "B1"], answer="A", image_1=..., image_2=None, solution="", subject="Math", task="t", category="c", source="s",
                 type="Multiple Choice", context="Look.")}


def rows_of(name, as_bytes=True):
    picture = {"bytes": png(GOOD), "path": "x.png"} if as_bytes else GOOD
    return [{k: picture if v is ... else v for k, v in ROWS[name].items()}]


@pytest.mark.parametrize("name", VISUAL)
def test_a_local_file_of_the_same_columns(name, tmp_path):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    rows = rows_of(name)
    for row in rows: row.pop("metadata", None), row.pop("meta_info", None)  # parquet knows no empty records
    pd.DataFrame(rows).to_parquet(tmp_path / f"{name}.parquet")
    p, = load_visual(name, tmp_path / f"{name}.parquet")
    images, texts = check_pictures([p])
    assert len(images[0]) == (2 if name == "mmmu" else 1) == texts[0].count(IMAGE) and p.data["answer"] == ROWS[name][VISUAL[name].answer]
    assert p.data["id"] == str(ROWS[name][VISUAL[name].ident])
    blind, = load_visual(name, tmp_path / f"{name}.parquet", blind=True)
    assert blind.data["images"] == [] and "<image" not in blind.prompt and check_pictures([blind])
    pd.DataFrame([{k: v for k, v in rows[0].items() if k != VISUAL[name].answer}]).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="are missing"): load_visual(name, tmp_path / "bad.parquet")


def test_markers_stand_for_their_own_pictures():
    prompt, images = visual_prompt(VISUAL["mmmu"], rows_of("mmmu", False)[0])
    assert prompt == "Compare <image> and <image>: which?\nA. first\nB. image 1" and len(images) == 2
    prompt, images = visual_prompt(VISUAL["emma"], rows_of("emma", False)[0])
    assert prompt == "Look.\nContinue <image>\nA. A1\nB. B1" and len(images) == 1


def test_unknown_benchmarks_and_tools_are_refused(tmp_path):
    with pytest.raises(ValueError, match="accepted are mathvista"): load_visual("imagenet")
    with pytest.raises(ValueError, match="lmms-eval"): grading_command("m", "mine")
    assert "mathvista_testmini_cot,mathverse_testmini,mathvision_test,dynamath_reasoning,mmmu_val,mmstar,emma" in grading_command("Qwen/Qwen2.5-VL-3B-Instruct")


def test_scores_of_lmms_eval_are_read_back(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": {"mathvista_testmini_cot": {"alias": "mathvista", "gpt_eval_score,none": 62.3}, "mmstar": {"average,none": 0.559, "math,none": 0.1}, "other": {"acc,none": 1}}}))
    assert read_scores(path) == pytest.approx({"mathvista": 62.3, "mmstar": 55.9})
    path.write_text(json.dumps({"results": {"other": {}}}))
    with pytest.raises(ValueError, match="accepted are those of"): read_scores(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="no results file"): read_scores(path)


def test_virl39k_becomes_conversations_and_wrong_rows_a_list(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b"): (tmp_path / "images" / f"{name}.png").write_bytes(png(GOOD))
    (tmp_path / "images" / "c.png").write_bytes(png(GOOD)[:60])
    rows = [{"qid": "1", "question": "First <image> then <image>?", "answer": r"\boxed{17^\circ}", "image": ["images/a.png", "images/b.png"], "PassRate_32BTrained": 0.5},
            {"qid": "2", "question": "No marker?", "answer": r"\boxed{A}", "image": ["images/a.png"]}, {"qid": "3", "question": "<image> broken", "answer": "1", "image": ["images/c.png"]},
            {"qid": "4", "question": "<image> <image> one is missing", "answer": "1", "image": ["images/a.png"]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    path, wrong = prepare_virl(tmp_path, "rows.json", progress=False)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["answer"] for line in lines] == [r"17^\circ", "A"] and set(wrong) == {2, 3} == set(map(int, json.loads((tmp_path / "wrong.json").read_text())))
    kinds = [[part["type"] for part in line["prompt"][0]["content"]] for line in lines]
    assert kinds == [["text", "image", "text", "image", "text"], ["image", "text"]] and "boxed" in lines[0]["prompt"][0]["content"][-1]["text"]
    with pytest.raises(ValueError): parts_of("<image>", 2, "x")


# TRL

def trl_trainer(folder, tmp_path, method=None, **options):
    pytest.importorskip("trl")
    from datasets import Dataset
    from relax.trl import ReLaXConfig, ReLaXTrainer
    from relax.vision import load_processor
    rows = trl_rows(PICTURES.problems(8))
    def reward(completions, **kwargs): return [float(i % 2) for i in range(len(completions))]
    args = ReLaXConfig(str(tmp_path), **dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=20, n_observables=4, max_steps=1, logging_steps=1, use_cpu=True, bf16=False,
                                             report_to="none", disable_tqdm=True, save_strategy="no", learning_rate=1e-2, dynamic_sampling=False) | options)
    return ReLaXTrainer(folder, reward, args, Dataset.from_list(rows), processing_class=load_processor(folder), method=method)


def test_trl_trains_it_a_step_with_relax(folder, tmp_path):
    t = trl_trainer(folder, tmp_path)
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    seen = {}
    loss = t._compute_loss
    def spy(model, inputs):
        b, _ = t._batch(model, inputs)
        seen.update(T=inputs["completion_ids"].shape[1], hidden=b.hidden.shape, placeholders=int((b.ids == model.config.image_token_id).sum()), pixels=inputs["pixel_values"].shape[0])
        return loss(model, inputs)
    t._compute_loss = spy
    t.train()
    log = t.state.log_history[0]
    moved = [n for n, p in t.model.named_parameters() if not torch.equal(p, before[n])]
    assert any(".visual." in n for n in moved) and any("language_model" in n for n in moved)
    assert seen["hidden"] == (4, seen["T"], 32) and seen["placeholders"] == 0 and seen["pixels"] == 4 * 64
    assert np.isfinite(log["loss"]) and log["dsd/mean"] > 0 and "relax/exploration_loss" in log


def test_trl_and_our_loop_agree_on_a_batch(folder, tmp_path):
    "States, log-probabilities and entropies of TRL's rollouts with pictures, by both paths."
    t = trl_trainer(folder, tmp_path, learning_rate=0.0)
    kept = []
    loss = t._compute_loss
    t._compute_loss = lambda model, inputs: kept.append((inputs, t._batch(model, inputs)[0])) or loss(model, inputs)
    t.train()
    inputs, b = kept[0]
    prompts = [(p, g[None]) for p, g in zip(inputs["pixel_values"].split(64), inputs["image_grid_thw"])]
    r = Rollouts(inputs["prompt_ids"], inputs["prompt_mask"].bool(), b.ids, b.mask, torch.zeros(b.ids.shape), images=Patches(prompts, torch.arange(4)))
    logp, entropy, hidden = score(t.model, r, t.temperature)
    for ours, theirs in ((logp, b.logp), (entropy, b.entropy), (hidden, b.hidden)): assert torch.allclose(ours[b.mask], theirs[b.mask], atol=1e-3)


def test_trl_refuses_refilling_with_pictures(folder, tmp_path):
    with pytest.raises(ValueError, match="image processor"): trl_trainer(folder, tmp_path, dynamic_sampling=True)


CONFIGS = sorted((ROOT / "configs").glob("qwen2.5-vl-*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_says_what_it_does(path):
    "TRL's own parser takes the file, ReLaXConfig takes the values, the sum in its comment is true, every departure has its reason."
    pytest.importorskip("trl")
    import re
    from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config
    from relax.trl import DataConfig, ReLaXConfig
    data, args, model = TrlParser((DataConfig, ReLaXConfig, ModelConfig)).parse_args_and_config(["--config", str(path)])
    text = path.read_text()
    size, kind = re.match(r"qwen2.5-vl-(\d+b)-(lora|qlora)", path.stem).groups()
    rows, accumulated, world, total = map(int, re.search(r"# Batch: (\d+) x (\d+) x (\d+) = (\d+) responses an update", text).groups())
    assert (rows, accumulated) == (args.per_device_train_batch_size, args.gradient_accumulation_steps) and rows * accumulated * world == total == 32 * args.num_generations
    assert f"{rows * args.steps_per_generation} responses are sampled" in text and (rows * args.steps_per_generation) % args.num_generations == 0
    assert model.model_name_or_path == f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct" and args.output_dir == f"out/{path.stem}" and not args.dynamic_sampling and not args.use_vllm
    assert (args.alpha, args.beta, args.num_generations, args.max_completion_length, args.n_observables, args.temperature, args.max_grad_norm) == (0.1, 0.01, 16, 3072, 50, 1.0, 1.0)
    assert get_peft_config(model).target_modules == "all-linear" and (get_quantization_config(model) is not None) == (kind == "qlora") and args.bf16 and data.dataset_name.endswith("train.jsonl")
    marks = re.findall(r"\[departs: ([^\]]+)\]", text.replace("\n# ", " "))
    assert len(marks) >= 4 and all(len(m) > 30 for m in marks)


def test_there_is_a_3b_and_a_7b():
    assert {p.stem for p in CONFIGS} >= {"qwen2.5-vl-3b-lora", "qwen2.5-vl-3b-qlora", "qwen2.5-vl-7b-qlora"}


def test_prepared_virl39k_is_what_trl_reads(tmp_path, folder):
    "From the written file through `load_data` to one step."
    pytest.importorskip("trl")
    if importlib.util.find_spec("math_verify") is None: pytest.skip("needs math-verify")
    from relax.trl import DataConfig, ReLaXConfig, ReLaXTrainer, load_data
    from relax.vision import load_processor
    (tmp_path / "a.png").write_bytes(png(GOOD))
    (tmp_path / "rows.json").write_text(json.dumps([{"question": f"<image> plot {c} ?", "answer": r"\boxed{3}", "image": ["a.png"]} for c in COLOURS]))
    path, _ = prepare_virl(tmp_path, "rows.json", progress=False)
    data, reward = load_data(DataConfig(dataset_name=str(path)))
    assert data[0]["images"][0].size == (64, 64) and data[0]["answer"] == "3"
    args = ReLaXConfig(str(tmp_path / "out"), per_device_train_batch_size=2, num_generations=2, max_completion_length=12, n_observables=4, max_steps=1, use_cpu=True, bf16=False, report_to="none",
                       disable_tqdm=True, save_strategy="no", dynamic_sampling=False)
    t = ReLaXTrainer(folder, lambda completions, **kw: [float(i % 2) for i in range(len(completions))], args, data, processing_class=load_processor(folder))
    t.train()
    assert t.state.global_step == 1 and reward([[{"content": r"\boxed{3}"}]], ["3"]) == [1.0]


# ---------------------------------------------------------------- the true shapes, and their bench at a tiny one

TINY = Shape(2, 64, 4, 2, 128, 300, True, 16, tower=Tower(2, 32, 2, 48, 8, 2, 32, (1,)))


def test_true_shapes_have_the_published_numbers_of_parameters():
    "3.75 and 8.29 billion, in models without bytes; the arithmetic of `Shape` and `Tower` gives the same, adapters too."
    for size, published in (("3B", 3.75), ("7B", 8.29)):
        model = random_seer(QWEN_VL[size], rank=0, device="meta")
        assert sum(p.numel() for p in model.parameters()) == QWEN_VL[size].parameters and round(QWEN_VL[size].parameters / 1e9, 2) == published
        assert sum(p.numel() for n, p in model.named_parameters() if ".visual." in n) == QWEN_VL[size].parameters - QWEN[size].parameters
        c = model.config
        assert (c.image_token_id, c.vision_start_token_id, c.vision_end_token_id, c.video_token_id) == (151655, 151652, 151653, 151656)
        assert c.text_config.rope_parameters["mrope_section"] == [16, 24, 24] and c.vision_config.fullatt_block_indexes == [7, 15, 23, 31]


def test_a_policy_with_adapters_sees(tmp_path):
    "Under PEFT our forward pass is that of transformers; ReLaX reaches every adapter, those of the tower too, through gradient checkpointing; NF4 covers what transformers' own loading covers."
    model = random_seer(TINY, 4, "fp32")
    for i, (n, p) in enumerate(model.named_parameters()):
        if "lora_B" in n: torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(i))
    asked = ask_noise(model, 2, 5, (48, 64))
    with torch.no_grad():
        ours = model(**reading(model, *asked.values())).logits
        pixels, grids = (torch.cat(x) for x in zip(*asked["images"].prompts))
        theirs = model(input_ids=asked["prompt_ids"], attention_mask=asked["prompt_mask"].long(), pixel_values=pixels, image_grid_thw=grids,
                       mm_token_type_ids=(asked["prompt_ids"] == model.config.image_token_id).int()).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    r = answers(model, asked, 2, 12)
    with torch.no_grad(): calibration = calibrate(score(model, r)[2], r.mask, 2, generator=torch.Generator().manual_seed(0))
    apart = replace(r, images=r.images.apart())
    assert len(r.images.prompts) == 2 and len(apart.images.prompts) == 4
    torch.testing.assert_close(score(model, apart)[0], score(model, r)[0])
    method = ReLaX(beta=0.1, n_observables=2)
    method.loss(make_batch(model, model, apart, method, calibration, 2))[0].backward()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in learning.values()) == TINY.adapters(4) and sum(".visual." in n for n in learning) == 2 * (2 * 5 + 2)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning.values())
    four_bit = random_seer(TINY, 0, "nf4")
    assert {n for n, m in four_bit.named_modules() if isinstance(m, torch.nn.Linear) and type(m).__name__ != "Linear4bit"} == {"lm_head"}


@pytest.mark.parametrize("weights, rank", [("bf16", 4), ("nf4", 4)])
def test_bench_runs_on_a_tiny_shape(weights, rank):
    record = bench_vision(TINY, weights, rank, prompts=1, group=2, words=4, picture=(48, 64), response=20, rows=2, rounds=1, device="cpu")
    assert set(record["update_seconds"]) == set(CONTESTANTS) and all(t > 0 for t in record["update_seconds"].values()) and record["update_ratio"]["grpo"] == 1
    assert record["prompt"] == 12 + 2 + 4 and (record["responses"], record["response"]) == (2, 20) and record["parameters"] == TINY.parameters and record["picture"] == [48, 64]
    json.dumps(record)


def test_bench_writes_each_run_and_refuses_what_it_cannot_do(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "data_dir", lambda: tmp_path)
    def measure(s, weights, rank):
        if weights == "bf16": raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return {"parameters": s.parameters, "weights": weights}
    monkeypatch.setattr(vision, "bench_vision", measure)
    vision.bench_all_vision(["3B-lora"])
    vision.bench_all_vision(["7B-qlora"])
    written = json.loads((tmp_path / "bench_vision_gpu.json").read_text())
    assert written["command"] == "python -m relax.vision bench" and written["runs"]["3B-lora"]["out_of_memory"] == "CUDA out of memory."
    assert written["runs"]["7B-qlora"] == {"parameters": QWEN_VL["7B"].parameters, "weights": "nf4"} and len(written["runs"]) == 2
    with pytest.raises(SystemExit, match="70B.*accepted are.*3B-lora"): vision.main(["bench", "70B"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="CUDA"): vision.main(["bench"])
    with pytest.raises(ValueError, match="50 x 64.*multiples of 16"): ask_noise(random_seer(TINY, 0), 1, 4, (50, 64))


def test_the_bench_trains_as_the_configurations_do():
    assert {f"qwen2.5-vl-{name.lower()}" for name in vision.VISION_RUNS} == {p.stem for p in CONFIGS}
    for name, (size, weights, rank) in vision.VISION_RUNS.items():
        text = (ROOT / f"configs/qwen2.5-vl-{name.lower()}.yaml").read_text()
        assert f"lora_r: {rank}\n" in text and (weights == "nf4") == ("load_in_4bit: true" in text) and f"VL-{size}-Instruct" in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU of 24 GB: pytest tests/test_vision.py -k cuda")
def test_cuda_bench_of_the_true_3b():
    record = bench_vision(QWEN_VL["3B"], group=8, response=256, rows=8, rounds=1)
    assert record["prompt"] == 1280 + 2 + 128 and 0 < record["peak_bytes"]["relax"] < 24e9


# ---------------------------------------------------------------- what is shipped

def test_the_shipped_reasoner_sees():
    "It answers more with pictures than without, on held-out problems, and its record says how it was made."
    name = "pictures-small"
    if not (data_dir() / "reasoner" / name).exists(): pytest.skip("not shipped yet")
    model, processor = load_reasoner(name)
    problems = [p for level in (1, 5) for p in PICTURES.problems(12, "heldout", level)]
    rates = []
    for asked in (problems, [replace(p, data=p.data | {"images": []}) for p in problems]):
        rows = evaluate(model, processor, PICTURES, asked, 8, generator=torch.Generator().manual_seed(0))
        rates.append(sum(r["correct"] for r in rows) / sum(r["samples"] for r in rows))
    assert rates[0] > rates[1] + 0.1
    record = json.loads((data_dir() / "reasoner" / name / "training.json").read_text())
    assert record["recipe"] == vision.RECIPES[name] | {"p_misread": PICTURES.p_misread} and record["cpu_seconds"] > 0
