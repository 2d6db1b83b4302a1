"""Words that this code once used in a sense of its own, and the field's term for each; none of them may come back.

`python -m tests.repository.test_vocabulary [FOLDER_OR_FILE ...]` prints every hit and the counts by word and by file.
"""

import ast
import collections
import pathlib
import re
import subprocess
import sys
import tokenize

ROOT = pathlib.Path(__file__).resolve().parents[2]

# No identifier or file has one of these words, or one as a part of its name, and no docstring, comment or message uses it.
WORDS = {
    "told": "reported, warned, formatted, or what is meant",
    "tells": "says, reports, shows",
    "kept": "saved, stored, retained; results_cache, dropout_mask",
    "standing": "loop_state",
    "fade": "forget_gate, log_forget_gate",
    "fades": "forget_gate",
    "faded": "forget_gate",
    "fading": "forget_gate",
    "turned": "rotated, transposed",
    "unturned": "identity_rotation",
    "pivot": "anchor",
    "pivots": "anchors",
    "clips": "videos",
    "pictures": "images",
    "pictured": "is_image",
    "rival": "baseline",
    "rivals": "baselines",
    "patiently": "run_interruptible",
    "aside": "quarantine",
    "elsewhere": "another place by its name",
    "apart": "separate, independent",
    "arrows": "phase, magnitude",
    "waves": "sinusoids",
    "stretched": "interpolated",
    "spacing": "position_grid",
    "owed": "pending",
    "untold": "unknown",
    "beside": "next to, in the same folder, in addition to",
}
# No identifier is one of these.
NAMES = {
    "Asked": "EvalContext",
    "ASKED": "DATA_QA",
    "asks_questions": "is_qa",
    "WRITTEN": "TEXT_LIKE",
    "PICTURED": "DATA_IMAGE",
    "PICTURES": "DATA_IMAGE",
    "reads_images": "is_image",
    "lay_out": "with_logical_constraint",
    "laid_out": "with_logical_constraint",
    "gathered": "all_gather, replicated",
    "by_device": "shard_map",
    "whole_to_global": "from_process_local",
    "is_lead": "is_main_process",
    "as_the_lead": "broadcast_from_main",
    "several": "is_multiprocess",
    "leave_when_told": "exit_on_signal",
    "told_to_stop": "stop_requested",
    "await_loss": "what it waits for",
    "keep_memory": "configure_malloc",
    "give_back_memory": "malloc_trim",
    "keep_compiled_programs": "enable_compilation_cache",
    "in_store": "is_remote",
    "StorePath": "epath.Path",
    "Place": "epath.Path",
    "written_here": "staged_dir",
    "write_whole": "atomic_write",
    "new_folder": "atomic_dir",
    "check_free": "require_empty",
    "set_aside": "quarantine",
    "wrong_with": "validate",
    "UNNAMED": "TMP_SUFFIX",
    "Standing": "LoopState",
    "NotFinite": "NonFiniteError",
    "settle": "resolve, decide",
    "meanwhile": "poll",
    "Operands": "AttentionInputs",
    "Relation": "RelativeBias",
    "Halves": "prefill and decode_loop",
    "Static": "SamplingStatic",
    "Draw": "SamplingArgs",
    "Draws": "SampledPositions",
    "Spacing": "PositionGrid",
    "Architecture": "ModelSpec",
    "Objective": "TrainLoss",
    "criterion": "TaskLoss",
    "Programs": "CompiledModel",
    "Sizes": "DataSpec",
    "Given": "PrecomputedVectors",
    "Turn": "a name for what the function does",
    "Group": "PositionStructure",
    "level_sizes": "max_nodes_per_level",
    "kinds_TU": "token_types",
    "WORTH": "MIN_SAVING",
    "around_pivot": "around_anchor",
    "past_only": "causal_only",
    "check_kept": "check_assets",
    "Kept": "ResultsCache",
    "Stages": "TrialGraph",
    "Attempt": "RunProcess",
    "Busy": "Locked",
    "View": "ProgressView",
    "two_stages": "tune_then_repeat",
    "tried": "grid",
    "ways": "variants",
    "verdicts": "significance",
    "in_words": "describe",
    "HOW": "a name for the choice",
    "FEW": "a name for the limit",
    "LONGEST_PLAIN": "MAX_REFERENCE_LEN",
    "PARTLY_TURNED": "PARTIAL_ROTARY",
    "OF_PAIRS": "PARTIAL_ROTARY",
    "FADES": "FORGET_GATES",
    "FADING": "FORGET_GATES",
}
EXCLUDED = {pathlib.Path(__file__).resolve()}
# A docstring is a noun phrase or a verb, not a clause.
OPENINGS = dict.fromkeys(
    ("What", "Where", "Which", "Who", "Whether", "How", "As"), "begin the docstring with a noun or a verb"
)
ALL = WORDS | NAMES | OPENINGS
PROSE = re.compile(rf"(?<![\w.])({'|'.join(WORDS)})(?![\w])", re.IGNORECASE)
STRINGS = (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None))  # the second since Python 3.12
PARTS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+(?![a-z])")


def files() -> list[pathlib.Path]:
    """Returns the Python files, shell scripts and pages under version control, or all of them outside a clone."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = found.stdout.split("\0") if found.returncode == 0 else [str(path) for path in ROOT.rglob("*")]
    paths = [ROOT / name for name in names if name.endswith((".py", ".sh", ".md")) and not name.startswith(".venv")]
    return [path for path in paths if path.is_file() and path.resolve() not in EXCLUDED and path.name != "CHANGELOG.md"]


def hits(path: pathlib.Path) -> list[tuple[int, str]]:
    """Returns (line, word) of the words in a file and in its name."""
    found = [(0, word) for word in words_of(path.stem)]
    text = path.read_text(errors="replace")
    if path.suffix != ".py":
        lines = re.sub(r"`[^`\n]*`", "", text).splitlines()
        return found + [(number, word) for number, line in enumerate(lines, 1) for word in prose(line)]
    tree = ast.parse(text)
    renamed = set()
    for node in tree.body:  # the tables by which older configs are read
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(getattr(target, "id", "").startswith("RENAMED") for target in targets):
            renamed |= set(range(node.lineno, node.end_lineno + 1))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and path.is_relative_to(ROOT / "seqpe_jax"):
            opening = (ast.get_docstring(node) or "").partition(" ")[0]
            found += [(node.body[0].lineno, opening)] if opening in OPENINGS else []
    for token in tokenize.generate_tokens(iter(text.splitlines(keepends=True)).__next__):
        line = token.start[0]
        if line in renamed:
            continue
        if token.type == tokenize.NAME:
            found += [(line, word) for word in words_of(token.string)]
        elif token.type == tokenize.COMMENT or (token.type in STRINGS and " " in token.string.strip()):
            for offset, part in enumerate(token.string.splitlines()):
                found += [(line + offset, word) for word in prose(part)]
    return found


def words_of(identifier: str) -> list[str]:
    """Returns the words of an identifier that are in the lists."""
    if identifier in NAMES:
        return [identifier]
    return [part for part in (part.lower() for part in PARTS.findall(identifier)) if part in WORDS]


def prose(text: str) -> list[str]:
    """Returns the words of a text that are in the list."""
    return [word.lower() for word in PROSE.findall(text)]


def test_no_word_of_the_list_is_used():
    found = [f"{path.relative_to(ROOT)}:{line}: '{word}': {ALL[word]}" for path in files() for line, word in hits(path)]
    assert (
        words_of("is_told") == ["told"] and prose("As it was told.") == ["told"] and words_of("Spacing") == ["Spacing"]
    )
    assert len(WORDS | NAMES) >= 60
    assert not found, "\n".join(found)


def main(chosen: list[str]) -> None:
    """Prints the hits below the chosen folders and files, and the counts of all."""
    by_word: collections.Counter[str] = collections.Counter()
    by_file: collections.Counter[str] = collections.Counter()
    for path in files():
        name = str(path.relative_to(ROOT))
        for line, word in hits(path):
            by_word[word] += 1
            by_file[name] += 1
            if any(name.startswith(prefix) for prefix in chosen):
                print(f"{name}:{line}: {word}: {ALL[word]}")
    print("by file:", ", ".join(f"{name} {count}" for name, count in by_file.most_common()))
    print("by word:", ", ".join(f"{word} {count}" for word, count in by_word.most_common()))
    print(sum(by_word.values()), "hits")


if __name__ == "__main__":
    main(sys.argv[1:])
