"""Whether a run may go on, or begin, in a folder."""

import pathlib

from seqpe_jax import config
from seqpe_jax.config import Config
from seqpe_jax.errors import InputError, check_utf8_name
from seqpe_jax.runtime.checkpoint import read_config
from seqpe_jax.runtime.progress import LOG


def check_same_run(settings: Config, workdir: pathlib.Path, step: int | None) -> None:
    """Refuses a folder of something else. A run that has saved no step yet begins anew, with any config."""
    check_utf8_name(workdir.absolute(), "a folder with checkpoints (--workdir)")
    if not (workdir / "config.json").exists():
        if workdir.exists() and (not workdir.is_dir() or any(path.name != LOG for path in workdir.iterdir())):
            raise InputError(f"workdir {workdir} holds other files but no config.json: choose a new or empty folder")
        return
    if step is None:
        return
    # An older run's file lacks fields that are newer, which have their defaults, and may hold values that nothing reads.
    before = config.from_dict(read_config(workdir))
    old, new = (config.to_dict(config.as_read(one)) for one in (before, settings))
    for values in (old, new):
        for section in config.FREE_SECTIONS:
            values.pop(section, None)
        values["data"].pop("lossy_tokenizer")  # what is accepted changes nothing of what is computed
    lines = config.difference(old, new)
    if lines:
        raise InputError(
            f"workdir {workdir} belongs to a run with another config; it differs in {'; '.join(lines)}. Use a new "
            "--workdir, or the same fields"
        )
