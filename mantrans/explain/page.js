"use strict";
/* The page of one training step. `data` is described in mantrans/explain/__init__.py. One thing is
   in hand: a moment of the step; with it a token, a head and a weight. `show` draws all of them. */

const data = JSON.parse(document.getElementById("step").textContent);
const { boxes, moments, parameters, about, tokens } = data;
const now = { moment: 0, token: data.losses.indexOf(Math.max(...data.losses)), head: 0, parameter: null, element: 0 };
const PHASES = { forward: "Forward", backward: "Backward", update: "Update" };

/* ------------------------------------------------------------------------------ small helpers */

const byId = id => document.getElementById(id);
const colorOf = phase => `var(--${phase})`;

function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "path", "line", "text", "circle", "g", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("aria-")) { if (value !== undefined && value !== null) node.setAttribute(name, String(value)); continue; }
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined));
  return node;
}

function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const small = size !== 0 && (size < 1e-3 || size >= 1e5);
  const text = small ? value.toExponential(digits - 1).replace(/\.?0*e/, "e") : String(+value.toPrecision(digits));
  return text.replace(/-/g, "−").replace("e+", "e");
}

const count = value => value.toLocaleString("en-US");
const textOf = id => visible(data.texts[id] ?? `#${id}`);
const visible = text => text.replace(/\n/g, "↵").replace(/^ (?=.)/, "").replace(/^ $/, "␣");
const tokenAt = t => visible(tokens[t].text);
const largest = values => Math.max(...values.map(Math.abs), 1e-300);
const blockName = group => group.startsWith("blocks.") ? `Block ${+group.split(".")[1] + 1}` : null;

const WHERE = { norm_1: "Norm before attention", qkv: "Query, key, value", attention: "Attention",
  projection: "Projection", norm_2: "Norm before MLP", up: "Up projection", gate_up: "Gate and up projection",
  mlp: null, down: "Down projection", rotary: null, final_norm: "Final norm", output: "Output",
  embedding: "Embedding", loss: "Softmax and loss" };
const SHORT = { norm_1: "Norm 1", norm_2: "Norm 2", qkv: "Q, K, V", up: "Up", gate_up: "Gate, up", down: "Down",
  rotary: "Rotary", loss: "Loss" };
const lastOf = box => box.layer.split(".").pop();
const nameOf = box => WHERE[lastOf(box)] ?? box.title;
const LETTERS = { HD: "H·D", M: "(H + 2 H_kv)·D", position: "T_max", row: "tokens" };
const letter = axis => LETTERS[axis] ?? axis;

/* ---------------------------------------------------------------------------------- heat maps */

function decoded(array) {
  if (!array.values) {
    const bytes = Uint8Array.from(atob(array.data), c => c.charCodeAt(0));
    array.values = new Float32Array(bytes.buffer);
    const columns = array.columns ?? range(array.shape.at(-1));
    const rows = array.rows ?? range(array.shape.length > 1 ? array.shape.at(-2) : 1);
    Object.assign(array, { atRows: rows, atColumns: columns });
    const sizes = [...array.values].filter(Number.isFinite).map(Math.abs).sort((a, b) => a - b);
    array.scale = sizes[Math.floor(sizes.length * 0.98)] || sizes.at(-1) || 1;
  }
  return array;
}

const range = n => [...Array(n).keys()];
const rgb = name => {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim().slice(1);
  const long = hex.length === 3 ? [...hex].map(c => c + c).join("") : hex;
  return [0, 2, 4].map(i => parseInt(long.slice(i, i + 2), 16));
};
let palette;
const readPalette = () => { palette = { paper: rgb("--paper"), negative: rgb("--negative"), positive: rgb("--positive") }; };

function shade(value, scale) {
  if (!Number.isFinite(value)) return [0, 0, 0, 0];
  const to = value < 0 ? palette.negative : palette.positive;
  const share = Math.min(1, Math.abs(value) / scale) ** 0.7;
  return [...palette.paper.map((c, i) => Math.round(c + share * (to[i] - c))), 255];
}

/* What a row or a column stands for. */
function place(axis, index) {
  const { H, H_kv, D, F } = about.sizes;
  if (axis === "T") return `“${tokenAt(index)}” (${index + 1})`;
  if (axis === "position") return `position ${index + 1}`;
  if (axis === "V") return `token “${textOf(index)}”`;
  if (axis === "row") return `token “${textOf(data.tied.ids[index])}”`;
  if (axis === "HD") return `head ${Math.floor(index / D) + 1}, element ${index % D + 1}`;
  if (axis === "2F") return index < F ? `gate ${index + 1}` : `value ${index - F + 1}`;
  if (axis === "M") {
    const head = Math.floor(index / D), [kind, at] = head < H ? ["q", head] : head < H + H_kv ? ["k", head - H] : ["v", head - H - H_kv];
    return `${kind}, head ${at + 1}, element ${index % D + 1}`;
  }
  return `${{ C: "channel", F: "unit", D: "element" }[axis] ?? axis} ${index + 1}`;
}

const shapeText = array => `(${array.axes.map(letter).join(", ")}) = ${array.shape.join(" × ")}`;

function sampledText(array) {
  const parts = [];
  if (array.rows) parts.push(`${array.rows.length} of ${count(array.shape.at(-2))} rows`);
  if (array.columns) parts.push(`${array.columns.length} of ${count(array.shape.at(-1))} columns`);
  return parts.length ? `shown: ${parts.join(", ")}` : "";
}

/* A heat map of an array. options: name; head: only this plane; marks: [[row, column]] that can be
   chosen; chosen: index of one; onchoose(index); rows: whether rows are named; onrow(row). */
function heat(index, options = {}) {
  const array = decoded(data.arrays[index]);
  const folded = array.shape.length === 1;
  const width = folded ? Math.min(64, array.atColumns.length) : array.atColumns.length;
  const height = folded ? Math.ceil(array.atColumns.length / width) : array.atRows.length;
  const heads = options.head === undefined ? range(array.planes) : [options.head];
  const statistics = `${number(array.least)} to ${number(array.most)}, mean ${number(array.mean, 2)}, rms ${number(array.rms)}`;
  const read = el("p", { class: "read" }, statistics);
  const cell = (head, row, column) => folded ? (row * width + column) : (head * height + row) * width + column;
  const size = Math.max(3, Math.min(12, Math.round(options.height ?? 228 / height)));

  function tell(head, row, column) {
    const at = cell(head, row, column), value = array.values[at];
    if (value === undefined) return;
    const [first, second] = [array.axes.at(-2), array.axes.at(-1)];
    const words = folded ? [place(second, array.atColumns[row * width + column])]
      : [first === "T" && second === "T" ? "query " + place(first, array.atRows[row]) : place(first, array.atRows[row]),
         first === "T" && second === "T" ? "key " + place(second, array.atColumns[column]) : place(second, array.atColumns[column])];
    if (array.planes > 1) words.unshift(`head ${head + 1}`);
    read.textContent = `${words.join(", ")}: ${Number.isFinite(value) ? number(value, 5) : "not seen"}`;
  }

  const planes = heads.map(head => {
    const canvas = el("canvas", { width, height, tabindex: 0, role: "img",
      "aria-label": `${options.name}, ${shapeText(array)}; arrow keys read its cells`, style: `height:${size * height}px` });
    canvas.paint = () => {
      const context = canvas.getContext("2d"), image = context.createImageData(width, height);
      for (let i = 0; i < width * height; i++)
        image.data.set(shade(array.values[folded ? i : head * width * height + i] ?? NaN, array.scale), 4 * i);
      context.putImageData(image, 0, 0);
    };
    canvas.paint();
    const overlay = el("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": true });
    const square = (row, column, name) => {
      const around = name.includes("chosen") && size < 8 ? 1 : 0;
      return el("rect", { x: column - around, y: row - around, width: 1 + 2 * around, height: 1 + 2 * around, class: name });
    };
    const marks = (options.marks ?? []).map(element => marked(array, folded, width, element));
    marks.forEach(([row, column], i) => overlay.append(square(row, column, i === options.chosen ? "element chosen" : "element")));
    const cursor = square(0, 0, "at");
    const at = { row: 0, column: 0 };
    let touched = null;
    const point = event => {
      const area = canvas.getBoundingClientRect();
      at.row = Math.min(height - 1, Math.max(0, Math.floor((event.clientY - area.top) / area.height * height)));
      at.column = Math.min(width - 1, Math.max(0, Math.floor((event.clientX - area.left) / area.width * width)));
    };
    const look = () => { cursor.setAttribute("x", at.column); cursor.setAttribute("y", at.row); overlay.append(cursor); tell(head, at.row, at.column); };
    const leave = () => { cursor.remove(); read.textContent = statistics; };
    const choose = () => {
      const near = marks.map(([row, column], i) => [Math.hypot(row - at.row, column - at.column), i]).sort((a, b) => a[0] - b[0])[0];
      if (near && options.onchoose && near[0] < 3) options.onchoose(near[1]);
      else if (options.onrow) options.onrow(array.atRows[at.row], head);
    };
    canvas.addEventListener("pointermove", event => { point(event); look(); });
    canvas.addEventListener("pointerleave", event => { if (event.pointerType !== "touch") leave(); });
    canvas.addEventListener("blur", leave);
    canvas.addEventListener("focus", look);
    canvas.addEventListener("click", event => {  // a finger's first tap reads a cell, its second chooses
      point(event);
      look();
      if (event.pointerType !== "touch" || touched === `${at.row} ${at.column}`) choose();
      touched = `${at.row} ${at.column}`;
    });
    canvas.addEventListener("keydown", event => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (step) { at.row = clamp(at.row + step[0], height); at.column = clamp(at.column + step[1], width); look(); }
      else if (event.key === "Enter" || event.key === " ") choose();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    return el("div", { class: "plane" }, canvas, overlay);
  });
  const named = options.rows !== false && !folded && ["T", "row"].includes(array.axes.at(-2));
  const rowName = row => array.axes.at(-2) === "T" ? tokenAt(row) : textOf(data.tied.ids[row]);
  return el("figure", {},
    el("figcaption", {}, el("b", {}, options.name), el("span", {}, shapeText(array)), el("span", {}, sampledText(array))),
    el("div", { class: "heat" },
      named ? el("ol", { "aria-hidden": true, style: `grid-template-rows:repeat(${height},${size}px)` },
        array.atRows.map(row => el("li", { class: row === options.row ? "chosen" : null }, size < 8 ? "" : rowName(row)))) : el("span"),
      el("div", { class: "planes" }, planes)),
    read);
}

/* Of the positions that an array keeps, the one nearest to the token in hand. */
function keptRow(index) {
  const rows = decoded(data.arrays[index]).atRows;
  return rows.reduce((best, row) => Math.abs(row - now.token) < Math.abs(best - now.token) ? row : best, rows[0]);
}
const notKept = index => t => !decoded(data.arrays[index]).atRows.includes(t);

const clamp = (value, size) => Math.max(0, Math.min(size - 1, value));

function marked(array, folded, width, element) {
  if (folded) { const i = array.atColumns.indexOf(element[0]); return [Math.floor(i / width), i % width]; }
  return [array.atRows.indexOf(element[0]), array.atColumns.indexOf(element[1])];
}

/* --------------------------------------------------------------------------------------- bars */

/* rows: [[name, value, text]]; signed: from the middle. */
function bars(rows, options = {}) {
  const most = options.most ?? largest(rows.map(row => row[1]));
  return el("div", { class: "bars", style: `--color:${options.color ?? "var(--forward)"}` }, rows.map(([name, value, text, chosen]) => [
    el("span", { class: chosen ? "chosen" : null, title: name }, name), bar(value, most, options.signed), el("b", {}, text ?? number(value))]));
}

function bar(value, most, signed) {
  const share = Math.min(100, 100 * Math.abs(value) / most) / (signed ? 2 : 1);
  const color = signed ? `background:var(--${value < 0 ? "negative" : "positive"});` : "";
  const left = signed ? (value < 0 ? 50 - share : 50) : 0;
  return el("div", { class: signed ? "bar signed" : "bar" }, el("i", { style: `${color}left:${left}%;width:${share}%` }));
}

function tokenButtons(chosen, choose, options = {}) {
  const ids = options.ids;
  return el("div", { class: "tokens small" }, (ids ?? tokens).map((token, t) => el("button", {
    type: "button", "aria-pressed": t === chosen, disabled: options.disabled?.(t), onclick: () => choose(t) }, ids ? textOf(token) : tokenAt(t))));
}

/* ------------------------------------------------------------------------ questions at a glance */

function drawSentence() {
  const scored = data.losses.filter(x => x !== null), most = Math.max(...scored);
  const holder = byId("tokens");
  holder.className = "tokens";
  const read = byId("token-read");
  const tell = t => {
    const loss = t ? data.losses[t - 1] : null;
    read.textContent = loss === null ? `“${tokenAt(t)}” comes first and is not predicted.`
      : `“${tokenAt(t)}”: loss ${number(loss)}, probability ${number(Math.exp(-loss))}, ${number(100 * loss / scored.reduce((a, b) => a + b), 2)}% of all.`;
  };
  const rest = () => { read.textContent = "The stronger a token's color, the larger its loss: how little the model expected it after the tokens before. Choose one to see its gradient."; };
  holder.replaceChildren(...tokens.map((token, t) => {
    const loss = t ? data.losses[t - 1] : null, share = loss === null ? 0 : loss / most;
    return el("button", { type: "button", style: `background:color-mix(in srgb, var(--positive) ${Math.round(75 * share)}%, var(--raised));${share > 0.55 ? "color:var(--paper)" : ""}`,
      onpointerenter: () => tell(t), onfocus: () => tell(t), onpointerleave: rest, onblur: rest,
      onclick: () => { if (t) now.token = t - 1; go(moments.findIndex(m => m.phase === "backward")); byId("box").scrollIntoView({ block: "start" }); } },
      tokenAt(t), el("small", {}, loss === null ? "\u00a0" : number(loss, 2)));
  }));
  rest();
}

function drawQuestions() {
  const byChange = Object.entries(parameters).map(([name, p]) => [name, p.norms.change / (p.norms.value || Infinity), p])
    .sort((a, b) => b[1] - a[1]).slice(0, 6);
  byId("questions").replaceChildren(
    el("div", {}, el("h2", {}, "Which layer received how much gradient?"), layerChart(),
      el("p", { class: "soft" }, "Line: the norm of the residual's gradient, which each branch adds to on its way back. Bars: the norm of the weights' gradients.")),
    el("div", {}, el("h2", {}, "Which weights moved most?"),
      bars(byChange.map(([name, share]) => [name, share, `${number(100 * share, 2)}%`]), { color: colorOf("update") }),
      el("p", { class: "soft" }, "Norm of the change by the norm of the weights.")),
    el("div", {}, el("h2", {}, "What would another update do?"),
      bars([["before", data.loss, data.loss.toFixed(3)], ...data.variants.map(v => [v.name, v.loss, v.loss.toFixed(3)])], { color: colorOf("forward") }),
      el("p", { class: "soft" }, `Loss of the same sentence after the update, which changes the weights by ${data.variants.map(v => `${number(v.length)} ${v.name === "this step" ? "in this step" : v.name}`).join(", ")} (norm of the change).`)));
}

function layerChart() {
  const groups = [...new Set(boxes.map(box => box.group))].filter(group => boxes.some(box => box.group === group && box.parameters.length));
  const sizes = groups.map(group => Math.hypot(...[...new Set(boxes.filter(box => box.group === group).flatMap(box => box.parameters))].map(name => parameters[name].norms.gradient)));
  const W = 320, H = 132, step = W / groups.length, most = Math.max(...sizes), top = Math.max(...data.residual.map(r => r.gradient));
  const where = layer => groups.indexOf(boxes.find(box => box.layer === layer).group);
  const points = data.residual.map(r => [step * (where(r.layer) + (r.layer.endsWith("norm_2") ? 0.72 : r.layer === "final_norm" ? 0.5 : 0.28)), 100 - 92 * r.gradient / top, r]);
  return el("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "Gradient norms by layer", style: "width:100%;max-width:26rem;font:9.5px system-ui" },
    groups.map((group, i) => el("g", {}, el("rect", { x: step * i + step * 0.2, width: step * 0.6, y: 100 - 92 * sizes[i] / most, height: 92 * sizes[i] / most, fill: colorOf("backward"), opacity: 0.3 },
      el("title", {}, `${group}: ${number(sizes[i])}`)),
      el("text", { x: step * (i + 0.5), y: 113, "text-anchor": "middle", fill: "var(--soft)" }, blockName(group)?.toLowerCase() ?? { embedding: "embed", final_norm: "norm" }[group] ?? group),
      el("text", { x: step * (i + 0.5), y: 125, "text-anchor": "middle", fill: "var(--soft)" }, number(sizes[i], 2)))),
    el("path", { d: "M" + points.map(([x, y]) => `${x},${y}`).join("L"), fill: "none", stroke: colorOf("backward"), "stroke-width": 2 }),
    [points[0], points.at(-1)].map(([x, y, r], i) => el("text", { x: x + (i ? 0 : 6), y: i ? y - 6 : y + 3, "text-anchor": i ? "middle" : "start", fill: colorOf("backward"), "font-weight": 600 }, number(r.gradient, 2))),
    points.map(([x, y, r]) => el("circle", { cx: x, cy: y, r: 2.6, fill: colorOf("backward") }, el("title", {}, `residual at ${r.layer}: gradient ${number(r.gradient)}, value ${number(r.norm)}`))));
}

/* ---------------------------------------------------------------------------------- map, time */

/* What can be followed element by element: weights, and the inputs of boxes that have no matrix. */
const subject = name => parameters[name] ?? data.results[name];
const resultOf = (box, pair) => `${box.layer}.${pair.name}`;
const subjectsOf = box => [...box.parameters, ...box.inputs.map(pair => resultOf(box, pair)).filter(name => data.results[name])];
const momentOf = (box, phase) => moments.findIndex(m => m.box === box && m.phase === phase);

function drawMap() {
  const residual = Object.fromEntries(data.residual.map(r => [r.layer, r.gradient]));
  const most = Math.max(...Object.values(residual));
  let width = 2, group = null;
  const rows = boxes.map((box, i) => {
    const last = lastOf(box), inBlock = box.group.startsWith("blocks.");
    const leaves = inBlock && last.startsWith("norm"), joins = last === "projection" || last === "down";
    if (residual[box.layer]) width = 2 + 5 * Math.sqrt(residual[box.layer] / most);
    const rail = way => el("span", { class: ["rail", way === "backward" && "back", leaves && "leaves", joins && "joins"].filter(Boolean).join(" "),
      style: `--color:${colorOf(way)};--size:${way === "backward" ? width.toFixed(1) : 2}px`, "data-rail": way, "data-box": i }, joins ? el("i", {}, "+") : null);
    const head = box.group !== group && inBlock ? [el("span", { class: "rail", style: `--color:${colorOf("forward")}`, "data-rail": "forward", "data-box": i }),
      el("span", { class: "group" }, blockName(box.group)), el("span", { class: "rail back", style: `--color:${colorOf("backward")};--size:${width.toFixed(1)}px`, "data-rail": "backward", "data-box": i })] : [];
    group = box.group;
    const button = way => el("button", { type: "button", class: way === "backward" ? "back" : null, "data-moment": momentOf(i, way), onclick: () => go(momentOf(i, way)) }, SHORT[lastOf(box)] ?? nameOf(box));
    return [...head, rail("forward"), button("forward"), el("span", { class: box.keeps ? "saved" : null, "data-box": i, title: `keeps ${count(box.keeps)} numbers for its backward` }), button("backward"), rail("backward")];
  });
  byId("map").replaceChildren(el("span", { class: "head" }, "Forward ↓"), el("span", { class: "head back" }, "Backward ↑"), el("span"), ...rows.flat(),
    el("span"), el("button", { type: "button", class: "update", "data-moment": moments.length - 1, onclick: () => go(moments.length - 1) }, "Update"), el("span"));
}

function markMap() {
  for (const button of byId("map").querySelectorAll("button")) {
    const at = +button.dataset.moment;
    button.classList.toggle("past", at < now.moment);
    if (at === now.moment) button.setAttribute("aria-current", "step"); else button.removeAttribute("aria-current");
  }
  for (const line of byId("map").querySelectorAll(".saved"))
    line.classList.toggle("alive", momentOf(+line.dataset.box, "forward") <= now.moment && momentOf(+line.dataset.box, "backward") > now.moment);
  for (const rail of byId("map").querySelectorAll(".rail"))
    rail.classList.toggle("lit", momentOf(+rail.dataset.box, rail.dataset.rail) <= now.moment);
  const holder = byId("map-holder"), current = byId("map").querySelector("[aria-current]");
  if (current && getComputedStyle(holder).position === "sticky") {
    const above = current.getBoundingClientRect().top - holder.getBoundingClientRect().top;
    if (above < 60 || above > holder.clientHeight - 60) holder.scrollTop += above - holder.clientHeight / 2;
  }
}

function drawTime() {
  const N = moments.length, most = Math.max(...moments.map(m => m.activations + m.gradients));
  const y = value => 38 - 36 * value / most;
  const area = (top, bottom, color) => el("path", { fill: color, opacity: 0.75,
    d: "M" + moments.map((m, i) => `${i},${y(top(m))}L${i + 1},${y(top(m))}`).join("L") + "L" + moments.map((m, i) => `${i + 1},${y(bottom(m))}L${i},${y(bottom(m))}`).reverse().join("L") + "Z" });
  const slider = el("input", { type: "range", min: 0, max: N - 1, value: 0, "aria-label": "Moment of the step", oninput: event => go(+event.target.value) });
  byId("time").replaceChildren(
    el("div", { class: "line" },
      el("button", { type: "button", "aria-label": "Back", onclick: () => go(now.moment - 1) }, "←"),
      el("button", { type: "button", "aria-label": "Onward", onclick: () => go(now.moment + 1) }, "→"),
      el("span", { class: "what", "aria-live": "polite" }), el("span", { class: "alive" })),
    el("div", { class: "track" },
      el("svg", { viewBox: `0 0 ${N} 38`, preserveAspectRatio: "none", "aria-hidden": true },
        area(m => m.activations, () => 0, colorOf("forward")), area(m => m.activations + m.gradients, m => m.activations, colorOf("backward")),
        el("line", { x1: 0, x2: N, y1: 38, y2: 38, stroke: "var(--rule)", "vector-effect": "non-scaling-stroke" })),
      slider, el("div", { class: "thumb" })));
}

function markTime() {
  const moment = moments[now.moment], box = boxes[moment.box];
  const where = box ? [blockName(box.group), nameOf(box)].filter(Boolean).join(", ") : "all weights";
  const time = byId("time");
  time.querySelector(".what").replaceChildren(el("b", { style: `color:${colorOf(moment.phase)}` }, PHASES[moment.phase]), ` ${where}`);
  time.querySelector(".alive").textContent = `in memory: ${count(moment.activations)} numbers of activations, ${count(moment.gradients)} of gradients`;
  const slider = time.querySelector("input");
  slider.value = now.moment;
  slider.setAttribute("aria-valuetext", `${PHASES[moment.phase]}: ${where}`);
  time.querySelector(".thumb").style.left = `${100 * (now.moment + 0.5) / moments.length}%`;
}

/* ------------------------------------------------------------------------------ the box in hand */

function drawBox() {
  const moment = moments[now.moment], box = boxes[moment.box];
  const holder = byId("box");
  const focused = holder.contains(document.activeElement) ? label(document.activeElement) : null;
  holder.style.setProperty("--color", colorOf(moment.phase));
  holder.replaceChildren(...(box ? operation(box, moment) : update(moment)));
  if (focused) [...holder.querySelectorAll("button, select, canvas, a, pre")].find(node => label(node) === focused)?.focus({ preventScroll: true });
}

/* What a control is called, to find it again after a drawing. */
const label = node => node.tagName + (node.getAttribute("aria-label") ?? (node.tagName === "BUTTON" ? node.textContent : ""));

function operation(box, moment) {
  const words = data.words[box.operation], other = moment.phase === "forward" ? "backward" : "forward";
  const subjects = subjectsOf(box);
  if (!subjects.includes(now.parameter)) choose(subjects[0] ?? null, null, false);
  return [
    el("header", {}, el("span", { class: "phase" }, [PHASES[moment.phase], blockName(box.group)].filter(Boolean).join(" · ")),
      el("button", { type: "button", onclick: () => go(momentOf(moment.box, other)) }, `see its ${other}`)),
    el("h2", {}, nameOf(box)),
    el("p", { class: "why" }, words[moment.phase].why),
    el("div", { class: "ways" }, ["forward", "backward"].map(way => el("div", { class: way === moment.phase ? "way now" : "way", style: `--color:${colorOf(way)}` },
      el("h3", {}, PHASES[way]), words[way].formulas.map(line => el("div", {}, line))))),
    flow(box, moment),
    proof(box),
    ({ attention, cross_entropy: crossEntropy, embedding: tied, layer_norm: norm, add_layer_norm: norm, rms_norm: norm, add_rms_norm: norm })[box.operation]?.(box, moment),
    code(moment, words),
  ].filter(Boolean);
}

function flow(box, moment) {
  const back = moment.phase === "backward", later = back ? null : "later", at = moment.box;
  const neighbor = (index, words) => boxes[index] ? [`, ${words} `, el("button", { type: "button", onclick: () => go(momentOf(index, moment.phase)) }, nameOf(boxes[index]))] : [];
  const column = (title, values, gradients) => [el("h3", {}, title), el("div", { class: "heats" }, values), el("div", { class: `heats ${later ?? ""}` }, gradients)];
  const side = pairs => [pairs.map(p => heat(p.value, { name: p.name, row: now.token, onrow: chooseToken })),
    pairs.filter(p => p.gradient !== null).map(p => heat(p.gradient, { name: p.gradient_name, row: now.token, onrow: chooseToken, ...marksOf(pairs === box.inputs ? resultOf(box, p) : "") }))];
  const weights = box.parameters.map(name => [name, parameters[name]]);
  const short = name => name.split(".").slice(-2).join(".");
  return el("section", { class: "part flow", "aria-label": "What goes in and out" },
    box.inputs.length ? column(["In", neighbor(at - 1, back ? "gradient to" : "from"), box.operation.startsWith("add_") ? " and the residual" : ""], ...side(box.inputs)) : [],
    weights.length ? column("Weights", weights.map(([name, p]) => heat(p.value, { name: short(name) })),
      weights.map(([name, p]) => heat(p.gradient, { name: `d ${short(name)}`, ...marksOf(name) }))) : [],
    column(["Out", neighbor(at + 1, back ? "gradient from" : "to")], ...side(box.outputs)));
}

/* The elements of a subject that can be chosen in its heat map. */
function marksOf(name) {
  if (!subject(name)) return {};
  return { marks: subject(name).elements, chosen: name === now.parameter ? now.element : -1, onchoose: element => choose(name, element) };
}

/* The chosen element's gradient, and the loss on both sides of it. */
function proof(box) {
  const pairs = [...box.inputs, ...box.outputs].filter(p => p.error).map(p => [p.gradient_name, p.error]);
  const weights = box.parameters.filter(name => parameters[name].error).map(name => [`d ${name}`, parameters[name].error]);
  const checked = [...pairs, ...weights];
  if (!checked.length) return null;
  return el("section", { class: "part", "aria-label": "The proof" }, el("h2", {}, "The proof"),
    el("p", {}, `These gradients agree with autograd's to ${number(Math.max(...checked.map(([, error]) => error.relative)), 2)} of their largest element.`),
    el("div", { class: "columns" },
      el("div", {}, el("h3", {}, "Against autograd, in float64"),
        el("table", { class: "names" }, el("thead", {}, el("tr", {}, ["gradient", "largest error", "relative"].map(x => el("th", {}, x)))),
          el("tbody", {}, checked.map(([name, error]) => el("tr", {}, el("td", {}, name), el("td", {}, number(error.absolute, 2)), el("td", {}, number(error.relative, 2))))))),
      now.parameter ? difference(subjectsOf(box)) : null));
}

function chooser(names) {
  const p = subject(now.parameter);
  return el("div", { class: "controls" },
    el("select", { "aria-label": "Which gradient", onchange: event => choose(event.target.value, null) }, names.map(name => el("option", { value: name, selected: name === now.parameter }, parameters[name] ? name : `the input, ${name.split(".").pop()}`))),
    el("button", { type: "button", "aria-label": "The element before", onclick: () => choose(now.parameter, now.element - 1) }, "‹"),
    el("span", { class: "mono" }, `[${p.elements[now.element].join(", ")}]`),
    el("button", { type: "button", "aria-label": "The next element", onclick: () => choose(now.parameter, now.element + 1) }, "›"),
    el("span", { class: "soft" }, `${now.element + 1} of ${p.elements.length}, framed in the heat map`));
}

/* The digits in which two numbers agree, and the rest. */
function agreeing(value, other) {
  const [a, b] = [value, other].map(x => x.toExponential(9).replace(/-/g, "−"));
  const sameExponent = a.split("e")[1] === b.split("e")[1];
  let n = 0;
  while (sameExponent && n < a.length && a[n] === b[n]) n++;
  return [el("span", { class: "same" }, a.slice(0, n)), a.slice(n)];
}

function difference(names) {
  const p = subject(now.parameter), i = now.element, { step, above, below, slopes } = p.differences;
  const line = (name, value) => [el("span", {}, name), el("code", {}, value), el("span")];
  return el("div", { id: "difference" }, el("h3", {}, "Against the loss itself: a finite difference"), chooser(names),
    el("div", { class: "sums" }, line(`loss with the element + ${number(step)}`, above[i].toFixed(12)), line(`loss with it − ${number(step)}`, below[i].toFixed(12)),
      line(`their difference / ${number(2 * step)}`, agreeing(slopes[i], p.gradients[i])), line("the backward's gradient", agreeing(p.gradients[i], slopes[i])),
      line("difference of the two", number(slopes[i] - p.gradients[i], 2))));
}

function code(moment, words) {
  const link = (where, text) => where.link ? el("a", { href: where.link }, text) : text;
  const listing = name => {
    const { file, line, source } = data.functions[name];
    let quoted = false;
    const lines = source.split("\n").map((text, i) => {
      const marks = (text.match(/"""/g) ?? []).length, doc = quoted || marks > 0;
      if (marks === 1) quoted = !quoted;
      return [el("span", { class: "n" }, `${String(line + i).padStart(4)}  `), el("span", { class: doc || text.trim().startsWith("#") ? "doc" : null }, `${text}\n`)];
    });
    return [el("h3", { style: "margin-top:1rem" }, `${name}, `, link(data.functions[name], `${file}:${line}`)), el("pre", { tabindex: 0 }, lines.flat())];
  };
  return el("section", { class: "part" }, el("h2", {}, "The code that computed it"),
    el("p", { class: "soft" }, "called at ", link(moment.caller, `${moment.caller.file}:${moment.caller.line}`), "; derived in ", link(words.derivation, words.derivation.file)),
    moment.functions.map(listing).flat());
}

/* --------------------------------------------------------------------- what is special about some */

function attention(box, moment) {
  const pair = Object.fromEntries(box.inside.map(p => [p.name, p])), back = moment.phase === "backward";
  const i = keptRow(pair.p.value), read = (index, j) => { const a = decoded(data.arrays[index]); return a.values[(now.head * a.atRows.length + a.atRows.indexOf(i)) * a.atColumns.length + a.atColumns.indexOf(j)]; };
  const keys = range(i + 1).filter(j => data.arrays[pair.p.value].columns?.includes(j) ?? true);
  const p = keys.map(j => read(pair.p.value, j)), dp = keys.map(j => read(pair.p.gradient, j)), ds = keys.map(j => read(pair.scores.gradient, j));
  const delta = data.deltas[box.layer][now.head][i], unseen = i + 1 - keys.length;
  const cells = (j, n) => [el("td", {}, tokenAt(j)), el("td", { class: "wide" }, bar(p[n], 1)), el("td", {}, number(p[n]))].concat(back ? [
    el("td", { class: "spare" }, number(dp[n])), el("td", {}, number(dp[n] - delta)), el("td", { class: "wide" }, bar(ds[n], largest(ds), true)), el("td", {}, number(ds[n]))] : []);
  const choosePlane = (row, head) => { now.head = head; chooseToken(row); };
  const inside = ["q", "k", "v"].map(name => [el("h3", {}, `${name} and d${name}, head ${now.head + 1}`), heat(pair[name].value, { name, head: now.head, row: i, onrow: chooseToken }),
    el("div", { class: back ? null : "later" }, heat(pair[name].gradient, { name: `d${name}`, head: now.head, row: i, onrow: chooseToken }))]);
  return el("section", { class: "part", "aria-label": "Inside attention" },
    el("h2", {}, back ? "Where a query's gradient goes" : "What a query looks at"),
    el("div", { class: "controls" }, range(about.sizes.H).map(h => el("button", { type: "button", "aria-pressed": h === now.head, onclick: () => { now.head = h; drawBox(); } }, `head ${h + 1}`))),
    tokenButtons(i, chooseToken, { disabled: notKept(pair.p.value) }),
    el("div", { class: "columns", style: "margin-top:1rem" },
      el("div", { class: "heats" }, heat(pair.p.value, { name: "p, all heads", onrow: choosePlane, row: i }), back ? heat(pair.scores.gradient, { name: "ds, all heads", onrow: choosePlane, row: i }) : null),
      el("div", {}, el("table", { style: `--color:${colorOf("forward")}` },
        el("thead", {}, el("tr", {}, ["key", "", "p"].concat(back ? ["dp", "dp − δ", "", "ds"] : []).map(x => el("th", { class: x === "dp" ? "spare" : null }, x)))),
        el("tbody", {}, keys.map((j, n) => el("tr", {}, cells(j, n))))),
        unseen ? el("p", { class: "soft" }, `${count(unseen)} other keys are not shown.`) : null,
        back ? el("p", { class: "soft", style: "margin-top:.6rem" }, `δ = Σ p dp = ${number(delta)}: the one number that the softmax takes from every dp of this query, because raising one weight lowers the others. `
          + "Then dq gathers ds k over the keys; each key receives ds q, each value p dout.") : null)),
    el("div", { class: "flow", style: "margin-top:1.2rem" }, inside));
}

function norm(box, moment) {
  if (moment.phase === "forward") return null;
  const means = data.norms[box.layer], [pair] = box.inside, t = keptRow(pair.value);
  const row = index => { const a = decoded(data.arrays[index]), n = a.atColumns.length, at = a.atRows.indexOf(t); return [...a.values.subarray(at * n, (at + 1) * n)]; };
  const g = row(pair.gradient), xHat = row(pair.value), shift = means.g ? means.g[t] : 0, along = means.x_hat[t];
  const scale = largest(g), strip = (name, values, note) => [el("span", {}, name), stripOf(values, scale, name), el("span", { class: "soft" }, note)];
  const lost = (shift ** 2 + along ** 2) / means.square[t];
  return el("section", { class: "part", "aria-label": "What the gradient loses" },
    el("h2", {}, means.g ? "The two means that the gradient loses" : "The mean that the gradient loses"), tokenButtons(t, chooseToken, { disabled: notKept(pair.value) }),
    el("div", { class: "strips" },
      strip("g = γ dy", g, "what arrives"),
      means.g ? strip("mean(g)", g.map(() => shift), number(shift)) : [],
      strip("x̂ mean(g x̂)", xHat.map(x => x * along), number(along)),
      strip("the rest", g.map((x, n) => x - shift - xHat[n] * along), `${number(100 * lost, 2)}% of Σ g² is gone`)),
    el("p", { class: "soft" }, "The rest is divided by the row's deviation; then the gradient that went around the norm, on the residual, is added: dx."));
}

function stripOf(values, scale, name) {
  const canvas = el("canvas", { width: values.length, height: 1, role: "img", "aria-label": name, class: "strip" });
  canvas.paint = () => {
    const context = canvas.getContext("2d"), image = context.createImageData(values.length, 1);
    values.forEach((value, i) => image.data.set(shade(value, scale), 4 * i));
    context.putImageData(image, 0, 0);
  };
  canvas.paint();
  return canvas;
}

function crossEntropy(box, moment) {
  const t = clamp(now.token, tokens.length), row = data.predictions[t], target = data.targets[t], back = moment.phase === "backward";
  const label = id => `${textOf(id)}${id === target ? "  ← comes next" : ""}`;
  return el("section", { class: "part", "aria-label": "Token by token" },
    el("h2", {}, back ? "Probabilities minus one-hot, token by token" : "What the model expected, token by token"), tokenButtons(t, chooseToken),
    el("p", { class: "soft", style: "margin-top:.6rem" }, target === null ? "Nothing comes after the last token: no loss, no gradient."
      : `After “${tokenAt(t)}” comes “${textOf(target)}”: loss ${number(data.losses[t], 4)} = −log ${number(row.probabilities[row.ids.indexOf(target)], 4)}.`),
    el("div", { class: "columns" },
      el("div", {}, el("h3", {}, "softmax(z)"), bars(row.ids.map((id, n) => [label(id), row.probabilities[n], number(row.probabilities[n]), id === target]), { most: 1 })),
      back ? el("div", {}, el("h3", {}, `dz = (softmax(z) − onehot) / ${data.losses.filter(x => x !== null).length}`),
        bars(row.ids.map((id, n) => [label(id), row.gradients[n], number(row.gradients[n]), id === target]), { signed: true })) : null));
}

function tied(box, moment) {
  if (!data.tied || moment.phase !== "backward") return null;
  const { ids, norms } = data.tied, r = Math.max(0, ids.indexOf(tokens[now.token].id));
  const names = { output: "from the output: as a word that could come next", embedding: "from the embedding: as a word that was read", together: "together: what the optimizer sees" };
  return el("section", { class: "part", "aria-label": "Two gradients meet" },
    el("h2", {}, "Two gradients that meet in one row"),
    el("p", {}, "The table is used twice, so each row's gradient has two parts, and both are added in the same memory."),
    tokenButtons(r, at => { now.token = tokens.findIndex(token => token.id === ids[at]); drawBox(); }, { ids }),
    el("div", { style: "margin:1rem 0" }, bars(Object.entries(names).map(([part, name]) => [`${name.split(":")[0]}`, norms[part][r], `norm ${number(norms[part][r])}`]), { color: colorOf("backward") })),
    el("div", { class: "flow" }, Object.entries(names).map(([part, name]) => [el("h3", {}, name), heat(data.tied[part], { name: part, row: r }), el("span")])));
}

function update(moment) {
  const words = data.words[about.optimizer.name], names = Object.keys(parameters);
  if (!parameters[now.parameter]) choose(names.find(name => name.endsWith("qkv.weight")) ?? names[0], null, false);
  const p = parameters[now.parameter], i = now.element, u = p.update, value = name => u[name]?.[i];
  const steps = [["gradient", p.gradients[i], "of the backward"], ["clipped", p.gradients[i] * about.clip, `times c = ${number(about.clip)}`],
    ["m", value("m"), "mean of the gradients lately"], ["v", value("v"), "mean of their squares"],
    ["m̂", value("m_hat"), "corrected for its beginning at 0"], ["v̂", value("v_hat"), "the same"], ["w before", p.before[i], ""], ["step", p.after[i] - p.before[i], "decay included"], ["w after", p.after[i], ""]]
    .filter(([, x]) => x !== undefined);
  return [
    el("header", {}, el("span", { class: "phase" }, "Update")), el("h2", {}, words.title), el("p", { class: "why" }, words.backward.why),
    el("div", { class: "ways" }, el("div", { class: "way now" }, words.backward.formulas.map(line => el("div", {}, line))),
      el("div", { class: "way" }, Object.entries({ "learning rate η": about.learning_rate, ...about.optimizer }).filter(([, x]) => typeof x === "number").map(([name, x]) => el("div", {}, `${name.replace(/_/g, " ")} = ${number(x)}`)))),
    el("section", { class: "part" }, el("h2", {}, "Clipping"),
      bars([["gradient norm", about.grad_norm], ["after clipping", about.grad_norm * about.clip]], { color: colorOf("backward") }),
      el("p", { class: "soft", style: "margin-top:.5rem" }, about.clip < 1 ? `The gradient is longer than the limit ${number(about.optimizer.max_grad_norm)}, so all of it is multiplied by ${number(about.clip)}: its direction stays.` : "The gradient is shorter than the limit and stays as it is.")),
    el("section", { class: "part" }, el("h2", {}, "One weight's step"), chooser(names),
      el("div", { class: "columns" }, heat(p.gradient, { name: `d ${now.parameter}`, ...marksOf(now.parameter) }),
        el("div", { class: "sums" }, steps.map(([name, x, note]) => [el("span", {}, name), el("code", {}, number(x, 6)), el("span", { class: "soft" }, note)])))),
    code(moment, words)];
}

/* ----------------------------------------------------------------------------------- movement */

function chooseToken(t) { now.token = clamp(t, tokens.length); drawBox(); }

/* element: null for the one with the largest gradient. */
function choose(name, element, draw = true) {
  const gradients = subject(name)?.gradients ?? [0], n = gradients.length;
  const steepest = gradients.map(Math.abs).indexOf(largest(gradients));
  Object.assign(now, { parameter: name, element: element === null ? Math.max(0, steepest) : (element + n) % n });
  if (draw) drawBox();
}

function go(moment) {
  const next = clamp(moment, moments.length);
  now.moment = next;
  const { box, phase } = moments[next];
  history.replaceState(null, "", `#${box === null ? "update" : `${boxes[box].layer}/${phase}`}`);
  show();
}

function show() { markMap(); markTime(); drawBox(); }

/* #blocks.0.attention/backward, or of the first box of an operation, #attention/backward. */
function fromAddress() {
  const [layer, phase = "forward"] = decodeURIComponent(location.hash.slice(1)).split("/");
  const box = boxes.findIndex(b => b.layer === layer || b.operation === layer || b.layer.endsWith(`.${layer}`));
  const moment = ["update", about.optimizer.name].includes(layer) ? moments.length - 1 : momentOf(box, phase);
  if (moment < 0) return false;
  now.moment = moment;
  return true;
}

document.addEventListener("keydown", event => {
  if (event.altKey || event.ctrlKey || event.metaKey || ["SELECT", "INPUT", "PRE"].includes(event.target.tagName)) return;
  const to = { ArrowLeft: now.moment - 1, ArrowRight: now.moment + 1, Home: 0, End: moments.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  go(to);
});
window.addEventListener("hashchange", () => { if (fromAddress()) show(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readPalette(); show(); });

readPalette();
if (matchMedia("(max-width: 62rem)").matches) byId("map-holder").removeAttribute("open");
drawSentence();
drawQuestions();
drawMap();
drawTime();
const asked = fromAddress();
show();
if (asked) byId("box").scrollIntoView({ block: "start" });
