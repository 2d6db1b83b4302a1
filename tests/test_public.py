"""The public names: lazy imports, SeqPE in a model of one's own, and the examples."""

import pathlib
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from beartype import beartype

import seqpe_jax
from seqpe_jax.config import ContrastiveConfig, DistillationConfig, ObjectiveConfig
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.errors import InputError
from seqpe_jax.models.build import DataSpec, ModelSpec
from tests.tiny import ROOT, tiny_config

EXAMPLES = pathlib.Path(ROOT) / "examples"
# With the shapes that their types name held to.
attend, apply_position_signal = (
    jaxtyping.jaxtyped(part, typechecker=beartype) for part in (seqpe_jax.attend, seqpe_jax.apply_position_signal)
)
SIZES = {"layers": 2, "width": 16, "heads": 2, "max_position": 1000}


def test_what_is_promised_is_there():
    assert set(seqpe_jax.__all__) <= set(dir(seqpe_jax))
    assert all(getattr(seqpe_jax, name).__doc__ for name in seqpe_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = seqpe_jax.lode
    with pytest.warns(DeprecationWarning, match="place is now seqpe_jax.apply_position_signal"):
        assert seqpe_jax.place is seqpe_jax.apply_position_signal


@pytest.mark.slow
def test_imports_pull_in_no_package_that_is_not_needed():
    """Neither data nor plots for the public parts; for training what it needs alone."""
    code = """
import sys, seqpe_jax
seqpe_jax.SeqPE, seqpe_jax.apply_position_signal, seqpe_jax.position_losses
print(*{name.partition(".")[0] for name in sys.modules})
import seqpe_jax.training.trainer
print(*{name.partition(".")[0] for name in sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    public, training = (set(line.split()) for line in done.stdout.splitlines())
    assert "flax" in public and {"jax", "flax", "orbax"} <= training, "else this test sees nothing"
    assert not public & {"tensorflow_datasets", "orbax", "matplotlib", "grain", "sklearn", "tensorboardX"}
    needless = {"sklearn", "scipy", "matplotlib", "tokenizers", "optuna", "submitit", "tensorflow", "torch"}
    assert not training & needless


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seqpe", "rotary", "rotary_mixed", "alibi", "sinusoidal", "pope", "none"])
def test_apply_position_signal_equals_attend(kind):
    """By any attention that knows nothing of positions, for every encoding; grouped sets of positions too."""
    fields = {"encoding__position_heads": 1, "encoding__rotary_pairs": 2} if kind == "seqpe" else {}
    model_spec = ModelSpec.of(tiny_config(variant=kind, **fields), DataSpec(vocabulary=8))
    positions_PLA = jnp.arange(24).reshape(1, 24, 1) + jnp.array([0, 40])[:, None, None]

    @jax.jit
    def outputs():
        """Of `attend`, of JAX's attention, and of `attend` without positions."""
        key = jax.random.PRNGKey(0)
        signal = model_spec.signal(model_spec.init(key), positions_PLA, (24,)).at_layer(0)
        q, k, v = jax.random.normal(jax.random.PRNGKey(1), (3, 4, 24, 2, 12))
        transformed = apply_position_signal(q, k, v, signal)
        found = jax.nn.dot_product_attention(*transformed, scale=1.0, is_causal=True)[..., :12]
        return attend(q, k, v, signal), found, attend(q, k, v, PositionSignal())

    expected, found, plain = outputs()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    if kind not in ("none", "sinusoidal"):
        assert np.abs(expected - plain).max() > 1e-3


def test_shapes_are_what_the_types_say():
    q, k, v = jnp.zeros((1, 3, 2, 8)), jnp.zeros((1, 5, 2, 8)), jnp.zeros((1, 5, 2, 4))
    assert jax.eval_shape(attend, q, k, v, PositionSignal()).shape == (1, 3, 2, 4)
    for wrong in ((q, k, q), (q, k[..., :4], v), (q[0], k, v), (q.astype(int), k, v)):
        with pytest.raises(jaxtyping.TypeCheckError):
            attend(*wrong, PositionSignal())


def test_features_stay_float32_with_bfloat16_queries():
    encoding, qkv = seqpe_jax.SeqPE.for_model(**SIZES), jax.ShapeDtypeStruct((1, 8, 2, 8), jnp.bfloat16)

    def features(q, k, v):
        signal = encoding.init_with_output(jax.random.PRNGKey(0), jnp.arange(8))[0].at_layer(0)
        return seqpe_jax.apply_position_signal(q, k, v, signal)

    assert {array.dtype for array in jax.eval_shape(features, qkv, qkv, qkv)} == {jnp.dtype("float32")}
    q = jnp.zeros(qkv.shape)
    with pytest.raises(InputError, match="bias"):
        seqpe_jax.apply_position_signal(q, q, q, PositionSignal(bias=jnp.zeros((1, 8, 8))))


def test_an_encoding_for_a_model_of_one_s_own_reads_positions_of_any_form():
    encoding = seqpe_jax.SeqPE.for_model(**SIZES)

    @jax.jit
    def signals():
        params = encoding.init(jax.random.PRNGKey(0), jnp.arange(8))
        return [encoding.apply(params, jnp.arange(40).reshape(shape)) for shape in ((40,), (40, 1), (1, 40, 1))]

    one, two, three = signals()
    assert one.position_query_key[0].shape == (2, 1, 40, 2, 8)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    jax.tree.map(np.testing.assert_array_equal, one, three)
    grid = seqpe_jax.SeqPE.for_model(**SIZES, axes=2, qk="single")
    positions_LA = jnp.stack(jnp.meshgrid(jnp.arange(3), jnp.arange(4), indexing="ij"), -1).reshape(-1, 2)
    signal = jax.eval_shape(lambda: grid.init_with_output(jax.random.PRNGKey(0), positions_LA)[0])
    assert signal.position_query_key[0].shape == (1, 12, 2, 8)


@pytest.mark.slow
@pytest.mark.parametrize("axes, window", [(1, 64), (2, (4, 4))])
def test_position_losses_are_those_of_the_objective_and_train_the_encoder(axes, window):
    encoding = seqpe_jax.SeqPE.for_model(**SIZES, axes=axes)
    params = jax.jit(encoding.init)(jax.random.PRNGKey(0), jnp.zeros((4, axes), jnp.int32))
    key = jax.random.PRNGKey(1)

    @jax.jit
    def losses_and_gradient(params, step):
        def loss(params):
            losses = seqpe_jax.position_losses(encoding, params, key, step, window=window)
            return sum(losses.values()), losses

        gradient, losses = jax.grad(loss, has_aux=True)(params)
        return losses, gradient

    (first, gradient), (again, _), (later, _) = (losses_and_gradient(params, step) for step in (0, 0, 1))
    assert set(first) == {"contrastive", "distillation"}
    assert all(value.shape == () and np.isfinite(value) and value > 0 for value in first.values())
    assert first == again and first["contrastive"] != later["contrastive"]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["params"]["encoder"]["digit_embedding"]))
    alone = ObjectiveConfig(
        contrastive=ContrastiveConfig(weight=0.0), distillation=DistillationConfig(batch=2, offsets=4)
    )
    only = jax.eval_shape(
        lambda params: seqpe_jax.position_losses(encoding, params, key, 0, window=window, settings=alone), params
    )
    assert set(only) == {"distillation"}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"window": (4, 4)}, "window has 2 axes and the encoding 1"),
        ({"window": 600}, "max_position=1000 must be at least 2 x 600"),
        ({"window": 64, "max_position": 100}, "max_position=100 must be at least 2 x 64"),
    ],
)
def test_impossible_losses_are_refused(options, words):
    encoding = seqpe_jax.SeqPE.for_model(**SIZES)
    with pytest.raises(seqpe_jax.InputError, match=words):
        seqpe_jax.position_losses(encoding, {"params": {}}, jax.random.PRNGKey(0), 0, **options)


@pytest.mark.slow
def test_the_examples_do_what_they_say():
    mixed, expected, losses = runpy.run_path(str(EXAMPLES / "seqpe_in_plain_jax.py"))["main"]()
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    assert set(losses) == {"contrastive", "distillation"}
    near, far = runpy.run_path(str(EXAMPLES / "seqpe_in_flax.py"))["main"](steps=20)
    assert near < 2.0 and far < near + 0.5, "the text is learned, and what was learned holds at eight times the length"


def test_one_name_for_all_commands():
    def said(*words):
        return subprocess.run(
            [sys.executable, "-m", "seqpe_jax", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
        )

    helped, wrong, passed = said("--help"), said("trian"), said("train", "--help")
    assert helped.returncode == 0 and "Commands: train, evaluate" in helped.stdout
    assert wrong.returncode == 2 and "there is no command 'trian'" in wrong.stderr and "Traceback" not in wrong.stderr
    assert passed.returncode == 0 and "--workdir" in passed.stdout and passed.stdout.startswith("Trains a model")
