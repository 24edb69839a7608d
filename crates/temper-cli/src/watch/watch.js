// The live page: a list of runs, the curves of those that are on, and one run in detail. The server sends
//
//   runs   = [status, ..]         when runs came or went, and first of all
//   run    = status               when a run's line is another one
//   points = { id, file, from, end, part }     points that follow on the first `from` bytes of the run's metrics
//
// A run's curves are known up to `end` in `file`; where points do not follow on that, the curves are asked for again.
(() => {
  const by = (id) => document.getElementById(id);
  const board = curves(pageData(), switched);
  const columns = [...document.querySelectorAll(".runs th")].map(({ textContent }) => textContent);
  const known = new Map();
  let chosen = null;
  let drawing = 0;

  // Many changes come at once, and a page that nobody sees draws nothing.
  function draw() {
    drawing ||= requestAnimationFrame(() => { drawing = 0; board.show(); legend(); });
  }

  // ---- the list

  function list(all) {
    const there = new Set(all.map(({ id }) => id));
    for (const id of [...known.keys()]) if (!there.has(id)) forget(id);
    // Those that run are on first, and then the newest.
    for (const status of [...all].sort(order)) update(status);
    arrange();
    by("none").hidden = all.length > 0;
    compare();
    draw();
  }

  function order(left, right) {
    const running = (status) => status.state === "running" ? 0 : 1;
    const byName = left.name.localeCompare(right.name, "en", { numeric: true });
    return running(left) - running(right) || right.begun - left.begun || byName;
  }

  function arrange() {
    const rows = [...known.values()].sort((left, right) => order(left.status, right.status)).map(({ row }) => row);
    if (rows.some((row, at) => by("runs").children[at] !== row)) by("runs").replaceChildren(...rows);
  }

  function update(status) {
    const one = known.get(status.id) ?? begin(status);
    const moved = one.status.state !== status.state;
    one.status = status;
    one.run.name = status.name;
    fill(one);
    refetch(one);
    if (moved) arrange();
    if (chosen === status.id) about();
    draw();
  }

  function begin(status) {
    const row = document.createElement("tr");
    const cells = columns.map((name) => {
      const cell = row.appendChild(document.createElement("td"));
      cell.dataset.name = name;
      return cell;
    });
    const progress = document.createElement("progress");
    const steps = document.createElement("span");
    cells[2].append(progress, steps);
    const details = cells[8].appendChild(document.createElement("button"));
    details.type = "button";
    details.textContent = "details";
    details.addEventListener("click", () => choose(status.id));
    const run = { name: status.name, steps: [], seconds: [], tokens: [], columns: {} };
    const curves = { run, file: null, end: 0, asking: false, added: 0 };
    const one = { id: status.id, status, row, cells, progress, steps, ...curves };
    known.set(status.id, one);
    const on = board.add(run, cells[0]);
    cells[0].querySelector("button").title = status.folder;
    if (on && chosen === null) choose(status.id, false);
    return one;
  }

  function counted(steps) {
    return label(steps, 0, "steps");
  }

  // Of pairs where there are any, else of tokens.
  function accuracy(last) {
    const ofPairs = last["eval_rewards/accuracies"] ?? last["rewards/accuracies"];
    if (ofPairs != null) return `${label(ofPairs)} of pairs`;
    const ofTokens = last.eval_mean_token_accuracy ?? last.mean_token_accuracy;
    return ofTokens == null ? "–" : `${label(ofTokens)} of tokens`;
  }

  function fill({ status, cells, progress, steps }) {
    const { last, planned, step } = status;
    const number = (value) => value == null ? "–" : label(value);
    progress.hidden = !planned;
    progress.max = planned || 1;
    progress.value = Math.min(step, planned ?? 0);
    steps.textContent = counted(step) + (planned ? ` of ${counted(planned)}` : "");
    const texts = {
      1: status.verb ? `${status.state}, ${status.verb}` : status.state,
      3: status.left == null ? "–" : duration(status.left),
      4: number(last.loss),
      5: number(last.eval_loss),
      6: accuracy(last),
      7: last.tokens_per_second == null ? "–" : counted(last.tokens_per_second),
    };
    for (const at in texts) cells[at].textContent = texts[at];
    cells[1].className = status.state;
  }

  function forget(id) {
    const { row, run } = known.get(id);
    known.delete(id);
    board.remove(run);
    row.remove();
    if (chosen === id) {
      chosen = null;
      by("about").hidden = true;
    }
  }

  // ---- curves

  function switched(run) {
    const one = [...known.values()].find((one) => one.run === run);
    refetch(one);
    compare();
    draw();
  }

  // Asks for a run's curves where they are not known to their end, or grew much since.
  async function refetch(one) {
    const { status, run } = one;
    const current = one.file === status.file && one.end === status.end;
    const few = one.added <= Math.max(1000, status.step / 4);
    if (!board.on.has(run) || (current && few) || one.asking) return;
    one.asking = true;
    const answer = await ask(`/run/${one.id}/curves`);
    one.asking = false;
    if (!answer || !known.has(one.id)) return;
    Object.assign(run, answer.run, { name: one.status.name });
    Object.assign(one, { file: answer.file, end: answer.end, added: 0, notes: answer.notes });
    if (chosen === one.id) showNotes(one);
    draw();
  }

  function points({ id, file, from, end, part }) {
    const one = known.get(id);
    if (!one || !board.on.has(one.run) || one.file !== file || one.end !== from) return;
    grow(one.run, part);
    one.end = end;
    one.added += part.steps.length;
    draw();
  }

  // The runs that are on, where the curves are; their buttons are in the list.
  function legend() {
    const entries = [...board.on].map(([run, colour]) => {
      const entry = document.createElement("span");
      entry.className = "entry";
      entry.appendChild(document.createElement("i")).style.borderTopColor = colour;
      entry.append(run.name);
      return entry;
    });
    by("legend").replaceChildren(...entries);
  }

  // ---- settings, answers, log

  async function compare() {
    const on = [...known.values()].filter(({ run }) => board.on.has(run));
    const place = by("differences");
    if (on.length < 2) return place.replaceChildren(words("Switch on two runs or more to compare their settings."));
    const answer = await ask(`/differences/${on.map(({ id }) => id).join(",")}`);
    if (!answer) return;
    const rows = answer.rows.map(([name, values]) => [name, ...values]);
    place.replaceChildren(rows.length ? table(["", ...answer.runs], rows) : words("All settings are equal."));
  }

  function choose(id, scroll = true) {
    chosen = id;
    about();
    if (scroll) by("about").scrollIntoView({ behavior: "smooth" });
  }

  async function about() {
    const one = known.get(chosen);
    const answer = one && await ask(`/run/${one.id}/about`);
    if (!answer || chosen !== one.id) return;
    by("about").hidden = false;
    by("about-name").textContent = one.status.name;
    by("about-folder").textContent = answer.folder;
    one.others = answer.notes;
    showNotes(one);
    changed(by("said"), answer.said, (place) => { place.textContent = answer.said; });
    changed(by("log"), answer.log, (place) => {
      const atEnd = place.scrollTop + place.clientHeight >= place.scrollHeight - 4;
      place.textContent = answer.log || "nothing yet";
      if (atEnd) place.scrollTop = place.scrollHeight;
    });
    changed(by("answers"), answer.answers, (place) => place.replaceChildren(...answer.answers.map(answered)));
    changed(by("settings"), answer.settings, (place) =>
      place.replaceChildren(table(["key", "value", "from"], answer.settings)));
  }

  // Writes only what is different, so that a selection or a fold stays.
  function changed(place, value, write) {
    const text = JSON.stringify(value);
    if (place.written === text) return;
    place.written = text;
    write(place);
  }

  function showNotes({ notes = [], others = [] }) {
    by("about-notes").replaceChildren(...[...notes, ...others].map((note) => element("li", note)));
  }

  function answered({ prompt, answers }) {
    const article = document.createElement("article");
    const entries = answers.flatMap(({ step, answer }) =>
      [element("dt", `step ${counted(step)}`), element("dd", answer)]);
    const list = document.createElement("dl");
    list.append(...entries);
    article.append(element("h3", prompt), list);
    return article;
  }

  function element(name, text) {
    const node = document.createElement(name);
    node.textContent = text;
    return node;
  }

  function words(text) {
    return Object.assign(element("p", text), { className: "key" });
  }

  function table(header, rows) {
    const table = document.createElement("table");
    const line = (name, cells) => {
      const row = document.createElement("tr");
      row.append(...cells.map((cell) => element(name, cell)));
      return row;
    };
    table.createTHead().append(line("th", header));
    table.createTBody().append(...rows.map((row) => line("td", row)));
    return table;
  }

  // ---- the server

  async function ask(path) {
    try {
      const answer = await fetch(path);
      return answer.ok ? await answer.json() : null;
    } catch {
      return null;
    }
  }

  // A stream that breaks is opened again by the browser; one that was refused is not.
  function connect() {
    const stream = new EventSource("/events");
    const on = (name, act) => stream.addEventListener(name, (event) => act(JSON.parse(event.data)));
    on("runs", list);
    on("run", update);
    on("points", points);
    stream.addEventListener("open", () => { by("state").textContent = "live"; });
    stream.addEventListener("error", () => {
      by("state").textContent = "not connected: has temper watch ended, or do too many pages follow? Trying again.";
      if (stream.readyState === EventSource.CLOSED) setTimeout(connect, 5000);
    });
  }

  connect();
})();
