"""SeqPE without Flax modules around it: queries and keys that carry their positions, for any attention function.

python examples/seqpe_in_plain_jax.py
"""

import jax
import jax.numpy as jnp

import seqpe_jax

LAYERS, WIDTH, HEADS, LENGTH = 2, 32, 4, 256


def main() -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Returns the output of JAX's attention, that of `seqpe_jax.attend`, and the losses on position vectors."""
    key = jax.random.PRNGKey(0)
    encoding = seqpe_jax.SeqPE.for_model(layers=LAYERS, width=WIDTH, heads=HEADS, max_position=10_000)
    params = jax.jit(encoding.init)(key, jnp.arange(64))  # 64 positions, 256 below
    q, k, v = jax.random.normal(key, (3, 1, LENGTH, HEADS, WIDTH // HEADS))

    signal = jax.jit(encoding.apply)(params, jnp.arange(LENGTH)).at_layer(0)
    q_, k_, v_ = seqpe_jax.apply_position_signal(q, k, v, signal)
    out = jax.nn.dot_product_attention(q_, k_, v_, scale=1.0, is_causal=True)[..., : WIDTH // HEADS]

    losses = jax.jit(lambda params: seqpe_jax.position_losses(encoding, params, key, step=0, window=64))(params)
    return out, seqpe_jax.attend(q, k, v, signal), losses


if __name__ == "__main__":
    out, expected, losses = main()
    print("largest difference between the two forms:", float(jnp.abs(out - expected).max()))
    print({name: float(value) for name, value in losses.items()})
