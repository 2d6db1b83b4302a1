"""The encodings by the name that `encoding.kind` gives them."""

from seqpe_jax.encodings.fixed import ALiBi, NoPosition, Rotary, RotaryAxial, Sinusoidal
from seqpe_jax.encodings.learned import Learned
from seqpe_jax.encodings.mixed import RotaryMixed
from seqpe_jax.encodings.pope import PoPE
from seqpe_jax.encodings.relative_bias import T5, Fire, GridALiBi, Kerple, LookHere, ScaleInvariant
from seqpe_jax.encodings.seqpe import SeqPE

ENCODINGS = {
    "seqpe": SeqPE,
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "rotary": Rotary,
    "rotary_axial": RotaryAxial,
    "rotary_mixed": RotaryMixed,
    "alibi": ALiBi,
    "alibi_grid": GridALiBi,
    "t5": T5,
    "kerple": Kerple,
    "fire": Fire,
    "lookhere": LookHere,
    "scale_invariant": ScaleInvariant,
    "pope": PoPE,
    "none": NoPosition,
}
