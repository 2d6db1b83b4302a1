"""The metrics of evaluations, by kind of data: names in results, titles, units and which direction is better.

And the names of the times that training reports.
"""

import dataclasses

# Names in the lines of metrics.jsonl; seconds of a step are means since the line before.
STEP_SECONDS = "train/step_seconds"  # without evaluations and saves
DATA_SECONDS = "train/data_seconds"  # of a step, in which the main process waited for its batch
SAVE_SECONDS = "train/save_seconds"  # since the line before, in which training stood still for saves
GOODPUT = "train/goodput"  # fraction of the time since the run's first start that was spent in steps that count
SLOWEST_PROCESS = (
    "hosts/slowest_process"  # with the most host seconds: those of a step in which no device is waited for
)
SLOWEST_HOST_SECONDS = "hosts/slowest_seconds"  # its host seconds
MEDIAN_HOST_SECONDS = "hosts/median_seconds"  # median of the host seconds of all processes


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number in the results of an evaluation.

    Attributes:
      name: key in results, such as "bits_per_byte".
      title: heading of a table, with the unit.
      higher_is_better: direction.
      decimals: digits after the point that tables show.
      while_training: evaluations during training report it too, so that it can decide which checkpoint is the best.
    """

    name: str
    title: str
    higher_is_better: bool = False
    decimals: int = 3
    while_training: bool = True

    @property
    def direction(self) -> str:
        """Says which values are good."""
        return "higher is better" if self.higher_is_better else "lower is better"


def _percent(name: str, title: str) -> Metric:
    return Metric(name, title, higher_is_better=True, decimals=1)


LOSS = Metric("loss", "Loss (nats per token)")
# Kind of data (`config.data_kind`) -> its metrics in addition to the loss, the main one first.
METRICS = {
    "text": (
        Metric("bits_per_byte", "Bits per byte"),
        Metric("perplexity", "Perplexity"),
        Metric("word_perplexity", "Word perplexity", while_training=False),
    ),
    "questions": (
        _percent("contains", "Answers found, in percent,"),
        _percent("contains_all", "Parts of answers found, in percent,"),
        _percent("exact_match_strict", "Exact match, as it is written, in percent"),
        _percent("exact_match", "Exact match, normalised as SQuAD's, in percent"),
        _percent("f1", "F1 in percent"),
        Metric("answer_perplexity", "Perplexity of the answers", while_training=False),
    ),
    "sequences": (
        _percent("accuracy", "Right outputs in percent"),
        _percent("exact_match", "Inputs with all outputs right, in percent"),
    ),
    "images": (
        _percent("top1", "Top-1 accuracy in percent"),
        _percent("top5", "Top-5 accuracy in percent"),
    ),
}
EMA = "ema_"  # before the name of a metric that is measured of the moving average of the parameters (`optimizer.ema`)
HIGHER_IS_BETTER = {
    prefix + metric.name: metric.higher_is_better
    for metrics in METRICS.values()
    for metric in (LOSS, *metrics)
    for prefix in ("", EMA)
}


def training_metrics(data_kind: str) -> tuple[str, ...]:
    """Returns the names of the metrics that evaluations during training report, the loss first.

    Args:
      data_kind: "text", "questions", "sequences" or "images".
    """
    return (LOSS.name, *(metric.name for metric in METRICS[data_kind] if metric.while_training))


def with_average(names: tuple[str, ...], ema: float) -> tuple[str, ...]:
    """Returns the names of metrics with those of the moving average of the parameters, where a run has one.

    Args:
      names: metrics that evaluations during training report.
      ema: `optimizer.ema` of the run; 0 = it has none.
    """
    return (*names, *(EMA + name for name in names)) if ema else names
