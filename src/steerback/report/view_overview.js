// Overview: tables with intervals, figures, excluded trials with reasons, provenance.
let overviewShown = false;

function showOverview() {
  if (overviewShown) return;
  overviewShown = true;
  const box = element("view-overview");
  for (const run of data.runs) box.append(runSummary(run));
  unpack("figures").then((figures) => {
    data.runs.forEach((run, number) => {
      const shown = figures.splice(0, run.figures.length);
      const place = element(`figures-${number}`);
      for (const { name, src, caption } of shown) {
        const words = caption.split("\n").map((line) => make("p", {}, line));
        place.append(make("figure", {}, make("img", { src, alt: `Figure ${name}` }), make("figcaption", {}, words)));
      }
    });
  });
}

function runSummary(run) {
  const number = data.runs.indexOf(run);
  const facts = [
    ["experiment", run.experiment],
    ["targets", run.targets.join(", ")],
    ["judge", run.judge + (run.judges.length > 1 ? ` (judged by: ${run.judges.join(", ")})` : "")],
    ["planned", Object.entries(run.stages).map(([stage, n]) => `${count(n)} ${stage}`).join(", ")],
  ];
  return make(
    "article",
    { class: "run" },
    make("h2", {}, run.name),
    make("dl", { class: "facts" }, facts.map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text)))),
    run.problem ? make("p", { class: "notice" }, `Not analysed: ${run.problem}`) : null,
    run.tables.map(dataTable),
    run.lines.length ? make("ul", { class: "lines" }, run.lines.map((line) => make("li", {}, line))) : null,
    make("div", { id: `figures-${number}`, class: "figures" }),
    make("h3", {}, "Excluded trials"),
    leftOut(run),
    make("h3", {}, "Provenance"),
    provenance(run),
  );
}

function dataTable(table) {
  const side = (n) => (n < table.left ? null : "number");
  return make(
    "div",
    { class: "table" },
    make("h3", {}, table.name === "table" ? "Results" : table.name[0].toUpperCase() + table.name.slice(1)),
    make(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": table.name },
      make(
        "table",
        {},
        make("thead", {}, make("tr", {}, table.columns.map((name, n) => make("th", { class: side(n), scope: "col" }, name)))),
        make("tbody", {}, table.cells.map((row) => make("tr", {}, row.map((cell, n) => make("td", { class: side(n) }, cell))))),
      ),
    ),
    make("p", { class: "caption" }, table.caption),
  );
}

const STATES = ["planned", "sound", "degraded", "cut", "invalid", "unscored", "empty", "missing"];

function leftOut(run) {
  const several = new Set(run.counts.map((c) => c.stage)).size > 1;
  const states = STATES.filter((state) => run.counts.some((c) => c.counts[state]));
  const rows = run.counts.map(({ target, stage, condition, counts, reasons }) =>
    make(
      "tr",
      {},
      make("td", {}, target),
      several ? make("td", {}, stage) : null,
      make("td", {}, condition),
      states.map((state) => make("td", { class: "number" }, stateCell(target, condition, stage, state, counts[state] ?? 0))),
      make("td", {}, reasons.map(([why, n]) => make("div", {}, `${count(n)} ${why}`))),
    ),
  );
  const head = ["target", ...(several ? ["stage"] : []), "condition", ...states, "reason"];
  return make(
    "div",
    { class: "table" },
    make(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Excluded trials" },
      make(
        "table",
        {},
        make("thead", {}, make("tr", {}, head.map((name) => make("th", { class: states.includes(name) ? "number" : null, scope: "col" }, name)))),
        make("tbody", {}, rows),
      ),
    ),
    make(
      "p",
      { class: "caption" },
      "A response can be degraded (five or more identical words in a row) and cut by the length limit at once. " +
        "The result tables say whether degraded responses count; cut responses count, and their last attempt may be incomplete.",
    ),
    run.latents.map(latentsLeft),
  );
}

function stateCell(target, condition, stage, state, n) {
  if (!n || state === "planned") return count(n);
  const filters = Object.entries({ target, condition, stage, flags: state });
  return make("a", { href: `#trials${filters.map(([k, v]) => `&${k}=${encodeURIComponent(v)}`).join("")}` }, count(n));
}

function latentsLeft({ target, selection, calibrated, unusable }) {
  const lines = [];
  if (selection) {
    const steps = Object.entries(selection).map(([name, n]) => `${name}: ${typeof n === "object" ? JSON.stringify(n) : n}`);
    lines.push(make("p", {}, `${target}, latents: ${steps.join("; ")}`));
  }
  if (unusable && unusable.length) {
    lines.push(
      make("p", {}, `${target}: ${count(unusable.length)} of ${plural(calibrated, "latent")} without a usable threshold`),
      make("ul", {}, unusable.map((u) => make("li", {}, `${u.latent}: ${u.status} (${u.reason})`))),
    );
  }
  return lines;
}

function provenance(run) {
  const sections = Object.keys(run.manifest).length ? run.manifest : { config: run.config };
  return make("div", { class: "provenance" }, Object.entries(sections).map(([name, value]) => branch(name, value)));
}

function branch(name, value) {
  if (value === null || typeof value !== "object") {
    return make("p", { class: "leaf" }, make("span", { class: "name" }, name), " ", make("span", {}, String(value)));
  }
  const entries = Object.entries(value);
  if (!entries.length) return make("p", { class: "leaf" }, make("span", { class: "name" }, name), " none");
  return make("details", {}, make("summary", {}, name), entries.map(([key, inner]) => branch(key, inner)));
}

