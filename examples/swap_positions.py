"""Opens a trained decoder, puts SeqPE next to its rotary positions, trains it, and says what it then computes.

python examples/swap_positions.py runs/rotary runs/swapped

The first folder is that of a run, an export, or a Hugging Face decoder with RoPE and its tokenizer.
"""

import sys

import seqpe_jax
from seqpe_jax import config
from seqpe_jax.training.loop import train_and_evaluate


def main(folder: str, workdir: str, **fields) -> seqpe_jax.Model:
    """Returns the trained model; fields: of the config, by dotted name, such as those of your own data."""
    fields = {"init_from": folder, "steps": 200, "optimizer.learning_rate": 1e-4, "objective.shift.rate": 0.3} | fields
    settings = config.load(f"{folder}:seqpe+rotary", fields)
    train_and_evaluate(settings, workdir)
    model = seqpe_jax.load(workdir)
    print(model, model.generate("import ", max_new_tokens=40), sep="\n")
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
