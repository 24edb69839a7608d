// The curves of runs: which are on, over which axis, how smooth.
//
//   data = { colours: [..], plots: [{ name, lines: [{ column, word, noisy }, ..] }], runs: [run, ..] }
//   run  = { name, steps: [..], seconds: [..], tokens: [..], columns: { column: { x, y, mean: { x, y } or absent } } }
// `steps`, `seconds` and `tokens` say where steps lie on the three axes. Runs may come, grow and go: `add`, `grow`,
// `remove`, then `show`. `switched` is called with a run that was switched.
function curves(data, switched = () => {}) {
  const by = (id) => document.getElementById(id);
  const charts = data.plots.map((plot) => {
    const figure = by(`plot-${plot.name}`);
    return { plot, figure, chart: chart(figure) };
  });
  const note = by("legend-note");
  const buttons = new Map();
  // Runs that are on, with their colours. No two of them have the same.
  const on = new Map();
  let count = 0;

  function switchOn(run) {
    const taken = new Set(on.values());
    const own = data.colours[buttons.get(run).at % data.colours.length];
    const colour = taken.has(own) ? data.colours.find((colour) => !taken.has(colour)) : own;
    if (colour) on.set(run, colour);
    return Boolean(colour);
  }

  // A button that switches the run, in the legend or where it is wanted.
  function add(run, parent = by("legend")) {
    const button = document.createElement("button");
    const swatch = button.appendChild(document.createElement("i"));
    const name = button.appendChild(document.createElement("span"));
    button.type = "button";
    button.addEventListener("click", () => {
      const full = !on.delete(run) && !switchOn(run);
      note.textContent = full ? `${on.size} runs are shown, as many as colours tell apart: switch one off first.` : "";
      switched(run);
      show();
    });
    parent.append(button);
    buttons.set(run, { button, swatch, name, at: count++ });
    return on.size < data.colours.length && switchOn(run);
  }

  function remove(run) {
    buttons.get(run).button.remove();
    buttons.delete(run);
    on.delete(run);
  }

  function show() {
    for (const [run, { button, swatch, name }] of buttons) {
      button.setAttribute("aria-pressed", on.has(run));
      swatch.style.borderTopColor = on.get(run) ?? "transparent";
      name.textContent = run.name;
    }
    const share = Number(by("smoothing").value) / 100;
    by("smoothing-share").value = share > 0 ? `${by("smoothing").value}% of a run` : "none";
    const x = by("axis").value;
    const shown = [...buttons.keys()].filter((run) => on.has(run));
    for (const { plot, figure, chart } of charts) {
      figure.hidden = ![...buttons.keys()].some((run) => plot.lines.some(({ column }) => run.columns[column]));
      if (figure.hidden) continue;
      const lines = shown.flatMap((run) => linesOf(run, plot, x, share));
      chart.draw({ lines, x, logX: by("log-x").checked, logY: by("log-y").checked });
    }
  }

  function linesOf(run, plot, axis, share) {
    const several = plot.lines.length > 1;
    return plot.lines.flatMap(({ column, word, noisy }, at) => {
      const points = run.columns[column];
      if (!points) return [];
      const mean = noisy && share > 0 ? running(points.mean ?? points, share) : null;
      const x = placed(run, points.x, axis);
      if (x.length === 0) return [];
      return [{
        name: several ? `${run.name}, ${word}` : run.name,
        colour: on.get(run),
        dashed: at > 0,
        x,
        y: points.y,
        mean: mean && { x: placed(run, mean.x, axis), y: mean.y },
      }];
    });
  }

  // Each value's mean with its neighbours, in a window that is a share of all. None of too few to say anything.
  function running({ x, y }, share) {
    const reach = Math.round((y.length * share) / 2);
    if (reach === 0 || y.length < 20) return null;
    const sums = [0];
    for (const value of y) sums.push(sums[sums.length - 1] + value);
    const mean = (_, at) => {
      const from = Math.max(0, at - reach), to = Math.min(y.length, at + reach + 1);
      return (sums[to] - sums[from]) / (to - from);
    };
    return { x, y: y.map(mean) };
  }

  // Where steps lie on an axis: between two known ones on a straight line.
  function placed(run, steps, axis) {
    if (axis === "steps") return steps;
    const known = run.steps, places = run[axis];
    if (places.length === 0) return [];
    let at = 0;
    return steps.map((step) => {
      while (at + 1 < known.length && known[at + 1] <= step) at++;
      if (at + 1 === known.length || step <= known[at]) return places[at];
      const share = (step - known[at]) / (known[at + 1] - known[at]);
      return places[at] + share * (places[at + 1] - places[at]);
    });
  }

  for (const run of data.runs) add(run);
  if (data.runs.length > on.size) {
    const shown = `${on.size} of ${data.runs.length} runs are shown, as many as colours tell apart`;
    note.textContent = `${shown}: switch one off to see another.`;
  }
  for (const id of ["axis", "log-x", "log-y", "smoothing"]) by(id).addEventListener("input", show);
  show();
  return { add, remove, show, on };
}

// Adds the later steps of a run.
function grow(run, part) {
  const before = run.seconds.at(-1) ?? 0;
  const whole = run.tokens.length === run.steps.length && part.tokens.length === part.steps.length;
  run.tokens = whole ? run.tokens.concat(part.tokens) : [];
  run.steps.push(...part.steps);
  run.seconds.push(...part.seconds.map((seconds) => before + seconds));
  for (const [column, { x, y }] of Object.entries(part.columns)) {
    const own = run.columns[column] ??= { x: [], y: [] };
    for (const points of own.mean ? [own, own.mean] : [own]) {
      points.x.push(...x);
      points.y.push(...y);
    }
  }
}

function pageData() {
  return JSON.parse(document.getElementById("data").textContent);
}
