"""`python -m seqpe_jax.train`: the command of `seqpe_jax.cli.train`."""

from seqpe_jax import start_signals

if __name__ == "__main__":
    start_signals.exit_on_signal()
    start_signals.exit_on_interrupt()
    from seqpe_jax.cli.train import run_command

    run_command()
