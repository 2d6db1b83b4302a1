"""Opens a trained language model: logits, position vectors, generated text.

python examples/load_and_generate.py            # the model that launch/quickstart.sh trained
python examples/load_and_generate.py runs/first
"""

import pathlib
import sys

import jax.numpy as jnp

import seqpe_jax

QUICKSTART = pathlib.Path(__file__).parents[1] / "runs" / "quickstart" / "seqpe"


def main(folder: str) -> str:
    """Returns the text that a run's model generates after a prompt."""
    model = seqpe_jax.load(folder)
    print(model)
    tokens = jnp.asarray(model.tokenizer.encode(b"import json"))[None]
    print("logits of the next token:", model.logits(tokens)[0, -1].shape)
    print("vectors of positions:", model.encode_positions([0, 9, 4999]).shape)
    return model.generate("import ", max_new_tokens=40)


if __name__ == "__main__":
    print(main(sys.argv[1] if len(sys.argv) > 1 else str(QUICKSTART)))
