"""The kinds of data that a config names."""

TEXTS = ("stdlib_text", "text_files", "wikitext103")
QUESTIONS = ("stdlib_qa", "squad_long", "qa_jsonl")
IMAGES = ("digit_images", "moving_digits", "image_folder", "imagenet2012", "imagenet_resized")

# Kinds of data; `of` of a field or section names those whose runs read it.
TEXT, ASKED, PICTURED = "text", "questions", "images"
WRITTEN = (TEXT, ASKED)  # in tokens
PICTURES = (PICTURED,)
