"""Times a config's model against the same one in PyTorch on the CPU, in training or generation; the two take turns.

    python -m venv OTHER && OTHER/bin/pip install torch numpy transformers
    python benchmarks/against_torch.py --config=configs/speed_lm.py:rotary --python=OTHER/bin/python --output=against_torch.json
    python benchmarks/against_torch.py --config=configs/speed_lm.py:llama --python=OTHER/bin/python
    python benchmarks/against_torch.py --config=configs/speed_lm.py:llama --python=OTHER/bin/python --mode=decode

PyTorch is nothing that this project needs: it runs in the interpreter that --python names. A config of kind gpt2 is compared
with a plain GPT-2 (`torch_gpt2.py`), one of kind llama with the model of `transformers` (`torch_llama.py`). Give a config of
RoPE in float32 without dropout. Prints the median of the turns' ratios, ours over PyTorch's, and the quartiles.
"""

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from seqpe_jax.cli import common, config_flags
from seqpe_jax.distributed import processes, sharding
from seqpe_jax.errors import InputError
from seqpe_jax.files import atomic_write
from seqpe_jax.inference.decode import Sampling
from seqpe_jax.inference.generate import generate
from seqpe_jax.training.trainer import Trainer

config_flags.define_config()
_PYTHON = flags.DEFINE_string("python", None, "an interpreter that has PyTorch")
_TURNS = flags.DEFINE_integer("turns", 20, "timed steps of each", lower_bound=2)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "decode"], "training steps, or 256 new tokens of one text (llama)")
_OUTPUT = common.define_path("output", "JSON file to write", writes="file")
SCRIPTS = {"gpt2": "torch_gpt2.py", "llama": "torch_llama.py"}
PROMPT, NEW_TOKENS = 16, 256
WARM_UP, PAUSE = 3, 0.2  # turns; seconds between them, in which the threads of the side before go to sleep


def main() -> None:
    """The command."""
    processes.enable_compilation_cache()
    settings = config_flags.read_config()
    model = settings.model
    rates = (model.dropout, model.attention_dropout, model.embedding_dropout)
    if model.kind not in SCRIPTS or (_MODE.value == "decode" and model.kind != "llama"):
        raise InputError(
            f"model.kind={model.kind} with --mode={_MODE.value} is not compared: give kind gpt2 (train) or llama (train, decode)"
        )
    if settings.encoding.kind != "rotary" or any(rates) or settings.precision.compute != "float32":
        raise InputError("the model in PyTorch has RoPE, float32 and no dropout: give such a config")
    if jax.devices()[0].platform != "cpu":
        raise InputError("this compares on a CPU: set JAX_PLATFORMS=cpu")
    trainer = Trainer.of(settings, jax.devices()[:1])
    sizes = {name: getattr(model, name) for name in ("layers", "width", "heads")} | {
        "kv_heads": model.parts.kv_heads,
        "mlp_width": model.parts.mlp_width,
        "vocabulary": trainer.task.data_spec.vocabulary,
        "length": settings.data.length,
        "batch": settings.batch_size if _MODE.value == "train" else 1,
        "prompt": PROMPT,
        "new_tokens": 0 if _MODE.value == "train" else NEW_TOKENS,
        "threads": len(os.sched_getaffinity(0)),
    }
    work = (_train if _MODE.value == "train" else _decode)(trainer, sizes)
    line = [_PYTHON.value, str(pathlib.Path(__file__).with_name(SCRIPTS[model.kind])), json.dumps(sizes)]
    try:
        other = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        raise InputError(f"--python={_PYTHON.value} cannot be started: {error.strerror}") from error
    ready, _, version = other.stdout.readline().strip().partition(" ")
    if ready != "ready":
        raise InputError(f"--python={_PYTHON.value} has no PyTorch that runs, or no transformers: see above")
    ours, theirs = [], []
    for _ in range(WARM_UP + _TURNS.value):
        time.sleep(PAUSE)
        start = time.perf_counter()
        work()
        ours.append(time.perf_counter() - start)
        time.sleep(PAUSE)
        other.stdin.write("\n")
        other.stdin.flush()
        theirs.append(float(other.stdout.readline()))
    other.stdin.close()
    other.wait()
    ours, theirs = ours[WARM_UP:], theirs[WARM_UP:]
    low, middle, high = statistics.quantiles([one / two for one, two in zip(ours, theirs, strict=True)])
    found = {
        "mode": _MODE.value,
        "kind": model.kind,
        "sizes": sizes,
        "processor": _processor(),
        "jax": jax.__version__,
        "torch": version,
        "turns": len(ours),
        "ratio": {"median": middle, "quarters": [low, high], "of_minima": min(ours) / min(theirs)},
    }
    print(
        f"ours / PyTorch {version}: {middle:.2f} ({low:.2f} .. {high:.2f}), fastest turns {min(ours) / min(theirs):.2f}"
    )
    if _OUTPUT.value:
        atomic_write(pathlib.Path(_OUTPUT.value), json.dumps(found, indent=1) + "\n")


def _processor() -> str:
    """Returns the processor's name where Linux says it, else that of its architecture."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _train(trainer: Trainer, sizes: dict[str, int]) -> Callable[[], None]:
    """Returns a function that takes a training step."""
    step, state = trainer.jit_train_step(), [trainer.init_state()]
    tokens = np.random.default_rng(0).integers(0, sizes["vocabulary"], (sizes["batch"], sizes["length"] + 1), np.int32)
    batch = sharding.from_local_rows(trainer.mesh, {"tokens": tokens})

    def work() -> None:
        state[0], metrics = step(state[0], batch)
        jax.block_until_ready((state, metrics))

    return work


def _decode(trainer: Trainer, sizes: dict[str, int]) -> Callable[[], None]:
    """Returns a function that generates text after a prompt, greedily and without an EOS token."""
    params, prompt = trainer.init_state().params, np.random.default_rng(0).integers(0, sizes["vocabulary"], PROMPT)
    sampling, known = Sampling(NEW_TOKENS), np.ones(sizes["vocabulary"], bool)

    def work() -> None:
        (found,) = generate(trainer.compiled, trainer.config, params, [prompt], sampling, known)
        assert len(found.tokens) == NEW_TOKENS

    return work


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "python"])
    common.run(main)
