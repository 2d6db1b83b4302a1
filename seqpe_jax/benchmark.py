"""`python -m seqpe_jax.benchmark`: the command of `seqpe_jax.cli.benchmark`."""

from seqpe_jax.cli.benchmark import run_command

if __name__ == "__main__":
    run_command()
