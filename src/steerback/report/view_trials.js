// Table of trials: filters, sorting, search. Only the visible rows are in the document.
const { columns: column, texts } = data.trials;
const total = (column.key ?? []).length;
const several = data.runs.length > 1;
const ROW = 34; // height of a row in pixels, as in view.css
const textOf = (name) => (i) => texts[name][column[name][i]];
const numberOf = (name) => (i) => column[name][i];
const latentOf = (i) => [textOf("latent")(i), textOf("label")(i)].filter(Boolean).join(" ");

const COLUMNS = [
  { id: "run", name: "run", kind: "choice", of: (i) => data.runs[column.run[i]].name, hidden: !several },
  { id: "target", name: "target", kind: "choice", of: textOf("target"), hidden: (texts.target ?? []).length < 2 },
  { id: "stage", name: "stage", kind: "choice", of: textOf("stage"), hidden: (texts.stage ?? []).length < 2 },
  { id: "condition", name: "condition", kind: "choice", of: textOf("condition") },
  { id: "latent", name: "latent", kind: "choice", of: latentOf },
  { id: "prompt", name: "prompt", kind: "text", of: textOf("prompt") },
  { id: "boost", name: "boost", kind: "number", of: numberOf("boost") },
  { id: "attempts", name: "attempts", kind: "number", of: numberOf("attempts") },
  { id: "first", name: "first", kind: "number", of: numberOf("first") },
  { id: "last", name: "last", kind: "number", of: numberOf("last") },
  { id: "gain", name: "gain", kind: "number", of: numberOf("gain") },
  { id: "flags", name: "state", kind: "flags", of: textOf("flags") },
  { id: "recovery", name: "recovery", kind: "choice", of: textOf("recovery"), hidden: !(texts.recovery ?? []).some(Boolean) },
  { id: "activations", name: "activations", kind: "choice", of: textOf("activations"), hidden: (texts.activations ?? []).length < 2 },
].filter((c) => !c.hidden);

const table = { filters: {}, search: "", matches: null, sort: null, down: false, order: [], current: 0, built: false };
let bodies = null; // lower-case texts of all responses; read at the first search

// Return the key of a trial for addresses; with several runs, the run's name comes first.
const linkKey = (i) => (several ? `${data.runs[column.run[i]].name}:${column.key[i]}` : column.key[i]);

function trialOf(key) {
  for (let i = 0; i < total; i += 1) if (linkKey(i) === key) return i;
  return (column.key ?? []).indexOf(key);
}

function showTrials(filters = {}) {
  if (!table.built) buildTable();
  if (Object.keys(filters).length) {
    table.filters = {};
    table.search = filters.search ?? "";
    for (const c of COLUMNS) if (filters[c.id]) table.filters[c.id] = filters[c.id];
    for (const input of document.querySelectorAll("[data-filter]")) input.value = table.filters[input.dataset.filter] ?? "";
    element("search").value = table.search;
    search();
  } else arrange();
}

function buildTable() {
  table.built = true;
  const heads = COLUMNS.map((c) =>
    make("th", { scope: "col", class: `c-${c.kind} c-${c.id}`, "data-column": c.id }, make("button", { type: "button", click: () => sortBy(c.id) }, c.name)),
  );
  element("view-trials").append(
    make(
      "div",
      { class: "bar" },
      make("label", { for: "search" }, "Search"),
      make("input", { id: "search", type: "search", placeholder: "in prompts, labels and responses", input: (e) => search(e.target.value), autocomplete: "off", spellcheck: "false" }),
      make("button", { type: "button", id: "clear", click: clearFilters }, "Clear filters"),
      make("span", { id: "shown", role: "status" }),
    ),
    make(
      "div",
      { id: "rows", tabindex: "0", role: "region", "aria-label": "Table of trials", scroll: drawRows },
      make(
        "table",
        { "aria-rowcount": total },
        make("thead", {}, make("tr", {}, heads), make("tr", { class: "filters" }, COLUMNS.map((c) => make("td", { class: `c-${c.kind}` }, filterInput(c))))),
        make("tbody", { id: "body" }),
      ),
    ),
  );
  window.addEventListener("resize", () => !element("view-trials").hidden && drawRows());
  window.addEventListener("beforeprint", () => drawRows({ all: true }));
  window.addEventListener("afterprint", () => drawRows());
  arrange();
}

function filterInput(c) {
  const change = (event) => {
    if (event.target.value) table.filters[c.id] = event.target.value;
    else delete table.filters[c.id];
    arrange();
  };
  const shared = { "data-filter": c.id, "aria-label": `Filter ${c.name}` };
  if (c.kind === "text" || c.kind === "number") {
    const hint = c.kind === "number" ? "any" : "contains";
    const title = c.kind === "number" ? "For example 2, >= 2, < 40, or 20..30" : null;
    return make("input", { ...shared, type: "text", placeholder: hint, title, input: change, autocomplete: "off" });
  }
  const values = new Set();
  for (let i = 0; i < total; i += 1) for (const v of c.kind === "flags" ? c.of(i).split(", ") : [c.of(i)]) values.add(v);
  const sorted = [...values].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  return make("select", { ...shared, change }, make("option", { value: "" }, "all"), sorted.map((v) => make("option", { value: v }, v || "none")));
}

function clearFilters() {
  table.filters = {};
  for (const input of document.querySelectorAll("[data-filter]")) input.value = "";
  element("search").value = "";
  search("");
}

// Return the test of a number filter: `>= 2`, `< 40`, `20..30`, `7`. An invalid filter keeps all trials.
function numberTest(text) {
  const range = /^\s*(-?[\d.]+)\s*\.\.\s*(-?[\d.]+)\s*$/.exec(text);
  if (range) return (x) => x !== null && x >= Number(range[1]) && x <= Number(range[2]);
  const one = /^\s*(>=|<=|>|<|=)?\s*(-?\d*\.?\d+)\s*$/.exec(text);
  if (!one) return () => true;
  const limit = Number(one[2]);
  const tests = { ">=": (x) => x >= limit, "<=": (x) => x <= limit, ">": (x) => x > limit, "<": (x) => x < limit };
  const test = tests[one[1]] ?? ((x) => x === limit || short(x, 4) === short(limit, 4));
  return (x) => x !== null && test(x);
}

function tests() {
  return COLUMNS.filter((c) => table.filters[c.id]).map((c) => {
    const wanted = table.filters[c.id];
    if (c.kind === "number") {
      const test = numberTest(wanted);
      return (i) => test(c.of(i));
    }
    if (c.kind === "text") return (i) => c.of(i).toLowerCase().includes(wanted.toLowerCase());
    if (c.kind === "flags") return (i) => c.of(i).split(", ").includes(wanted);
    return (i) => c.of(i) === wanted;
  });
}

function arrange() {
  const checks = tests();
  const order = [];
  for (let i = 0; i < total; i += 1) {
    if ((table.matches === null || table.matches.has(i)) && checks.every((test) => test(i))) order.push(i);
  }
  const by = COLUMNS.find((c) => c.id === table.sort);
  if (by) order.sort((a, b) => compare(by.of(a), by.of(b)) || a - b);
  table.order = order;
  table.current = Math.min(table.current, Math.max(order.length - 1, 0));
  element("shown").textContent = `${count(order.length)} of ${plural(total, "trial")}`;
  for (const head of document.querySelectorAll("th[data-column]")) {
    const sorted = head.dataset.column === table.sort ? (table.down ? "descending" : "ascending") : null;
    if (sorted) head.setAttribute("aria-sort", sorted);
    else head.removeAttribute("aria-sort");
  }
  drawRows();
}

// Missing values come last in both directions.
function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  const sign = table.down ? -1 : 1;
  return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
}

function sortBy(id) {
  const numeric = COLUMNS.find((c) => c.id === id).kind === "number";
  if (table.sort !== id) Object.assign(table, { sort: id, down: numeric });
  else if (table.down === numeric) table.down = !numeric;
  else Object.assign(table, { sort: null, down: false });
  element("rows").scrollTop = 0;
  table.current = 0;
  arrange();
}

function drawRows({ all = false } = {}) {
  const box = element("rows");
  const { order } = table;
  const first = all ? 0 : Math.max(0, Math.floor(box.scrollTop / ROW) - 12);
  const last = all ? Math.min(order.length, 500) : Math.min(order.length, first + Math.ceil(box.clientHeight / ROW) + 24);
  const space = (rows) => {
    const cell = make("td", { colspan: COLUMNS.length });
    cell.style.height = `${rows * ROW}px`;
    return make("tr", { class: "space", "aria-hidden": "true" }, cell);
  };
  const rows = order.slice(first, last).map((i, n) => trialRow(i, first + n));
  if (!order.length) rows.push(make("tr", {}, make("td", { colspan: COLUMNS.length, class: "nothing" }, "No trial matches these filters.")));
  element("body").replaceChildren(space(first), ...rows, ...(all ? [] : [space(order.length - last)]));
}

function trialRow(i, place) {
  const cells = COLUMNS.map((c) => {
    const value = c.of(i);
    const shown = c.kind === "number" ? short(value) : value;
    const inner = c.id === "prompt" ? make("a", { href: hashOf(linkKey(i)), tabindex: "-1" }, shown) : shown;
    const kind = c.kind === "number" ? `c-number c-${c.id}${c.id === "gain" && value > 0 ? " up" : ""}` : `c-${c.kind} c-${c.id}`;
    return make("td", { class: kind, title: c.kind === "number" ? null : shown, dir: c.kind === "text" ? "auto" : null }, inner);
  });
  const choose = (event) => {
    if (event.target.closest("a")) return;
    table.current = place;
    openCurrent();
  };
  const current = place === table.current;
  return make("tr", { class: current ? "current" : null, "aria-current": current ? "true" : null, "aria-rowindex": place + 1, "data-trial": i, click: choose }, cells);
}

function moveCurrent(by) {
  table.current = Math.min(Math.max(table.current + by, 0), Math.max(table.order.length - 1, 0));
  const box = element("rows");
  const top = table.current * ROW;
  const room = box.clientHeight - box.querySelector("thead").offsetHeight - ROW;
  if (top < box.scrollTop) box.scrollTop = top;
  if (top > box.scrollTop + room) box.scrollTop = top - room;
  drawRows();
}

function openCurrent() {
  const i = table.order[table.current];
  if (i !== undefined) goTo(hashOf(linkKey(i)));
}

function searchTrials() {
  if (address().view !== "trials") {
    location.hash = "#trials";
    route(); // now, and not only at the event that follows: the next letters belong to the search
  }
  element("search").focus();
}

let searches = 0;

async function search(text = table.search) {
  table.search = text;
  const wanted = text.trim().toLowerCase();
  const turn = (searches += 1);
  if (!wanted) {
    table.matches = null;
    return arrange();
  }
  const hits = new Set();
  for (let i = 0; i < total; i += 1) {
    if (`${textOf("prompt")(i)}\n${latentOf(i)}\n${column.key[i]}`.toLowerCase().includes(wanted)) hits.add(i);
  }
  table.matches = hits;
  arrange();
  if (!bodies) {
    element("shown").textContent = "reading all responses …";
    const texts = await allTexts();
    bodies = texts;
  }
  if (turn !== searches) return undefined; // a newer search has started
  bodies.forEach((body, i) => body.includes(wanted) && hits.add(i));
  return arrange();
}

async function allTexts() {
  const bodies = [];
  for (let n = 0; n * data.chunk < total; n += 1) {
    const chunk = await read(`chunk-${n}`); // `read` does not cache: only the texts stay in memory
    for (const trial of chunk) bodies.push((trial.text ?? "").toLowerCase());
  }
  return bodies;
}

