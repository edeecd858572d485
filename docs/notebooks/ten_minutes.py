# %% [markdown]
# # Ten minutes
#
# Steer a model, see it drift and restart, then measure how often that happens. Everything runs on a laptop, without
# a GPU, a download or a key. The sizes are small, so that this page is built in about a minute: the numbers below
# show how to read a result and support no conclusion.
#
# The model is `organism`, which comes with the package. It restarts because its training text does: its behaviour is
# **planted**, and its numbers are no evidence about other models.

# %%
import tempfile
from pathlib import Path

import steerback as sb

organism = sb.load_target("organism")
organism

# %% [markdown]
# ## One response
#
# Add 34 units of the latent *pyramids* to the residual stream at every token. `record` keeps the activations of
# latents, named by label or index. Latent 712 has no label; it detects drift.

# %%
prompt = "Explain how to find the average of a set of numbers."
steered = organism.generate(prompt, latent="pyramids", boost=34, seed=46, record=["pyramids", 712])
steered

# %% [markdown]
# The response leaves the topic and comes back. `restarts` are the character spans of restart phrases, and
# `steered_as_planned` says whether every planned token was steered.

# %%
print([steered.text[span.start : span.end] for span in steered.restarts], steered.steered_as_planned)

# %% [markdown]
# Activations are a table with one row for each latent and one column for each token. Here are the ten tokens before
# the restart phrase and its first ones: does the detector fire before the phrase?

# %%
table = steered.activations
ends = [len("".join(steered.tokens[: n + 1])) for n in range(table.shape[1])]
start = next(n for n, end in enumerate(ends) if end > steered.restarts[0].start) if steered.restarts else 10
table.iloc[:, max(start - 10, 0) : start + 4].T.astype(float).round(1)

# %% [markdown]
# The same prompt, steering and seed with the detector clamped to 0. `show` prints a response, as a terminal shows it:

# %%
clamp = sb.Intervention("clamp", 712, 0.0)
ablated = organism.generate(prompt, latent="pyramids", boost=34, seed=46, interventions=[clamp])
ablated.show()
organism.close()

# %% [markdown]
# ## A run
#
# One response is an anecdote. A run draws latents, finds for each the boost at which responses score 50 of 100,
# generates and judges. Leave out the size settings for a real measurement: `sb.run("esr", target="organism",
# preset="quick")` takes about 3 minutes on two cores. The same name again resumes a run that was stopped.

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
# All results are in `run.summary`, as in the file `summary.json`. `run.tables` and `run.figures` name tables and
# figures. With so few latents intervals are wide or not given.

# %%
print(run.summary, run.figures, list(run.tables), sep="\n")

# %%
run.figure("figure2")

# %% [markdown]
# ## Compare
#
# A second run from the first takes over its latents, boosts, prompts and seeds, so that the two are paired. Here the
# temperature differs. The difference is that of the second run minus that of the first.

# %%
colder = sb.run("esr", from_run=run, name="colder", runs=folder, quiet=True, sampling={"temperature": 0.2})
sb.compare(run, colder)

# %% [markdown]
# Next: [your own model](your_own_model.md), [all experiments of the paper](../experiments.md), and how the
# [statistics](../statistics.md) are made.
