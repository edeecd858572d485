# %% [markdown]
# # Your own model
#
# Steer a model from a folder, without an SAE: write a target table, make a direction from a few texts, check the
# target with `doctor`, and look at a response. This page needs no download, because its model is a Llama of 4 layers
# with random weights. It writes noise and is no evidence about language models. To use your model, leave out the cell
# that creates the random one, and set `model` to your folder (Llama, Qwen 2, Qwen 3, Gemma 2 or Gemma 3).

# %%
import os
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import steerback as sb

folder = Path(tempfile.mkdtemp())
model = folder / "model"

volcanoes = [
    "The volcano threw ash and lava over the slope for three days.",
    "Lava ran down from the crater and hardened at the foot of the mountain.",
    "Magma rises through the vent until the volcano erupts.",
    "Ash from the eruption covered the villages under the volcano.",
]
neutral = [
    "The library opens at nine and closes at six on weekdays.",
    "She bought two loaves of bread and a bottle of milk.",
    "Trains to the coast leave every hour from the second platform.",
    "He painted the fence white before the guests arrived.",
]

# %% [markdown]
# Create a byte-level tokenizer with a chat template, and the random model:

# %%
special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
bpe.train_from_iterator(
    volcanoes + neutral, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
tokenizer.chat_template = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    initializer_range=0.3,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
LlamaForCausalLM(config).save_pretrained(model)
saved = tokenizer.save_pretrained(model)

# %% [markdown]
# ## The target
#
# A target is one table of a TOML file, with the place of the model and the block (0-based) to steer after. A block in
# the middle of the model is a good start. The environment variable `STEERBACK_TARGETS` names the file, like the
# option `--targets` of commands.

# %%
table = folder / "mine.toml"
table.write_text(
    f'''[mine]
model = "{model.as_posix()}"
steer_layer = 2
read_layer = 2
directions = "directions"
''',
    "utf-8",
)
(folder / "directions").mkdir()
os.environ["STEERBACK_TARGETS"] = str(table)
mine = sb.load_target("mine", engine="transformers")
mine

# %% [markdown]
# ## A direction
#
# The direction is the mean activation on texts about volcanoes minus that on neutral texts. Four texts per side are
# enough for a first try; use dozens for a measurement. `steerback directions make` does the same.

# %%
from steerback.latents.directions import from_texts
from steerback.targets.directions import save_direction

vector, facts = from_texts(mine.engine, volcanoes, neutral, layer=2, source="four texts a side")
save_direction(folder / "directions" / "volcanoes.safetensors", vector, facts)
mine.close()
print(f"length of the residual stream: {facts.residual_norm:.2f}, of the difference: {facts.norm:.2f}")

# %% [markdown]
# ## Check it
#
# `examine` loads the target, measures the residual stream and steers once. For a target with an SAE it also checks
# whether the SAE belongs to this layer. `steerback doctor mine` prints the same.

# %%
from steerback.jobs.doctor import examine

mine = sb.load_target("mine", engine="transformers")
print("\n".join(examine(mine).lines()))

# %% [markdown]
# ## Try it
#
# A boost is the length of the added vector at every token. Half the length of the residual stream is a good start.
# Raise the boost if the text does not change, and lower it if the text makes no sense.

# %%
boost = round(facts.residual_norm / 2, 1)
prompt = "Explain how to wash windows."
steered = mine.generate(prompt, latent="volcanoes", boost=boost, max_new_tokens=40)
plain = mine.generate(prompt, max_new_tokens=40)
print("steered as planned:", steered.steered_as_planned, "- text changed:", steered.text != plain.text)
steered

# %% [markdown]
# ## Measure it
#
# With a model that answers questions, a run calibrates the boost:
#
# ```python
# run = sb.run("esr", target="mine", latents=["volcanoes"], judge="offline", preset="quick", name="mine")
# run.figure("figure2")
# ```
#
# Intervals need five or more directions. The offline judge compares words. For results that you report, use a
# language model as judge ([judging](../judging.md)). Next: the same in the terminal ([tutorial](../tutorial.md)), and
# [targets with an SAE](../targets.md).

# %%
mine.close()
