"""Reading the arrays recorded from the PyTorch reference, and comparing with them."""

import json
import pathlib

import jax
import numpy as np

from seqpe_jax.interop import weights

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "shared" / "goldens"


def names(kind: str) -> list[str]:
    """Files of one kind; one name that no fixture finds where the goldens are absent, so that a test skips."""
    return sorted(path.stem for path in (FOLDER / kind).glob("*.npz")) or ["absent"]


def load(goldens: pathlib.Path, kind: str, name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns (config, arrays) of a file."""
    arrays = np.load(goldens / kind / f"{name}.npz")
    return json.loads(str(arrays["config"][0])), {key: arrays[key] for key in arrays.files if key != "config"}


def under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays below a prefix, under the rest of their names."""
    return {key[len(prefix) :]: value for key, value in arrays.items() if key.startswith(prefix)}


def close(found, expected, relative: float, name: str = "") -> None:
    """Asserts a largest difference relative to the largest expected magnitude."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, name
    assert np.abs(found - expected).max() <= relative * max(np.abs(expected).max(), 1e-3), name


def compare_gradients(config, grads, stored, state) -> None:
    """Compares all stored gradients with those of our parameters; the rest is filled with NaN and left out."""
    filled = {key: stored.get(key, np.full_like(value, np.nan)) for key, value in state.items()}
    rules = [rule for rule in weights.make_rules(config) if set(rule.reference_names) <= set(state)]
    expected = weights.to_params(rules, filled)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    largest = max((np.abs(leaf).max() for leaf in stored.values()), default=0.0)
    compared = 0
    for found, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        there = ~np.isnan(want)
        found, want = np.asarray(found)[there], want[there]
        if want.size:
            assert np.abs(found - want).max() <= 1e-4 * max(np.abs(want).max(), 1e-2 * largest)
            compared += want.size
    assert compared == sum(leaf.size for leaf in stored.values())
