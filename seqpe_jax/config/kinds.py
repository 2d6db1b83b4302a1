"""The kinds of encodings and of data that a config names, and what those of encodings can do."""

from typing import Literal

EncodingKind = Literal[
    "seqpe", "learned", "sinusoidal", "rotary", "rotary_axial", "rotary_mixed", "alibi", "alibi_grid", "t5", "kerple",
    "fire", "lookhere", "scale_invariant", "pope", "fox", "cable", "none",
]  # fmt: skip
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
TEXT_ONLY = ("alibi", "t5", "kerple", "scale_invariant", "pope", "fox", "cable")  # know one axis, or what came before
GRID_ONLY = ("alibi_grid", "lookhere")
MOVABLE = REAL_POSITIONS  # windows may stand elsewhere than at the origin
WAVES = ("seqpe", "sinusoidal", "rotary", "rotary_axial", "rotary_mixed", "scale_invariant", "pope")
IN_HEADS = ("seqpe", "rotary", "rotary_axial", "rotary_mixed", *OF_DISTANCES)  # what they do can be left to some heads
PARTLY_TURNED = ("seqpe", "rotary", "rotary_axial", "scale_invariant")


# Kinds of data; `of` of a field or section names those whose runs read it.
TEXT, ASKED, PICTURED = "text", "questions", "images"
WRITTEN = (TEXT, ASKED)  # in tokens
PICTURES = (PICTURED,)
