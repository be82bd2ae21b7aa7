// What explorer and replay draw with: elements, labelled controls, and three kinds of picture in SVG. No library, no network.
"use strict";
window.relaxPlot = (() => {
  const SVG = "http://www.w3.org/2000/svg";

  function element(tag, attributes = {}, ...children) {
    const svg = ["svg", "path", "circle", "line", "text", "g", "polyline", "rect"].includes(tag);
    const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children.filter((c) => c !== null));
    return node;
  }

  // A labelled select; options are [value, text] pairs.
  function choice(id, label, options, change) {
    const select = element("select", { id }, ...options.map(([value, text]) => element("option", { value }, text)));
    select.addEventListener("change", change);
    return { node: element("div", { class: "control" }, element("label", { for: id }, label), select), get: () => select.value, set: (v) => { select.value = v; }, select };
  }

  // A labelled slider over a list; `text` says in words where it stands, also to a screen reader.
  function slider(id, label, values, text, change) {
    const input = element("input", { id, type: "range", min: 0, max: values.length - 1, step: 1, value: 0 });
    const shown = element("output", { for: id });
    const show = () => { shown.textContent = text(values[+input.value]); input.setAttribute("aria-valuetext", shown.textContent); };
    input.addEventListener("input", () => { show(); change(); });
    show();
    const control = {
      node: element("div", { class: "control" }, element("label", { for: id }, label, " "), shown, input), input,
      get: () => values[+input.value], set: (v) => { input.value = values.indexOf(v); show(); },
      limit: (list) => { const old = values[+input.value]; values = list; input.max = list.length - 1; input.value = list.includes(old) ? list.indexOf(old) : list.length - 1; show(); },
    };
    return control;
  }

  function frame(title, width, height) {
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
    const figure = element("figure", {}, element("figcaption", {}, title), svg);
    return { figure, svg, describe: (text) => svg.setAttribute("aria-label", `${title}: ${text}`), clear: () => svg.replaceChildren() };
  }

  // The complex plane with the unit circle; `values` are found eigenvalues, `known` true ones.
  function plane(picture, values, known = []) {
    const reach = Math.max(1.15, ...[...values, ...known].map(([x, y]) => Math.hypot(x, y) * 1.08)), k = 95 / reach;
    picture.clear();
    picture.svg.append(
      element("line", { x1: 5, x2: 195, y1: 100, y2: 100, class: "axis" }), element("line", { y1: 5, y2: 195, x1: 100, x2: 100, class: "axis" }),
      element("circle", { cx: 100, cy: 100, r: k, class: "unit" }),
      ...known.map(([x, y]) => element("circle", { cx: 100 + k * x, cy: 100 - k * y, r: 5.5, class: "known" })),
      ...values.map(([x, y]) => element("circle", { cx: 100 + k * x, cy: 100 - k * y, r: 3, class: "found" })));
    const radii = values.map(([x, y]) => Math.hypot(x, y));
    picture.describe(`${values.length} eigenvalues, magnitudes from ${Math.min(...radii).toFixed(2)} to ${Math.max(...radii).toFixed(2)}` + (known.length ? "; true ones as rings" : ""));
  }

  // A path in the plane, faint where it is old; `points` is a flat list within +-1000.
  function path(picture, points) {
    picture.clear();
    const at = (i) => [100 + points[2 * i] * 0.093, 100 - points[2 * i + 1] * 0.093], n = points.length / 2;
    for (let part = 0; part < 4; part++) {
      const from = Math.floor((part * (n - 1)) / 4), to = Math.floor(((part + 1) * (n - 1)) / 4), list = [];
      for (let i = from; i <= to; i++) list.push(at(i).map((v) => v.toFixed(1)).join(","));
      if (list.length) picture.svg.append(element("polyline", { points: list.join(" "), class: "path", opacity: 0.3 + 0.23 * part }));
    }
    const [x, y] = at(0), [u, v] = at(n - 1);
    picture.svg.append(element("circle", { cx: x, cy: y, r: 3.5, class: "start" }), element("circle", { cx: u, cy: v, r: 3.5, class: "found" }));
    picture.describe(`${n} steps; the ring is the first, the dot the last`);
  }

  // Curves over a shared axis: `lines` are {name, className, x, y}; `mark` is where the reader stands. x positions by `place` within 0..1.
  function lines(picture, list, place, mark, ticks, { width = 300, height = 130, digits = 2 } = {}) {
    picture.clear();
    const left = 40, right = width - 14, top = 8, bottom = height - 20, all = list.flatMap((l) => l.y.filter((v) => v !== null));
    let low = Math.min(...all), high = Math.max(...all);
    if (high - low < 1e-9) { low -= 0.5; high += 0.5; }
    const X = (x) => left + (right - left) * place(x), Y = (y) => bottom - ((bottom - top) * (y - low)) / (high - low);
    picture.svg.append(element("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }));
    for (const [y, at] of [[low, bottom], [high, top + 6]]) picture.svg.append(element("text", { x: left - 4, y: at, "text-anchor": "end" }, y.toFixed(digits)));
    for (const t of ticks) picture.svg.append(element("text", { x: X(t), y: height - 6, "text-anchor": "middle" }, String(t)));
    picture.svg.append(element("line", { x1: X(mark), x2: X(mark), y1: top, y2: bottom, class: "mark" }));
    for (const l of list) {
      const points = l.x.map((x, i) => (l.y[i] === null ? null : `${X(x).toFixed(1)},${Y(l.y[i]).toFixed(1)}`)).filter(Boolean).join(" ");
      picture.svg.append(element("polyline", { points, class: `line ${l.className}` }));
      const i = l.x.indexOf(mark);
      if (i >= 0 && l.y[i] !== null) picture.svg.append(element("circle", { cx: X(mark), cy: Y(l.y[i]), r: 3, class: `dot ${l.className}` }));
    }
  }

  return { element, choice, slider, frame, plane, path, lines };
})();
