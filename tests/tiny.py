"""A config small enough for any test, and batches for it."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax import checksums, config, run_dir
from seqpe_jax.config import Config
from seqpe_jax.training.loop import train_and_evaluate
from seqpe_jax.training.step import TrainState, create_train_state

ROOT = pathlib.Path(__file__).parents[1]
# Overrides of SeqPE with each part that its signal may have, in some heads.
COMPOSED = {
    "encoding__qk": "multi",
    "encoding__feature_width": 3,
    "encoding__position_heads": 1,
    "encoding__rotary_pairs": 4,
    "encoding__rotary_heads": 1,
    "encoding__log_scaling": True,
}


def tiny_config(**overrides) -> Config:
    """The quickstart's config, shrunken, SeqPE without its gates; overrides by dotted name with `__` for the dot."""
    variant = overrides.pop("variant", "seqpe")
    values = {
        "steps": 6,
        "batch_size": 8,
        "data.length": 16,
        "model.layers": 1,
        "model.width": 24,
        "model.heads": 2,
        "encoding.layers": 1,
        "encoding.width": 24,
        "encoding.heads": 2,
        "encoding.max_position": 200,
        "objective.contrastive.batch": 4,
        "objective.contrastive.candidates": 6,
        "objective.contrastive.window": 32,
        "objective.distillation.batch": 4,
        "objective.distillation.offsets": 6,
        "optimizer.warmup_steps": 0,
        "objective.shift.rate": 0.0,
        "checkpoint.every": 2,
        "report.every": 1,
        "eval.lengths": (16, 32),
        "eval.tokens": 512,
        "report.trackers": (),
    }
    if variant != "seqpe":  # what it does not read would be refused
        values = {name: value for name, value in values.items() if not name.startswith(("encoding.", "objective."))}
    else:
        values |= {"encoding.rotary_pairs": 0, "encoding.feature_width": 0}
    values |= {name.replace("__", "."): value for name, value in overrides.items()}
    return config.load(f"{ROOT}/configs/stdlib_lm.py:{'seqpe_logits' if variant == 'seqpe' else variant}", values)


def every_part(kind: str, gate: str = "forget") -> dict:
    """Overrides that combine an encoding of texts with every part that it can take at once."""
    chosen = config.ENCODINGS[kind]
    fields = {"encoding__gate": gate, "encoding__gate_bias_init": 1.0}
    fields |= {} if kind == "rope_id" else {"encoding__log_scaling": True}  # it sharpens attention itself
    parts = {"position_heads": 1, "rotary_pairs": 4, "rotary_heads": 1}
    fields |= {f"encoding__{name}": value for name, value in parts.items() if chosen.has(name)}
    return fields


def train(settings: Config, workdir: str | pathlib.Path) -> None:
    """What the command does, in this process."""
    train_and_evaluate(settings, workdir)


def older(run: pathlib.Path) -> None:
    """Makes a run look like one of a version that wrote neither checksums of small files nor fingerprints of data."""
    for name in (checksums.DIGESTS_FILE, "data.json"):
        (run / name).unlink(missing_ok=True)  # a converted run has no fingerprints
    for step in (run / run_dir.CHECKPOINTS_DIR).iterdir():
        meta = json.loads((step / run_dir.META_FILE).read_text())
        del meta[run_dir.SIDE_FILES_KEY]
        (step / run_dir.META_FILE).write_text(json.dumps(meta))
        checksums.write_checksums(step)


def tokens(settings: Config, seed: int = 0, vocabulary: int = 256) -> dict[str, jnp.ndarray]:
    """A batch of random tokens."""
    draw = np.random.default_rng(seed).integers(0, vocabulary, (settings.batch_size, settings.data.length + 1))
    return {"tokens": jnp.asarray(draw, jnp.int32)}


def draw_params(shapes, std: float, seed: int = 1):
    """Parameters of these shapes, drawn on the host: compiling what draws a model's own takes longer than most tests."""
    draw = np.random.default_rng(seed)

    def drawn(path, leaf):
        noise = draw.normal(size=leaf.shape).astype(leaf.dtype)
        return jnp.asarray({"scale": 1 + 0.1 * noise, "bias": 0.1 * std * noise}.get(path[-1].key, std * noise))

    return jax.tree_util.tree_map_with_path(drawn, shapes)


def random_params(run, std: float, seed: int = 1):
    """Such parameters of a run."""
    return draw_params(run.abstract_state.params, std, seed)


def random_state(run, std: float) -> TrainState:
    """The same as a state at step 0."""
    return create_train_state(random_params(run, std), run.optimizer, jax.random.PRNGKey(0))
