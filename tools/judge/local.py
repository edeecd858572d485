"""Try a local language model as a judge: its floor on unsteered text, and its recall on restarts put into real text.

    python -m tools.judge.local render QUERIES.jsonl            the judge's own questions about 300 + 200 responses
    python -m tools.judge.local ask MODEL.gguf QUERIES.jsonl REPLIES.jsonl [--device cuda]      needs a GPU to be quick
    python -m tools.judge.local score QUERIES.jsonl REPLIES.jsonl OUT.json

The questions are those of `--judge provider/model` (rubric attempts-1), and the replies are read by the same parser.
`ask` needs PyTorch, transformers and gguf alone, so that it also runs on a machine without this package.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FLOOR, PLANTED = 300, 200
PREFIX, ANSWER = 300, 500  # characters of off-topic text before a restart, and of the answer after it


def cases(model: str) -> list[dict[str, Any]]:
    """Unsteered responses, and steered beginnings followed by a restart phrase and an unsteered answer."""
    from tools.judge.examples import responses

    rng = random.Random(44)
    rows = [r for r in responses(model) if r.text.strip()]
    unsteered = [r for r in rows if not r.topic and not r.meta]
    answers = {r.prompt: r.text for r in unsteered}
    steered = [r for r in rows if r.topic and r.prompt in answers]
    phrases = [
        p for p in json.loads((ROOT / "tests/data/judging/heldout.json").read_text())["restarts"] if "{" not in p
    ]
    made: list[dict[str, Any]] = [
        {"prompt": r.prompt, "label": None, "response": r.text, "restart": None} for r in rng.sample(unsteered, FLOOR)
    ]
    for i, row in enumerate(rng.choices(steered, k=PLANTED)):
        before = sentence_end(row.text, PREFIX)
        phrase = phrases[i % len(phrases)]
        text = f"{before} {phrase} {sentence_end(answers[row.prompt], ANSWER)}"
        made.append({"prompt": row.prompt, "label": row.topic, "response": text, "restart": len(before) + 1})
    return made


def sentence_end(text: str, most: int) -> str:
    """The beginning of a text up to the last end of a sentence within `most` characters."""
    ends = [m.end() for m in re.finditer(r"[.!?](?=\s|$)", text[:most])]
    return text[: ends[-1]] if ends else text[:most].rsplit(" ", 1)[0]


def render(out: Path) -> None:
    """Write the judge's question about each case."""
    from steerback.judging.base import JudgeItem
    from steerback.judging.graders import ATTEMPTS

    with out.open("w", encoding="utf-8") as file:
        for n, case in enumerate(cases("qwen2.5-coder-1.5b")):
            query = ATTEMPTS.question([JudgeItem(str(n), case["prompt"], case["response"], case["label"])])
            row = {"n": n, "system": query.system, "user": query.user, "nonce": query.nonce, **case}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def ask(model_file: Path, queries: Path, replies: Path, device: str, batch: int = 50, tokens: int = 320) -> None:
    """Let the model answer every question, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    began = time.time()
    tokenizer = AutoTokenizer.from_pretrained(model_file.parent, gguf_file=model_file.name)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(model_file.parent, gguf_file=model_file.name, dtype=torch.float32)
    model = model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()
    rows = [json.loads(line) for line in queries.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda r: len(r["user"]))
    with replies.open("w", encoding="utf-8") as file, torch.no_grad():
        for at in range(0, len(rows), batch):
            part = rows[at : at + batch]
            chats = [[{"role": r, "content": row[r]} for r in ("system", "user")] for row in part]
            texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
            inputs = tokenizer(texts, return_tensors="pt", padding=True).to(device)
            made = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
            said = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for row, reply in zip(part, said, strict=True):
                file.write(json.dumps({"n": row["n"], "reply": reply}, ensure_ascii=False) + "\n")
            file.flush()
            print(at + len(part), round(time.time() - began), "s", flush=True)
    note = {
        "model": model_file.name,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "seconds": round(time.time() - began),
    }
    replies.with_suffix(".note.json").write_text(json.dumps(note) + "\n", encoding="utf-8")


def score(queries: Path, replies: Path, out: Path) -> None:
    """Read the replies as the judge would, and write floor and recall with Wilson intervals."""
    from steerback.judging.base import JudgeItem
    from steerback.judging.graders import ATTEMPTS
    from steerback.judging.llm import judgement
    from steerback.metrics.intervals import wilson

    said = {r["n"]: r["reply"] for r in map(json.loads, replies.read_text(encoding="utf-8").splitlines())}
    counts = {"floor": [0, 0, 0], "recall": [0, 0, 0]}  # events, scored, unscored
    reasons: dict[str, int] = {}
    for row in map(json.loads, queries.read_text(encoding="utf-8").splitlines()):
        item = JudgeItem(str(row["n"]), row["prompt"], row["response"], row["label"])
        verdict = judgement(ATTEMPTS.read(said[row["n"]], row["nonce"], item), "local")
        kind = counts["floor" if row["restart"] is None else "recall"]
        if verdict.status != "scored":
            kind[2] += 1
            reasons[verdict.reason] = reasons.get(verdict.reason, 0) + 1
            continue
        starts = [a.start for a in verdict.gated_attempts()][1:]
        kind[1] += 1
        kind[0] += bool(starts) if row["restart"] is None else any(abs(s - row["restart"]) <= 3 for s in starts)
    body: dict[str, Any] = {
        name: {
            "events": events,
            "scored": scored,
            "unscored": unscored,
            "share": events / scored if scored else None,
            "interval": list(wilson(events, scored)) if scored else None,
        }
        for name, (events, scored, unscored) in counts.items()
    }
    note = json.loads(replies.with_suffix(".note.json").read_text(encoding="utf-8"))
    command = "python -m tools.judge.local render; ask; score"
    out.write_text(json.dumps({**note, **body, "unscored reasons": reasons, "command": command}, indent=1) + "\n")
    print(json.dumps(body, indent=1))


def main() -> None:
    """Run one of the three steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("render", "ask", "score"))
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.step == "ask":
        ask(*options.files, device=options.device)
    else:
        {"render": render, "score": score}[options.step](*options.files)


if __name__ == "__main__":
    main()
