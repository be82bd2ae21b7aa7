"""Record what the spectrum explorer shows, into data/site/explorer.json: spectrum and DSD for every choice that its controls offer.

All of it is computed here, by the package; the page only looks up. Some minutes on one core: `python site/explorer.py`. A test computes some of it again.
"""
import json
from dataclasses import dataclass, replace

import torch
from tqdm.auto import tqdm

from relax.dictionary import KoopmanDictionary
from relax.dsd import ESTIMATORS, dsd, koopman_spectrum
from relax.dynamics import Duffing, LinearSystem, OrnsteinUhlenbeck, Pendulum, SlowManifold, StuartLandau, VanDerPol
from relax.grpo import encode, sample, score
from relax.reasoner import load_reasoner
from relax.record import Run, data_dir, environment, fingerprint, write_atomic
from relax.tasks import TASKS

OBSERVABLES, LENGTHS = (3, 5, 10, 25), (16, 32, 64, 128, 256, 512)
RIDGES = (None, 1e-3, 1e-2, 1e-1, 1.0)  # None: what the estimator is defined with
TRAJECTORIES, FIT_STEPS = 32, 200


def damped_rotations(radii: list[float]) -> torch.Tensor:
    "A matrix with the eigenvalues r exp(+-i a), one pair a radius, at different angles a."
    angles = torch.linspace(0.3, 1.5, len(radii), dtype=torch.float64)
    blocks = [r * torch.stack([torch.stack([a.cos(), -a.sin()]), torch.stack([a.sin(), a.cos()])]) for r, a in zip(radii, angles)]
    return torch.block_diag(*blocks)


SYSTEMS = {
    "alike": ("Linear, all modes fade alike (|λ| = 0.8), driven by noise", LinearSystem(damped_rotations([0.8] * 3), noise=1.0)),
    "spread": ("Linear, modes fade differently (|λ| = 0.3, 0.8, 0.98), driven by noise", LinearSystem(damped_rotations([0.3, 0.8, 0.98]), noise=1.0)),
    "ou": ("Ornstein-Uhlenbeck process", OrnsteinUhlenbeck()),
    "slow": ("Slow manifold", SlowManifold()),
    "pendulum": ("Pendulum without friction", Pendulum()),
    "duffing": ("Duffing oscillator, damped", Duffing()),
    "vanderpol": ("Van der Pol oscillator", VanDerPol()),
    "landau": ("Stuart-Landau limit cycle", StuartLandau())}
POLICIES = {"base": "the model before training", "grpo": "trained by GRPO", "uniform_kl": "trained by GRPO + uniform KL", "relax": "trained by ReLaX"}


@dataclass
class Source:
    "A trajectory to look at (1, T, d), the trajectories and mask that its dictionaries are fitted on, its words, and eigenvalues where they are known."
    label: str
    shown: torch.Tensor
    fitted: torch.Tensor
    mask: torch.Tensor | None = None
    words: str = ""
    known: tuple = ()
    run: dict | None = None


def system_source(label, system) -> Source:
    x = system.simulate(TRAJECTORIES, max(LENGTHS), torch.Generator().manual_seed(0))
    try: known = tuple(system.eigenvalues(6).tolist())
    except NotImplementedError: known = ()
    return Source(label, x[:1], x, known=known)


@torch.no_grad()
def responses(model, tokenizer, task, n: int):
    "Responses to held-out problems with their states, and which of them is longest."
    ids, mask = encode(tokenizer, [p.prompt for p in task.problems(n, "heldout")])
    r = sample(model, ids, mask, task.max_new_tokens, tokenizer.eos_token_id, tokenizer.pad_token_id, 1, 1.0, torch.Generator().manual_seed(0))
    return r, score(model, r, 1.0)[2], int(r.mask.sum(1).argmax())


def response_source(label: str, folder: str, task, like: Source | None = None, run: Run | None = None) -> Source:
    "The longest of a few responses; the dictionary is fitted on these, or is the one of `like`."
    model, tokenizer = load_reasoner(folder)
    r, states, longest = responses(model, tokenizer, task, TRAJECTORIES)
    text = tokenizer.decode(torch.cat([r.prompt_ids[longest][r.prompt_mask[longest]], r.ids[longest][r.mask[longest]]]), skip_special_tokens=True)
    shown = states[longest][r.mask[longest]][None]
    fitted, mask = (like.fitted, like.mask) if like else (states, r.mask)
    return Source(label, shown, fitted, mask, text, run={run.id: fingerprint(run)} if run else None)


def sources() -> dict[str, Source]:
    found = {name: system_source(*s) for name, s in SYSTEMS.items()}
    countdown = found["base"] = response_source(f"Countdown response, {POLICIES['base']}", "countdown-small", TASKS["countdown"])
    for arm in ("grpo", "uniform_kl", "relax"):
        run = Run(f"countdown-small-{arm}-s0")
        found[arm] = response_source(f"Countdown response, {POLICIES[arm]}", str(run.folder / "policy"), TASKS["countdown"], countdown, run)
    return found | {"waypoints": response_source("Waypoints response, the model before training", "waypoints-small", TASKS["waypoints"])}


def dictionary(source: Source, m: int) -> KoopmanDictionary:
    "m observables fitted on a source, or, where its states have too few coordinates to tell them apart, as many as can be."
    d = KoopmanDictionary(source.shown.shape[-1], m, generator=torch.Generator().manual_seed(0), bias=True).double()
    d.fit(source.fitted.double(), source.mask, steps=FIT_STEPS, generator=torch.Generator().manual_seed(0))
    return d


def estimator(name: str, ridge: float | None):
    return ESTIMATORS[name] if ridge is None else replace(ESTIMATORS[name], ridge=ridge)


def cell(states, d, name: str, ridge) -> list:
    "DSD, then the spectrum as real and imaginary parts in thousandths, one of each conjugate pair."
    values = koopman_spectrum(states, d, None, estimator(name, ridge))[0]
    upper = values[values.imag >= -1e-9]
    return [float(f"{dsd(states, d, None, estimator(name, ridge)).item():.4g}"), *(round(1000 * x) for l in upper.tolist() for x in (l.real, l.imag))]


def plane(states: torch.Tensor) -> list[int]:
    "The trajectory for the eye: its first two coordinates, for hidden states its first two principal components, scaled to +-1000."
    x = states[0].double()
    if x.shape[1] == 1: x = torch.stack([torch.arange(len(x), dtype=x.dtype), x[:, 0]], 1)
    if x.shape[1] > 6: x = (x - x.mean(0)) @ torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:2].T
    x = x[:, :2] - x[:, :2].mean(0)
    return (1000 * x / x.abs().max(0).values.clamp_min(1e-12)).round().int().flatten().tolist()


def record_source(source: Source, bar) -> dict:
    lengths, cells = [n for n in LENGTHS if n <= len(source.shown[0])], {}
    for m in OBSERVABLES:
        d = dictionary(source, m)
        for name in ESTIMATORS:
            for i, ridge in enumerate(RIDGES):
                for n in lengths: cells[f"{name}/{m}/{i}/{n}"] = cell(source.shown[:, :n].double(), d, name, ridge)
        bar.update()
    return {"label": source.label, "words": source.words, "known": [[round(v.real, 4), round(v.imag, 4)] for v in source.known], "dimension": source.shown.shape[-1],
            "tokens": bool(source.words), "lengths": lengths, "run": source.run, "path": plane(source.shown), "cells": cells}


def main():
    torch.set_num_threads(1)
    every = sources()
    with tqdm(total=len(every) * len(OBSERVABLES)) as bar: found = {name: record_source(s, bar) for name, s in every.items()}
    env = {k: v for k, v in environment().items() if k != "commit"}
    path = data_dir() / "site" / "explorer.json"
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, json.dumps({"env": env, "observables": OBSERVABLES, "ridges": RIDGES, "sources": found}, separators=(",", ":"), ensure_ascii=False) + "\n")


if __name__ == "__main__": main()
