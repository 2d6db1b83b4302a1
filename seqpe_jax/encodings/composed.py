"""An encoding made of parts, each of which fills its own fields of the signal, for the heads that it is meant for."""

import jax
from flax import linen as nn

from seqpe_jax.encodings.base import PositionSignal


class Composed(nn.Module):
    """Several encodings of the same positions at once, such as a few rotating pairs beside SeqPE's logit.

    The first part is the one that a config names; it keeps its parameters' names, so that a checkpoint does not tell
    whether its encoding stood alone, and it alone may have vectors.

    Attributes:
      parts: the encodings; no two of them fill the same field of the signal.
      heads_model: heads of the model; reach: how many of them, the first ones, each part is for.
    """

    parts: tuple[nn.Module, ...]
    heads_model: int
    reach: tuple[int, ...]

    def setup(self) -> None:
        """Gives the first part this module's own parameters."""
        nn.share_scope(self, self.parts[0])

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns the joined signal of positions int32[P, L, A] of a window or grid of this shape."""
        own = self.parts[0](positions_PLA, shape=shape, deterministic=deterministic)
        return self._beside(own, positions_PLA, shape)

    def vectors(self, positions_RA: jax.Array, **options) -> jax.Array:
        """Returns the vectors float32[R, E] of positions int32[R, A]; options as of the first part."""
        return self.parts[0].vectors(positions_RA, **options)

    def signal(self, vectors_PLE: jax.Array, positions_PLA: jax.Array, *, shape: tuple[int, ...]) -> PositionSignal:
        """Returns the joined signal of positions int32[P, L, A] whose vectors float32[P, L, E] are known."""
        own = self.parts[0].signal(vectors_PLE, positions_PLA, shape=shape)
        return self._beside(own, positions_PLA, shape)

    def query_key(self, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the query and key parts of vectors [..., E], as the first part does."""
        return self.parts[0].query_key(vectors)

    def with_precomputed_table(self, sides: tuple[int, ...], step: int) -> "Composed":
        """Returns this encoding with a table of vectors in the encoder's place, as the first part does."""
        return self.clone(parts=(self.parts[0].with_precomputed_table(sides, step), *self.parts[1:]))

    def _beside(self, own: PositionSignal, positions_PLA: jax.Array, shape: tuple[int, ...]) -> PositionSignal:
        """The first part's signal, joined with those of the others."""
        signal = own.for_heads(self.reach[0], self.heads_model)
        for part, heads in zip(self.parts[1:], self.reach[1:], strict=True):
            signal = signal.joined(part(positions_PLA, shape=shape).for_heads(heads, self.heads_model))
        return signal
