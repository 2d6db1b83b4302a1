"""The text of compiled programs: the bytes of types, and how often each computation runs."""

import jax
import jax.numpy as jnp
import pytest

from seqpe_jax.profiling.hlo import HloModule, array_bytes, dimensions


@pytest.mark.parametrize(
    "kind, size",
    [
        ("f32[2,3]{1,0:T(8,128)}", 24),
        ("(bf16[4], /*index=1*/pred[], u32[]{:S(2)})", 13),
        ("s4[3]", 2),
        ("f8e4m3fn[5]", 5),
    ],
)
def test_bytes_of_types(kind, size):
    assert array_bytes(kind) == size


def test_vector_memory_and_the_host_are_no_hbm():
    kind = "(bf16[4]{0:T(8,128)(2,1)S(1)}, f32[8]{0:T(8,128)}, f32[2]{0:S(5)}, u32[]{:S(2)})"
    assert array_bytes(kind, memory="hbm") == 32 and array_bytes(kind) == 8 + 32 + 8 + 4
    assert dimensions(kind) == [4] and dimensions("f32[]") == []


def test_loops_within_loops_multiply():
    def program(x):
        def outer(x, _):
            return jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(x) @ x, x), None

        return jax.lax.scan(outer, x, None, length=3)[0]

    hlo = HloModule(jax.jit(program).lower(jnp.ones((4, 4))).compile().as_text())
    dots = [hlo.execution_counts[name] for name, one in hlo.instructions() if one.opcode == "dot"]
    assert dots == [15] and hlo.unknown_trip_loops() == 0


def test_a_loop_that_turns_as_often_as_the_data_ask_is_open():
    def program(x, count):
        return jax.lax.while_loop(lambda at: at[0] < count, lambda at: (at[0] + 1, at[1] @ at[1]), (0, x))[1]

    hlo = HloModule(jax.jit(program).lower(jnp.ones((4, 4)), 3).compile().as_text())
    assert hlo.unknown_trip_loops(("dot",)) == 1 and hlo.unknown_trip_loops(("convolution",)) == 0
    assert [hlo.execution_counts[name] for name, one in hlo.instructions() if one.opcode == "dot"] == [1]
