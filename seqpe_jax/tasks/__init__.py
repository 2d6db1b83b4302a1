"""What a run on each kind of data is: what it is trained for, what it reads, how it is evaluated."""

from seqpe_jax.config import Config
from seqpe_jax.tasks.images import Images
from seqpe_jax.tasks.questions import Questions
from seqpe_jax.tasks.task import Asked, Measure, Task, evaluate_at
from seqpe_jax.tasks.text import Text

__all__ = ["Asked", "Images", "Measure", "Questions", "Task", "Text", "evaluate_at", "task_class"]


def task_class(config: Config) -> type[Task]:
    """Returns the task of a config's data: `Text`, `Questions` or `Images`."""
    return Images if config.reads_images else Questions if config.asks_questions else Text
