"""`python -m seqpe_jax.aot`: the command of `seqpe_jax.cli.aot`."""

from seqpe_jax.cli.aot import run_command

if __name__ == "__main__":
    run_command()
