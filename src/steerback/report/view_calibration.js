// Calibration: tested boosts with scores, fitted curve and threshold of each latent.
let calibrationShown = false;

async function showCalibration() {
  if (calibrationShown) return;
  calibrationShown = true;
  const box = element("view-calibration");
  const runs = await unpack("calibration");
  const parts = runs.flatMap((run) => run.targets.map((target) => calibrationOf(run, target)));
  if (parts.length) box.append(...parts);
  else box.append(make("p", { class: "quiet" }, "These runs have no calibrated latents."));
}

function calibrationOf(run, { target, latents }) {
  const usable = latents.filter((l) => l.status === "converged").length;
  const from = run.source === run.run ? "" : ` Calibrated in run ${run.source}.`;
  const tried = latents.some((l) => l.tried.length) ? "" : " This run does not contain the calibration trials.";
  return make(
    "article",
    { class: "run" },
    make("h2", {}, `${run.run}: ${target}`),
    make("p", {}, `${usable} of ${plural(latents.length, "threshold")} converged.${from}${tried}`),
    make("div", { class: "grid" }, latents.map(latentCard)),
    make("p", { class: "caption" }, "Dots: mean first score of the trials at one boost, larger with more trials. Line and band: fitted curve with its 95 % interval. Vertical line and band: threshold with its 95 % interval. Dashed: target score. Cross: fresh trials at the threshold, with their 95 % interval."),
  );
}

const W = 300;
const H = 170;
const EDGE = { left: 34, right: 8, top: 8, bottom: 28 };

function latentCard(latent) {
  const check = latent.verification;
  const lines = [
    `threshold ${short(latent.boost)} [${short(latent.low)}, ${short(latent.high)}]`,
    check ? `fresh trials ${short(check.score)} [${short(check.low)}, ${short(check.high)}], n = ${check.n_trials}` : null,
  ];
  return make(
    "figure",
    { class: "latent-card" },
    make("figcaption", {}, make("strong", {}, [latent.latent, latent.label].filter(Boolean).join(" ")), " ", make("span", { class: `badge ${latent.status === "converged" ? "good" : "invalid"}` }, latent.status)),
    calibrationChart(latent),
    lines.filter(Boolean).map((line) => make("p", {}, line)),
    latent.status === "converged" ? null : make("p", { class: "warning" }, latent.reason),
    triedTable(latent),
  );
}

function triedTable({ tried }) {
  if (!tried.length) return null;
  const rows = tried.map((t) => make("tr", {}, make("td", { class: "number" }, short(t.boost)), make("td", { class: "number" }, short(t.mean)), make("td", { class: "number" }, t.scores.length), make("td", { class: "number" }, t.unscored)));
  const head = ["boost", "mean score", "trials", "unscored"].map((name) => make("th", { scope: "col", class: "number" }, name));
  return make("details", {}, make("summary", {}, `${plural(tried.length, "boost")} tested`), make("table", {}, make("thead", {}, make("tr", {}, head)), make("tbody", {}, rows)));
}

function calibrationChart(latent) {
  const { curve, tried } = latent;
  const shown = tried.filter((t) => t.mean !== null);
  const values = [...shown.map((t) => t.boost), latent.boost, ...(curve ? curve.boost : [latent.low, latent.high])];
  const least = Math.min(...values);
  const span = Math.max(...values) - least || 1;
  const x = (boost) => EDGE.left + (Math.min(Math.max((boost - least) / span, 0), 1)) * (W - EDGE.left - EDGE.right);
  const y = (score) => H - EDGE.bottom - (score / 100) * (H - EDGE.top - EDGE.bottom);
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `Scores against boost of latent ${latent.latent}` });
  const line = (kind, x1, y1, x2, y2) => svg.append(make("line", { class: kind, x1, y1, x2, y2 }));
  for (const score of [0, 50, 100]) {
    line("grid-line", EDGE.left, y(score), W - EDGE.right, y(score));
    svg.append(make("text", { class: "tick", x: EDGE.left - 5, y: y(score) + 4, "text-anchor": "end" }, score));
  }
  for (const boost of [least, least + span / 2, least + span]) {
    svg.append(make("text", { class: "tick", x: x(boost), y: H - EDGE.bottom + 14, "text-anchor": boost === least ? "start" : boost === least + span ? "end" : "middle" }, short(boost)));
  }
  svg.append(make("text", { class: "tick", x: (EDGE.left + W - EDGE.right) / 2, y: H - 2, "text-anchor": "middle" }, "boost"));
  svg.append(make("rect", { class: "threshold-band", x: x(latent.low), width: Math.max(x(latent.high) - x(latent.low), 1), y: EDGE.top, height: H - EDGE.top - EDGE.bottom }));
  if (curve) {
    const up = curve.boost.map((b, n) => `${x(b).toFixed(1)},${y(curve.high[n]).toFixed(1)}`);
    const down = curve.boost.map((b, n) => `${x(b).toFixed(1)},${y(curve.low[n]).toFixed(1)}`).reverse();
    svg.append(make("polygon", { class: "curve-band", points: [...up, ...down].join(" ") }));
    svg.append(make("polyline", { class: "curve", points: curve.boost.map((b, n) => `${x(b).toFixed(1)},${y(curve.score[n]).toFixed(1)}`).join(" ") }));
  }
  line("target", EDGE.left, y(latent.target_score), W - EDGE.right, y(latent.target_score));
  line("threshold", x(latent.boost), EDGE.top, x(latent.boost), H - EDGE.bottom);
  for (const t of shown) {
    const dot = make("circle", { class: "dot", cx: x(t.boost), cy: y(t.mean), r: Math.min(2 + Math.sqrt(t.scores.length), 6) }, make("title", {}, `boost ${short(t.boost)}: mean ${short(t.mean)} of ${t.scores.length}`));
    svg.append(dot);
  }
  const check = latent.verification;
  if (check) {
    line("check", x(latent.boost), y(check.low), x(latent.boost), y(check.high));
    line("check", x(latent.boost) - 5, y(check.score), x(latent.boost) + 5, y(check.score));
  }
  return svg;
}

start();
