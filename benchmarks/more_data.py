"""Times a step from the batch that is read to the state that is written, on a text and on that text ten times over.

    python benchmarks/more_data.py --config=configs/speed_lm.py --turns=20

The text is Python's standard library. Both take turns in one process. Prints for each part of a step (waiting for the next
batch, the step, saving its state to the disk) and for the whole the median of the turns' ratios, with the quarters around.
"""

import itertools
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from seqpe_jax import config
from seqpe_jax.cli import common, config_flags
from seqpe_jax.data.datasets import stdlib_text
from seqpe_jax.distributed import processes
from seqpe_jax.training.checkpoint import Checkpointer
from seqpe_jax.training.trainer import Trainer

config_flags.define_config()
_TURNS = flags.DEFINE_integer("turns", 20, "timed steps of each", lower_bound=2)
PARTS, TIMES, WARM_UP = ("read", "step", "save", "whole"), 10, 3


def steps(folder: pathlib.Path, text: bytes) -> Iterator[list[float]]:
    """Yields the seconds of the parts of a step and of the whole, of a run in a folder on a text, for ever."""
    folder.mkdir()
    path = folder / "text.txt"
    path.write_bytes(text)
    chosen = {"data.name": "text_files", "data.paths": (str(path),)}
    trainer = Trainer.of(config.load(config_flags.config_path(), config_flags.config_overrides() | chosen))
    print(f"{len(text) / 1e6:.0f} MB of text: {trainer.task.describe()}", flush=True)
    step, state, batches = trainer.jit_train_step(), trainer.init_state(), trainer.batches(0)
    checkpoints = Checkpointer(folder / "run", keep=1)
    for number in itertools.count(1):
        marks = [time.perf_counter()]
        _, batch = next(batches)
        marks.append(time.perf_counter())
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        marks.append(time.perf_counter())
        checkpoints.save(number, state, {})
        checkpoints.wait()
        marks.append(time.perf_counter())
        yield [after - before for before, after in itertools.pairwise(marks)] + [marks[-1] - marks[0]]


def main() -> None:
    """The command."""
    processes.enable_compilation_cache()
    text = b"\n".join(content for _, content in stdlib_text.files()["train"])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SEQPE_JAX_CACHE"] = folder  # prepared data go with it
        once, often = (steps(pathlib.Path(folder) / str(times), text * times) for times in (1, TIMES))
        turns = [(next(once), next(often)) for _ in range(WARM_UP + _TURNS.value)][WARM_UP:]
    for part, name in enumerate(PARTS):
        low, middle, high = statistics.quantiles([much[part] / little[part] for little, much in turns])
        print(f"{name}: {middle:.3f} ({low:.3f} .. {high:.3f})")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    common.run(main)
