"""Which letters the reply of a model to a multiple-choice question names.

`eval.parse_letter` decides by them and has a table of examples.
"""

from __future__ import annotations

import re
import unicodedata

from support.benchmarks import LETTERS

LONGEST_REPLY = 5000  # characters of a reply that are searched for a letter

# Words that cannot follow an article: "A is right" and "A because" name option A, "A man" does not.
NO_NOUN = (
    r"(?:and|as|at|based|because|but|by|due|for|from|given|if|in|of|on|or|since|so|that|then|to"
    r"|which|with|(?:is|was|seems|looks|(?:would|must)\s+be)\s+(?:\w+ly\s+)?"
    r"(?:the|my|right|correct|true|best|most))\b"
)
NOT_WRONG = r"(?!.\)?\s+(?:is|are)\s+(?:not|wrong|incorrect|false)\b)"  # not "A is wrong"
NOT_DENIED = r"(?<![Nn]ot )(?<!n't )"  # nor is "not option A"

# " is option ", ": ", " would be " between a word such as "answer" and the letter
LINK = (
    r"(?:\s+(?:is|was|(?:would|should|must)\s+be))?"
    r"(?:\s+(?:the\s+)?(?:correct\s+)?(?:letter|option|choice|answer))?[\s:=(–-]+"
)


def named_letters(reply: str, options: tuple[str, ...]) -> list[set[str]]:
    """The letters that a reply names as its choice, in three sets, the most telling one first.

    At the start of the reply or after "answer"; after "option" or "choice"; in brackets.
    """
    reply = tidy(reply, options)
    letters = LETTERS[: len(options)]
    if re.fullmatch(rf"(?:\W*\b[{letters}]\b){{2,}}\W*", reply):  # "A; B" or "A B C D"
        return [set(re.findall(r"\w", reply))]

    # In a sentence, "A" and "I" are often an article or a pronoun ("A man", "I think"). Only
    # `capital` takes these for letters, too.
    capital = rf"{NOT_WRONG}[{letters}](?!\w)"  # "B"
    upper = rf"(?![AI]\s+(?!{NO_NOUN})[a-z]){capital}"
    small = rf"{NOT_WRONG}[{letters.lower()}](?![\w'’-])"
    lower = rf"{small}(?:(?<![ai])|(?=\s*(?:[).,:;!]|$|{NO_NOUN})))"  # "a" and "i" end a phrase
    letter = rf"\(?({upper}|{lower})"  # "B", "b", "(B"
    # "B.", "(b) blue", "B because" at the start of a line, but not "B movies"
    before_no_noun = rf"\s(?!\s*(?!{NO_NOUN})[a-z])"
    label = rf"^(?:\(?({upper})(?:[.:),;!。]|{before_no_noun}|$)|\(?({small})[.:)](?:\s|$))"
    # " or C", ", perhaps option C", " (C)" right after a letter
    joining = r"[.:)]?\s*(?:[,;/&]?\s*\b(?i:or|and|as\s+well\s+as)\b|[,;/&]"
    joining += rf"|(?=\(?[{LETTERS}][.:)]))"  # one label after another: "(A) (B)"
    perhaps = r"(?:(?:maybe|perhaps|possibly|option|choice)\s+)*"
    further = re.compile(rf"{joining}\s*{perhaps}{letter}")

    def find(pattern: str, text: str) -> set[str]:
        """The letters of all matches, and those joined to them: "B or C" -> {"B", "C"}."""
        found = set()
        for match in re.finditer(pattern, text):
            while match:
                found.add(match[match.lastindex].upper())
                match = further.match(text, match.end(match.lastindex))
        return found

    answer = find(rf"\b(?i:answer{LINK}){letter}", reply)
    for line in reply.split("\n"):  # a reply may repeat the options, one a line
        labels = find(label, line.strip())
        answer |= labels
        if not labels:
            break
    choice = find(rf"{NOT_DENIED}\b(?i:(?:option|choice){LINK}){letter}", reply)
    choice |= find(rf"{NOT_DENIED}\b(?i:option|choice)\s+\(?({capital})", reply)  # "option A red"
    return [answer, choice, find(rf"{NOT_DENIED}\(\s*({upper}|{lower})\s*\)", reply)]


def tidy(reply: str, options: tuple[str, ...]) -> str:
    """A reply without decoration, and without the words of an option after its letter."""
    # WHY: the time that the patterns take can grow with the square of the length.
    reply = unicodedata.normalize("NFKC", reply[:LONGEST_REPLY])
    reply = re.sub(r"[*_`\"“”$]|(?<!\w)'|'(?!\w)", "", reply)  # **B** or "B" -> B
    reply = re.sub(r"[\]}>]", ")", reply)
    reply = re.sub(r"[\[{<]", "(", reply).strip()
    for letter, option in zip(LETTERS, options, strict=False):
        words = re.escape(option)
        reply = re.sub(rf"\b{letter} (?={words}\W*$)", f"{letter}: ", reply)  # "A red" -> "A: red"
        reply = re.sub(rf"(\b{letter}[.:)])\s*{words}(?!\w)", r"\1", reply)  # "A. red" -> "A."
    return reply


def common_beginning(options: list[list[int]]) -> list[int]:
    """The ids with which all options begin, so that the id after them tells the options apart.

    The miniature's tokenizer has no token for a capital letter: it writes A as [a space, byte 65]
    and B as [a space, byte 66]. If one option is the beginning of all, there is no such id, and the
    result is [].
    """
    begun: list[int] = []
    for ids in zip(*options, strict=False):
        if len(set(ids)) > 1:
            return begun
        begun.append(ids[0])
    return []
