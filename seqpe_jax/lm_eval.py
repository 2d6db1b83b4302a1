"""`lm-evaluation-harness` with the model "seqpe_jax"; its other arguments are those of `lm_eval`.

    pip install -e .[lm-eval]
    python -m seqpe_jax.lm_eval --model seqpe_jax --model_args checkpoint=runs/first,max_length=1024 --tasks lambada_openai

`lm_eval` knows the models of its own package alone, so this command adds one and then calls it.
`interop.lm_eval_model` lists the model_args.
"""

import sys

from seqpe_jax.errors import InputError

MISSING = "lm_eval is not installed: pip install 'seqpe_jax[lm-eval]', or pip install lm-eval"


def main() -> None:
    """Runs `lm_eval` with the arguments of the process; exits with 2 and one line on bad input."""
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import register_model
    except ImportError as error:
        if error.name is None or not error.name.startswith("lm_eval"):
            raise
        sys.exit(_refuse(MISSING))
    from seqpe_jax.interop import lm_eval_model

    register_model(lm_eval_model.NAME)(lm_eval_model.SeqPEModel)
    try:
        cli_evaluate()
    except InputError as error:
        sys.exit(_refuse(str(error)))


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
