"""Commands that end where they would compile a model or start others, once `install` was called in their process."""

import os

import jax

# Commands import these when they need them; here all of them find them there.
import seqpe_jax.data.datasets.digits
import seqpe_jax.data.datasets.text_files
import seqpe_jax.inference.export
import seqpe_jax.interop.convert
import seqpe_jax.profiling.benchmark
import seqpe_jax.reporting.report
import seqpe_jax.sweeps.search  # noqa: F401
from seqpe_jax.cli import common
from seqpe_jax.distributed import roll_call
from seqpe_jax.errors import InputError
from seqpe_jax.inference.compiled import CompiledModel
from seqpe_jax.profiling import aot
from seqpe_jax.sweeps import run as runs
from seqpe_jax.tasks import evaluate
from seqpe_jax.training import loop, warm_start
from seqpe_jax.training.trainer import Trainer

STOPPED = "stopped before compiling"
FOLDER = "SEQPE_JAX_TESTS_FOLDER"  # where commands run
_run, _devices_of = common.run, aot.topology_devices


def _stop(*_, **__):
    print(STOPPED)
    roll_call.exit_process(0)


def _run_there(main, reads_checkpoints=False):
    os.chdir(os.environ[FOLDER])
    _run(main)


def _no_state(self):
    """No state: what it would begin with is read all the same."""
    if self.config.init_from:
        _ = warm_start.open_source(self.config, self.abstract_state.params).source.params
    return object(), ()


def _measured(model, *_):
    _ = model.params
    _stop()


def _devices(topology):
    try:
        return _devices_of(topology)
    except InputError as error:
        if "libtpu" not in str(error):
            raise
        return jax.devices()


def install() -> None:
    """Closes the seams; `tests.commands.Commands` calls it in its own process, never in that of the tests."""
    common.run = _run_there
    Trainer.init_or_warm_start, Trainer.init_state, loop.run_steps = _no_state, _stop, _stop
    evaluate._evaluate_and_print = _measured
    CompiledModel.signal = CompiledModel.vectors = CompiledModel.params_with_table = _stop
    aot.compile_step, aot.topology_devices = _stop, _devices
    runs.Popen = _stop
