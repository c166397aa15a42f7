"use strict";
// Draws the curves, plays the gallery and lists answers, from the JSON that the page carries.
const data = JSON.parse(document.getElementById("data").textContent);

function element(name, attributes, parent, text) {
  const isShape = parent && (parent instanceof SVGElement || name === "svg");
  const made = isShape ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function ticks(low, high, most, least = 0) {
  const rough = Math.max(least, (high - low) / most), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((each) => each >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(+at.toPrecision(12));
  return found;
}

const shown = (value) =>
  value && Math.abs(value) < 1e-3 ? value.toExponential(2).replace(/\.?0+e/, "e") : String(+value.toPrecision(4));

class Chart {
  constructor(chart, hidden) {
    this.chart = chart;
    this.hidden = hidden;
    this.figure = element("figure", { class: "chart" }, document.getElementById("charts"));
    element("figcaption", {}, this.figure, chart.title);
    this.box = element("div", { class: "plot" }, this.figure);
    this.tip = element("div", { class: "tip", hidden: "" }, this.figure);
    this.range = null;
    this.box.addEventListener("pointermove", (event) => this.hover(event));
    this.box.addEventListener("pointerleave", () => this.leave());
    this.box.addEventListener("pointerdown", (event) => { this.from = this.step(event); });
    this.box.addEventListener("pointerup", (event) => this.zoom(this.from, this.step(event)));
    this.box.addEventListener("dblclick", () => { this.range = null; this.draw(); });
  }

  lines() { return this.chart.lines.filter((line) => !this.hidden.has(line.method)); }

  draw() {
    const width = this.width = this.box.clientWidth || 520, height = this.height = 230;
    this.box.replaceChildren();
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, width, height }, this.box);
    const lines = this.lines();
    const xs = lines.flatMap((line) => line.x);
    const [first, last] = this.range || [Math.min(...xs), Math.max(...xs)];
    const ys = lines.flatMap((line) => line.y.filter((_, i) => first <= line.x[i] && line.x[i] <= last));
    if (!ys.length) return;
    let low = Math.min(...ys), high = Math.max(...ys);
    if (low > 0 && low < high) low = Math.min(low, Math.max(0, low - 0.1 * (high - low)));
    if (low === high) { low -= Math.abs(low) / 10 || 1; high += Math.abs(high) / 10 || 1; }
    this.view = [first, Math.max(last, first + 1)];
    this.x = (step) => 48 + (width - 58) * (step - this.view[0]) / (this.view[1] - this.view[0]);
    const y = (value) => height - 26 - (height - 36) * (value - low) / (high - low);
    for (const at of ticks(low, high, 5)) {
      element("line", { x1: 48, x2: width - 10, y1: y(at), y2: y(at), class: "grid" }, svg);
      element("text", { x: 44, y: y(at) + 4, "text-anchor": "end" }, svg, shown(at));
    }
    for (const at of ticks(...this.view, width / 90, 1))
      element("text", { x: this.x(at), y: height - 8, "text-anchor": "middle" }, svg, shown(at));
    for (const line of lines) {
      const colour = data.methods[line.method].colour;
      const points = line.x.map((step, i) => [step, line.y[i]]).filter(([step]) => first <= step && step <= last);
      const path = points.map(([step, value]) => `${this.x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
      element("polyline", { points: path, stroke: colour }, svg);
      if (points.length < 40)
        for (const [step, value] of points) element("circle", { cx: this.x(step), cy: y(value), r: 2.5, fill: colour }, svg);
    }
    this.guide = element("line", { y1: 8, y2: height - 26, class: "guide", visibility: "hidden" }, svg);
  }

  step(event) {
    const box = this.box.getBoundingClientRect();
    const share = ((event.clientX - box.left) * this.width / box.width - 48) / (this.width - 58);
    return this.view[0] + share * (this.view[1] - this.view[0]);
  }

  hover(event) {
    if (!this.view) return;
    const steps = this.lines().flatMap((line) => line.x), wanted = this.step(event);
    const step = steps.reduce((best, each) => Math.abs(each - wanted) < Math.abs(best - wanted) ? each : best, steps[0]);
    const byMethod = new Map();
    for (const line of this.lines()) {
      const value = line.y[line.x.findLastIndex((each) => each <= step)];
      if (value !== undefined) byMethod.set(line.method, [...(byMethod.get(line.method) || []), value]);
    }
    this.tip.replaceChildren();
    element("b", {}, this.tip, `step ${step}`);
    for (const [method, values] of byMethod) {
      const mean = values.reduce((sum, value) => sum + value) / values.length;
      const spread = values.length > 1 ? ` (${shown(Math.min(...values))} to ${shown(Math.max(...values))})` : "";
      const row = element("div", {}, this.tip);
      element("i", { style: `background:${data.methods[method].colour}` }, row);
      row.append(` ${data.methods[method].label}: ${shown(mean)}${spread}`);
    }
    this.tip.hidden = false;
    this.guide.setAttribute("x1", this.x(step));
    this.guide.setAttribute("x2", this.x(step));
    this.guide.setAttribute("visibility", "visible");
  }

  leave() {
    this.tip.hidden = true;
    if (this.guide) this.guide.setAttribute("visibility", "hidden");
  }

  zoom(from, to) {
    const [low, high] = [Math.min(from, to), Math.max(from, to)];
    if (Number.isFinite(low) && high - low > 0.03 * (this.view[1] - this.view[0])) { this.range = [low, high]; this.draw(); }
  }
}

function drawCharts() {
  if (!data.charts.length) return;
  const hidden = new Set(), all = [];
  const legend = document.getElementById("legend");
  data.methods.forEach((method, index) => {
    const label = element("label", {}, legend);
    const box = element("input", { type: "checkbox", checked: "" }, label);
    element("i", { style: `background:${method.colour}` }, label);
    label.append(` ${method.label}`);
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(index); else hidden.add(index);
      all.forEach((chart) => chart.draw());
    });
  });
  for (const chart of data.charts) all.push(new Chart(chart, hidden));
  const draw = () => all.forEach((chart) => chart.draw());
  addEventListener("resize", draw);
  draw();  // only now are columns as wide as they stay
}

function play(article) {
  const frames = [...article.querySelectorAll(".frames img")], slider = article.querySelector("input[type=range]");
  const screen = article.querySelector(".screen img"), time = article.querySelector("output"), button = article.querySelector("button");
  const duration = +article.dataset.duration;
  let timer = null;
  const show = () => {
    const share = slider.value / slider.max;
    const frame = frames[Math.min(frames.length - 1, Math.floor(share * frames.length))];
    screen.src = frame.src;
    time.textContent = `${(share * duration).toFixed(1)} s`;
    article.querySelectorAll(".now").forEach((line) => { line.style.left = `${100 * share}%`; });
  };
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
  slider.addEventListener("input", show);
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (+slider.value >= +slider.max) slider.value = 0;
    button.textContent = "Pause";
    timer = setInterval(() => {
      slider.value = +slider.value + slider.max / 80;
      show();
      if (+slider.value >= +slider.max) stop();
    }, 100);
  });
  show();
}

const times = (span) => span ? `${span[0].toFixed(2)} to ${span[1].toFixed(2)}` : "no answer";

function listAnswers() {
  const found = location.hash.match(/^#answers-(\w+)-(\d+)$/), place = document.getElementById("answers");
  if (!found || !place || !data.answers[found[1]]) return;
  const [, mode, method] = found;
  const runs = data.answers[mode].filter((run) => run.method === +method);
  place.replaceChildren();
  element("h3", {}, place, `${data.methods[method].label}, ${mode} mode`);
  const wide = element("div", { class: "wide" }, place), table = element("table", {}, wide);
  const head = element("tr", {}, element("thead", {}, table));
  for (const name of ["query", "video", "true", ...runs.map((run) => `${run.run}: answer`), ...runs.map(() => "IoU, %")])
    element("th", {}, head, name);
  const order = runs[0].rows.map((_, index) => index);
  const mean = (index) => runs.reduce((sum, run) => sum + (run.rows[index] ? run.rows[index][2] : 0), 0);
  order.sort((a, b) => mean(a) - mean(b));
  const body = element("tbody", {}, table);
  for (const index of order) {
    const [query, video, windows] = data.samples[index], row = element("tr", {}, body);
    for (const text of [query, video, windows.map(times).join(", ")]) element("td", {}, row, text);
    for (const run of runs) element("td", {}, row, run.rows[index] ? times(run.rows[index][0] === null ? null : run.rows[index]) : "not asked");
    for (const run of runs) element("td", {}, row, run.rows[index] ? (100 * run.rows[index][2]).toFixed(0) : "-");
  }
  place.scrollIntoView();
}

drawCharts();
document.querySelectorAll("article.plays").forEach(play);
addEventListener("hashchange", listAnswers);
listAnswers();
