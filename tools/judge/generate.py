"""Write responses of a real model, unsteered and steered: text that the offline judge learns from or is tried on.

    python -m tools.judge.generate MODEL.gguf OUT.jsonl --part train --lists LIST.txt ... [--device cuda]

Needs PyTorch, transformers and gguf. Steering adds a difference-of-means direction (a topic's sentences against the
other topics') to the residual stream after a block at 60 % of the depth, at every position. One JSON object a line:
`prompt`, `response`, `topic` and `strength` (empty and 0 when unsteered), `meta` and `temperature`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
STRENGTHS = (0.1, 0.2, 0.3, 0.4)
TEMPERATURES = (0.6, 0.8, 1.0)


def sections() -> dict[str, list[str]]:
    """Return the lines of prompts.txt by section."""
    by_name: dict[str, list[str]] = {}
    name = ""
    for line in (HERE / "prompts.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            name = line.strip("[]")
        elif line and not line.startswith("#"):
            by_name.setdefault(name, []).append(line)
    return by_name


def plan(part: str, lists: list[Path], unsteered: int, steered: int) -> list[dict[str, Any]]:
    """Return what to generate: every prompt of the lists once, then the made prompts, again and again."""
    text, rng = sections(), random.Random(part)
    listed = [p for f in lists for p in f.read_text(encoding="utf-8").splitlines() if p and not p.startswith("#")]
    made = [kind.format(topic) for kind in text[f"kinds {part}"] for topic in text[f"topics {part}"]]
    rng.shuffle(made)
    prompts = [*listed, *made]
    topics = [line.split(":")[0] for line in text["steer"]]
    rows = []
    for i in range(unsteered + steered):
        push = i >= unsteered
        meta = rng.choice(text["meta"]) if i % 10 == 9 else ""
        rows.append(
            {
                "prompt": prompts[i % len(prompts)],
                "meta": meta,
                "topic": topics[i % len(topics)] if push else "",
                "strength": rng.choice(STRENGTHS) if push else 0.0,
                "temperature": TEMPERATURES[i % 3],
            }
        )
    return rows


class Writer:
    """A model with its tokenizer and steering directions."""

    def __init__(self, gguf: Path, device: str) -> None:
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        kind = torch.bfloat16 if device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        self.model = model.to(device, kind).eval()
        self.chat = self.tokenizer.chat_template is not None
        layers = self.model.model.layers
        self.layer = layers[round(0.6 * len(layers)) - 1]
        self.push: torch.Tensor | None = None
        self.seen: torch.Tensor | None = None
        self.layer.register_forward_hook(self._hook)

    def _hook(self, _module: object, _inputs: object, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        self.seen = hidden
        if self.push is None:
            return output
        moved = hidden + self.push[:, None, :].to(hidden.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    @torch.no_grad()
    def directions(self) -> dict[str, torch.Tensor]:
        """Return the unit difference of means of each topic, times the median norm of the residual stream."""
        means, norms = {}, []
        for line in sections()["steer"]:
            name, _, rest = line.partition(": ")
            batch = self.tokenizer([s.strip() for s in rest.split(" | ")], return_tensors="pt", padding=True)
            batch = batch.to(self.device)
            self.model(**batch)
            assert self.seen is not None
            kept = batch["attention_mask"].bool().clone()
            kept[:, :-6] &= False  # the last six words, which leaves the outlier of the first position out
            states = self.seen[kept].float()
            means[name] = states.mean(0)
            norms.append(states.norm(dim=-1).median())
        scale = torch.stack(norms).median()
        total = sum(means.values())
        count = len(means)
        by_name = {name: m - (total - m) / (count - 1) for name, m in means.items()}
        return {name: d / d.norm() * scale for name, d in by_name.items()}

    def asked(self, row: dict[str, Any]) -> str:
        """Return the text that the model continues."""
        prompt = " ".join(p for p in (row["prompt"], row["meta"]) if p)
        if not self.chat:
            return f"Question: {prompt}\nAnswer:"
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )

    @torch.no_grad()
    def write(self, rows: list[dict[str, Any]], directions: dict[str, torch.Tensor], tokens: int) -> list[str]:
        """Return the response to each row; all rows have the same temperature."""
        batch = self.tokenizer([self.asked(r) for r in rows], return_tensors="pt", padding=True).to(self.device)
        zero = torch.zeros_like(next(iter(directions.values())))
        vectors = [directions[r["topic"]] * r["strength"] if r["topic"] else zero for r in rows]
        self.push = torch.stack(vectors)
        out = self.model.generate(
            **batch,
            do_sample=True,
            temperature=rows[0]["temperature"],
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
            max_new_tokens=tokens,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.push = None
        texts = self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [(t if self.chat else t.split("\nQuestion:")[0]).strip() for t in texts]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=("train", "heldout"), required=True)
    parser.add_argument("--lists", type=Path, nargs="*", default=[])
    parser.add_argument("--unsteered", type=int, default=1200)
    parser.add_argument("--steered", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=280)
    parser.add_argument("--batch", type=int, default=300)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    began = time.time()
    torch.manual_seed(44)
    writer = Writer(options.model, options.device)
    directions = writer.directions()
    print(options.model.name, "loaded", round(time.time() - began), "s", flush=True)
    rows = plan(options.part, options.lists, options.unsteered, options.steered)
    rows.sort(key=lambda r: (bool(r["topic"]), r["temperature"]))
    with options.out.open("w", encoding="utf-8") as out:
        for at in range(0, len(rows), options.batch):
            for temperature in TEMPERATURES:
                part = [r for r in rows[at : at + options.batch] if r["temperature"] == temperature]
                for row, text in zip(part, writer.write(part, directions, options.tokens) if part else [], strict=True):
                    out.write(json.dumps({**row, "response": text}, ensure_ascii=False) + "\n")
            out.flush()
            print(options.model.name, at + options.batch, round(time.time() - began), "s", flush=True)
    note = {
        "model": options.model.name,
        "sha256": hashlib.sha256(options.model.read_bytes()).hexdigest(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "temperatures": TEMPERATURES,
        "strengths": STRENGTHS,
        "tokens": options.tokens,
        "seed": 44,
    }
    options.out.with_suffix(".json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
