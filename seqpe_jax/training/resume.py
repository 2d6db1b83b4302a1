"""Checks before a run starts or resumes in a folder: is it the same run, is there room, are saves fast enough."""

import dataclasses
import fnmatch
import os
import time
from collections.abc import Collection
from typing import Any

from seqpe_jax import config
from seqpe_jax.checksums import checksums_of
from seqpe_jax.config import Config
from seqpe_jax.data.tokenizers import EOS_FILES
from seqpe_jax.errors import InputError, check_utf8_name
from seqpe_jax.files import COMPILED_DIR, AnyPath, free_space, is_remote
from seqpe_jax.run_dir import (
    CHECKPOINTS_DIR,
    CLASS_NAMES_FILE,
    CONFIG_FILE,
    DIGESTS_FILE,
    EXPORT_SECTION,
    FINGERPRINTS_FILE,
    HISTORY_FILE,
    LOG_FILE,
    OWNER_FILE,
    TOKENIZER_FILE,
    RunDir,
)
from seqpe_jax.training.optimizer import decay_steps

# Fields that `--change` may change when a run resumes: the saved state (step, parameters, moments) means the same with each
# of their values. The others either decide what the state holds, or which examples its steps have seen.
CHANGEABLE = (
    *(
        f"optimizer.{name}"
        for name in (
            "learning_rate",
            "encoder_learning_rate",
            "embedding_learning_rate",
            "schedule",
            "decay_steps",
            "warmup_steps",
            "end_learning_rate",
            "b1",
            "b2",
            "epsilon",
            "momentum",
            "ema",
            "weight_decay",
            "encoder_weight_decay",
            "clip",
            "accumulate",
            "freeze_steps",
            "non_finite",
            "skips",
        )
    ),
    "objective.*",
    "data.augment.*",
    "data.mixture",  # the weights of its sources alone
    "data.prompt_weight",
    "data.question_weight",
    "model.dropout",
    "model.attention_dropout",
    "model.embedding_dropout",
    "model.drop_path",
    "model.remat",
    "model.attention_kind",
    "model.attention_block",
    "model.kernel_block_*",
    "encoding.dropout",
    "encoding.attention_dropout",
    "precision.compute",
    "precision.matmul",
)
# Of these, fields that decide whether the state has some arrays: they must stay 0, or above 0.
SWITCHES = ("optimizer.clip", "optimizer.freeze_steps", "optimizer.momentum", "optimizer.ema")
PREEMPTION_SECONDS = 30.0  # between the notice that a machine is taken away and its end, on most clouds
PROBE_BYTES = 64 * 2**20


def with_random_bits(settings: Config, random_bits: str) -> Config:
    """Returns a config with `precision.random_bits` set where it is "auto"."""
    if settings.precision.random_bits != "auto":
        return settings
    return dataclasses.replace(settings, precision=dataclasses.replace(settings.precision, random_bits=random_bits))


def random_bits_of(run: RunDir) -> str:
    """Returns the `precision.random_bits` of a stored run; runs from before there was a choice have threefry."""
    return run.config_values.get("precision", {}).get("random_bits", "threefry")


def check_space(run: RunDir, size: int, count: int) -> None:
    """Refuses a disk without space for the checkpoints of a run, before its first step.

    Args:
      run: the run's folder, which need not exist.
      size: bytes of a checkpoint.
      count: checkpoints that must have room.

    Raises:
      InputError: names both sizes.
    """
    if is_remote(run.path):
        return
    folder = run.path.absolute()
    while not folder.is_dir():
        folder = folder.parent
    needed, free = size * count, free_space(folder)
    if free is not None and free < needed:
        raise InputError(
            f"workdir {run} has {free / 2**20:,.1f} MiB of free space, and {count} checkpoint(s) of this model take "
            f"{needed / 2**20:,.1f}: make room there, or choose another --workdir"
        )


def slow_save_warning(run: RunDir, size: int) -> str:
    """Returns a warning if a save takes longer than a preempted machine has left, else "".

    A save writes and then reads back what it has written, for its checksums; in a bucket the store computes them.

    Args:
      run: the run's folder; its speed is measured by writing a file.
      size: bytes that this process saves.
    """
    write_seconds, read_seconds = save_seconds(run.path, min(size, PROBE_BYTES))
    seconds = (write_seconds + read_seconds) * max(1.0, size / PROBE_BYTES)
    if seconds <= PREEMPTION_SECONDS:
        return ""
    share = read_seconds / (write_seconds + read_seconds)
    checks = f", {share:.0%} of it to read it back for its checksums" if share >= 0.1 else ""
    return (
        f"warning: a save takes about {seconds:,.0f} s ({size / 2**20:,.0f} MiB at {size / seconds / 2**20:,.1f} MiB/s, as "
        f"measured in {run}{checks}), and a machine that is taken away usually leaves {PREEMPTION_SECONDS:.0f}: what is done "
        "since the last save may be lost then, so lower checkpoint.every or use a faster disk"
    )


def save_seconds(folder: AnyPath, size: int) -> tuple[float, float]:
    """Returns the seconds to write a file of `size` bytes to a folder, removed again, and those to compute its checksum."""
    content, began = os.urandom(size), time.monotonic()
    path = folder / f".{os.getpid()}.probe"
    try:
        if is_remote(path):
            path.write_bytes(content)
        else:
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        written = time.monotonic()
        checksums_of(folder, [path.name])
        return written - began, time.monotonic() - written
    finally:
        path.unlink(missing_ok=True)


def check_change(change: Collection[str]) -> None:
    """Refuses fields that cannot change when a run resumes.

    Args:
      change: dotted names of fields.

    Raises:
      InputError: names one, with the reason.
    """
    for name in change:
        if name not in config.field_names():
            raise InputError(f"--change: {config.unknown_field_message(name)}")
        if name == "steps":
            raise InputError("--change=steps: --extend=true lets a run take more steps, whatever its schedule")
        free = name.partition(".")[0] in config.RESUME_CHANGEABLE
        if not free and not any(fnmatch.fnmatchcase(name, pattern) for pattern in CHANGEABLE):
            raise InputError(
                f"--change={name}: what the run has saved depends on this field, so that it cannot change when the run resumes: "
                "leave it as it was, or begin a new run with its parameters (a new --workdir, and --init-from)"
            )


def check_same_run(
    settings: Config, run: RunDir, step: int | None, extend: bool = False, change: Collection[str] = ()
) -> list[str]:
    """Refuses a folder of another run. A run that has saved no step yet starts anew, with any config.

    Fields that change no result may differ (`config.RESUME_CHANGEABLE`), and a run may get more steps.

    Args:
      settings: config of the run.
      run: the run's folder, which need not exist.
      step: the newest saved one, or None.
      extend: allows more steps although the learning rate so far depended on their number.
      change: dotted names of fields that may differ too (`check_change`).

    Returns:
      `field: old -> new` of each of these that differs.

    Raises:
      InputError: names what the folder holds, or the fields that differ.
    """
    check_change(change)
    check_utf8_name(run.path.absolute(), "a folder with checkpoints (--workdir)")
    if not run.exists:
        early = (LOG_FILE, OWNER_FILE, COMPILED_DIR)  # written before config.json
        if run.path.exists() and (not run.path.is_dir() or any(path.name not in early for path in run.path.iterdir())):
            raise InputError(f"workdir {run} holds other files but no config.json: choose a new or empty folder")
        return []
    values = run.config_values
    if EXPORT_SECTION in values or not {"data", "model", "encoding"} <= values.keys():
        content = "an export" if EXPORT_SECTION in values else "the config.json of something else"
        raise InputError(f"workdir {run} holds {content}, which training would overwrite: choose a new or empty folder")
    if step is None:
        if not (run.path / CHECKPOINTS_DIR).exists() and (lines := run.read_metrics()):
            raise InputError(
                f"workdir {run} has metrics up to step {lines[-1]['step']}, but its folder '{CHECKPOINTS_DIR}' is gone: "
                "put it back, or choose another --workdir"
            )
        return []
    # An older run's file lacks newer fields, which have their defaults, and may hold values that nothing reads.
    before, now = (with_random_bits(one, random_bits_of(run)) for one in (run.config, settings))
    lines = config.difference(_compared_values(before, change), _compared_values(now, change))
    if others := [line for line in lines if _changed_field(line) not in change]:
        names = sorted({_changed_field(line) for line in others})
        may_change = all(any(fnmatch.fnmatchcase(name, pattern) for pattern in CHANGEABLE) for name in names)
        hint = f", or --change={','.join(names)} to change them from step {step} on" if may_change else ""
        raise InputError(
            f"workdir {run} belongs to a run with another config; it differs in {'; '.join(others)}. Use a new --workdir, "
            f"or the same fields{hint}"
        )
    for name in SWITCHES:
        if name in change and bool(_value(before, name)) != bool(_value(now, name)):
            raise InputError(
                f"--change={name}: {_value(before, name)} -> {_value(now, name)} would add or remove arrays of the saved "
                "state: give a value above 0 where the run began with one, and 0 where it did not"
            )
    _check_steps(before, settings, run, step, extend, change)
    if settings.init_from and settings.init_from != before.init_from:
        began = f"began with init_from={before.init_from}" if before.init_from else "began with fresh parameters"
        raise InputError(
            f"the run of {run} is at step {step} and {began}: init_from={settings.init_from} is read only when a run "
            "begins. Leave it out to resume, or choose a new --workdir"
        )
    return lines


def _changed_field(line: str) -> str:
    """Returns the field that a line of `config.difference` is about, as --change names it."""
    name = line.partition(":")[0]
    return "data.mixture" if name.startswith("data.mixture.") and name.endswith(".weight") else name


def _value(settings: Config, name: str) -> Any:
    section, _, field = name.partition(".")
    return getattr(getattr(settings, section), field)


def _compared_values(settings: Config, change: Collection[str] = ()) -> dict:
    """The fields of a config that must be equal to resume, and those that change."""
    values = config.to_dict(config.reset_unused(settings))
    for section in (*config.RESUME_CHANGEABLE, "steps"):
        values.pop(section, None)
    for name in ("lossy_tokenizer", "prepared", "threads", "workers"):  # none changes a result
        values["data"].pop(name)
    for source in values["data"]["mixture"].values():
        source.pop("prepared")
    values["data"]["bit_depth"] = values["data"]["bit_depth"] or 16  # as files were read before the field existed
    for name in ("decay_steps", "non_finite", "skips"):  # `_check_steps` compares the first; none changes past steps
        if f"optimizer.{name}" not in change:
            values["optimizer"].pop(name)
    return values


def _check_steps(
    before: Config, settings: Config, run: RunDir, step: int, extend: bool, change: Collection[str]
) -> None:
    """Refuses a number of steps that the run is past, or under which it would have had another learning rate so far."""
    if settings.steps < step:
        raise InputError(
            f"the run of {run} has {step} steps already: set steps to {step} or more, got {settings.steps}"
        )
    if settings.optimizer.schedule == "wsd":
        same = all(step <= one.steps - decay_steps(one.optimizer, one.steps) for one in (before, settings))
        decays = [one.optimizer.decay_steps for one in (before, settings)]
        decay_may_differ = {"optimizer.decay_steps", "optimizer.schedule"} & set(change)
        same = same or before.steps == settings.steps and (decays[0] == decays[1] or bool(decay_may_differ))
    else:
        same = settings.steps == before.steps or settings.optimizer.schedule == "constant"
    if not (same or extend):
        raise InputError(
            f"the run of {run} was to take {before.steps} steps, and its learning rate so far depends on that number "
            f"(optimizer.schedule='{settings.optimizer.schedule}'): add --extend=true to continue to {settings.steps} under "
            "the schedule of that many, or set steps as it was. Under wsd, more steps change nothing before the decay"
        )


def clear_assets(run: RunDir) -> None:
    """Removes the small files of a start that saved nothing, whose tokenizer or class names would count as the new run's."""
    assets = {FINGERPRINTS_FILE, TOKENIZER_FILE, CLASS_NAMES_FILE, *EOS_FILES} - {CONFIG_FILE}
    for name in (DIGESTS_FILE, *assets, HISTORY_FILE):  # the list of the others first
        (run.path / name).unlink(missing_ok=True)
    run.reload()
