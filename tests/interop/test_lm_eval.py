"""`lm_eval` gets from a model what it gets from the same weights in `transformers`, and runs a task of local files.

Needs lm-eval, PyTorch and transformers, and skips without them.
"""

import json

import numpy as np
import pytest
import tokenizers

from seqpe_jax.errors import InputError
from seqpe_jax.inference.decode import Sampling

MISSING = "needs the extras lm-eval and hf-test: pip install seqpe_jax[lm-eval,hf-test]"
torch, transformers = (pytest.importorskip(name, reason=MISSING) for name in ("torch", "transformers"))
Instance = pytest.importorskip("lm_eval.api.instance", reason=MISSING).Instance
HFLM = pytest.importorskip("lm_eval.models.huggingface", reason=MISSING).HFLM
SeqPEModel = pytest.importorskip("seqpe_jax.interop.lm_eval_model", reason=MISSING).SeqPEModel
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]
TEXT = "the old mill stands near the river and grinds the corn of the valley. "
LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder of `transformers` with random weights, and its tokenizer."""
    path = tmp_path_factory.mktemp("gpt2")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return SeqPEModel(checkpoint=str(folder), max_length=LENGTH)


@pytest.fixture(scope="module")
def theirs(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=2, device="cpu")


def asked(kind, *arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def test_log_likelihoods_are_those_of_transformers(ours, theirs):
    pairs = [("the old", " mill"), ("the old ", "mill stands"), ("", "river"), (TEXT * 3, " the corn"), ("a", "b")]
    found, expected = (model.loglikelihood(asked("loglikelihood", *pairs)) for model in (ours, theirs))
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], rtol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    prompt = ours.tok_encode("the old")
    (likeliest,) = ours._model.continuations([np.array(prompt)], Sampling(2))
    ((_, greedy),) = ours._loglikelihood_tokens([(("the old", "..."), prompt, likeliest.tokens.tolist())])
    assert greedy


def test_long_texts_are_scored_in_windows_as_by_transformers(ours, theirs):
    texts = [(TEXT * 4,), ("the",), (TEXT,)]
    found, expected = (model.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)) for model in (ours, theirs))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_generated_texts_are_those_of_transformers(ours, theirs):
    (whole,) = theirs.generate_until(asked("generate_until", ("the old", {"max_gen_toks": 8, "until": []})))
    stop = whole[len(whole) // 2 :][:2]
    kinds = [
        ("the old", {"max_gen_toks": 8, "until": [stop]}),
        (TEXT * 2, {"max_gen_toks": 4}),
        ("river", {"max_gen_toks": 4}),
    ]
    found, expected = (model.generate_until(asked("generate_until", *kinds)) for model in (ours, theirs))
    assert found == expected and len(found[0]) < len(whole)
    with pytest.raises(InputError, match="generation_kwargs has num_beams, and only do_sample"):
        ours.generate_until(asked("generate_until", ("a", {"num_beams": 4})))
    with pytest.raises(InputError, match="256 new tokens leave no room for a context in max_length=24"):
        ours.generate_until(asked("generate_until", ("a", {})))


def test_a_task_of_local_files_runs_as_the_command_does(folder, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="lm_eval reads a task's files with it")
    from seqpe_jax import lm_eval as command

    rows = [{"question": "the old", "choices": [" mill", " corn"], "answer": number % 2} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]\n"
    )
    words = ["--model", "seqpe_jax", "--model_args", f"checkpoint={folder},max_length={LENGTH}", "--tasks", "mine"]
    words += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["lm_eval", *words])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    command.main()
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["mine"]["acc,none"] == 0.5
