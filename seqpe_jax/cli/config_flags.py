"""The flags --config=FILE.py[:VARIANT] or FOLDER and --config.SECTION.FIELD=VALUE, and the help on the fields of a config.

The file is executed once, by `read_config`: the flags only hold its path and the values of fields, as the types of
`seqpe_jax.config` say. (`ml_collections.config_flags` executes it while flags are parsed, and knows no field beforehand.)
"""

import ast
import dataclasses
import textwrap
import typing
from typing import Any

from absl import flags

from seqpe_jax import config
from seqpe_jax.errors import InputError, suggest

PREFIX = "config."
MESH = PREFIX + "mesh."


class _TupleParser(flags.ArgumentParser):
    """Parses several values of one field: `16,32`, or Python's notation for a tuple or list."""

    syntactic_help = "values separated by commas"

    def __init__(self, item: Any):
        self._item = item

    def parse(self, argument: str) -> tuple[Any, ...]:
        if typing.get_origin(self._item) is typing.Literal:
            return _names(argument)
        return _texts(argument) if self._item is str else _numbers(argument)

    def flag_type(self) -> str:
        return "list"


class _DictParser(flags.ArgumentParser):
    """Parses Python's notation for a dict; what is none stays a text, which the config refuses by its field's name."""

    syntactic_help = "a dict in Python's notation"

    def parse(self, argument: str) -> Any:
        try:
            return ast.literal_eval(argument)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return argument

    def flag_type(self) -> str:
        return "dict"


def define_config(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flag --config and one flag for each field."""
    flags.DEFINE_string(
        "config",
        None,
        "config file, FILE.py or FILE.py:VARIANT, or the folder of a run, an export or a checkpoint: FOLDER, "
        "FOLDER:ENCODING or FOLDER:ENCODING+rotary (next to its RoPE)",
        flag_values=flag_values,
    )
    for name, kind in config.field_types().items():
        flags.DEFINE_flag(_flag_of_field(name, kind), flag_values, module_name=config.__name__)


def mesh_overrides(flag_values: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
    """Returns the mesh fields that the command line sets, by their names within the section."""
    given = {name: flag_values[MESH + name] for name in config.model_mesh_fields()}
    return {name: flag.value for name, flag in given.items() if flag.present}


def _flag_of_field(name: str, kind: Any) -> flags.Flag:
    if typing.get_origin(kind) is tuple and dataclasses.is_dataclass(typing.get_args(kind)[0]):
        return flags.Flag(_DictParser(), flags.ArgumentSerializer(), PREFIX + name, None, "")
    if typing.get_origin(kind) is tuple:
        return flags.MultiFlag(
            _TupleParser(typing.get_args(kind)[0]), flags.ArgumentSerializer(), PREFIX + name, None, ""
        )
    if kind is bool:
        return flags.BooleanFlag(PREFIX + name, None, "")
    parser = {int: flags.IntegerParser, float: flags.FloatParser}.get(kind, flags.ArgumentParser)()
    return flags.Flag(parser, flags.ArgumentSerializer(), PREFIX + name, None, "")


def config_path(flag_values: flags.FlagValues = flags.FLAGS) -> str:
    """Returns the config file or folder as the command line names it, with its variant."""
    return flag_values["config"].value


def config_overrides(flag_values: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
    """Returns the fields that the command line sets, by their dotted names."""
    found = {}
    for name in config.field_types():
        flag = flag_values[PREFIX + name]
        if flag.present:
            is_tuple = isinstance(flag, flags.MultiFlag)
            found[name] = tuple(item for items in flag.value for item in items) if is_tuple else flag.value
    return found


def read_config(flag_values: flags.FlagValues = flags.FLAGS) -> config.Config:
    """Reads the config file or folder once, applies the fields of the command line, and validates the result once.

    Raises:
      InputError: see `config.load`; or a field of the command line is unused.
    """
    overrides = config_overrides(flag_values)
    if "ignore-fields" in flag_values and flag_values["ignore-fields"].value:
        overrides["ignore_fields"] = tuple(flag_values["ignore-fields"].value)
    settings = config.load(config_path(flag_values), overrides)
    config.check_overrides_used(settings, overrides)
    return settings


def unknown_flag(name: str) -> InputError | None:
    """Returns the error of an unknown flag that is meant as a field of the config, else None."""
    field = name.removeprefix("no").removeprefix(PREFIX)
    if PREFIX not in name:
        return None
    if field in config.field_names():  # of a command that defines those of the mesh alone
        read = ", ".join(f"--{MESH}{name}" for name in config.model_mesh_fields())
        return InputError(
            f"--{name} is not read here: the trained model's config is stored, and only {read} can be set"
        )
    return InputError(config.unknown_field_message(field))


def help_on_config(flag_values: flags.FlagValues = flags.FLAGS) -> str:
    """Returns the help on --config, and the names of all fields by section."""
    sections: dict[str, list[str]] = {}
    for name in config.field_names():
        section, _, field = name.rpartition(".")
        sections.setdefault(section, []).append(field)
    lines = [
        f"--config: {flag_values['config'].help}",
        "--config.SECTION.FIELD=VALUE sets a field; --help=SECTION lists those of a section with types, defaults and meaning, "
        "--helpfull all:",
    ]
    lines += [f"{section + ': ' if section else ''}{', '.join(fields)}" for section, fields in sections.items()]
    wrapped = [
        textwrap.fill(
            line,
            80,
            initial_indent="  " if line.startswith("--") else "    ",
            subsequent_indent=6 * " ",
            break_on_hyphens=False,
            break_long_words=False,
        )
        for line in lines
    ]
    return "\n".join(wrapped)


def help_on_fields(section: str = "") -> str:
    """Returns a line for each field with its type, default and meaning.

    Args:
      section: the section whose fields are listed, such as "encoding"; "" = all.

    Raises:
      InputError: there is no such section.
    """
    docs = config.field_docs()
    chosen = {name: doc for name, doc in docs.items() if not section or name.startswith(section + ".")}
    if not chosen:
        sections = dict.fromkeys(name.partition(".")[0] for name in docs if "." in name)
        raise InputError(f"the config has no section '{section}'.{suggest(section, sections)}")
    lines = []
    for name, field in chosen.items():
        lines.append(f"  --config.{name}={_format_default(field.default)}  ({_format_type(field)})")
        kinds = config.kinds_with(name.removeprefix("encoding.")) if name.startswith("encoding.") else []
        owners = f" [{', '.join(kinds)}]" if 0 < len(kinds) < len(config.ENCODINGS) else ""
        lines.append(f"      {field.doc}{owners}")
    return "\n".join(lines)


def _format_type(field: config.FieldDoc) -> str:
    if field.choices:
        return " | ".join(field.choices)
    if typing.get_origin(field.type) is tuple:
        item = typing.get_args(field.type)[0]
        return f"{' | '.join(typing.get_args(item)) or item.__name__}, ..."
    return field.type.__name__


def _format_default(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "()"
    return str(value) if value != "" else "''"


def _numbers(argument: str) -> tuple[Any, ...]:
    """Returns numbers; a value that is none stays a text, which the config refuses by its field's name."""
    try:
        value = ast.literal_eval(argument)
    except (SyntaxError, ValueError):
        value = argument
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _names(argument: str) -> tuple[str, ...]:
    """Returns names in Python's notation for a text, tuple or list, or separated by commas."""
    written = _texts(argument)
    return tuple(name.strip() for name in argument.split(",")) if written == (argument,) else written


def _texts(argument: str) -> tuple[str, ...]:
    """Returns the texts of Python's notation for a text, tuple or list, else one text; a path such as 2024 is no number."""
    source = argument.strip()
    try:
        written = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError):
        return (argument,)
    if isinstance(written, ast.Constant) and isinstance(written.value, str):
        return (written.value,)
    if not isinstance(written, (ast.Tuple, ast.List)):
        return (argument,)
    items = written.elts
    if not all(isinstance(item, ast.Constant) for item in items):
        return (argument,)
    return tuple(
        item.value if isinstance(item.value, str) else ast.get_source_segment(source, item) or "" for item in items
    )
