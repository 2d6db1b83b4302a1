"""`python -m seqpe_jax.train`: the command of `seqpe_jax.cli.train`."""

from seqpe_jax.cli.train import run_command

if __name__ == "__main__":
    run_command()
