"""`python -m seqpe_jax.prepare`: the command of `seqpe_jax.cli.prepare`."""

from seqpe_jax.cli.prepare import run_command

if __name__ == "__main__":
    run_command()
