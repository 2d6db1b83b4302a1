"""What a run on each kind of data is: what it is trained for, what it reads, how it is evaluated."""

from seqpe_jax.config import Config
from seqpe_jax.tasks.image_classification import ImageClassification
from seqpe_jax.tasks.language_modeling import LanguageModeling
from seqpe_jax.tasks.question_answering import QuestionAnswering
from seqpe_jax.tasks.task import EvalContext, Evaluator, Task, evaluate_at

__all__ = [
    "EvalContext",
    "ImageClassification",
    "Evaluator",
    "QuestionAnswering",
    "Task",
    "LanguageModeling",
    "evaluate_at",
    "task_class",
]


def task_class(config: Config) -> type[Task]:
    """Returns the task of a config's data: `LanguageModeling`, `QuestionAnswering` or `ImageClassification`."""
    return ImageClassification if config.is_image else QuestionAnswering if config.is_qa else LanguageModeling
