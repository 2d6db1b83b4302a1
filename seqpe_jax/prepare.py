"""`python -m seqpe_jax.prepare`: the command of `seqpe_jax.cli.prepare`."""

from seqpe_jax import start_signals

if __name__ == "__main__":
    start_signals.exit_on_interrupt()
    from seqpe_jax.cli.prepare import run_command

    run_command()
