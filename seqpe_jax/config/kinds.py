"""The kinds of data that a config names."""

TEXT_DATASETS = ("stdlib_text", "text_files", "wikitext103")
QA_DATASETS = ("stdlib_qa", "squad_long", "qa_jsonl")
IMAGE_DATASETS = ("digit_images", "moving_digits", "image_folder", "imagenet2012", "imagenet_resized")

# Kinds of data; `of` of a field or section names those whose runs read it.
DATA_TEXT, DATA_QA, DATA_IMAGE = "text", "questions", "images"
TEXT_LIKE = (DATA_TEXT, DATA_QA)  # in tokens
IMAGE_LIKE = (DATA_IMAGE,)
