"""Options of XLA by platform, chip and mesh; those of the user win, and none that XLA does not know ends a run."""

import dataclasses

import jax
import pytest

from seqpe_jax.distributed import compiler_options
from seqpe_jax.distributed.compiler_options import (
    GPU_OVERLAP,
    TPU_OVERLAP,
    TPU_SLICES,
    environment_facts,
    format_options,
    parse_options,
    platform_options,
    refused_options,
    resolve,
)
from seqpe_jax.errors import InputError
from seqpe_jax.training.trainer import Trainer
from tests.tiny import tiny_config, tokens

GONE = "xla_gpu_enable_async_collectives"  # XLA had it until 2024
THRESHOLD = "xla_gpu_all_gather_combine_threshold_bytes"


@pytest.mark.parametrize(
    "platform, kind, mesh, expected",
    [
        ("cpu", "cpu", {"devices": 8}, {}),
        ("tpu", "TPU v5 lite", {"devices": 1}, {}),
        ("tpu", "TPU v5 lite", {"devices": 256}, TPU_OVERLAP),
        ("tpu", "TPU v6 lite", {"devices": 512, "slices": 2}, TPU_OVERLAP | TPU_SLICES),
        ("tpu", "TPU7x", {"devices": 8}, {}),
        ("tpu", "TPU v9", {"devices": 8, "slices": 2}, TPU_SLICES),
        ("gpu", "NVIDIA H200", {"devices": 1}, {}),
    ],
)
def test_options_of_a_platform(platform, kind, mesh, expected):
    assert platform_options(platform, kind, **mesh) == expected


@pytest.mark.parametrize(
    "params, compute_bytes, gather, gradients",
    [(0, 4, 2**25, 2**25), (50 * 10**6, 2, 2**27, 2**28), (10**9, 2, 2**30, 2**30)],
)
def test_collectives_of_gpus_are_combined_up_to_a_layer(params, compute_bytes, gather, gradients):
    options = platform_options("gpu", "NVIDIA H100", devices=8, layer_params=params, compute_bytes=compute_bytes)
    reduce = THRESHOLD.replace("all_gather", "reduce_scatter"), THRESHOLD.replace("all_gather", "all_reduce")
    assert options == GPU_OVERLAP | {THRESHOLD: gather} | dict.fromkeys(reduce, gradients)


def test_the_installed_xla_knows_every_option_of_gpus():
    options = platform_options("gpu", "NVIDIA H100", devices=8)
    assert parse_options(format_options(options)) == options
    found = refused_options(format_options(options | {GONE: True, THRESHOLD: "many"}), jax.devices()[0])
    assert found.keys() == {GONE, THRESHOLD}


def test_the_user_and_the_environment_win(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_gpu_autotune_level=2 --noxla_gpu_enable_pipelined_all_reduce")
    automatic = {
        "xla_gpu_autotune_level": 4,
        "xla_gpu_enable_pipelined_all_reduce": True,
        THRESHOLD: 1,
        GONE: True,
        "xla_gpu_enable_triton_gemm": False,
    }
    device = jax.devices()[0]
    options, note = resolve(("auto", f"{THRESHOLD}=5", f"{THRESHOLD}=7"), automatic, device)
    assert options == ("xla_gpu_enable_triton_gemm=false", f"{THRESHOLD}=7")
    assert note == f"options that this version of XLA refuses are left out: {GONE}"
    assert resolve((), automatic, device) == ((), "")
    assert resolve(("auto",), {}, device) == ((), "")
    with pytest.raises(InputError, match=f"the compiler for cpu refuses {GONE}=true .*leave it out"):
        resolve((f"{GONE}=true",), {}, device)


def test_processes_compare_the_flags_that_change_programs(monkeypatch):
    monkeypatch.setenv(
        "XLA_FLAGS", "--xla_b=2  --xla_force_host_platform_device_count=8 --xla_dump_to=/tmp/a --xla_a=1"
    )
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    assert environment_facts() == {"XLA_FLAGS": "--xla_a=1 --xla_b=2", "LIBTPU_INIT_ARGS": ""}


def test_a_step_is_compiled_with_its_options_and_the_config_names_them(monkeypatch):
    monkeypatch.setattr(
        compiler_options, "platform_options", lambda *_, **mesh: {"xla_llvm_enable_noalias_metadata": True}
    )
    settings = tiny_config(variant="rotary", mesh__compiler_options=("auto", "xla_cpu_prefer_vector_width=128"))
    trainer = Trainer.of(settings, jax.devices()[:1])
    options = ("xla_llvm_enable_noalias_metadata=true", "xla_cpu_prefer_vector_width=128")
    assert trainer.config.mesh.compiler_options == options and f"XLA options: {' '.join(options)}" in trainer.describe()
    mesh = dataclasses.replace(trainer.config.mesh, compiler_options=("xla_no_such=1",))
    broken = dataclasses.replace(trainer, config=dataclasses.replace(trainer.config, mesh=mesh))
    lowered = broken.jit_train_step().lower(trainer.abstract_state, tokens(settings))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such"):
        lowered.compile()


@pytest.mark.parametrize("option", ["on", "auto,xla_a=1", "--xla_a=1", "xla_a", "jax_a=1", "xla_a=1 2"])
def test_what_is_no_option_is_refused(option):
    with pytest.raises(InputError, match="mesh.compiler_options: .* must be 'auto' or NAME=VALUE"):
        tiny_config(mesh__compiler_options=(option,))
