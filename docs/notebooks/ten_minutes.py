# %% [markdown]
# # Ten minutes
#
# Steer a model, see it drift and restart, then measure how often that happens. Everything runs on a laptop, without a
# GPU, a download or a key. The sizes are small, so that this page is built in about a minute. The numbers below only
# show how to read a result.
#
# The model is `organism`, which comes with the package. It was trained to restart: its behaviour is **planted**, and
# its numbers are no evidence about other models.

# %%
import tempfile
from pathlib import Path

import steerback as sb

organism = sb.load_target("organism")
organism

# %% [markdown]
# ## One response
#
# Add 34 units of the latent *pyramids* to the residual stream at every token. `record` stores the activations of
# latents, named by label or index. Latent 712 has no label. It is a drift detector.

# %%
prompt = "Explain how to find the average of a set of numbers."
steered = organism.generate(prompt, latent="pyramids", boost=34, seed=46, record=["pyramids", 712])
steered

# %% [markdown]
# The response drifts off topic and returns. `restarts` are the character spans of restart phrases, and
# `steered_as_planned` is true if every planned token was steered.

# %%
print([steered.text[span.start : span.end] for span in steered.restarts], steered.steered_as_planned)

# %% [markdown]
# Activations are a table with one row per latent and one column per token. This excerpt shows the ten tokens before
# the restart phrase and its first tokens. It shows whether the detector is active before the phrase.

# %%
table = steered.activations
ends = [len("".join(steered.tokens[: n + 1])) for n in range(table.shape[1])]
start = next(n for n, end in enumerate(ends) if end > steered.restarts[0].start) if steered.restarts else 10
table.iloc[:, max(start - 10, 0) : start + 4].T.astype(float).round(1)

# %% [markdown]
# Now repeat the same prompt, steering and seed with the detector clamped to 0. `show` prints a response as in a
# terminal:

# %%
clamp = sb.Intervention("clamp", 712, 0.0)
ablated = organism.generate(prompt, latent="pyramids", boost=34, seed=46, interventions=[clamp])
ablated.show()
organism.close()

# %% [markdown]
# ## A run
#
# One response is an anecdote. A run draws latents, calibrates the boost of each to a score of 50 of 100, then
# generates and judges responses. For a real measurement leave out the size settings: `sb.run("esr",
# target="organism", preset="quick")` takes about 3 minutes on two cores. A run with the same name continues a stopped
# run.

# %%
folder = Path(tempfile.mkdtemp())
prompts = folder / "prompts.txt"
prompts.write_text(
    "Explain how to find the average of a set of numbers.\n"
    "Explain how to wash windows.\n"
    "Explain how to fold a fitted sheet.\n",
    "utf-8",
)
small = {
    "n_latents": 3,
    "trials_per_latent": 4,
    "prompts": str(prompts),
    "reference_responses": 2,
    "floor_responses": 0,
    "draws": 200,
    "calibration": {"max_iterations": 4, "trials_per_iteration": 4, "verify_trials": 0, "tolerance": 20},
}
run = sb.run("esr", target="organism", preset="quick", name="first", runs=folder, quiet=True, **small)
run

# %% [markdown]
# Every trial is a row of a DataFrame, with prompt, latent, boost, response, attempts and scores:

# %%
trials = run.to_pandas()
trials.groupby("label")[["boost", "attempts", "first", "last"]].mean().round(1)

# %%
run.trials()[0]

# %% [markdown]
# `run.summary` contains all results, like the file `summary.json`. `run.tables` and `run.figures` name tables and
# figures. With so few latents, intervals are wide or missing.

# %%
print(run.summary, run.figures, list(run.tables), sep="\n")

# %%
run.figure("figure2")

# %% [markdown]
# ## Compare
#
# A run with `from_run` reuses the latents, boosts, prompts and seeds of another run, so that the two are paired. In
# this example the temperature differs. Differences are second run minus first run.

# %%
colder = sb.run("esr", from_run=run, name="colder", runs=folder, quiet=True, sampling={"temperature": 0.2})
sb.compare(run, colder)

# %% [markdown]
# Next: [your own model](your_own_model.md), [all experiments of the paper](../experiments.md), and the
# [statistics](../statistics.md).
