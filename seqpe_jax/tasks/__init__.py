"""Tasks, one for each kind of data: training data and loss of a run, and its evaluation."""

from seqpe_jax.config import Config
from seqpe_jax.data.registry import DATA_IMAGE, DATA_QA, DATA_SEQUENCES, DATA_TEXT
from seqpe_jax.tasks.algorithmic import AlgorithmicSequences
from seqpe_jax.tasks.base import EvalContext, Evaluator, Task, evaluate_at
from seqpe_jax.tasks.image_classification import ImageClassification
from seqpe_jax.tasks.language_modeling import LanguageModeling
from seqpe_jax.tasks.question_answering import QuestionAnswering

__all__ = [
    "AlgorithmicSequences",
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
    """Returns the task of a config's kind of data."""
    return {
        DATA_TEXT: LanguageModeling,
        DATA_QA: QuestionAnswering,
        DATA_SEQUENCES: AlgorithmicSequences,
        DATA_IMAGE: ImageClassification,
    }[config.data_kind]
