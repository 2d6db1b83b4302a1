"""`python -m seqpe_jax.benchmark`: the command of `seqpe_jax.cli.benchmark`."""

from seqpe_jax import start_signals

if __name__ == "__main__":
    start_signals.exit_on_interrupt()
    from seqpe_jax.cli.benchmark import run_command

    run_command()
