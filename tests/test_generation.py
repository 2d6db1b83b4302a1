"""Generation with a cache against the forward without one, for every encoding; ragged batches, draws, end tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax import build, generation
from seqpe_jax.errors import InputError
from seqpe_jax.generation import Sampling
from tests.tiny import tiny_config

pytestmark = pytest.mark.slow

NEW = 32
PROMPTS = [np.array(prompt) for prompt in ([7, 3, 200, 3, 9], [1], [90] * 20, list(range(50, 61)))]
SIZES = {
    "model__layers": 2, "model__width": 16, "encoding__width": 16, "encoding__max_position": 64, "model__init_std": 0.5,
    "objective__contrastive__weight": 0.0, "objective__distillation__weight": 0.0,
}  # fmt: skip


def run_of(variant: str = "seqpe", devices: int = 1, **fields):
    """A run with random parameters; it trains on windows of 16 tokens."""
    if variant == "seqpe":
        fields = {"encoding__init_std": 0.5, "encoding__qk_init_std": 0.5} | fields
    run = build.build(tiny_config(variant=variant, **(SIZES | fields)), jax.devices()[:devices])
    return run, jax.jit(run.objective.init)(jax.random.PRNGKey(1))


def uncached(run, params, prompt, new: int, window: int):
    """Greedy tokens and their logits, each from a forward over everything before it, under the window's signal."""
    model, variables = run.objective.model, {"params": params["model"]}

    @jax.jit
    def forward(buffer_BL, at):
        positions_PLA = jnp.arange(window, dtype=jnp.int32)[None, :, None]
        signal = run.objective.signal(params, positions_PLA, (window,))
        return model.apply(variables, buffer_BL, signal)[0, at]

    buffer = np.zeros((1, window), np.int32)
    buffer[0, : len(prompt)] = prompt
    logits = []
    for at in range(len(prompt), len(prompt) + new):
        logits.append(np.asarray(forward(buffer, at - 1)))
        buffer[0, at] = logits[-1].argmax()
    return buffer[0, len(prompt) : len(prompt) + new], np.stack(logits)


SEQPE = [
    {"encoding__mode": mode, "encoding__qk": qk, "encoding__per_head": per_head}
    for mode, maps in (
        ("input_add", ("none",)), ("rotary", ("none",)),
        *((mode, ("single", "multi", "none", "halves")) for mode in ("attn_add", "attn_mul", "attn_scalar")),
    )
    for qk in maps
    for per_head in (True, False)
]  # fmt: skip
BASELINES = ["learned", "sinusoidal", "rotary", "rotary_axial", "rotary_mixed", "alibi", "none"]
CASES = [("seqpe", fields) for fields in SEQPE] + [(kind, {}) for kind in BASELINES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def test_equals_the_forward_without_a_cache(case):
    """A ragged batch, twice the training length and more."""
    run, params = run_of(case[0], **case[1])
    chosen = PROMPTS[:3]
    window = max(map(len, chosen)) + NEW
    found = run.generate(params, chosen, Sampling(NEW), keep_logits=True)
    for prompt, result in zip(chosen, found, strict=True):
        tokens, logits = uncached(run, params, prompt, NEW, window)
        np.testing.assert_allclose(result.logits, logits, atol=1e-4)
        np.testing.assert_array_equal(result.tokens, tokens)
        log_probs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[:, None], -1)[:, 0]
        np.testing.assert_allclose(result.log_probs, log_probs, atol=1e-4)
        assert not result.ended and len(set(tokens.tolist())) > 2  # a constant text could not fail


@pytest.fixture(scope="module")
def seqpe():
    return run_of()
