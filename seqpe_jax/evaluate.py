"""`python -m seqpe_jax.evaluate`: the command of `seqpe_jax.cli.evaluate`."""

from seqpe_jax.cli.evaluate import run_command

if __name__ == "__main__":
    run_command()
