"""How dense is the code? Prints a table, and fails if a file is over its bounds.

    python -m tests.density

Readers can follow about ten tokens a line. A comprehension, a conditional expression or a lambda
folds several steps into one, so these are counted as well.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIX = ("merv.py", "encoders.py", "llama.py", "data.py", "train.py", "eval.py")
MODEL_FILES = ("merv.py", "encoders.py", "llama.py", "support/variants.py")  # formulas are denser
FOLDED = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.IfExp, ast.Lambda)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
NOT_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip
MAX_FUNCTION = 60  # lines


def product_files() -> list[Path]:
    """All Python files that are not tests."""
    files = []
    lesson = ("lesson", "lesson/exercises", "lesson/solutions")
    for folder in ("", "support", "miniature", *lesson):
        files += sorted((ROOT / folder).glob("*.py"))
    return files


def measure(source: str) -> dict[str, float]:
    """Tokens a code line, folded expressions a hundred code lines, share of comments and docstrings
    in code lines (%), and the lines of the longest function."""
    tree = ast.parse(source)
    explained, code = set(), set()
    longest = 0
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
            explained |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef):
            longest = max(longest, node.end_lineno - node.lineno + 1)
    docstrings = set(explained)
    tokens = 0
    open_f_strings = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            explained.add(token.start[0])
        elif token.type not in NOT_CODE and token.start[0] not in docstrings:
            # An f-string is one token in Python 3.11 and many in 3.12: it counts as one.
            kind = tokenize.tok_name[token.type]
            if open_f_strings == 0:
                tokens += 1
            if kind == "FSTRING_START":
                open_f_strings += 1
            elif kind == "FSTRING_END":
                open_f_strings -= 1
            code |= set(range(token.start[0], token.end[0] + 1))
    lines = max(1, len(code))
    folded = sum(isinstance(node, FOLDED) for node in ast.walk(tree))
    return {
        "tokens": tokens / lines,
        "folded": 100 * folded / lines,
        "explained": 100 * len(explained) / lines,
        "longest": longest,
    }


def faults(name: str, found: dict[str, float]) -> list[str]:
    """Which bounds a file is over."""
    most_tokens = 12 if name in MODEL_FILES else 10
    over = []
    if found["tokens"] > most_tokens:
        over.append(f"more than {most_tokens} tokens a line")
    if found["folded"] > 8:
        over.append("more than 8 folded expressions in 100 lines")
    if name in SIX and found["explained"] < 35:
        over.append("comments and docstrings below 35 %")
    if found["longest"] > MAX_FUNCTION:
        over.append(f"a function of more than {MAX_FUNCTION} lines")
    return over


def main() -> None:
    """Print one line a file; status 1 if any is over its bounds."""
    print(f"{'':<30}  tokens  folded  explained  longest function")
    failed = False
    for file in product_files():
        name = str(file.relative_to(ROOT))
        found = measure(file.read_text(encoding="utf-8"))
        over = faults(name, found)
        failed = failed or bool(over)
        numbers = f"{found['tokens']:8.1f}{found['folded']:8.1f}{found['explained']:9.0f} %"
        print(f"{name:<30}{numbers}{found['longest']:10.0f}  {'; '.join(over)}".rstrip())
    sys.exit(failed)


if __name__ == "__main__":
    main()
