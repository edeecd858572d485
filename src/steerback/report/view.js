// Functions shared by all views: nodes, compressed data, addresses, keys. Texts are set as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const VIEWS = ["overview", "trials", "trial", "calibration", "forks"];
const parsed = new Map(); // part of the page -> promise of its content

// Return a node with attributes. Functions become listeners, null is skipped, and child strings are written as text.
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "rect", "circle", "text", "polyline", "polygon", "title"].includes(name);
  const node = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(key, value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined) continue;
    if (child instanceof Node) node.append(child);
    else write(node, String(child));
  }
  return node;
}

// Return a promise of the content of a compressed part; it is read at the first call.
function unpack(id) {
  if (!parsed.has(id)) parsed.set(id, read(id));
  return parsed.get(id);
}

async function read(id) {
  if (!element(id) && document.readyState === "loading") {
    await new Promise((resolve) => document.addEventListener("DOMContentLoaded", resolve, { once: true }));
  }
  const bytes = fromBase64(element(id).textContent);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

function fromBase64(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i += 1) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

function short(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(digits)));
}

const count = (n) => n.toLocaleString("en");
const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

// -- addresses: #overview, #trials&column=filter, #trial=KEY, #calibration, #forks -----------------------------------------

function address() {
  const hash = location.hash.slice(1);
  if (hash.startsWith("trial=")) return { view: "trial", key: decoded(hash.slice(6)) };
  const [view, ...rest] = hash.split("&");
  const filters = {};
  for (const part of rest) {
    const [name, value = ""] = part.split("=");
    filters[decoded(name)] = decoded(value);
  }
  return { view: VIEWS.includes(view) && view !== "trial" ? view : "overview", filters };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

const hashOf = (key) => `#trial=${encodeURIComponent(key)}`;

function route() {
  const { view, key, filters } = address();
  for (const name of VIEWS) element(`view-${name}`).hidden = name !== view;
  for (const link of document.querySelectorAll("header nav a")) {
    const current = link.hash === `#${view}` || (view === "trial" && link.hash === "#trials");
    if (current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  hideTip();
  if (view === "overview") showOverview();
  if (view === "trials") showTrials(filters);
  if (view === "trial") showTrial(key);
  if (view === "calibration") showCalibration();
  if (view === "forks") showForks();
  if (view !== "trials") window.scrollTo(0, 0);
}

function goTo(hash) {
  if (location.hash === hash) route();
  else location.hash = hash;
}

// -- keys ----------------------------------------------------------------------------------------------------------

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { view } = address();
  const typing = event.target.closest("input, select, textarea");
  if (event.key === "Escape") {
    if (typing) event.target.blur();
    else if (view === "trial" && !unpin()) backToTrials();
    return;
  }
  if (typing) return;
  const act = {
    "/": () => searchTrials(),
    j: () => step(view, 1),
    k: () => step(view, -1),
    Enter: () => view === "trials" && !event.target.closest("a, button") && openCurrent(),
    ArrowRight: () => view === "trial" && movePin(1),
    ArrowLeft: () => view === "trial" && movePin(-1),
  }[event.key];
  if (act && act() !== false) event.preventDefault();
}

function step(view, by) {
  if (view === "trial") stepTrial(by);
  else if (view === "trials") moveCurrent(by);
  else return false;
  return true;
}

// -- the tooltip at the pointer ------------------------------------------------------------------------------------

function showTip(x, y, ...lines) {
  const tip = element("tip");
  tip.replaceChildren(...lines.map((line) => make("div", {}, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 18 + height > innerHeight ? y - height - 10 : y + 18}px`;
}

function hideTip() {
  element("tip").hidden = true;
}

function start() {
  const { shown, total, why } = data.sample;
  if (shown < total) {
    const note = `A sample: ${count(shown)} of ${plural(total, "trial")} (${why}). It was drawn at random within each ` +
      `target and latent, seed ${data.sample.seed}; rates, figures and tables cover all trials.`;
    element("sampled").textContent = note;
    element("sampled").hidden = false;
  }
  element("forks-link").hidden = !data.forks.length;
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", route);
  window.addEventListener("scroll", hideTip, { passive: true });
  route();
}

