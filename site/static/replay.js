// The training replay: curves of recorded runs with a hand on the time axis, and what was seen at the steps at which the policy was looked at.
"use strict";
(() => {
  const { element, choice, slider, frame, plane, lines } = window.relaxPlot, data = window.RELAX_REPLAY, root = document.getElementById("replay");
  const runs = Object.keys(data.runs), arm = (run) => run.replace(/^countdown-small-/, "").replace(/-s\d+$/, "");
  const names = { grpo: "GRPO", uniform_kl: "GRPO + uniform KL", half_lr: "GRPO, half the learning rate", relax: "ReLaX" };
  const steps = Object.keys(data.runs[runs[0]].looks).map(Number).sort((a, b) => a - b), last = steps[steps.length - 1];
  const verdicts = { correct: "✓ right", wrong: "✗ wrong", unparsable: "✗ not an answer" };

  // What was seen of a run at a step, or the last time before it: [step, looks].
  function latest(run, now) {
    const at = Math.max(...Object.keys(data.runs[run].looks).map(Number).filter((s) => s <= now));
    return [at, data.runs[run].looks[at]];
  }

  // The mean over five neighbouring steps, fewer at the ends.
  function smooth(values) {
    return values.map((_, i) => {
      const near = values.slice(Math.max(0, i - 2), i + 3).filter((v) => v !== null);
      return near.length ? near.reduce((a, b) => a + b) / near.length : null;
    });
  }

  const run = choice("re-run", "Method", runs.map((r) => [r, names[arm(r)]]), update);
  const prompts = data.runs[runs[0]].looks[0].map((l, i) => [String(i), l.prompt]);
  const problem = choice("re-problem", "Held-out problem", prompts, update);
  const step = slider("re-step", "Step:", steps, String, update);
  const play = element("button", { type: "button" }, "Play");
  const pictures = Object.entries(data.labels).map(([name, label]) => ({ name, picture: frame(label, 300, 130) }));
  const spectrum = frame("Spectrum of the responses", 200, 200), number = element("p", { class: "number", "aria-live": "polite" });
  const prompt = element("p", { class: "prompt" }), words = element("p", { class: "words" }), outcome = element("p", { class: "outcome" });
  const key = element("p", { class: "key" }, ...runs.map((r) => element("span", { class: `swatch ${arm(r)}` }, names[arm(r)])));
  const smoothed = Object.fromEntries(runs.map((r) => [r, Object.fromEntries(Object.keys(data.labels).map((c) => [c, smooth(data.runs[r].curves[c])]))]));
  let timer = null;

  function update() {
    const now = step.get(), at = Math.max(now, 1), [when, looks] = latest(run.get(), now), seen = looks[+problem.get()];
    for (const { name, picture } of pictures) {
      const list = runs.map((r) => ({ className: arm(r) + (r === run.get() ? " chosen" : ""), x: smoothed[r][name].map((_, i) => i + 1), y: smoothed[r][name] }));
      lines(picture, list, (x) => (x - 1) / (last - 1), at, [1, last / 2, last]);
      picture.describe(`at step ${at}: ` + runs.map((r) => `${names[arm(r)]} ${(smoothed[r][name][at - 1] ?? NaN).toFixed(3)}`).join(", "));
    }
    plane(spectrum, seen.spectrum);
    number.textContent = `DSD of ${data.responses} responses at step ${when}, pooled: ${seen.dsd}`;
    prompt.textContent = seen.prompt;
    words.textContent = seen.text;
    outcome.textContent = verdicts[seen.outcome] ?? seen.outcome;
    outcome.className = `outcome ${seen.outcome}`;
  }

  function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; }
  function forward() {
    if (step.get() === last) return stop();
    step.set(steps[steps.indexOf(step.get()) + 1]);
    update();
  }
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (step.get() === last) { step.set(0); update(); }
    play.textContent = "Pause";
    timer = setInterval(forward, 700);
  });

  root.append(
    element("div", { class: "controls" }, run.node, problem.node, step.node, element("div", { class: "control" }, play)),
    element("div", { class: "pictures" }, ...pictures.map((p) => p.picture.figure)), key,
    element("div", { class: "pictures" }, spectrum.figure, element("div", { class: "wide" }, number, element("h3", {}, "One of the responses"), prompt, words, outcome)));
  run.set(runs.find((r) => arm(r) === "relax") ?? runs[0]);
  update();
})();
