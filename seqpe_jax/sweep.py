"""`python -m seqpe_jax.sweep`: the command of `seqpe_jax.cli.sweep`."""

from seqpe_jax.cli.sweep import run_command

if __name__ == "__main__":
    run_command()
