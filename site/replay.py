"""Record what the training replay shows and run folders do not hold: completions and spectra along the way, into data/site/replay.json.

A run depends on its configuration alone, so it is trained again and looked at every few steps; the metrics of both must be equal, and the file says by how much
they differ. Looking draws from generators of its own and changes nothing. About five minutes a run on one core: `python site/replay.py`. What was recorded here of
the same run folders is kept.
"""
import json
from copy import deepcopy
from pathlib import Path

import torch
from tqdm.auto import tqdm

from relax.dsd import dsd, koopman_spectrum, pool_groups
from relax.grpo import decode, encode, sample, score
from relax.record import Run, data_dir, environment, fingerprint, write_atomic
from relax.train import TrainConfig, Trainer

RUNS = [f"countdown-small-{arm}-s0" for arm in ("grpo", "uniform_kl", "half_lr", "relax")]
STEPS = (0, 2, 5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 100)
PROBLEMS, RESPONSES = 6, 8


@torch.no_grad()
def look(trainer, calibration) -> list[dict]:
    "A few held-out problems: one completion of each with its verdict, and spectrum and robust DSD of a group of responses under the run's dictionary."
    problems = trainer.task.problems(PROBLEMS, "heldout")
    ids, mask = encode(trainer.tokenizer, [p.prompt for p in problems])
    r = sample(trainer.model, ids, mask, trainer.limit, trainer.tokenizer.eos_token_id, trainer.tokenizer.pad_token_id, RESPONSES, 1.0,
               torch.Generator().manual_seed(0))
    states, real = pool_groups(score(trainer.model, r, 1.0)[2], r.mask, RESPONSES)
    spectra, spread = koopman_spectrum(states, calibration.dictionary, real), dsd(states, calibration.dictionary, real)
    texts = decode(trainer.tokenizer, r)[::RESPONSES]
    return [{"prompt": p.prompt, "text": text, "outcome": trainer.task.verify(p, text).outcome, "dsd": round(float(v), 5),
             "spectrum": [[round(float(x), 4) for x in (l.real, l.imag)] for l in s]} for p, text, s, v in zip(problems, texts, spectra, spread)]


def gap(row: dict, recorded: dict) -> float:
    "The largest relative difference between a step's metrics and the recorded ones."
    return max(abs(row[k] - float(v)) / max(abs(float(v)), 1e-9) for k, v in recorded.items() if k in row and v)


def follow(run: Run, bar) -> dict:
    "Train the run again; look before the first step and after every step of STEPS."
    trainer, rows = Trainer(TrainConfig(**run.config)), run.rows("metrics")
    initial, seen, differences = deepcopy(trainer.model), {}, []
    for row in rows:
        differences.append(gap(trainer.train_step()["metrics"], row))
        if trainer.step == 1:
            trained, trainer.model = trainer.model, initial
            seen[0], trainer.model = look(trainer, trainer.calibration), trained
        if trainer.step in STEPS: seen[trainer.step] = look(trainer, trainer.calibration)
        bar.update()
        bar.set_postfix(difference=f"{max(differences):.1e}")
    return {"sha256": fingerprint(run), "largest relative difference of a metric": max(differences), "looks": seen}


def kept(path: Path, env: dict) -> dict:
    "What the file already holds of runs that have not changed since, if it was made in the same environment."
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {i: r for i, r in recorded["runs"].items() if fingerprint(Run(i)) == r["sha256"]} if recorded.get("env") == env else {}


def main():
    torch.set_num_threads(1)
    path, env = Path(data_dir()) / "site" / "replay.json", {k: v for k, v in environment().items() if k != "commit"}
    old = kept(path, env)
    with tqdm(total=sum(len(Run(i).rows("metrics")) for i in RUNS if i not in old), unit="step") as bar: found = {i: old.get(i) or follow(Run(i), bar) for i in RUNS}
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, json.dumps({"env": env, "responses": RESPONSES, "runs": found}, separators=(",", ":"), ensure_ascii=False) + "\n")


if __name__ == "__main__": main()
