"use strict";
// A chart: lines over two axes as SVG, and their values under the pointer. `chart(figure).draw(picture)` draws anew
// whenever something is different: a line switched on, another axis, more points.
//
//   picture = { lines, x: "steps" | "seconds" | "tokens", logX, logY }
//   line    = { name, colour, dashed, x: [..], y: [..], mean: { x: [..], y: [..] } or null }

const HEIGHT = 280;
const MARGIN = { top: 12, right: 16, bottom: 44 };
// Up to so many points are marked one by one.
const FEW = 24;
// A line whose nearest point is farther than so many pixels has no value under the pointer.
const NEAR = 40;
const NAMES = { steps: "step", seconds: "training time", tokens: "tokens" };
// Marks on an axis of time, in seconds.
const TIMES = [
  0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400,
];

function chart(figure) {
  const frame = figure.querySelector(".chart");
  const svg = frame.querySelector("svg");
  const tip = frame.querySelector(".tip");
  let picture = null;
  let view = null;

  function add(parent, name, attributes, text) {
    const node = document.createElementNS(svg.namespaceURI, name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    return parent.appendChild(node);
  }

  function draw(next) {
    picture = next;
    const width = Math.max(240, frame.clientWidth);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    tip.hidden = true;
    const x = domain(picture.lines.map((line) => line.x), picture.logX, 0);
    const y = domain(picture.lines.map((line) => line.y), picture.logY, 0.05);
    view = x && y && place(x, y, width);
    if (!view) {
      add(svg, "text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "nothing to draw");
      return;
    }
    axes();
    if (picture.logY && !y.log) {
      add(svg, "text", { x: view.right, y: MARGIN.top + 2, "text-anchor": "end" }, "linear: values below 0");
    }
    // The means go on top of every pale line. A line that others lie upon is wider, and shows on both sides of them.
    const drawn = picture.lines.map((line) => line.mean ?? line);
    const upon = drawn.map((one, i) => drawn.slice(i + 1).filter((other) => lies(one, other)).length);
    picture.lines.forEach((line, i) => trace(line, line, line.mean ? "pale" : "", upon[i]));
    picture.lines.forEach((line, i) => { if (line.mean) trace(line, line.mean, "", upon[i]); });
  }

  // Whether two lines are one to the eye.
  function lies(one, other) {
    const near = (left, right) => Math.abs(left - right) <= 1;
    return one.x.length === other.x.length
      && one.x.every((x, i) => x === other.x[i] && near(view.y(one.y[i]), view.y(other.y[i])));
  }

  // Where values lie, with as much room on the left as the marks need.
  function place(x, y, width) {
    const up = marks(y, 5);
    const left = 16 + 7 * Math.max(3, ...up.map(({ text }) => text.length));
    const across = marks(x, Math.max(2, Math.round(width / 110)), picture.x);
    const [right, bottom] = [width - MARGIN.right, HEIGHT - MARGIN.bottom];
    return { width, left, right, bottom, up, across, x: scale(x, left, right), y: scale(y, bottom, MARGIN.top) };
  }

  function axes() {
    const { left, right, bottom } = view;
    for (const { value, text } of view.up) {
      const at = view.y(value);
      add(svg, "line", { class: "grid", x1: left, x2: right, y1: at, y2: at });
      add(svg, "text", { x: left - 8, y: at + 4, "text-anchor": "end" }, text);
    }
    add(svg, "line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom });
    add(svg, "text", { x: (left + right) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, NAMES[picture.x]);
    for (const { value, text } of view.across) {
      const at = view.x(value);
      add(svg, "line", { class: "axis", x1: at, x2: at, y1: bottom, y2: bottom + 4 });
      add(svg, "text", { x: at, y: bottom + 18, "text-anchor": at > right - 20 ? "end" : "middle" }, text);
    }
  }

  function trace(line, { x, y }, style, upon) {
    let path = "", gap = true, count = 0;
    for (let i = 0; i < x.length; i++) {
      const across = view.x(x[i]), up = view.y(y[i]);
      if (!Number.isFinite(across) || !Number.isFinite(up)) { gap = true; continue; }
      path += `${gap ? "M" : "L"}${across.toFixed(1)} ${up.toFixed(1)}`;
      gap = false;
      count++;
    }
    const pale = style === "pale";
    const dashed = line.dashed && !pale ? "dashed" : "";
    const node = add(svg, "path", { class: `line ${style} ${dashed}`, d: path, stroke: line.colour });
    // The more lines there are, the paler what lies beneath their means.
    if (pale) node.setAttribute("stroke-opacity", 0.35 / Math.sqrt(picture.lines.length));
    if (upon > 0 && !pale) node.style.strokeWidth = 1.8 + 3 * upon;
    if (count > FEW || pale) return;
    for (let i = 0; i < x.length; i++) {
      mark(x[i], y[i], 3 + 1.5 * upon, line.colour);
    }
  }

  function mark(x, y, r, fill, style = "") {
    const [cx, cy] = [view.x(x), view.y(y)];
    if (Number.isFinite(cx) && Number.isFinite(cy)) add(svg, "circle", { class: style, cx, cy, r, fill });
  }

  function point(event) {
    if (!view) return;
    const box = svg.getBoundingClientRect();
    const pointer = (event.clientX - box.left) * (view.width / box.width);
    const found = [];
    for (const line of picture.lines) {
      const at = nearest(line.x, view.x, pointer);
      const away = Math.abs(view.x(line.x[at]) - pointer);
      if (!(away <= NEAR)) continue;
      const mean = line.mean && line.mean.y[nearest(line.mean.x, view.x, pointer)];
      found.push({ line, away, x: line.x[at], raw: line.y[at], shown: mean ?? line.y[at], hasMean: mean != null });
    }
    svg.querySelectorAll(".pointed").forEach((node) => node.remove());
    tip.hidden = found.length === 0;
    if (found.length === 0) return;
    found.sort((left, right) => right.shown - left.shown);
    const closest = found.reduce((best, one) => one.away < best.away ? one : best);
    const across = view.x(closest.x);
    add(svg, "line", { class: "pointed axis", x1: across, x2: across, y1: MARGIN.top, y2: view.bottom });
    for (const { line, x, shown } of found) mark(x, shown, 4, line.colour, "pointed");
    describe(closest, found);
    tip.style.left = across > view.width / 2 ? "auto" : `${((across + 12) / view.width) * 100}%`;
    tip.style.right = across > view.width / 2 ? `${((view.width - across + 12) / view.width) * 100}%` : "auto";
  }

  function describe(closest, found) {
    const row = (swatch, name, value) => {
      const cells = [document.createElement("i"), document.createElement("span"), document.createElement("b")];
      if (swatch) swatch(cells[0]);
      [cells[1].textContent, cells[2].textContent] = [name, value];
      return cells;
    };
    const head = row(null, NAMES[picture.x], label(closest.x, 0, picture.x));
    const rows = found.map(({ line, raw, shown, hasMean }) => row(
      (node) => { node.style.borderTopColor = line.colour; node.className = line.dashed ? "dashed" : ""; },
      line.name,
      hasMean ? `${label(shown)} (${label(raw)})` : label(shown),
    ));
    tip.replaceChildren(...head, ...rows.flat());
  }

  function leave() {
    tip.hidden = true;
    svg.querySelectorAll(".pointed").forEach((node) => node.remove());
  }

  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  // A finger is gone at once: what it pointed at stays until it touches something else.
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") leave(); });
  document.addEventListener("pointerdown", (event) => { if (!frame.contains(event.target)) leave(); });
  new ResizeObserver(() => {
    if (picture && !(view && view.width === frame.clientWidth)) draw(picture);
  }).observe(frame);
  return { draw };
}

// The lowest and highest of the values with some room. A logarithmic axis leaves out zero; where values are below
// zero the axis is linear.
function domain(lists, log, room) {
  let low = Infinity, high = -Infinity, positive = Infinity;
  for (const list of lists) {
    for (const value of list) {
      if (!Number.isFinite(value)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
      if (value > 0 && value < positive) positive = value;
    }
  }
  if (low > high) return null;
  if (log && low >= 0 && positive <= high) {
    const share = positive < high ? (high / positive) ** room : 1.5;
    return { low: positive / share, high: high * share, log: true };
  }
  const pad = low < high ? (high - low) * room : Math.abs(low) * 0.1 || 1;
  return { low: low - pad, high: high + pad, log: false };
}

function scale({ low, high, log }, from, to) {
  const placed = log ? Math.log : (value) => value;
  const first = placed(low), span = placed(high) - first;
  return (value) => from + ((placed(value) - first) / span) * (to - from);
}

// Where an axis has marks, and what they say.
function marks({ low, high, log }, count, kind) {
  if (log) {
    const found = [];
    const decades = Math.log10(high / low);
    for (let decade = Math.floor(Math.log10(low)); decade <= Math.log10(high); decade++) {
      for (const digit of decades > count / 2 ? [1] : [1, 2, 5]) {
        const value = digit * 10 ** decade;
        if (value >= low && value <= high) found.push({ value, text: label(value, 10 ** decade, kind) });
      }
    }
    if (found.length > 1) {
      const every = Math.ceil(found.length / (count + 2));
      return found.filter((_, at) => at % every === 0);
    }
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const round = [1, 2, 5, 10].find((digit) => digit * power >= rough * 0.999) * power;
  const time = kind === "seconds" && rough > TIMES[0] ? TIMES.find((time) => time >= rough) : undefined;
  const step = time ?? (kind && kind !== "seconds" ? Math.max(1, round) : round);
  const first = Math.ceil(low / step);
  const found = [];
  for (let at = 0; at <= 2 * count && (first + at) * step <= high + step * 1e-6; at++) {
    const value = (first + at) * step;
    found.push({ value, text: label(Math.abs(value) < step * 1e-6 ? 0 : value, step, kind) });
  }
  return found;
}

// A number as people read it; on an axis with as many digits as its step has.
function label(value, step = 0, kind = "") {
  const size = Math.abs(value);
  if (!Number.isFinite(value)) return "–";
  if (kind === "seconds") return duration(value);
  if (size === 0) return "0";
  if (size >= 1e15) return value.toExponential(2).replace("e+", "e");
  if (size >= 1e9) return `${Number((value / 1e9).toPrecision(4))} G`;
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(4))} M`;
  if (kind) return Math.round(value).toLocaleString("en");
  if (size < 1e-3) {
    const power = (number) => Math.floor(Math.log10(number) + 1e-9);
    const digits = step ? power(size) - power(step) : 2;
    return value.toExponential(Math.min(Math.max(digits, 0), 3)).replace("e-", "e−");
  }
  const decimals = Math.ceil(step ? -Math.log10(step) - 1e-9 : 3 - Math.floor(Math.log10(size)));
  const text = value.toFixed(Math.min(Math.max(decimals, 0), 12));
  return size >= 1e4 ? Number(text).toLocaleString("en") : text.replace("-", "−");
}

function duration(seconds) {
  const whole = Math.round(seconds);
  if (seconds < 10) return `${Number(seconds.toPrecision(3))} s`;
  if (whole < 60) return `${whole} s`;
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60), whole % 60];
  if (whole < 3600) return rest ? `${minutes} min ${rest} s` : `${minutes} min`;
  return minutes ? `${hours} h ${minutes} min` : `${hours} h`;
}

// The place of the value in a rising list that lies nearest to a place on the screen; −1 in an empty one.
function nearest(values, across, pointer) {
  let low = 0, high = values.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (across(values[middle]) < pointer) low = middle + 1; else high = middle;
  }
  const before = low > 0 && Math.abs(across(values[low - 1]) - pointer) < Math.abs(across(values[low]) - pointer);
  return before ? low - 1 : values.length === 0 ? -1 : low;
}
