"""The kinds of encodings and of data that a config names, and what those of encodings can do."""

from typing import Literal

EncodingKind = Literal[
    "seqpe",
    "learned",
    "sinusoidal",
    "rotary",
    "rotary_axial",
    "rotary_mixed",
    "alibi",
    "alibi_grid",
    "t5",
    "kerple",
    "fire",
    "lookhere",
    "scale_invariant",
    "pope",
    "none",
]
Gate = Literal["none", "forget", "cable"]
# Published names of the kind `none` with a gate: FoX (arXiv 2503.02130) and CABLE (arXiv 2503.08067).
GATED = {"fox": "forget", "cable": "cable"}
TEXTS = ("stdlib_text", "text_files", "wikitext103")
QUESTIONS = ("stdlib_qa", "squad_long", "qa_jsonl")
IMAGES = ("digit_images", "moving_digits", "image_folder", "imagenet2012", "imagenet_resized")

# Kinds of encodings by what they can do; `reads` of a field names those that read it.
SEQPE = ("seqpe",)
# Logits gain a function of how far the key lies.
OF_DISTANCES = ("alibi", "alibi_grid", "t5", "kerple", "fire", "lookhere", "scale_invariant")
# Positions need not be whole numbers.
REAL_POSITIONS = ("seqpe", "sinusoidal", "rotary", "rotary_axial", "rotary_mixed", *OF_DISTANCES, "pope")
SLOPED = ("alibi", "alibi_grid", "lookhere")  # logits fall with distance by a fixed slope of each head
TEXT_ONLY = ("alibi", "t5", "kerple", "scale_invariant", "pope")  # know one axis, or what came before
GRID_ONLY = ("alibi_grid", "lookhere")
MOVABLE = REAL_POSITIONS  # windows may stand elsewhere than at the origin
WAVES = ("sinusoidal", "rotary", "rotary_axial", "rotary_mixed", "scale_invariant", "pope")
# What they do can be limited to some heads; what is added to the tokens reaches all.
IN_HEADS = ("seqpe", "rotary", "rotary_axial", "rotary_mixed", *OF_DISTANCES, "pope")
OWN_PAIRS = ("rotary", "rotary_axial", "scale_invariant")  # rotate pairs themselves; all, or half, by default
# Take rotary pairs beside what they do themselves: all that do not rotate queries and keys already.
ADDED_PAIRS = ("seqpe", "learned", "sinusoidal", "alibi", "alibi_grid", "t5", "kerple", "fire", "lookhere", "none")


def encoding_name(kind: str, gate: str) -> str:
    """Returns the name of an encoding in reports: its kind, "fox" or "cable", or "KIND+GATE"."""
    if gate == "none":
        return kind
    published = {named: name for name, named in GATED.items()}
    return published[gate] if kind == "none" and gate in published else f"{kind}+{gate}"


# Kinds of data; `of` of a field or section names those whose runs read it.
TEXT, ASKED, PICTURED = "text", "questions", "images"
WRITTEN = (TEXT, ASKED)  # in tokens
PICTURES = (PICTURED,)
