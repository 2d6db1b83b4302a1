"""`python -m seqpe_jax.export`: the command of `seqpe_jax.cli.export`."""

from seqpe_jax.cli.export import run_command

if __name__ == "__main__":
    run_command()
