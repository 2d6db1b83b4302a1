"""SeqPE inside a small Flax model of one's own: trained on windows of 64 tokens, evaluated at 512.

python examples/seqpe_in_flax.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import seqpe_jax

LAYERS, WIDTH, HEADS = 2, 32, 4


class Transformer(nn.Module):
    """A causal transformer whose only position encoding is SeqPE."""

    def setup(self) -> None:
        """Creates the encoding and the layers, whose parameters are trained together."""
        self.encoding = seqpe_jax.SeqPE.for_model(layers=LAYERS, width=WIDTH, heads=HEADS, max_position=10_000)
        self.embed = nn.Embed(256, WIDTH)
        self.project = [nn.DenseGeneral((3, HEADS, WIDTH // HEADS)) for _ in range(LAYERS)]
        self.merge = [nn.DenseGeneral(WIDTH, axis=(-2, -1)) for _ in range(LAYERS)]
        self.norms = [nn.LayerNorm() for _ in range(LAYERS)]

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the logits of the next token, float32[B, L, 256], of tokens int32[B, L]."""
        x = self.embed(tokens)
        signal = self.encoding(jnp.arange(tokens.shape[1]))
        for i in range(LAYERS):
            q, k, v = jnp.moveaxis(self.project[i](self.norms[i](x)), -3, 0)
            x = x + self.merge[i](seqpe_jax.attend(q, k, v, signal.at_layer(i)))
        return self.embed.attend(x)


def main(steps: int = 20) -> list[float]:
    """Trains on a text that repeats, and returns the losses, nats per byte, at lengths 64 and 512."""
    text = jnp.frombuffer(b"train short, work long. " * 100, "uint8").astype(jnp.int32)
    model, key = Transformer(), jax.random.PRNGKey(0)
    params = jax.jit(model.init)(key, text[None, :64])
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)

    def task_loss(params, tokens):
        logits = model.apply(params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def loss(params, tokens, step):
        encoding_params = {"params": params["params"]["encoding"]}
        encoding = seqpe_jax.SeqPE.for_model(layers=LAYERS, width=WIDTH, heads=HEADS, max_position=10_000)
        auxiliary = seqpe_jax.position_losses(encoding, encoding_params, key, step, window=64)
        return task_loss(params, tokens) + 0.1 * sum(auxiliary.values())

    @jax.jit
    def update(params, state, step):
        start = jax.random.randint(jax.random.fold_in(key, step), (8, 1), 0, 1000)
        grads = jax.grad(loss)(params, text[start + jnp.arange(65)], step)
        changes, state = optimizer.update(grads, state)
        return optax.apply_updates(params, changes), state

    for step in range(steps):
        params, state = update(params, state, step)
    return [float(jax.jit(task_loss)(params, text[None, : length + 1])) for length in (64, 512)]


if __name__ == "__main__":
    print("nats per byte at lengths 64 and 512: {:.3f} {:.3f}".format(*main()))
