// Forks as trees: response, forked tokens, arms of each fork, and their continuations.
const forkedTrials = new Set(data.forks.map(([run, key]) => `${run} ${key}`));
let places = null; // "run key" -> number of the trial on this page

function placeOf(run, key) {
  if (!places) places = new Map(column.key.map((k, i) => [`${column.run[i]} ${k}`, i]));
  return places.get(`${run} ${key}`) ?? -1;
}

const isForked = (run, key) => forkedTrials.has(`${run} ${key}`);

async function showForks() {
  const forks = await unpack("forks");
  const continued = new Set(forks.flatMap((f) => f.arms.flatMap((arm) => arm.trials.map((key) => `${f.run} ${key}`))));
  const roots = [...new Map(forks.map((f) => [`${f.run} ${f.parent}`, f])).entries()].filter(([id]) => !continued.has(id));
  const trees = roots.map(([, f]) => make("li", {}, trialName(f.run, f.parent, f.parent), forkTree(forks, f.run, f.parent)));
  element("view-forks").replaceChildren(make("h2", {}, "Forks"), make("ul", { class: "tree" }, trees));
}

// Return the forks of one trial as nested lists; the tree of a forked continuation is nested in it.
function forkTree(forks, run, key) {
  const children = forks.filter((f) => f.run === run && f.parent === key);
  if (!children.length) return null;
  return make("ul", {}, children.map((fork) => make("li", {}, forkNode(forks, fork))));
}

function forkNode(forks, fork) {
  const where = [`after token ${fork.tokens}`, fork.at ? ` (${fork.at})` : "", fork.throughout ? ", arms throughout" : ""].join("");
  return make(
    "details",
    { class: "fork", open: true },
    make("summary", {}, make("strong", {}, where)),
    make("p", { class: "text cut", dir: "auto" }, make("span", { class: "prefill" }, fork.before), make("span", { class: "fork-mark", title: "forked here" }, "|"), fork.after ? make("span", { class: "quiet" }, fork.after, "…") : null),
    make("ul", {}, fork.arms.map((arm, n) => make("li", {}, armNode(forks, fork, arm, n)))),
    make("p", { class: "caption" }, fork.note),
  );
}

function armNode(forks, fork, arm, number) {
  const [rate, low, high] = arm.rate;
  const bar = make("span", { class: "rate", "aria-hidden": "true" });
  for (const [name, from, to] of [["interval", low, high], ["value", rate, rate]]) {
    if (from === null || to === null) continue;
    const part = make("span", { class: name });
    part.style.left = `${100 * from}%`;
    part.style.width = `${100 * (to - from)}%`;
    bar.append(part);
  }
  const numbers = [...arm.shown.map(([name, text]) => `${name} ${text}`), ...arm.tests.map(([name, p]) => `p (${name.replace(" %", "")}) ${p}`)];
  const left = arm.left ? `, ${count(arm.left)} left out` : "";
  return make(
    "details",
    { class: `arm a${number % 4}` },
    make("summary", {}, make("strong", {}, arm.name), bar, make("span", { class: "numbers" }, `n ${arm.n}${left}; ${numbers.join("; ")}`)),
    make("p", { class: "quiet" }, `Edits of the continuation: ${arm.edits.slice(0, 4).join("; ") || "none"}${arm.edits.length > 4 ? `; and ${arm.edits.length - 4} more` : ""}`),
    make("ul", { class: "leaves" }, arm.trials.map((key) => make("li", {}, continuation(fork.run, key), forkTree(forks, fork.run, key)))),
  );
}

function continuation(run, key) {
  const i = placeOf(run, key);
  const seed = key.slice(key.lastIndexOf("/") + 1);
  if (i < 0) return `continuation ${seed} (not on this page)`;
  const scores = column.attempts[i] ? `${plural(column.attempts[i], "attempt")}, ${short(column.first[i])}${column.attempts[i] > 1 ? ` → ${short(column.last[i])}` : ""}` : textOf("flags")(i);
  return trialName(run, key, `seed ${column.seed[i]}: ${scores}`);
}

function trialName(run, key, text) {
  const i = placeOf(run, key);
  return i < 0 ? make("span", {}, text) : make("a", { href: hashOf(linkKey(i)) }, text);
}

// Show on the page of a trial which trial it continues, and its forks.
async function drawForks(i) {
  const [run, key, box] = [column.run[i], column.key[i], element("forks-of-trial")];
  const parent = data.parents[run]?.[textOf("condition")(i)];
  const continues = textOf("stage")(i) === "fork" && parent;
  if (!continues && !isForked(run, key)) return;
  const forks = await unpack("forks");
  if (open.i !== i) return;
  const tree = forkTree(forks, run, key);
  box.replaceChildren(
    make("h3", {}, "Forks"),
    continues ? make("p", {}, "Continues ", trialName(run, parent[0], parent[0]), ` after token ${parent[1]}.`) : "",
    tree ? make("div", { class: "tree" }, tree) : "",
  );
}

// Open all parts for printing, and close them again afterwards.
let closed = [];
window.addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll(".tree details:not([open])")];
  for (const part of closed) part.open = true;
});
window.addEventListener("afterprint", () => {
  for (const part of closed) part.open = false;
});
