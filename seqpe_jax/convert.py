"""`python -m seqpe_jax.convert`: the command of `seqpe_jax.cli.convert`."""

from seqpe_jax.cli.convert import run_command

if __name__ == "__main__":
    run_command()
