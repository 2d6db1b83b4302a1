"""Questions with complete prompts, one JSON object per line: the format of the PyTorch reference and of RULER."""

import pathlib
from collections.abc import Iterator

from seqpe_jax.data import registry
from seqpe_jax.data.datasets.base import SPLITS
from seqpe_jax.data.formats import HEAD_BYTES, check_plain_text, strip_bom
from seqpe_jax.errors import InputError
from seqpe_jax.files import parse_json_text

QA_JSONL_USAGE = registry.get("qa_jsonl").paths_hint


class QaJsonl:
    """Prompts of a file that is read in place: {"index": int, "input": the prompt, "outputs": accepted answers}.

    A single file serves as every split; a folder has one file per split.
    """

    name = "qa_jsonl"

    @classmethod
    def file(cls, split: str, paths: tuple[str, ...]) -> pathlib.Path:
        """Returns the file of a split. Raises: InputError: there is none."""
        registry.get(cls.name).check_paths(paths)
        path = pathlib.Path(paths[0]).expanduser().absolute()
        file = path if cls.is_one_file(paths) else path / f"{split}.jsonl"
        if not file.is_file():
            present = [name for name in SPLITS if (path / f"{name}.jsonl").is_file()]
            has = f" (the folder has {', '.join(present)})" if present else ""
            raise InputError(f"data.paths: '{file}' does not exist{has}; {QA_JSONL_USAGE}")
        return file

    @classmethod
    def is_one_file(cls, paths: tuple[str, ...]) -> bool:
        """Returns whether `data.paths` is a single file, which is every split."""
        return not pathlib.Path(paths[0]).expanduser().is_dir()


def lines(file: pathlib.Path) -> Iterator[tuple[int, int, bytes]]:
    """Yields (line number from 1, byte offset, line) of lines that are not blank.

    Raises:
      InputError: unreadable, or not text.
    """
    try:
        with open(file, "rb") as content:
            check_plain_text(content.read(HEAD_BYTES), f"data.paths: '{file}'")
            content.seek(0)
            offset = 0
            for number, line in enumerate(content, 1):
                if strip_bom(line).strip():
                    yield number, offset, line
                offset += len(line)
    except OSError as error:
        raise InputError(f"cannot read '{file}' ({error.strerror}): check data.paths") from error


def parse(line: bytes, where: str, number: int = 0) -> tuple[int, str, tuple[str, ...]]:
    """Returns (index, prompt, accepted answers) of a line, stripped of white space, each answer once.

    The prompt is "input", and the beginning of the answer where RULER stores it separately ("answer_prefix").

    Args:
      line: JSON.
      where: file and line number, for messages.
      number: index of a line without one.

    Raises:
      InputError: not an object with these fields.
    """
    try:
        record = parse_json_text(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); {QA_JSONL_USAGE}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where} is no object; {QA_JSONL_USAGE}")
    if "input" not in record and {"context", "question"} <= record.keys():
        raise InputError(
            f"{where} is a question with its context: use data.name=squad_long, which asks it at any length"
        )
    record = {"index": number, **record}
    if isinstance(record.get("outputs"), str):
        record["outputs"] = [record["outputs"]]
    for name, kind, wanted in (("index", int, "an integer"), ("input", str, "a text"), ("outputs", list, "a list")):
        if not isinstance(record.get(name), kind) or isinstance(record[name], bool):
            raise InputError(
                f"{where}: field '{name}' must be {wanted}, got {record.get(name)!r:.60}; {QA_JSONL_USAGE}"
            )
    outputs = record["outputs"]
    if not outputs or not all(isinstance(output, str) and output.strip() for output in outputs):
        raise InputError(
            f"{where}: field 'outputs' must be a list of texts that are not empty, got {outputs!r:.60}; {QA_JSONL_USAGE}"
        )
    if not record["input"].strip():
        raise InputError(f"{where}: field 'input' is empty; {QA_JSONL_USAGE}")
    prefix = record.get("answer_prefix") or ""
    if not isinstance(prefix, str):
        raise InputError(f"{where}: field 'answer_prefix' must be a text, got {prefix!r:.60}; {QA_JSONL_USAGE}")
    prompt = (record["input"] + prefix).strip()
    return record["index"], prompt, tuple(dict.fromkeys(output.strip() for output in outputs))
