// Activation lines of several latents along a response: one strip per latent, all on the same token axis.
const STEP = 13; // width of a token in pixels
const STRIP = 44;
const GAP = 10;
const WORDS = 76; // height of the token labels in pixels

function linesChart(tokens, attempts, chosen) {
  const width = tokens.length * STEP;
  const height = chosen.length * (STRIP + GAP) + WORDS;
  const svg = make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Activations of ${plural(chosen.length, "series")} along ${plural(tokens.length, "token")}` });
  for (const [from, to, attempt] of runsOf(attempts)) {
    svg.append(make("rect", { class: `strip a${attempt % 4}`, x: from * STEP, y: 0, width: (to - from) * STEP, height: height - WORDS }));
  }
  svg.append(make("rect", { id: "marker-hover", class: "marker", y: 0, width: STEP, height, visibility: "hidden" }));
  svg.append(make("rect", { id: "marker-pin", class: "marker pinned", y: 0, width: STEP, height, visibility: "hidden" }));
  chosen.forEach((series, n) => svg.append(strip(series, n * (STRIP + GAP) + GAP / 2, width)));
  tokens.forEach((piece, t) => {
    const shown = Array.from(piece.replaceAll("\n", "⏎").trim());
    const text = shown.length > 11 ? `${shown.slice(0, 10).join("")}…` : shown.join("") || "␣";
    const x = t * STEP + STEP / 2 + 3;
    const y = height - WORDS + 6;
    svg.append(make("text", { class: "word", x, y, transform: `rotate(-90 ${x} ${y})`, "text-anchor": "end" }, visible(text)));
  });
  const names = make("div", { class: "names" }, chosen.map((s) => make("div", { class: `name g-${s.group || "other"}` }, make("span", { class: "label" }, s.name), make("span", { class: "peak" }, `max ${short(s.peak)}`))));
  return make("div", { class: "lines-chart" }, names, make("div", { class: "scroll", id: "lines-scroll", tabindex: "0", role: "region", "aria-label": "Lines of latents; arrow keys move the pin" }, svg));
}

// Replace hidden characters by dots: SVG text cannot show their boxes.
const visible = (text) => Array.from(text).map((c) => (HIDDEN.test(c) ? "\u00b7" : c)).join("");

// Return [from, to, attempt] of consecutive tokens of one attempt; tokens between attempts are skipped.
function runsOf(attempts) {
  const runs = [];
  attempts.forEach((attempt, t) => {
    const last = runs.at(-1);
    if (last && last[2] === attempt && last[1] === t) last[1] = t + 1;
    else if (attempt >= 0) runs.push([t, t + 1, attempt]);
  });
  return runs;
}

function strip(series, top, width) {
  const floor = top + STRIP;
  const points = series.values.map((value, t) => [t * STEP + STEP / 2, floor - (value / series.peak) * STRIP]);
  const line = points.map(([x, y]) => `${x},${y.toFixed(1)}`).join(" ");
  const area = points.length ? `${points[0][0]},${floor} ${line} ${points.at(-1)[0]},${floor}` : "";
  return make(
    "g",
    { class: `series g-${series.group || "other"}` },
    make("line", { class: "axis", x1: 0, x2: width, y1: floor, y2: floor }),
    make("polygon", { class: "area", points: area }),
    make("polyline", { class: "line", points: line }),
  );
}

function tokenAt(svg, event) {
  return Math.floor((event.clientX - svg.getBoundingClientRect().left) / STEP);
}

function placeMarker(id, t) {
  const marker = element(id);
  if (!marker) return;
  if (t === null) marker.setAttribute("visibility", "hidden");
  else {
    marker.setAttribute("x", t * STEP);
    marker.setAttribute("visibility", "visible");
  }
}

function scrollToToken(t) {
  const box = element("lines-scroll");
  if (!box) return;
  const x = t * STEP;
  if (x < box.scrollLeft || x > box.scrollLeft + box.clientWidth - 2 * STEP) box.scrollLeft = x - box.clientWidth / 2;
}

