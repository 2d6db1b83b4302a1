"""A run keeps how its texts end and says what its tokenizer loses; every length and context scores the same tokens."""

import json
import types

import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.data import tokens
from seqpe_jax.errors import InputError
from seqpe_jax.tasks import language_modeling
from seqpe_jax.tasks.base import EvalContext
from seqpe_jax.tasks.language_modeling import LanguageModeling
from seqpe_jax.tasks.question_answering import QuestionAnswering
from tests.data.test_tokenizers import with_tokens, word_level
from tests.tiny import tiny_config

WORDS = ["the", "fox", "walks"]


def settings(tokenizer, path, **fields):
    values = {
        "data__name": "text_files",
        "data__paths": (str(path),),
        "data__tokenizer": str(tokenizer),
        "data__cache_dir": str(path.parent / "cache"),
        "eval__lengths": (16,),
        "variant": "rotary",
    }
    return tiny_config(**values | fields)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("the fox walks\n" * 200)
    return path


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text(
        "".join(json.dumps({"index": n, "input": "the fox", "outputs": ["walks"]}) + "\n" for n in range(9))
    )
    return path


@pytest.fixture
def tokenizer(tmp_path):
    """Words, and a special token [EOS] that has the id 4."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    word_level(folder / "tokenizer.json", WORDS)
    return with_tokens(folder / "tokenizer.json", ["[EOS]"])


def stored_run(folder, data, settings):
    """Writes the config and the tokenizer of a run."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict(settings)))
    data.save_assets(folder)
    return folder


def test_the_start_says_how_texts_end(tokenizer, texts, asked, tmp_path):
    assert "texts end with '[EOS]' (token 4)" in LanguageModeling(settings(tokenizer, texts)).describe()
    assert "no EOS token: documents are concatenated" in LanguageModeling(settings("bytes", texts)).describe()
    plain = tmp_path / "plain.json"
    word_level(plain, WORDS)
    assert "no EOS token: documents are concatenated" in LanguageModeling(settings(plain, texts)).describe()
    questions = settings(tokenizer, asked, data__name="qa_jsonl")
    assert "answers end with '[EOS]' (token 4)" in QuestionAnswering(questions).describe()
    in_bytes = QuestionAnswering(settings("bytes", asked, data__name="qa_jsonl")).describe()
    assert "answers end with byte 0" in in_bytes and "loses" not in in_bytes
    assert "one file is every split: evaluations ask the questions that training reads" in in_bytes


def test_a_run_ends_its_texts_as_it_began(tokenizer, texts, tmp_path):
    """Later edits of the files next to data.tokenizer change nothing, until a new run begins."""
    given = settings(tokenizer, texts)
    run = stored_run(tmp_path / "run", LanguageModeling(given), given)
    with_tokens(tokenizer, ["<stop>"])
    with pytest.raises(InputError, match="is not the tokenizer that the run of .* began with"):
        LanguageModeling(given, run_dir=run)
    tokenizer.write_bytes((run / "tokenizer.json").read_bytes())
    (tokenizer.parent / "tokenizer_config.json").write_text('{"eos_token": "fox"}')
    assert LanguageModeling(given).tokenizer.eos_id == 2
    assert LanguageModeling(given, run_dir=run).tokenizer.eos_id == 4
    assert LanguageModeling(settings(run / "tokenizer.json", texts), run_dir=run).tokenizer.eos_id == 4
    begins = LanguageModeling(settings(tokenizer, texts, init_from=str(run)), run_dir=str(run))
    begins.check_assets(run)
    assert begins.tokenizer.eos_id == 2


def test_a_run_from_before_goes_on_without_an_end(tokenizer, texts, tmp_path):
    given = settings(tokenizer, texts)
    run = stored_run(tmp_path / "run", LanguageModeling(given), given)
    (run / "tokenizer_config.json").unlink()
    old, new = LanguageModeling(given, run_dir=run), LanguageModeling(given)
    assert old.tokenizer.eos_id is None and new.tokenizer.eos_id == 4
    assert 4 not in old.source("train").tokens


def test_questions_that_the_tokenizer_loses_are_refused(tokenizer, asked):
    asked.write_text(asked.read_text() + json.dumps({"index": 9, "input": "the wolf", "outputs": ["walks"]}) + "\n")
    with pytest.raises(InputError, match="loses text: 4 of .* such as 'wolf' .*data.lossy_tokenizer=True"):
        QuestionAnswering(settings(tokenizer, asked, data__name="qa_jsonl")).questions("train", 16)
    found = QuestionAnswering(settings(tokenizer, asked, data__name="qa_jsonl", data__lossy_tokenizer=True))
    assert "the tokenizer loses text: 4 of" in found.describe()


def test_text_that_prompts_lose_is_reported(tokenizer, texts, capsys):
    data = LanguageModeling(settings(tokenizer, texts))
    assert [ids.tolist() for ids in data.prompts([b"the fox", b"walks"])] == [[1, 2], [3]]
    assert capsys.readouterr().err == ""
    data.prompts([b"the fox", "the ☃".encode()])
    assert capsys.readouterr().err.startswith(
        "prompts: the tokenizer loses text: 3 of 14 checked bytes (21%), such as '☃'"
    )
    raw = LanguageModeling(settings("bytes", texts)).prompts([b"caf\xe9"])
    assert raw[0].tolist() == list(b"caf\xe9") and capsys.readouterr().err == ""
    LanguageModeling(settings("bytes", texts)).prompts([b"one<|endoftext|>two", b"<|endoftext|>"])
    assert capsys.readouterr().err == "prompts: special tokens that they spell are read as plain text: <|endoftext|>\n"


def test_an_export_says_which_of_its_logits_are_no_tokens(tokenizer, texts):
    plain, padded = (
        LanguageModeling(settings(tokenizer, texts, model__vocabulary=size)).export_signature((16,)) for size in (0, 64)
    )
    assert plain.output == ("batch", "length", "5") and "no tokens" not in plain.meaning
    assert padded.output == ("batch", "length", "64") and "59 of the 64 ids are no tokens" in padded.meaning
    assert "token ids 0 to 4" in padded.meaning


def test_a_vocabulary_that_is_too_small_is_refused(tokenizer, texts, tmp_path):
    with pytest.raises(
        InputError, match="has 5 tokens, but the model only 4 .*: set model.vocabulary to 5 or more, or to 0"
    ):
        LanguageModeling(settings(tokenizer, texts, model__vocabulary=4))


def context_of(losses, batch=4):
    """An evaluation context with the losses of targets: (tokens[B, L + 1]) -> float[B, L]."""
    return EvalContext(lambda batch: {"loss": losses(np.asarray(batch["tokens"]))}, None, lambda batch: batch, batch)


def text_of(monkeypatch, tokens, **fields):
    """The task of a split of these tokens."""
    source = types.SimpleNamespace(tokens=tokens, bytes=len(tokens), words=len(tokens) // 5)
    monkeypatch.setattr(LanguageModeling, "sources", lambda self, split: {"": source})
    return LanguageModeling(tiny_config(variant="rotary", **fields))


@pytest.mark.parametrize("limit", [0, 1500])
def test_every_length_scores_the_same_tokens(monkeypatch, limit):
    """A model that ignores its context has the same loss at all of them, though half of the split is noise."""
    noise = np.random.default_rng(0).integers(128, 256, 1024)
    tokens = np.concatenate([np.full(1024, 32), noise]).astype(np.uint8)
    text = text_of(monkeypatch, tokens, eval__tokens=limit)
    results = [
        text.evaluate(context_of(lambda tokens: tokens[:, 1:] / 32), (length,), "test") for length in (64, 1023, 1024)
    ]
    count = limit or 2047
    assert [result["tokens"] for result in results] == [count] * 3
    expected = tokens[1 : count + 1].mean() / 32
    assert [result["loss"] for result in results] == pytest.approx([expected] * 3, rel=1e-12)
    with pytest.raises(InputError, match="evaluation length 2048 is longer than the test split"):
        text.check_eval_size((2048,), "test")
    if limit:
        with pytest.raises(InputError, match=r"eval.tokens=1500 \(--tokens\) is less than evaluation length 1501"):
            text.check_eval_size((1501,), "test")


def test_every_context_scores_the_same_targets(monkeypatch):
    tokens = np.arange(5000)
    text = text_of(monkeypatch, tokens, eval__contexts=(16, 300, 1024), eval__targets=400)
    (contexts,) = text.extra_evaluators()
    seen = context_of(
        lambda tokens: tokens[:, 1:] + tokens[:, 1:] - tokens[:, :1]
    )  # which target, and tokens before it
    results = [contexts.evaluate(seen, eval_size, "test") for eval_size in contexts.eval_sizes()]
    for context, result in zip((16, 300, 1024), results, strict=True):
        assert (result["context"], result["targets"], result["stride"]) == (context, 400, 8)
        assert result["loss"] - (context - 3.5) == pytest.approx(results[0]["loss"] - 12.5)
    with pytest.raises(InputError, match="evaluation context 5000 is longer than the test split .*contexts below 5000"):
        contexts.check_eval_size((5000,), "test")
    assert QuestionAnswering.extra_evaluators(text) == ()


def test_a_run_on_several_hosts_does_not_tokenize_much(tokenizer, texts, monkeypatch):
    task = LanguageModeling(settings(tokenizer, texts))
    monkeypatch.setattr(tokens, "MAX_BYTES_PER_HOST", 1000)
    monkeypatch.setattr(language_modeling, "is_multiprocess", lambda: True)
    with pytest.raises(
        InputError, match="GB of text, and every host .* would tokenize it .*`python -m seqpe_jax.prepare"
    ):
        task.source("train")
    monkeypatch.setattr(language_modeling, "is_multiprocess", lambda: False)
    assert len(task.source("train").tokens)
