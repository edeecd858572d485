"use strict";
// Labelling of one sample. Positions count characters (code points), as in Python. Texts are set as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const storageKey = `steerback-labels/${data.run}/${data.sample}`;
  const element = (id) => document.getElementById(id);
  const items = data.items.map((item) => ({ ...item, characters: Array.from(item.response) }));
  const state = load();
  let cursor = 0; // index of the current word
  let chosen = 0; // index of the current attempt

  function load() {
    const empty = { at: 0, labels: {} };
    try {
      const stored = JSON.parse(localStorage.getItem(storageKey));
      return stored && typeof stored.labels === "object" ? { ...empty, ...stored } : empty;
    } catch {
      notice("This browser does not store the state of this page: save often.");
      return empty;
    }
  }

  function keep() {
    try {
      localStorage.setItem(storageKey, JSON.stringify(state));
    } catch {
      notice("This browser does not store the state of this page: save often.");
    }
  }

  function notice(message) {
    element("notice").textContent = message;
  }

  const item = () => items[state.at];
  const label = () => (state.labels[item().number] ??= { status: "scored", restarts: [], scores: [null] });
  const isTouched = (l) => l && (l.status !== "scored" || l.restarts.length > 0 || l.scores.some((s) => s !== null));
  const isDone = (l) => l && (l.status !== "scored" || l.scores.every((s) => s !== null));

  function fill(id, text) {
    element(id).replaceChildren();
    write(element(id), text);
  }

  function attemptAt(position) {
    return label().restarts.filter((start) => start <= position).length;
  }

  function showResponse() {
    const { characters, words } = item();
    const box = element("response");
    const { restarts, status } = label();
    box.replaceChildren();
    let written = 0;
    words.forEach((start, index) => {
      const end = index + 1 < words.length ? words[index + 1] : characters.length;
      write(box, characters.slice(written, start).join(""));
      const raw = characters.slice(start, end).join("");
      const trimmed = Array.from(raw.trimEnd());
      const word = document.createElement("span");
      word.className = "word";
      word.dataset.start = String(start);
      word.classList.toggle("cursor", index === cursor);
      word.classList.toggle("chosen", restarts.length > 0 && status === "scored" && attemptAt(start) === chosen);
      if (restarts.includes(start)) {
        word.classList.add("restart");
        word.dataset.attempt = String(restarts.indexOf(start) + 2);
      }
      write(word, trimmed.join(""));
      word.addEventListener("click", () => {
        cursor = index;
        toggle();
      });
      box.append(word);
      written = start + trimmed.length;
    });
    write(box, characters.slice(written).join(""));
  }

  function showAttempts() {
    const { restarts, scores, status } = label();
    const list = element("attempts");
    list.replaceChildren();
    if (status !== "scored") {
      const line = document.createElement("li");
      line.textContent = status === "empty" ? "only asks back: no attempt" : "cannot tell";
      list.append(line);
      return;
    }
    [0, ...restarts].forEach((start, number) => {
      const line = document.createElement("li");
      line.classList.toggle("chosen", number === chosen);
      const score = document.createElement("span");
      score.className = "score";
      score.textContent = scores[number] === null ? "score?" : String(scores[number]);
      const words = document.createElement("span");
      words.className = "start";
      write(words, item().characters.slice(start, start + 60).join("").trim() + " …");
      line.append(score, " ", words);
      line.addEventListener("click", () => {
        chosen = number;
        show();
      });
      list.append(line);
    });
  }

  function show() {
    const done = items.filter(({ number }) => isDone(state.labels[number])).length;
    element("place").textContent = `${state.at + 1} of ${items.length}; ${done} finished`;
    fill("prompt", item().prompt);
    fill("topic", item().topic ?? "");
    element("topic-heading").hidden = element("topic").hidden = item().topic === null;
    showResponse();
    showAttempts();
    document.querySelector(".word.cursor")?.scrollIntoView({ block: "nearest" });
    keep();
  }

  function go(to) {
    state.at = Math.min(Math.max(to, 0), items.length - 1);
    cursor = chosen = 0;
    notice("");
    window.scrollTo(0, 0);
    show();
  }

  function goUnfinished() {
    const order = items.map((_, index) => (state.at + 1 + index) % items.length);
    const next = order.find((index) => !isDone(state.labels[items[index].number]));
    if (next === undefined) notice("All responses are finished: save the file.");
    else go(next);
  }

  function move(starts, step) {
    const { words } = item();
    if (!words.length) return;
    const here = words[cursor];
    const target = step > 0 ? starts.find((start) => start > here) : starts.findLast((start) => start < here);
    if (target !== undefined) cursor = words.indexOf(target);
    chosen = attemptAt(words[cursor]);
    show();
  }

  function toggle() {
    const position = item().words[cursor];
    if (position === undefined) return;
    if (position === item().words[0]) {
      notice("The first attempt starts at this word, so it cannot be a restart.");
      return show();
    }
    notice("");
    const l = label();
    l.status = "scored";
    const at = l.restarts.indexOf(position);
    if (at >= 0) remove(at);
    else {
      const place = l.restarts.filter((start) => start < position).length;
      l.restarts.splice(place, 0, position);
      l.scores.splice(place + 1, 0, null);
      if (!l.scores.length) l.scores.push(null);
      chosen = place + 1;
    }
    show();
  }

  function remove(at) {
    label().restarts.splice(at, 1);
    label().scores.splice(at + 1, 1);
    chosen = at;
  }

  function setScore(value) {
    const l = label();
    if (l.status !== "scored") Object.assign(l, { status: "scored", restarts: [], scores: [null] });
    l.scores[chosen] = Math.min(Math.max(value, 0), 100);
    notice("");
    show();
  }

  function setStatus(status) {
    const same = label().status === status;
    state.labels[item().number] = same
      ? { status: "scored", restarts: [], scores: [null] }
      : { status, restarts: [], scores: [] };
    chosen = 0;
    show();
  }

  function save() {
    const labels = {};
    let unfinished = 0;
    for (const { number } of items) {
      const l = state.labels[number];
      if (isDone(l)) labels[number] = { status: l.status, restarts: l.restarts, scores: l.scores };
      else if (isTouched(l)) unfinished += 1;
    }
    const body = { format: data.format, run: data.run, sample: data.sample, rubric: data.rubric, labels };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(body, null, 1) + "\n"], { type: "application/json" }));
    link.download = `labels-${data.run}-${data.sample}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    const left = unfinished ? ` It leaves out ${unfinished} unfinished ones.` : "";
    notice(`Saved ${Object.keys(labels).length} of ${items.length} responses.${left}`);
  }

  const byKey = {
    n: () => go(state.at + 1),
    p: () => go(state.at - 1),
    f: goUnfinished,
    ArrowRight: () => move(item().words, 1),
    ArrowLeft: () => move(item().words, -1),
    ArrowDown: () => move(item().sentences, 1),
    ArrowUp: () => move(item().sentences, -1),
    m: toggle,
    u: () => {
      if (label().restarts.length) remove(label().restarts.length - 1);
      show();
    },
    a: () => {
      chosen = (chosen + 1) % (label().restarts.length + 1);
      show();
    },
    x: () => setScore(100),
    "+": () => setScore((label().scores[chosen] ?? 50) + 1),
    "-": () => setScore((label().scores[chosen] ?? 50) - 1),
    e: () => setStatus("empty"),
    q: () => setStatus("unscored"),
    s: save,
    h: () => {
      element("rules").hidden = !element("rules").hidden;
    },
  };
  for (let digit = 0; digit < 10; digit += 1) byKey[digit] = () => setScore(10 * digit);

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(byKey, event.key)) return;
    event.preventDefault();
    byKey[event.key]();
  });
  for (const [id, key] of [["previous", "p"], ["next", "n"], ["open", "f"], ["save", "s"], ["help", "h"]]) {
    element(id).addEventListener("click", (event) => {
      event.currentTarget.blur();
      byKey[key]();
    });
  }
  state.at = Number.isInteger(state.at) ? Math.min(Math.max(state.at, 0), items.length - 1) : 0;
  if (!Object.keys(state.labels).length) element("rules").hidden = false;
  show();
  window.scrollTo(0, 0);
})();
