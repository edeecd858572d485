// One trial: prompt, response, activations, verdicts, and the same latent, prompt and seed in other conditions.
const open = { i: -1, detail: null, series: [], coloured: null, lines: new Set(), judge: null, pinned: null, pieces: [] };
const MOST_COMPARED = 6;

async function detailOf(i) {
  return (await unpack(`chunk-${Math.floor(i / data.chunk)}`))[i % data.chunk];
}

async function showTrial(key) {
  const box = element("view-trial");
  const i = trialOf(key);
  if (i < 0) {
    open.i = -1;
    const why = data.sample.shown < data.sample.total ? "This page contains only a sample of the trials." : "";
    box.replaceChildren(make("p", { class: "notice" }, `There is no trial ${key} on this page. ${why}`));
    return;
  }
  open.i = i;
  const place = table.order.indexOf(i);
  if (place >= 0) table.current = place; // set before the wait, so that going back at once marks this row
  const detail = await detailOf(i);
  if (open.i !== i) return; // the user opened another trial in the meantime
  const before = open.coloured;
  open.detail = detail;
  open.series = seriesOf(detail);
  open.pieces = tokenTexts(detail);
  open.pinned = null;
  open.coloured = (open.series.find((s) => s.id === before) ?? open.series[0])?.id ?? null;
  open.lines = new Set(open.series.slice(0, 4).map((s) => s.id));
  open.judge = detail.verdicts.find((v) => v.judge === data.runs[column.run[i]].judge) ?? detail.verdicts[0] ?? null;
  box.replaceChildren(trialHead(i, place), promptNode(i, detail), responsePart(), make("section", { id: "forks-of-trial" }), make("section", { id: "activations" }), make("section", { id: "comparison" }), verdictsNode(detail), windowsNode(detail));
  drawResponse();
  drawActivations();
  drawComparison(i);
  drawForks(i);
}

const findSeries = (id) => open.series.find((s) => s.id === id) ?? null;

function trialHead(i, place) {
  const { detail } = open;
  const flags = textOf("flags")(i);
  const facts = [
    ["latent", latentOf(i) || "none"],
    ["boost", short(column.boost[i], 4)],
    ["seed", column.seed[i]],
    ["finish", detail.finish ?? "not generated"],
  ];
  if (detail.recovery) facts.push(["recovery", detail.recovery]);
  return make(
    "div",
    { class: "trial-head" },
    make(
      "div",
      { class: "bar" },
      make("button", { type: "button", click: backToTrials }, "All trials"),
      make("button", { type: "button", id: "previous", click: () => stepTrial(-1) }, "Previous"),
      make("button", { type: "button", id: "next", click: () => stepTrial(1) }, "Next"),
      make("span", {}, place < 0 ? "not among the filtered trials" : `${count(place + 1)} of ${count(table.order.length)}`),
    ),
    make("h2", {}, textOf("target")(i), ", ", textOf("condition")(i)),
    make("p", { class: "key" }, make("a", { href: hashOf(linkKey(i)), title: "Link to this trial" }, linkKey(i))),
    make("p", { class: "badges" }, flags === "sound" ? null : flags.split(", ").map((f) => make("span", { class: `badge ${f}` }, f))),
    detail.reason ? make("p", { class: "notice" }, detail.reason) : null,
    make("dl", { class: "facts" }, facts.map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(text))))),
    receiptNode(detail),
  );
}

function receiptNode({ receipt, interventions }) {
  const edits = interventions.map((e) => `${e.mode} ${e.latent} ${e.mode === "clamp" ? "to" : "×"} ${short(e.value, 4)} (${e.positions} positions)`);
  const planned = edits.length > 4 ? [...edits.slice(0, 3), `and ${edits.length - 3} more`] : edits;
  const lines = [make("p", {}, make("strong", {}, "Plan: "), planned.join("; ") || "no intervention")];
  if (receipt) {
    const part = ([done, wanted, all], name) => `${count(done)} of ${plural(all, name)}` + (done === wanted ? "" : `, planned ${count(wanted)}`);
    const words = `edited ${part(receipt.prompt, "prompt position")}, ${part(receipt.generated, "generated token")}; mean norm ${short(receipt.norm)}`;
    const kept = receipt.continued ? "; kept tokens count as prompt, except the last one, which counts as generated" : "";
    const last = receipt.generated[1] || kept ? ` (the last token is never fed back${kept})` : "";
    lines.push(make("p", { class: receipt.valid ? null : "warning" }, make("strong", {}, "Receipt: "), words + last));
  }
  return make("div", { class: "receipt" }, lines);
}

function promptNode(i, { meta, prefill, lead, receipt }) {
  const steered = receipt && receipt.valid && receipt.prompt[1] > 0;
  return make(
    "section",
    {},
    make("h3", {}, "Prompt"),
    make("div", { id: "prompt", class: `text box${steered ? " steered-block" : ""}`, dir: "auto" }, textOf("prompt")(i)),
    meta ? [make("h3", {}, "Meta-prompt"), make("div", { class: "text box", dir: "auto" }, meta)] : null,
    prefill && !lead ? [make("h3", {}, "Prefill (not judged)"), make("div", { class: "text box", dir: "auto" }, prefill)] : null,
  );
}

function responsePart() {
  const { detail, series } = open;
  const judges = detail.verdicts.map((v, n) => make("option", { value: n, selected: v === open.judge }, v.judge));
  const pick = (event) => {
    open.coloured = event.target.value || null;
    drawResponse();
    drawComparison(open.i);
  };
  const rejudge = (event) => {
    open.judge = detail.verdicts[Number(event.target.value)];
    drawResponse();
    drawActivations();
  };
  const controls = [
    judges.length > 1 ? make("label", {}, "Attempts by ", make("select", { id: "judge", change: rejudge }, judges)) : null,
    series.length
      ? make("label", {}, "Colour by ", make("select", { id: "colour", change: pick }, make("option", { value: "" }, "nothing"), series.map((s) => make("option", { value: s.id, selected: s.id === open.coloured }, s.name))))
      : null,
    series.length ? make("span", { class: "scale", "aria-hidden": "true" }, "0", make("span", { class: "ramp" }), make("span", { id: "scale-top" })) : null,
    steeredTokens(detail) ? make("span", { class: "legend" }, make("span", { class: "steered" }, "underlined"), ": steered") : null,
  ];
  return make("section", {}, make("h3", {}, "Response"), make("div", { class: "bar" }, controls), make("div", { id: "response", class: "response", mousemove: hoverToken, mouseleave: unhover, click: pinToken }), make("div", { id: "pinned", role: "status" }));
}

function drawResponse() {
  const { detail } = open;
  const box = element("response");
  if (detail.text === undefined) return box.replaceChildren(make("p", { class: "notice" }, "Not generated yet."));
  const series = findSeries(open.coloured);
  if (element("scale-top")) element("scale-top").textContent = series ? short(series.peak) : "";
  box.replaceChildren(...responseNodes(detail, open.judge, series, series?.peak));
  if (!detail.text) box.append(make("p", { class: "notice" }, "(empty response)"));
  return markPinned();
}

function hoverToken(event) {
  const piece = event.target.closest("[data-token]");
  if (!piece || piece.closest("#comparison")) return unhover();
  return describeToken(Number(piece.dataset.token), event);
}

function describeToken(t, event) {
  const { receipt } = open.detail;
  const series = findSeries(open.coloured);
  const lines = [shownToken(open.pieces[t]), `token ${t + 1} of ${open.pieces.length}, position ${receipt.prompt[2] + t}`];
  if (series) lines.push(`${series.name}: ${t < series.values.length ? short(series.values[t]) : "never fed back"}`);
  showTip(event.clientX, event.clientY, ...lines);
  placeMarker("marker-hover", t);
  return t;
}

function unhover() {
  hideTip();
  placeMarker("marker-hover", null);
}

function pinToken(event) {
  const piece = event.target.closest("[data-token]");
  if (piece && String(getSelection()) === "") pin(Number(piece.dataset.token));
}

function pin(t) {
  open.pinned = open.pinned === t ? null : t;
  markPinned();
}

function unpin() {
  if (open.pinned === null) return false;
  pin(open.pinned);
  return true;
}

function movePin(by) {
  if (open.pinned === null || !open.detail) return false;
  open.pinned = Math.min(Math.max(open.pinned + by, 0), open.pieces.length - 1);
  markPinned();
  return true;
}

function markPinned() {
  const t = open.pinned;
  for (const piece of document.querySelectorAll("#response .token")) piece.classList.toggle("pinned", Number(piece.dataset.token) === t);
  placeMarker("marker-pin", t);
  const box = element("pinned");
  box.replaceChildren();
  if (t === null) return;
  scrollToToken(t);
  const values = open.series.filter((s) => s.values[t] > 0).sort((a, b) => b.values[t] / b.peak - a.values[t] / a.peak);
  box.append(
    make("strong", {}, `Token ${t + 1}: `),
    make("q", {}, shownToken(open.pieces[t])),
    `, position ${open.detail.receipt.prompt[2] + t}. `,
    make("ul", {}, values.slice(0, 12).map((s) => make("li", {}, `${s.name}: `, make("strong", {}, short(s.values[t])), ` (${Math.round((100 * s.values[t]) / s.peak)} % of its maximum)`))),
  );
  if (open.series.length && !values.length) box.append("No recorded latent is active here.");
}

function drawActivations() {
  const { detail, series } = open;
  const box = element("activations");
  if (!series.length) {
    const why = detail.acts ? "No recorded latent is active." : "No activations were recorded for this response; steerback view RUN --record records them.";
    box.replaceChildren(make("h3", {}, "Activations"), make("p", { class: "quiet" }, why));
    return;
  }
  const toggle = (id) => () => {
    if (!open.lines.delete(id)) open.lines.add(id);
    drawActivations();
  };
  const chips = series.map((s) => make("button", { type: "button", class: "chip", "aria-pressed": String(open.lines.has(s.id)), click: toggle(s.id) }, s.name));
  const chart = linesChart(open.pieces, attemptsOfTokens(detail, open.judge), series.filter((s) => open.lines.has(s.id)));
  const svg = chart.querySelector("svg");
  const at = (event) => Math.min(Math.max(tokenAt(svg, event), 0), open.pieces.length - 1);
  svg.addEventListener("mousemove", (event) => {
    describeToken(at(event), event);
    for (const piece of document.querySelectorAll("#response .token")) piece.classList.toggle("hovered", Number(piece.dataset.token) === at(event));
  });
  svg.addEventListener("mouseleave", () => {
    unhover();
    for (const piece of document.querySelectorAll("#response .hovered")) piece.classList.remove("hovered");
  });
  svg.addEventListener("click", (event) => pin(at(event)));
  const kept = element("lines-scroll")?.scrollLeft ?? 0;
  const silent = detail.acts.silent.length;
  box.replaceChildren(
    make("h3", {}, "Activations along the response"),
    make("div", { class: "chips", role: "group", "aria-label": "Lines shown" }, chips),
    chart,
    make("p", { class: "caption" }, `Each strip is scaled to its maximum. Activations are recorded before additions and clamps. Click to pin a token.${silent ? ` ${plural(silent, "recorded latent")} without activity.` : ""}`),
  );
  element("lines-scroll").scrollLeft = kept;
  markPinned();
}

async function drawComparison(i) {
  const mates = [];
  for (let n = 0; n < total; n += 1) if (n !== i && column.group[n] === column.group[i]) mates.push(n);
  const box = element("comparison");
  if (!mates.length) return box.replaceChildren(make("h3", {}, "Side by side"), make("p", { class: "quiet" }, "This page has no other condition with this latent, prompt and seed."));
  const shown = [i, ...mates.slice(0, MOST_COMPARED)];
  const details = await Promise.all(shown.map(detailOf));
  if (open.i !== i) return undefined;
  const series = details.map((d) => seriesOf(d).find((s) => s.id === open.coloured) ?? null);
  const peak = Math.max(...series.map((s) => s?.peak ?? 0));
  const cards = shown.map((n, place) => comparisonCard(n, details[place], series[place], peak, n === i));
  const rest = mates.length - MOST_COMPARED;
  return box.replaceChildren(
    make("h3", {}, "Side by side: the same latent, prompt and seed"),
    make("div", { class: "comparison scroll", tabindex: "0", role: "region", "aria-label": "Conditions side by side" }, cards),
    make("p", { class: "caption" }, (peak > 0 ? `Colours share one scale, 0 to ${short(peak)}. ` : "") + (rest > 0 ? `${plural(rest, "more condition")} in the table of trials.` : "")),
  );
}

function comparisonCard(n, detail, series, peak, here) {
  const judge = data.runs[column.run[n]].judge;
  const verdict = detail.verdicts.find((v) => v.judge === judge) ?? null;
  const name = [several ? data.runs[column.run[n]].name : "", textOf("stage")(n) === "measure" ? "" : textOf("stage")(n), textOf("condition")(n)].filter(Boolean).join(", ");
  const scores = column.attempts[n] ? `${short(column.first[n])} → ${short(column.last[n])}` : textOf("flags")(n);
  return make(
    "article",
    { class: `card${here ? " here" : ""}` },
    make("h4", {}, here ? name : make("a", { href: hashOf(linkKey(n)) }, name)),
    make("p", { class: "quiet" }, `boost ${short(column.boost[n], 4)}; `, column.attempts[n] === 1 ? `1 attempt, ${short(column.first[n])}` : scores),
    make("div", { class: "response" }, detail.text === undefined ? "not generated yet" : responseNodes(detail, verdict, series, peak)),
  );
}

function verdictsNode({ verdicts }) {
  const rows = verdicts.map((v) =>
    make(
      "tr",
      {},
      make("td", {}, v.judge),
      make("td", {}, v.rubric),
      make("td", {}, v.status, v.reason ? `: ${v.reason}` : ""),
      make("td", {}, v.attempts.map(([start, end, score, phrase, gated], n) => make("div", {}, `${n + 1}. `, make("strong", {}, short(score)), ` characters ${start}–${end}`, phrase ? [", ", make("q", {}, phrase)] : null, gated ? "" : " (not counted)"))),
      make("td", {}, v.raw ? make("details", {}, make("summary", {}, "reply"), make("div", { class: "text raw" }, v.raw)) : "–"),
    ),
  );
  const head = ["judge", "rubric", "status", "attempts", "raw reply"].map((name) => make("th", { scope: "col" }, name));
  const content = verdicts.length ? make("div", { class: "scroll" }, make("table", { class: "verdicts" }, make("thead", {}, make("tr", {}, head)), make("tbody", {}, rows))) : make("p", { class: "quiet" }, "No judge has judged this response.");
  return make("section", {}, make("h3", {}, "Verdicts"), content);
}

// Relevance of the windows (sentences) of the response, which recovery is computed from.
function windowsNode({ text, windows, "windows reason": reason }) {
  if (!windows) return make("section");
  const characters = Array.from(text);
  const [starts, scores] = windows;
  const rows = starts.map((start, n) => {
    const bar = make("span", { class: "bar-of-score" });
    bar.style.width = `${scores[n]}%`;
    const sentence = characters.slice(start, starts[n + 1]).join("").trim();
    return make("tr", {}, make("td", { class: "number" }, short(scores[n])), make("td", { class: "score-track" }, bar), make("td", { class: "text", dir: "auto" }, sentence));
  });
  const content = rows.length ? make("table", { class: "windows" }, make("tbody", {}, rows)) : make("p", { class: "quiet" }, reason);
  return make("section", {}, make("h3", {}, "Relevance of each sentence"), content);
}

function stepTrial(by) {
  if (!table.built) buildTable();
  const place = table.order.indexOf(open.i);
  const next = place < 0 ? 0 : place + by;
  if (!(next in table.order)) return;
  open.i = table.order[next]; // set now: the next key may arrive before the page shows this trial
  table.current = next;
  goTo(hashOf(linkKey(open.i)));
}

function backToTrials() {
  goTo("#trials");
}

