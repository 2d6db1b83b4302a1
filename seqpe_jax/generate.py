"""`python -m seqpe_jax.generate`: the command of `seqpe_jax.cli.generate`."""

from seqpe_jax.cli.generate import run_command

if __name__ == "__main__":
    run_command()
