// Response text: attempts as bands, restart phrases, and tokens coloured by the activation of a latent.

const SINGLE = { steered: "steered latent", detectors: "detector", backtracking: "backtracking latent" };

// Return the series of a response: each active latent, and the sum of each group with several latents.
function seriesOf(detail) {
  const { acts } = detail;
  if (!acts) return [];
  const raw = new Uint16Array(fromBase64(acts.values).buffer);
  const latents = acts.latents.map(([latent, label, group, peak], n) => ({
    id: String(latent),
    name: `${latent} ${label || SINGLE[group] || ""}`.trim(),
    group,
    peak,
    values: Array.from(raw.subarray(n * acts.tokens, (n + 1) * acts.tokens), (share) => (share / 65535) * peak),
  }));
  const sums = [...new Set(latents.map((s) => s.group))]
    .map((group) => ({ group, members: latents.filter((s) => s.group === group) }))
    .filter(({ group, members }) => group && members.length > 1)
    .map(({ group, members }) => {
      const values = members[0].values.map((_, t) => members.reduce((sum, s) => sum + s.values[t], 0));
      const name = `sum of ${members.length} active ${group === "backtracking" ? "backtracking latents" : group}`;
      return { id: `sum ${group}`, name, group, peak: Math.max(...values), values };
    });
  const rank = { steered: 0, detectors: 1, backtracking: 2 };
  latents.sort((a, b) => (rank[a.group] ?? 3) - (rank[b.group] ?? 3) || b.peak - a.peak);
  return [...sums, ...latents];
}

// Return bands [from, to) that cover the whole text, each with the attempt of a judge, or null.
function bandsOf(length, verdict) {
  const spans = verdict && verdict.status === "scored" ? [...verdict.attempts].sort((a, b) => a[0] - b[0]) : [];
  const bands = [];
  let at = 0;
  spans.forEach(([start, end, score, phrase, gated], n) => {
    const from = Math.max(at, Math.min(start, length));
    const to = Math.max(from, Math.min(end, length));
    if (from > at) bands.push({ from: at, to: from, attempt: null });
    bands.push({ from, to, attempt: { number: n + 1, score, phrase, gated } });
    at = to;
  });
  if (at < length) bands.push({ from: at, to: length, attempt: null });
  return bands;
}

// Return the index of the attempt (from 0) at each token, -1 between attempts.
function attemptsOfTokens(detail, verdict) {
  const bands = bandsOf(Array.from(detail.text).length, verdict).filter((b) => b.attempt);
  let start = detail.lead;
  return (detail.ends ?? []).map((end) => {
    const index = bands.findIndex((b) => start >= b.from && start < b.to);
    start = detail.lead + end;
    return index;
  });
}

// Return the response as nodes. `series` (or null) sets the colour of each token, scaled to `peak`.
function responseNodes(detail, verdict, series, peak) {
  const characters = Array.from(detail.text);
  const { lead, ends = [] } = detail;
  const cuts = new Set([lead, characters.length]);
  for (const end of ends) cuts.add(lead + end);
  const steered = steeredTokens(detail);
  let token = 0;
  return bandsOf(characters.length, verdict).map((band) => {
    const phraseEnd = phraseAt(characters, band);
    const text = make("div", { class: "text", dir: "auto" });
    let at = band.from;
    while (at < band.to) {
      let to = at + 1;
      while (to < band.to && !cuts.has(to) && to !== phraseEnd) to += 1;
      while (token < ends.length && lead + ends[token] <= at) token += 1;
      const isToken = at >= lead && token < ends.length;
      const classes = [isToken ? "token" : "", at < phraseEnd ? "phrase" : "", at < lead ? "prefill" : ""];
      // If the token ends are unknown, the whole response is marked.
      if (isToken ? token < steered : steered > 0 && !ends.length && at >= lead) classes.push("steered");
      const piece = make("span", { class: classes.filter(Boolean).join(" ") || null, "data-token": isToken ? token : null }, characters.slice(at, to).join(""));
      if (isToken && series && token < series.values.length) heat(piece, series.values[token] / peak);
      text.append(piece);
      at = to;
    }
    return bandNode(band, text);
  });
}

function heat(piece, share) {
  if (!(share > 0)) return;
  piece.classList.add("hot");
  piece.style.setProperty("--share", `${(100 * Math.min(share, 1)).toFixed(1)}%`);
}

// Return the first character after the restart phrase, or -1 if the band does not start with it.
function phraseAt(characters, { from, attempt }) {
  if (!attempt || !attempt.phrase) return -1;
  const phrase = Array.from(attempt.phrase);
  const start = characters.slice(from, from + phrase.length).join("");
  return start.toLowerCase() === attempt.phrase.toLowerCase() ? from + phrase.length : -1;
}

function bandNode(band, text) {
  const { attempt } = band;
  if (!attempt) return make("div", { class: "band none" }, text);
  const head = make(
    "div",
    { class: "band-head" },
    make("span", {}, `attempt ${attempt.number}`),
    make("span", { class: "score" }, `${short(attempt.score)}`, make("span", { class: "of" }, "/100")),
    attempt.phrase ? make("span", {}, "restarts with ", make("q", {}, attempt.phrase)) : null,
    attempt.gated ? null : make("span", { class: "warning" }, "not counted: it does not start with the phrase"),
  );
  return make("div", { class: `band attempt a${(attempt.number - 1) % 4}${attempt.gated ? "" : " ungated"}` }, head, text);
}

// Return the number of leading tokens that were steered during generation: all or none, according to the receipt.
function steeredTokens({ receipt }) {
  if (!receipt || !receipt.valid) return 0;
  return receipt.generated[1] ? receipt.generated[0] - receipt.continued : 0;
}

const shownToken = (piece) => (piece === "" ? "(no text)" : piece.replaceAll("\n", "⏎").replaceAll(" ", "␣"));

function tokenTexts(detail) {
  const characters = Array.from(detail.text);
  let start = detail.lead;
  return (detail.ends ?? []).map((end) => {
    const piece = characters.slice(start, detail.lead + end).join("");
    start = detail.lead + end;
    return piece;
  });
}

