"""What every command shares: flags, `--help`, one clear line and exit code 2 for bad input."""

import sys
from collections.abc import Callable

from absl import flags

from seqpe_jax.errors import InputError


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls `main`; exits with 0, with 2 on bad input (one line), with 1 on a failure."""
    module = sys.modules["__main__"]
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((module.__doc__ or "").strip())
        print(flags.FLAGS.main_module_help())
        sys.exit(0)
    try:
        rest = flags.FLAGS(sys.argv)[1:]
        if rest:
            raise InputError(f"unexpected argument '{rest[0]}': options look like --name=value (see --help)")
        main()
    except (InputError, flags.Error) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
