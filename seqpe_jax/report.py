"""`python -m seqpe_jax.report`: the command of `seqpe_jax.cli.report`."""

from seqpe_jax.cli.report import run_command

if __name__ == "__main__":
    run_command()
