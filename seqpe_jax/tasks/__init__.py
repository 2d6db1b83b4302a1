"""What a run on each kind of data is: what it is trained for, what it reads, how it is evaluated."""

from seqpe_jax.config import Config
from seqpe_jax.tasks.image_classification import Images
from seqpe_jax.tasks.language_modeling import Text
from seqpe_jax.tasks.question_answering import Questions
from seqpe_jax.tasks.task import Asked, Measure, Task, evaluate_at

__all__ = ["Asked", "Images", "Measure", "Questions", "Task", "Text", "evaluate_at", "task_class"]


def task_class(config: Config) -> type[Task]:
    """Returns the task of a config's data: `Text`, `Questions` or `Images`."""
    return Images if config.reads_images else Questions if config.asks_questions else Text
