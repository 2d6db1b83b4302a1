"""What every command shares: flags, `--help`, one clear line and exit code 2 for bad input."""

import os
import sys
from collections.abc import Callable

from absl import flags

from seqpe_jax import config
from seqpe_jax.errors import InputError, suggest


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls `main`; exits with 0, with 2 on bad input (one line), with 1 on a failure."""
    module = sys.modules["__main__"]
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((module.__doc__ or "").strip())
        print(flags.FLAGS.main_module_help())
        sys.exit(0)
    try:
        _check_config_arguments(sys.argv[1:])
        rest = flags.FLAGS(sys.argv)[1:]
        if rest:
            raise InputError(f"unexpected argument '{rest[0]}': options look like --name=value (see --help)")
        main()
    except (InputError, flags.Error) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)  # at once: libraries cut short in the middle of their work would say more than this line
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _check_config_arguments(arguments: list[str]) -> None:
    """Says in one line what `config_flags` would tell as a traceback: no such file, variant or field."""
    for argument in arguments:
        name, given, value = argument.lstrip("-").partition("=")
        if name == "config" and given:
            config.load(value)
        elif name.startswith("config."):
            field = name.removeprefix("config.")
            if field not in config.field_names():
                raise InputError(f"unknown config field '{field}'.{suggest(field, config.field_names())}")
