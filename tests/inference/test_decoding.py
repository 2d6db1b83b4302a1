"""Generation over a KV cache against the uncached forward, for every field of a signal; batches, sampling, end tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.config.encodings import kinds_for
from seqpe_jax.errors import InputError
from seqpe_jax.inference import decode
from seqpe_jax.inference import generate as generation
from seqpe_jax.inference.compiled import CompiledModel
from seqpe_jax.inference.decode import Sampling
from seqpe_jax.models.build import DataSpec, ModelSpec
from seqpe_jax.training.trainer import Trainer
from tests.tiny import COMPOSED, every_part, random_params, tiny_config

pytestmark = pytest.mark.slow

KEY = jax.random.PRNGKey(0)
NEW = 20
PROMPTS = [np.array(prompt) for prompt in ([7, 3, 200, 3, 9], [1], [90] * 20, list(range(50, 61)))]
SIZES = {
    "model__layers": 2,
    "model__width": 16,
    "encoding__width": 16,
    "encoding__max_position": 64,
    "objective__contrastive__weight": 0.0,
    "objective__distillation__weight": 0.0,
}


def settings_of(variant: str = "seqpe", **fields):
    """A config that trains on windows of 16 tokens."""
    sizes = {name: value for name, value in SIZES.items() if variant == "seqpe" or name.startswith("model")}
    return tiny_config(variant=variant, **(sizes | fields))


def run_of(*variant: str, devices: int = 1, **fields):
    """A run with random parameters."""
    run = Trainer.of(settings_of(*variant, **fields), jax.devices()[:devices])
    return run, random_params(run, 0.3)


def generate(run, params, prompts, sampling, **options):
    """Generations of a run's own model."""
    return generation.generate(run.compiled, run.config, params, prompts, sampling, run.task.known_V, **options)


def uncached(run, params, prompts, found, window: int):
    """Logits of the new tokens of each text, from one forward over prompts and texts, under the window's signal."""
    buffer_BL = np.zeros((len(prompts), window), np.int32)
    for row, prompt, result in zip(buffer_BL, prompts, found, strict=True):
        row[: len(prompt) + len(result.tokens)] = [*prompt, *result.tokens]
    logits_BLV = np.asarray(run.compiled.logits(params, buffer_BL))
    starts = [len(prompt) - 1 for prompt in prompts]
    return [row[at : at + len(one.tokens)] for row, at, one in zip(logits_BLV, starts, found, strict=True)]


INTERPOLATED = {"encoding__resize": "interpolate", "encoding__fraction_digits": 1}
WINDOW = {"model__window": 6, "model__kv_heads": 1}  # rings, which prompts of 1 to 20 tokens and 20 more go around
DYNAMIC = {"encoding__scaling": "dynamic", "encoding__scaling_factor": 2.0}  # rotations by the length of the window
# Each field of a signal, of all layers or of each: embedded, rotated, scaled, shifted, rank-F bias, relative bias, gates.
CASES = [
    ("seqpe", {"encoding__mode": "input_add", "encoding__qk": "none"}),
    ("seqpe", {"encoding__mode": "attn_mul", "encoding__qk": "multi", "encoding__per_head": False}),
    ("seqpe", COMPOSED | every_part("seqpe", "cable")),
    ("seqpe", COMPOSED | INTERPOLATED),
    *((kind, every_part(kind)) for kind in ("learned", "rotary_mixed", "scale_invariant")),
    ("pope", every_part("pope") | {"encoding__layers_with": (0, 1)}),  # and one layer without
    ("alibi", every_part("alibi") | {"encoding__layers_with": (0, 1), "model__attention_cap": 2.0} | DYNAMIC),
    ("fire", every_part("fire") | WINDOW | {"encoding__rotary_heads": 0}),
    ("fox", WINDOW | {"model__window_layers": (0, 1)}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def test_equals_the_forward_without_a_cache(case):
    """A ragged batch, twice the training length and more; each token is the likeliest after all before it."""
    run, params = run_of(case[0], **case[1])
    chosen = PROMPTS[:3]
    window = max(map(len, chosen)) + NEW
    own = window if run.config.encoding.window_dependence else None
    found = generate(run, params, chosen, Sampling(NEW), keep_logits=True, window=own)
    for result, logits in zip(found, uncached(run, params, chosen, found, window), strict=True):
        np.testing.assert_allclose(result.logits, logits, atol=1e-4)
        np.testing.assert_array_equal(result.tokens, logits.argmax(axis=-1))
        log_probs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), result.tokens[:, None], -1)[:, 0]
        np.testing.assert_allclose(result.log_probs, log_probs, atol=1e-4)
        assert len(result.tokens) == NEW and not result.ended
    assert len(set(np.concatenate([result.tokens for result in found]).tolist())) > 2  # not one token for ever


def test_each_field_of_a_signal_has_a_case():
    """Encodings without a case fill no other field than those with one."""

    def fields(kind, values):
        model_spec = ModelSpec.of(settings_of(kind, **values), DataSpec(vocabulary=256))
        signal = jax.eval_shape(lambda key: model_spec.init_encoding(key)[1], KEY)
        filled = {field.name for field in dataclasses.fields(signal) if getattr(signal, field.name) is not None}
        return filled | {f"{name} by layer" for name in signal.per_layer_fields}

    covered = set().union(*(fields(kind, values) for kind, values in CASES))
    for kind in kinds_for(1):
        assert fields(kind, {}) <= covered, kind


@pytest.fixture(scope="module")
def seqpe():
    return run_of()


def same(found, expected, atol=1e-4):
    """Asserts equal tokens and log-probabilities."""
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=atol)


def test_prompts_together_equal_each_alone(seqpe):
    run, params = seqpe
    together = generate(run, params, PROMPTS, Sampling(9))
    for prompt, result in list(zip(PROMPTS, together, strict=True))[1:3]:  # the shortest and the longest
        same(generate(run, params, [prompt], Sampling(9)), [result])


def test_neither_batches_nor_other_prompts_change_a_sample(seqpe):
    """Blocks of queries, small batches and other prompts leave the samples of a prompt unchanged."""
    run, params = seqpe
    drawn = Sampling(9, temperature=1.0, top_p=0.9, seed=4)
    expected = generate(run, params, PROMPTS, drawn)
    small, _ = run_of(eval__batch_tokens=30, model__attention_block=4)
    same(generate(small, params, PROMPTS, drawn), expected)
    same(generate(run, params, [*PROMPTS, PROMPTS[0]], drawn)[: len(PROMPTS)], expected)


def test_eight_devices_equal_one():
    """With one head of keys, which devices share, in a ring and in a whole cache."""
    fields = WINDOW | {"model__window_layers": (0, 1)}
    run, params = run_of(**fields)
    sharded, _ = run_of(devices=8, mesh__fsdp=2, mesh__context=2, mesh__tensor=2, **fields)
    placed = jax.tree.map(
        lambda leaf, shape: jax.device_put(leaf, shape.sharding), params, sharded.abstract_state.params
    )
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
    drawn = Sampling(9, temperature=1.0)
    same(generate(sharded, placed, PROMPTS, drawn), generate(run, params, PROMPTS, drawn))


@pytest.mark.long
def test_bfloat16_equals_the_forward_without_a_cache(seqpe):
    """Rounding may choose another of two near tokens: the logits after the same tokens are compared."""
    run, params = run_of(precision__compute="bfloat16")[0], seqpe[1]
    found = generate(run, params, PROMPTS[:1], Sampling(NEW), keep_logits=True)
    (logits,) = uncached(run, params, PROMPTS[:1], found, len(PROMPTS[0]) + NEW)
    np.testing.assert_allclose(found[0].logits, logits, atol=0.03 * np.abs(logits).max())


def test_a_text_stops_at_its_end_token(seqpe):
    run, params = seqpe
    whole = generate(run, params, PROMPTS, Sampling(9))
    end = int(whole[0].tokens[3])
    expected = [np.flatnonzero(result.tokens == end) for result in whole]
    assert any(len(places) == 0 for places in expected)  # one does not stop
    stopped = generate(run, params, PROMPTS, Sampling(9, end=end))
    for result, before, places in zip(stopped, whole, expected, strict=True):
        count = places[0] + 1 if len(places) else 9
        np.testing.assert_array_equal(result.tokens, before.tokens[:count])
        np.testing.assert_allclose(result.log_probs, before.log_probs[:count], atol=1e-5)
        assert result.ended == bool(len(places)) and len(result.content) == count - result.ended
        assert end not in result.content


def test_work_ends_when_every_text_has(seqpe):
    run, params = seqpe
    prompt = PROMPTS[0]
    end = int(generate(run, params, [prompt], Sampling(1))[0].tokens[0])
    on_update, done = [], []
    sampling = Sampling(NEW, end=end)
    generate(
        run,
        params,
        [prompt],
        sampling,
        on_update=lambda *one: on_update.append(one),
        progress=lambda *one: done.append(one),
    )
    assert len(on_update) == 1 and on_update[0][1].tokens.tolist() == [end] and done[-1] == (NEW, NEW)
    static, model = decode.SamplingStatic(NEW, True, True, False), run.model_spec.network
    signal = run.compiled.signal(params, (len(prompt) + NEW,))

    @jax.jit
    def steps(end):
        sampling_args = Sampling(NEW).arguments(True)._replace(end=end)
        tokens_BL, lengths_B = jnp.asarray([prompt, prompt]), jnp.array([len(prompt), 0])  # the second row is padding
        state = decode.prefill(
            model, params["model"], signal, tokens_BL, lengths_B, lengths_B, sampling_args, static=static
        )
        return decode.decode_loop(model, params["model"], signal, state, sampling_args, NEW, static=static).step

    assert (steps(end), steps(-1)) == (1, NEW)
    on_update.clear()
    generate(run, params, [prompt], Sampling(NEW), on_update=lambda *one: on_update.append(one))
    counts = [len(result.tokens) for _, result in on_update]
    assert len(counts) > 2 and counts == sorted(set(counts)) and counts[-1] == NEW


def test_a_temperature_near_zero_is_greedy(seqpe):
    run, params = seqpe
    same(generate(run, params, PROMPTS, Sampling(9, 1e-6)), generate(run, params, PROMPTS, Sampling(9)))


def test_a_seed_repeats_its_samples_and_another_does_not(seqpe):
    run, params = seqpe
    first, again, other = (generate(run, params, PROMPTS, Sampling(9, 1.0, seed=seed)) for seed in (1, 1, 2))
    same(first, again, atol=0)
    assert any(not np.array_equal(one.tokens, two.tokens) for one, two in zip(first, other, strict=True))
    twins = generate(run, params, [PROMPTS[0]] * 2, Sampling(9, 1.0))
    assert not np.array_equal(twins[0].tokens, twins[1].tokens)
    (even,) = generate(run, params, PROMPTS[:1], Sampling(9, 1e6))  # 256 tokens, each as likely
    assert len(set(even.tokens.tolist())) > 5  # each step draws anew


def test_samples_have_the_distribution_asked_for():
    count, order = 20_000, np.array([2, 0, 3, 1])
    probabilities = np.zeros(4)
    probabilities[order] = [0.5, 0.25, 0.15, 0.1]
    keys = jax.random.split(KEY, count)
    logits = jnp.broadcast_to(jnp.log(probabilities) + 3.0, (count, 4))
    sample = jax.jit(decode.sample_tokens)
    for temperature, limits, expected in (
        (1.0, None, [0.5, 0.25, 0.15, 0.1]),
        (0.5, None, [0.25, 0.0625, 0.0225, 0.01]),
        (1.0, (9, 1.0), [0.5, 0.25, 0.15, 0.1]),
        (1.0, (9, 0.76), [0.5, 0.25, 0.15, 0]),
        (1.0, (9, 0.74), [0.5, 0.25, 0, 0]),
        (1.0, (9, 0.2), [1, 0, 0, 0]),
        (2.0, (9, 0.6), [0.5**0.5, 0.5, 0, 0]),  # the probabilities that top_p adds up are those at this temperature
        (1.0, (3, 1.0), [0.5, 0.25, 0.15, 0]),
        (2.0, (1, 1.0), [1, 0, 0, 0]),
        (1.0, (3, 0.8), [0.5, 0.25, 0, 0]),  # those that top_p adds up are of the top_k: 5/9 and 3/9 hold 0.8
    ):
        found = np.bincount(sample(keys, logits, temperature, limits), minlength=4)[order] / count
        expected = np.array(expected) / np.sum(expected)
        np.testing.assert_allclose(found, expected, atol=4 * 0.5 / count**0.5)
        assert (found[expected == 0] == 0).all()


def test_batches_take_every_prompt_once_in_few_shapes():
    lengths = np.random.default_rng(0).integers(1, 3000, 500).tolist()
    limits = {"new_tokens": 16, "window": 3016, "batch_tokens": 8192, "multiple": 4}
    found = decode.batch_prompts(lengths, **limits)
    assert sorted(index for batch in found for index in batch.indices) == list(range(500))
    for batch in found:
        assert max(lengths[index] for index in batch.indices) <= batch.length <= 3000
        assert len(batch.indices) <= batch.rows and batch.rows % 4 == 0
        assert batch.rows == 4 or batch.rows * (batch.length + 16) <= 8192
    shapes = {(batch.length, batch.rows) for batch in found}
    assert len(shapes) <= 8
    (alone,) = decode.batch_prompts([5], new_tokens=3, window=8, batch_tokens=1000, multiple=1)
    assert alone == ([0], 5, 1)  # no wider than the window


def test_a_long_prompt_needs_no_square_array(seqpe):
    from tests.jaxprs import has_array_of_size

    def program(block):
        run, params = run_of(model__attention_block=block)
        length, static = 48, decode.SamplingStatic(8, True, True, False)
        signal = run.compiled.signal(params, (length + 8,))
        prefill = functools.partial(decode.prefill, run.model_spec.network, static=static)
        sampling_args = Sampling(8).arguments(True)
        arguments = (jnp.zeros((8, length), jnp.int32), jnp.ones(8, jnp.int32), jnp.zeros(8, jnp.int32), sampling_args)
        return jax.make_jaxpr(prefill)(params["model"], signal, *arguments).jaxpr

    square = 8 * 2 * 48 * 56  # samples, heads, queries, keys
    assert has_array_of_size(program(0), square) and not has_array_of_size(program(8), square)


def test_a_token_costs_the_same_however_long_positions_are_written(seqpe):
    def flops(**fields):
        run, params = run_of(**fields)
        static = decode.SamplingStatic(8, True, True, False)
        signal = jax.eval_shape(lambda params: run.compiled.signal(params, (40,)), params)
        sampling_args = Sampling(8).arguments(True)
        prompts = (jnp.zeros((2, 32), jnp.int32), jnp.ones(2, jnp.int32), jnp.zeros(2, jnp.int32), sampling_args)
        prefill, decode_loop = (
            functools.partial(f, run.model_spec.network, static=static) for f in (decode.prefill, decode.decode_loop)
        )
        state = jax.eval_shape(prefill, params["model"], signal, *prompts)
        return jax.jit(decode_loop).lower(params["model"], signal, state, sampling_args, 8).cost_analysis()["flops"]

    plain = flops()
    assert plain == flops(encoding__layers=4, encoding__max_position=10**7) > 0
    assert flops(model__layers=3) > plain


# Encodings whose positions depend on the length of the window, and some whose positions do not.
WINDOWS = [("learned", {}), ("rotary", {"encoding__scaling": "yarn"}), ("seqpe", COMPOSED | INTERPOLATED)]
WINDOWS += [("seqpe", {}), ("rotary", {"encoding__log_scaling": True}), ("fire", {}), ("fox", {})]


@pytest.mark.parametrize("case", WINDOWS, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def test_other_prompts_and_limits_change_no_position(case, monkeypatch):
    """A text is a function of its prompt and of its window's signal, which is the same, or equal where it is used."""
    run, params = run_of(case[0], **case[1])
    windows = []

    def record(functions, params, signal, batch, *_, **__):
        yield [decode.Generation(np.zeros(1, np.int32), np.zeros(1, np.float32), False) for _ in batch.indices]

    def window_of(prompts, new, window=None):
        generate(run, params, [np.array(prompt) for prompt in prompts], Sampling(new), window=window)
        return windows.pop()

    field, short, long = run.config.encoding.window_dependence, [1] * 5, [1] * 13
    with monkeypatch.context() as patch:
        patch.setattr(decode, "decode", record)
        patch.setattr(CompiledModel, "signal", lambda self, params, shape, rows: windows.append(shape))
        if field:
            words = f"a window of 16 .* with {field} .* choose it, --window=25 or more"
            with pytest.raises(InputError, match=words):
                window_of([short], 20)
            assert window_of([short], 3) == window_of([short], 11) == window_of([short, long], 3) == (16,)
            assert window_of([short], 3, 40) == window_of([short, long], 20, 40) == (40,)
            return
        with pytest.raises(
            InputError,
            match=f"--window=40 .* not by the encoding.kind='{run.config.encoding.kind}' of this run: leave it",
        ):
            window_of([short], 3, 40)
        alone, together = window_of([short], 3), window_of([short, long], 20)
    signals = [run.compiled.signal(params, shape, 8) for shape in (alone, together)]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), *signals)


def test_a_text_ends_with_the_window_that_its_positions_depend_on():
    """As answers do in an evaluation: with any limit the same text, of which no token is past the window."""
    run, params = run_of("learned")
    prompts = [np.array([7, 3, 200]), np.array([90] * 13), np.arange(16)]
    found = {
        new: generate(run, params, prompts, Sampling(new), window=16, cut=True, keep_logits=True) for new in (3, 40)
    }
    assert [len(one.tokens) for one in found[3]] == [3, 3, 1] and [len(one.tokens) for one in found[40]] == [13, 3, 1]
    for few, many in zip(found[3], found[40], strict=True):
        np.testing.assert_array_equal(few.tokens, many.tokens[:3])
        np.testing.assert_allclose(many.logits[:3], few.logits, atol=1e-5)


def test_bad_settings_and_prompts_are_refused(seqpe):
    run, params = seqpe
    for fields, words in (
        ({"new_tokens": 0}, "new tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_p": 0.0}, "top-p must be above 0"),
        ({"top_p": 1.5}, "at most 1"),
        ({"top_k": -1}, "top-k must be at least 0"),
        ({"top_k": 5}, "top-k and top-p limit random draws"),
        ({"top_p": 0.9}, "set a temperature"),
        ({"seed": -1}, "seed must be at least 0"),
    ):
        with pytest.raises(InputError, match=words):
            Sampling(**({"new_tokens": 1} | fields))
    for prompts, window, words in (
        ([], None, "no prompt"),
        ([[1], []], None, "prompt 2 of 2 is empty"),
        ([[]], None, "the prompt is empty"),
        ([[1] * 97], None, "101 needs position 100, but the largest position possible is 99"),
        ([[1]], 65, "--window=65 .* leave it out"),
        ([[256]], None, "vocabulary"),
        ([[-1]], None, "vocabulary"),
    ):
        with pytest.raises(InputError, match=words):
            generate(run, params, [np.array(prompt, int) for prompt in prompts], Sampling(4), window=window)
    with pytest.raises(InputError, match="a window of 13 .* at least 14"):
        generation.check_generation(run_of("learned")[0].config, [10], Sampling(4), 13)


def test_ids_that_no_token_has_are_never_generated():
    """A vocabulary that is padded for speed: the rows beyond the tokenizer's are the likeliest by far."""
    run, params = run_of("none", model__vocabulary=300)
    assert run.task.known_V.tolist() == [True] * 256 + [False] * 44
    embedding = params["model"]["token_embedding"]["embedding"]
    params["model"]["token_embedding"]["embedding"] = embedding.at[256:].multiply(30.0)
    for sampling in (Sampling(9), Sampling(9, temperature=2.0, top_p=0.9)):
        found = generate(run, params, PROMPTS, sampling, keep_logits=True)
        assert max(one.tokens.max() for one in found) < 256
        assert any((one.logits.argmax(axis=-1) > 255).any() for one in found)
