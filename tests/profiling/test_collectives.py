"""Collectives are found wherever a program has them, with their bytes and the turns of their loops."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seqpe_jax.profiling.collectives import collectives, device_groups
from seqpe_jax.profiling.hlo import HloModule, Instruction

# What a TPU's compiler writes: no trip count, a reduce-scatter fused of its parts, a start and its end.
TPU = """\
HloModule jit_step, is_scheduled=true

%add (x.1: bf16[], y.1: bf16[]) -> bf16[] {
  ROOT %sum.1 = bf16[] add(%x.1, %y.1)
}

%all-reduce-scatter.1 (input.1: bf16[64,32]) -> bf16[16,32] {
  %input.1 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.4 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input.1), channel_id=8, to_apply=%add
  ROOT %slice.1 = bf16[16,32]{1,0:T(8,128)(2,1)} slice(%all-reduce.4), slice={[0:16], [0:32]}
}

%body (state.1: (s32[], bf16[16,32], s32[])) -> (s32[], bf16[16,32], s32[]) {
  %state.1 = (s32[]{:T(128)}, bf16[16,32]{1,0:T(8,128)(2,1)}, /*index=2*/s32[]) parameter(0)
  %turn.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %copy.1 = s32[]{:T(128)} copy(%turn.1)
  %one.1 = s32[] get-tuple-element(%state.1), index=2
  %next.1 = s32[]{:T(128)} add(%copy.1, %one.1), metadata={op_name="while/body/add"}
  %held.1 = bf16[16,32]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %all-gather.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%held.1), channel_id=9, dimensions={0}
  %fusion.1 = bf16[16,32]{1,0} fusion(%all-gather.1), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %tuple.1 = (s32[], bf16[16,32]{1,0}, s32[]) tuple(%next.1, %fusion.1, %one.1)
}

%condition (state.2: (s32[], bf16[16,32], s32[])) -> pred[] {
  %limit.1 = s32[] constant(LIMIT)
  %state.2 = (s32[], bf16[16,32]{1,0}, s32[]) parameter(0)
  %turn.2 = s32[] get-tuple-element(%state.2), index=0
  ROOT %less.1 = pred[] compare(%turn.2, %limit.1), direction=LT
}

ENTRY %main (input.2: bf16[16,32]) -> bf16[16,32] {
  %input.2 = bf16[16,32]{1,0} parameter(0), sharding={devices=[4,1]<=[4]}
  %zero.1 = s32[] constant(0)
  %unit.1 = s32[] constant(STEP)
  %tuple.2 = (s32[], bf16[16,32]{1,0}, s32[]) tuple(%zero.1, %input.2, %unit.1)
  %while.1 = (s32[], bf16[16,32]{1,0}, s32[]) while(%tuple.2), condition=%condition, body=%body
  %result.1 = bf16[16,32]{1,0} get-tuple-element(%while.1), index=1
  %start.1 = (bf16[16,32]{1,0}, bf16[64,32]{1,0}) all-gather-start(%result.1), channel_id=3, dimensions={0}
  %done.1 = bf16[64,32]{1,0} all-gather-done(%start.1)
  %send.1 = (bf16[16,32], bf16[16,32], u32[], u32[]) collective-permute-start(%result.1), source_target_pairs={{0,1}}
  ROOT %sent.1 = bf16[16,32] collective-permute-done(%send.1)
}
"""


def test_a_tpu_program():
    found = collectives(HloModule(TPU.replace("LIMIT", "7").replace("STEP", "1")))
    assert found.unknown_trip_loops == 0
    whole, part = 64 * 32 * 2, 16 * 32 * 2
    assert found.by_kind == {
        "all-gather": {"count": 8, "bytes": 8 * whole},
        "reduce-scatter": {"count": 7, "bytes": 7 * whole},
        "collective-permute": {"count": 1, "bytes": part},
    }
    # The device waits for what has no start and no fusion with products.
    assert {(one.kind, one.hidden): (one.count, one.largest) for one in found.collectives} == {
        ("all-gather", False): (7, whole),
        ("all-gather", True): (1, whole),
        ("reduce-scatter", False): (7, whole),
        ("collective-permute", True): (1, part),
    }


def test_a_loop_over_two_windows_at_a_time_counts_as_often_as_it_turns():
    found = collectives(HloModule(TPU.replace("LIMIT", "7").replace("STEP", "2")))
    assert found.unknown_trip_loops == 0 and found.by_kind["reduce-scatter"]["count"] == 4  # from 0, 2, 4 and 6


@pytest.mark.parametrize("step, limit", [("0", "7"), ("1", "(LIMIT)")])
def test_a_loop_whose_turns_are_not_known_counts_once_and_is_named(step, limit):
    found = collectives(HloModule(TPU.replace("LIMIT", limit).replace("STEP", step)))
    assert found.unknown_trip_loops == 1
    assert found.by_kind["reduce-scatter"]["count"] == 1 and found.by_kind["all-gather"]["count"] == 2


# One that a TPU's compiler hides: begun in a fusion, carried on within a product, ended in another fusion.
HIDDEN = """\
HloModule jit_step

%begin (shard.1: bf16[4,8]) -> (bf16[4,8], bf16[32,8]) {
  %shard.1 = bf16[4,8]{1,0} parameter(0)
  %all-gather.1 = bf16[32,8]{1,0} all-gather(%shard.1), channel_id=8, replica_groups=[4,8]<=[8,4]T(1,0), dimensions={0}
  ROOT %begun.1 = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) tuple(%shard.1, %all-gather.1)
}

%go_on (shard.2: bf16[4,8], whole.2: bf16[32,8], x.2: bf16[16,8]) -> (bf16[16,16], bf16[4,8], bf16[32,8]) {
  %shard.2 = bf16[4,8]{1,0} parameter(0)
  %whole.2 = bf16[32,8]{1,0} parameter(1)
  %x.2 = bf16[16,8]{1,0} parameter(2)
  %all-gather.2 = bf16[32,8]{1,0} all-gather(%shard.2), channel_id=8, replica_groups=[4,8]<=[8,4]T(1,0), dimensions={0}
  %product.2 = bf16[16,16]{1,0} dot(%x.2, %x.2), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %going.2 = (bf16[16,16]{1,0}, bf16[4,8]{1,0}, bf16[32,8]{1,0}) tuple(%product.2, %shard.2, %all-gather.2)
}

ENTRY %main (shard.3: bf16[4,8], x.3: bf16[16,8]) -> bf16[16,16] {
  %shard.3 = bf16[4,8]{1,0} parameter(0)
  %x.3 = bf16[16,8]{1,0} parameter(1)
  %async-collective-start.1 = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) fusion(%shard.3), kind=kCustom, \
output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %part.3 = bf16[4,8]{1,0} get-tuple-element(%async-collective-start.1), index=0
  %whole.3 = bf16[32,8]{1,0} get-tuple-element(%async-collective-start.1), index=1
  %fusion.3 = (bf16[16,16]{1,0}, bf16[4,8]{1,0}, bf16[32,8]{1,0}) fusion(%part.3, %whole.3, %x.3), kind=kOutput, \
output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%go_on
  ROOT %product.3 = bf16[16,16]{1,0} get-tuple-element(%fusion.3), index=0
}
"""


def test_one_that_goes_on_in_the_background_counts_once():
    (found,) = collectives(HloModule(HIDDEN)).collectives
    assert (found.kind, found.count, found.bytes, found.hidden) == ("all-gather", 1, 32 * 8 * 2, True)
    assert found.groups[1] == (1, 5, 9, 13, 17, 21, 25, 29) and found.bytes_received(32) == 7 / 8 * 512


# How a TPU's compiler sums an array over slices: of each, in the device's own part, through its host.
SLICES = """\
HloModule jit_step

ENTRY %main (part.1: f32[3,2,128]) -> f32[3,2,128] {
  %part.1 = f32[3,2,128]{2,1,0:T(2,128)} parameter(0)
  %after-all.1 = token[] after-all()
  %send.1 = (f32[3,2,128]{2,1,0:T(2,128)}, u32[], token[]) send(%part.1, %after-all.1), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.1 = token[] send-done(%send.1), channel_id=2, is_host_transfer=true
  %recv.1 = (f32[3,2,128]{2,1,0:T(2,128)}, u32[], token[]) recv(%after-all.1), channel_id=1, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done.1 = (f32[3,2,128]{2,1,0:T(2,128)}, token[]) recv-done(%recv.1), channel_id=1, is_host_transfer=true
  ROOT %sum.1 = f32[3,2,128]{2,1,0:T(2,128)} get-tuple-element(%recv-done.1), index=0
}
"""


def test_what_goes_between_slices_is_counted():
    (found,) = collectives(HloModule(SLICES)).collectives
    assert (found.kind, found.count, found.bytes, found.hidden) == ("all-reduce", 1, 3 * 2 * 128 * 4, True)
    assert found.groups == ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    "written, groups",
    [
        ("replica_groups={{0,2},{1,3}}, use_global_device_ids=true", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, dimensions={0}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
        ("to_apply=%add", ()),
    ],
)
def test_who_takes_part(written, groups):
    assert (
        device_groups(Instruction("a", "f32[4]", "all-reduce", ("b",), f", channel_id=1, {written}, metadata={{}}"))
        == groups
    )


def test_what_enters_a_device():
    def received(kind, count):
        (one,) = collectives(HloModule(ONE.format(kind=kind))).collectives
        return one.bytes_received(count)

    assert received("all-reduce", 4) == 2 * 64 * 3 / 4 and received("all-gather", 4) == 64 * 3 / 4
    assert received("collective-permute", 4) == 64


ONE = """\
ENTRY %main (x.1: f32[16]) -> f32[16] {{
  %x.1 = f32[16]{{0}} parameter(0)
  ROOT %sent.1 = f32[16]{{0}} {kind}(%x.1), channel_id=1
}}
"""


def test_a_compiled_program_of_this_machine():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))

    def program(x_BD):
        def turn(total_D, scale):
            return total_D + (jnp.tanh(x_BD * scale) * (1 + total_D)).sum(axis=0), None

        return jax.lax.scan(turn, jnp.zeros(4), jnp.arange(5.0))[0]

    compiled = jax.jit(program, out_shardings=whole).lower(jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=split))
    found = collectives(HloModule(compiled.compile().as_text()))
    assert found.by_kind == {"all-reduce": {"count": 5, "bytes": 5 * 16}} and not found.unknown_trip_loops
