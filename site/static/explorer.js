// The spectrum explorer: looks up what site/explorer.py recorded for the chosen source, estimator, m, ridge and length. It computes nothing.
"use strict";
(() => {
  const { element, choice, slider, frame, plane, path, lines } = window.relaxPlot, data = window.RELAX_EXPLORER, root = document.getElementById("explorer");
  const names = { robust: "robust (our default)", paper: "paper (equation 7)", authors: "authors (draft code)" };

  // A recorded cell as {dsd, values}: one of each conjugate pair is stored, in thousandths.
  function look(source, estimator, m, ridge, length) {
    const [dsd, ...flat] = data.sources[source].cells[`${estimator}/${m}/${data.ridges.indexOf(ridge)}/${length}`], values = [];
    for (let i = 0; i < flat.length; i += 2) {
      values.push([flat[i] / 1000, flat[i + 1] / 1000]);
      if (flat[i + 1] > 0 && values.length < m) values.push([flat[i] / 1000, -flat[i + 1] / 1000]);
    }
    return { dsd, values };
  }

  const source = choice("ex-source", "Motion", Object.entries(data.sources).map(([k, s]) => [k, s.label]), () => { length.limit(data.sources[source.get()].lengths); update(); });
  const estimator = choice("ex-estimator", "Estimator", Object.entries(names), update);
  const m = slider("ex-m", "Observables m:", data.observables, String, update);
  const ridge = slider("ex-ridge", "Ridge:", data.ridges, (r) => (r === null ? "as the estimator is defined" : String(r)), update);
  const length = slider("ex-length", "Length:", data.sources.alike.lengths, (n) => `${n} steps`, update);
  const motion = frame("Path", 200, 200), spectrum = frame("Eigenvalues", 200, 200), course = frame("DSD by length (curves far above the chosen one are cut)", 300, 160);
  const number = element("p", { class: "number", "aria-live": "polite" }), note = element("p", { class: "note" }), words = element("p", { class: "words" });
  const table = element("tbody"), key = element("p", { class: "key" });
  key.append(...Object.keys(names).map((n) => element("span", { class: `swatch ${n}` }, n)));

  function rows(values) {
    table.replaceChildren(...values.map(([x, y]) => element("tr", {}, ...[x, y, Math.hypot(x, y)].map((v) => element("td", {}, v.toFixed(3))))));
  }

  function update() {
    const s = data.sources[source.get()], n = length.get(), { dsd, values } = look(source.get(), estimator.get(), m.get(), ridge.get(), n);
    path(motion, s.path.slice(0, 2 * n));
    plane(spectrum, values, s.known);
    const all = Object.keys(names).map((name) => ({ className: name, x: s.lengths, y: s.lengths.map((l) => look(source.get(), name, m.get(), ridge.get(), l).dsd) }));
    const chosen = all.find((l) => l.className === estimator.get()), high = Math.max(...chosen.y);
    const drawn = all.map((l) => ({ ...l, y: l.y.map((v) => (v <= 3 * Math.max(high, 1e-3) ? v : null)) }));
    lines(course, drawn, (l) => Math.log(l / s.lengths[0]) / Math.log(s.lengths[s.lengths.length - 1] / s.lengths[0]), n, s.lengths, { height: 160, digits: 3 });
    course.describe(`${estimator.get()}: ` + chosen.x.map((l, i) => `${chosen.y[i]} at ${l}`).join(", "));
    number.textContent = `DSD = ${dsd}`;
    note.textContent = (n < 5 * m.get() ? `Fewer than 5 m = ${5 * m.get()} steps: this number says little. ` : "") +
      (estimator.get() === "authors" ? "These are singular values, so all lie on the positive axis. " : "") + (s.known.length ? "Rings: eigenvalues known in closed form (the first six)." : "");
    words.textContent = s.words;
    rows(values);
  }

  root.append(
    element("div", { class: "controls" }, source.node, estimator.node, m.node, ridge.node, length.node),
    element("div", { class: "pictures" }, motion.figure, spectrum.figure, element("div", { class: "wide" }, number, course.figure, key)),
    note, words,
    element("details", {}, element("summary", {}, "Eigenvalues as a table"), element("table", {}, element("thead", {}, element("tr", {}, ...["real", "imaginary", "magnitude"].map((h) => element("th", { scope: "col" }, h)))), table)));
  source.set("spread"); m.set(3); length.set(512);
  update();
})();
