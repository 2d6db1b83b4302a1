"""Prepares the data of a config once, on one machine without an accelerator, for runs on many hosts.

    python -m seqpe_jax.prepare --config=configs/lm_1b.py --output=gs://BUCKET/text
    python -m seqpe_jax.train --config=configs/lm_1b.py --config.data.prepared=gs://BUCKET/text --workdir=gs://BUCKET/run

Text is tokenized by --processes processes and written in shards of tokens; images are written as ArrayRecord shards of their
files and labels. Hosts read the byte ranges that they need. Batches are those of the unprepared data. Killed, the same
command continues after the last finished shard.
"""

import os

from absl import flags

from seqpe_jax.cli import common, config_flags

config_flags.define_config()
_OUTPUT = common.define_path(
    "output", "folder of the shards; new, or one of the same data to continue", writes="folder"
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "processes that tokenize, or threads that read images (default: the cores)", 1, 1024
)
_SHARD_BYTES = flags.DEFINE_integer("shard-bytes", 10**9, "bytes of a shard, about", 1, 2**40)


def main() -> None:
    """Writes the folder."""
    from seqpe_jax.data import prepare

    data = config_flags.read_config().data
    processes = _PROCESSES.value or len(os.sched_getaffinity(0))
    counts = prepare.prepare(data, _OUTPUT.value, shard_bytes=_SHARD_BYTES.value, processes=processes)
    for split, count in counts.items():
        print(f"{split}: {count}")
    print(f"written: {_OUTPUT.value}; train with --config.data.prepared={_OUTPUT.value}")


def run_command() -> None:
    """Runs the command with the arguments of the process, and exits with its code on an error."""
    flags.mark_flags_as_required(["config", "output"])
    common.run(main)
