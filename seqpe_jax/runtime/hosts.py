"""This process among the others: who leads, what to say at the start, where compiled programs are kept."""

import os
import pathlib

import jax


def is_lead() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


def describe() -> str:
    """Returns the machine in words: processes, devices and their kind."""
    kind = jax.devices()[0].device_kind
    return f"{jax.process_count()} process(es), {jax.device_count()} device(s) ({kind})"


def keep_compiled_programs() -> None:
    """Turns the persistent compile cache on, unless JAX_COMPILATION_CACHE_DIR already names another place."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("SEQPE_JAX_CACHE") or pathlib.Path.home() / ".cache" / "seqpe_jax"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
