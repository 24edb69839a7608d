// The curves of a report: which runs are on, over which axis, how smooth.
//
//   data = { colours: [..], plots: [{ name, lines: [{ column, word, noisy }, ..] }], runs: [run, ..] }
//   run  = { name, steps: [..], seconds: [..], tokens: [..], columns: { column: { x, y, mean: { x, y } or absent } } }
// `steps`, `seconds` and `tokens` say where steps lie on the three axes.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const charts = data.plots.map((plot) => ({ plot, chart: chart(by(`plot-${plot.name}`)) }));
  const note = by("legend-note");
  // Runs that are on, with their colours. No two of them have the same.
  const on = new Map();

  function switchOn(run, at) {
    const taken = new Set(on.values());
    const own = data.colours[at % data.colours.length];
    const colour = taken.has(own) ? data.colours.find((colour) => !taken.has(colour)) : own;
    if (colour) on.set(run, colour);
    return Boolean(colour);
  }

  const buttons = data.runs.map((run, at) => {
    const button = document.createElement("button");
    const swatch = button.appendChild(document.createElement("i"));
    button.append(run.name);
    button.type = "button";
    button.addEventListener("click", () => {
      const full = !on.delete(run) && !switchOn(run, at);
      note.textContent = full ? `${on.size} runs are shown, as many as colours tell apart: switch one off first.` : "";
      show();
    });
    by("legend").append(button);
    return { run, button, swatch };
  });

  function show() {
    for (const { run, button, swatch } of buttons) {
      button.setAttribute("aria-pressed", on.has(run));
      swatch.style.borderTopColor = on.get(run) ?? "transparent";
    }
    const share = Number(by("smoothing").value) / 100;
    by("smoothing-share").value = share > 0 ? `${by("smoothing").value}% of a run` : "none";
    const x = by("axis").value;
    for (const { plot, chart } of charts) {
      const lines = data.runs.filter((run) => on.has(run)).flatMap((run) => linesOf(run, plot, x, share));
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

  data.runs.forEach((run, at) => { if (on.size < data.colours.length) switchOn(run, at); });
  if (data.runs.length > on.size) {
    const shown = `${on.size} of ${data.runs.length} runs are shown, as many as colours tell apart`;
    note.textContent = `${shown}: switch one off to see another.`;
  }
  for (const id of ["axis", "log-x", "log-y", "smoothing"]) by(id).addEventListener("input", show);
  show();
})();
