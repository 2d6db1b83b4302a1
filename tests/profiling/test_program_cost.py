"""What a program computes and moves is counted from its text, as a person would count it."""

import jax
import jax.numpy as jnp
import pytest

from seqpe_jax.models import attention_tpu
from seqpe_jax.profiling.hlo import HloModule
from seqpe_jax.profiling.program_cost import program_cost
from tests.profiling.test_collectives import HIDDEN


def of(function, *arguments):
    return program_cost(HloModule(jax.jit(function).lower(*arguments).compile().as_text()))


def entry(*lines, before=""):
    return HloModule(
        f"{before}\nENTRY %main (x: f32[]) -> f32[] {{\n" + "\n".join(f"  {line}" for line in lines) + "\n}\n"
    )


def test_products_in_a_loop_count_as_often_as_it_turns():
    def program(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    found = of(program, jnp.ones((8, 16)), jnp.ones((5, 16, 16)))
    assert (found.flops, found.unknown_trip_loops, found.kernels) == (5 * 2 * 8 * 16 * 16, 0, 0)


def test_a_batch_of_products():
    found = of(lambda x, y: jnp.einsum("bhqk,bhsk->bhqs", x, y), jnp.ones((2, 3, 8, 4)), jnp.ones((2, 3, 16, 4)))
    assert found.flops == 2 * 2 * 3 * 8 * 16 * 4


@pytest.mark.parametrize(
    "made, left, right, attributes, flops",
    [
        # One product: x[2,16,24] @ w[24,96].
        ("f32[2,16,96]", "f32[2,16,24]", "f32[24,96,1]", "window={size=1}, dim_labels=0bf_io0->0bf", 2 * 32 * 24 * 96),
        # Four products q k of 16 x 16 over 12, the batch written as a window that meets each sample once.
        (
            "f32[2,2,16,16]",
            "f32[2,16,2,12]",
            "f32[2,16,2,12]",
            "window={size=2x2 pad=1_1x1_1 rhs_reversal=1x1}, dim_labels=0b1f_0o1i->01bf",
            2 * 4 * 9 / 4 * 16 * 16 * 12,
        ),
        (
            "f32[2,2,16,16]",
            "f32[2,16,2,12]",
            "f32[2,16,2,12]",
            "window={size=2x2 stride=1x1 lhs_dilate=2x2}, dim_labels=0b1f_0o1i->01bf",
            2 * 4 * 16 * 16 * 12,
        ),
        # A convolution of images, stride 2: all of its window lies inside.
        (
            "f32[8,3,3,32]",
            "f32[8,7,7,4]",
            "f32[3,3,4,32]",
            "window={size=3x3 stride=2x2}, dim_labels=b01f_01io->b01f",
            2 * 8 * 9 * 9 * 4 * 32,
        ),
        # With a border, of which nothing is computed: 2 + 3 + 2 places of the window along an axis.
        (
            "f32[8,3,3,32]",
            "f32[8,3,3,4]",
            "f32[3,3,4,32]",
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            2 * 8 * 7 * 7 * 4 * 32,
        ),
    ],
)
def test_what_a_tpu_writes_as_convolutions(made, left, right, attributes, flops):
    found = program_cost(
        entry(
            f"%x = {left} parameter(0)",
            f"%y = {right} parameter(1)",
            f"ROOT %z = {made} convolution(%x, %y), {attributes}",
        )
    )
    assert found.flops == flops


def test_kernels_say_what_they_compute_or_are_named():
    call = '%k = f32[4,8] custom-call(%x), custom_call_target="tpu_custom_call"'
    expected = program_cost(
        entry(f'{call}, backend_config={{"custom_call_config":{{"cost_estimate":{{"flops":"123"}}}}}}')
    )
    assert (expected.flops, expected.kernels) == (123, 0)
    assert program_cost(entry(call)).kernels == 1
    product = program_cost(
        entry(
            "%x = bf16[4,16] parameter(0)",
            '%k = (bf16[4,8], s8[99]) custom-call(%x, %x), custom_call_target="__cublas$gemm", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
        )
    )
    assert (product.flops, product.kernels) == (2 * 4 * 8 * 16, 0)


def test_the_attention_kernel_leaves_out_what_causality_hides():
    array = jax.ShapeDtypeStruct
    query, field = array((4, 1, 3, 1024, 64), jnp.bfloat16), array((1, 3, 1024, 8), jnp.float32)
    arrays = attention_tpu.KernelInputs(query, query, query, field, field, None, None)
    plan = attention_tpu.KernelConfig(
        keys=1024,
        block_q=512,
        block_k=512,
        backward_blocks=(512, 512),
        samples=4,
        causal=True,
        dropout=False,
        dropout_rate=0.0,
        mean_causal_offset=None,
        out_dtype=jnp.bfloat16,
        interpret=False,
    )
    estimate, pairs, calls = attention_tpu.cost_estimate, 3 * 512**2, 4 * 3
    assert estimate(attention_tpu._forward_kernel, arrays, plan, []).flops == 2 * pairs * (calls * 128 + 3 * 8)
    assert estimate(attention_tpu._dkv_kernel, arrays, plan, []).flops == 2 * pairs * (calls * 256 + 3 * 16)
    # Where devices have equal work, queries meet as many keys as in the mean over all devices.
    half = estimate(attention_tpu._forward_kernel, arrays, plan._replace(mean_causal_offset=-512), [])
    assert half.flops == 2 * 512**2 * (calls * 128 + 3 * 8)
    whole = estimate(attention_tpu._forward_kernel, arrays, plan._replace(causal=False), [query, field])
    assert whole.flops == 2 * 1024**2 * (calls * 128 + 3 * 8)
    assert whole.bytes_accessed == 4 * 3 * 1024 * 64 * 2 + 3 * 1024 * 8 * 4


def test_an_update_reads_and_writes_whole_arrays():
    def update(param, moment, grad):
        moment = 0.9 * moment + grad
        return param - 0.1 * moment, moment

    arrays = [jnp.ones((256, 256))] * 3
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(*arrays).compile()
    # Two instructions, the new moment being read by the second.
    assert program_cost(HloModule(compiled.as_text())).bytes == pytest.approx(6 * 256 * 256 * 4, rel=0.05)


def test_a_loop_over_stacked_weights_reads_each_once():
    def program(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    layers, width, rows = 6, 128, 8
    found = of(program, jnp.ones((rows, width)), jnp.ones((layers, width, width)))
    # A layer is cut out of the stack (read, written) and multiplied (read); rows go in and come out.
    most = 4 * layers * (3 * width**2 + 6 * rows * width)
    assert 4 * layers * width**2 <= found.bytes <= most


SLICED = """\
%cut (stack.1: f32[6,128,128], at.1: s32[]) -> bf16[128,128] {
  %stack.1 = f32[6,128,128]{2,1,0} parameter(0)
  %at.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %slice.1 = f32[1,128,128]{2,1,0} dynamic-slice(%stack.1, %at.1, %zero.1, %zero.1), dynamic_slice_sizes={1,128,128}
  %flat.1 = f32[128,128]{1,0} bitcast(%slice.1)
  ROOT %cast.1 = bf16[128,128]{1,0} convert(%flat.1)
}

%put (stack.2: f32[6,128,128], new.2: f32[128,128], at.2: s32[]) -> f32[6,128,128] {
  %stack.2 = f32[6,128,128]{2,1,0} parameter(0)
  %new.2 = f32[128,128]{1,0} parameter(1)
  %at.2 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  %one.2 = f32[1,128,128]{2,1,0} bitcast(%new.2)
  ROOT %update.2 = f32[6,128,128]{2,1,0} dynamic-update-slice(%stack.2, %one.2, %at.2, %zero.2, %zero.2)
}
"""


def test_of_a_stack_the_part_that_is_read_or_written_counts():
    held = (
        "%stack = f32[6,128,128]{2,1,0} parameter(0)",
        "%new = f32[128,128]{1,0} parameter(1)",
        "%at = s32[] parameter(2)",
    )
    cut = program_cost(
        entry(*held, "%a = bf16[128,128]{1,0} fusion(%stack, %at), kind=kLoop, calls=%cut", before=SLICED)
    )
    put = program_cost(
        entry(*held, "%a = f32[6,128,128]{2,1,0} fusion(%stack, %new, %at), kind=kLoop, calls=%put", before=SLICED)
    )
    assert (cut.bytes, put.bytes) == (128 * 128 * 6 + 4, 128 * 128 * 8 + 4)


def test_vector_memory_is_free_and_copies_there_are_not():
    found = program_cost(
        entry(
            "%x = f32[64]{0} parameter(0)",
            "%begun = (f32[64]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}) copy-start(%x)",
            "%y = f32[64]{0:S(1)} copy-done(%begun)",
            "%z = f32[64]{0:S(1)} add(%y, %y)",
            '%room = f32[999]{0} custom-call(), custom_call_target="AllocateBuffer"',
        )
    )
    assert found.bytes == 64 * 4


def test_what_a_collective_holds_in_the_background_is_not_moved_by_the_products_that_hide_it():
    found = program_cost(HloModule(HIDDEN))
    # The gathered array is written, once; then x is read, and its product written.
    assert found.bytes == 32 * 8 * 2 + 16 * 8 * 2 + 16 * 16 * 2 and found.flops == 2 * 16 * 16 * 8


def test_the_compilers_cycles_are_added_up():
    line = (
        '%a = f32[4]{0} fusion(%x), kind=kLoop, calls=%f, backend_config={"window_config":{"estimated_cycles":"700"}}'
    )
    assert program_cost(entry("%x = f32[4]{0} parameter(0)", line)).cycles == 700
