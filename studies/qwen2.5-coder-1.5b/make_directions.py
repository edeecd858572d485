"""Make difference-of-means directions for topics of the training texts: texts about a topic minus texts about others.

    python make_directions.py TARGET CORPUS.jsonl NAMES.txt

The directions are stored with the target under the names of their topics. NAMES.txt gets the names as `--latents` takes
them. Topics are drawn at random among those with enough texts; both sides have every kind of text.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from steerback.jobs.loaded import load_target
from steerback.latents.corpus import pieces, read_corpus
from steerback.latents.directions import mean_residuals
from steerback.readers import content_lines
from steerback.targets import resolve
from steerback.targets.directions import DirectionFacts, difference_of_means, save_direction, user_directions

TOPICS, LEAST_TEXTS, PIECES, NEUTRAL = 24, 6, 60, 400
ROOT = Path(__file__).resolve().parents[2]


def main(name: str, corpus: str, names: str) -> None:
    """Make and store the directions."""
    from steerback.engines.transformers import TransformersEngine

    target = resolve(name).with_directions(())
    texts = read_corpus(Path(corpus))
    by_topic = texts_by_topic({key: (text.prompt, text.text) for key, text in texts.items()})
    rng = random.Random(44)
    enough = sorted(topic for topic, own in by_topic.items() if len(own) >= LEAST_TEXTS and "," not in topic)
    topics = sorted(rng.sample(enough, min(TOPICS, len(enough))))
    folder = user_directions(target.user_key)
    with load_target(target, "transformers", 64) as loaded:
        engine = loaded.engine
        assert isinstance(engine, TransformersEngine)
        layer = engine.runner.site.steer_layer
        others = [text for topic in sorted(by_topic) if topic not in topics for text in by_topic[topic]]
        neutral, norm = mean_residuals(engine, drawn(others, NEUTRAL, rng), layer)
        for topic in topics:
            own = drawn(by_topic[topic], PIECES, rng)
            about, _ = mean_residuals(engine, own, layer)
            vector = difference_of_means(about, neutral)
            source = f"{len(own)} pieces of texts about it, minus {NEUTRAL} pieces about other topics"
            facts = DirectionFacts(layer, float(vector.norm()), norm, source, contexts=tuple(own[:8]), model=name)
            save_direction(folder / f"{topic}.safetensors", vector, facts)
            print(f"{topic}: {len(own)} pieces, length {facts.norm:.1f} at a residual norm of {norm:.1f}", flush=True)
    Path(names).write_text(",".join(topics), encoding="utf-8")


def texts_by_topic(texts: dict[str, tuple[str, str]]) -> dict[str, list[str]]:
    """Return the texts by the topic of their prompt."""
    data = ROOT / "src/steerback/data/corpus"
    topics, kinds = (content_lines((data / f"{name}.txt").read_text("utf-8")) for name in ("topics", "kinds"))
    topic_of = {kind.replace("{topic}", topic): topic for topic in topics for kind in kinds}
    found: dict[str, list[str]] = {}
    for prompt, text in texts.values():
        if topic := topic_of.get(prompt.strip()):
            found.setdefault(topic, []).append(text)
    return found


def drawn(texts: list[str], n: int, rng: random.Random) -> list[str]:
    """Return `n` pieces of the texts, drawn at random, each once."""
    every = list(dict.fromkeys(" ".join(piece.split()) for text in texts for piece in pieces(text)))
    return rng.sample(every, min(n, len(every)))


if __name__ == "__main__":
    main(*sys.argv[1:])
