"""`python -m seqpe_jax.predict`: the command of `seqpe_jax.cli.predict`."""

from seqpe_jax.cli.predict import run_command

if __name__ == "__main__":
    run_command()
