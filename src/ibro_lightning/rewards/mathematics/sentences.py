r"""An answer in a sentence: whether it is what the sentence says, or a part of something else.

>>> answer_in("The answer is 5 apples.", 14, 15, "5"), answer_in("The answer is 5 or 6.", 14, 15, "5")
('5\\text{ apples}', '5 or 6')
>>> answer_in("It is less than 5.", 16, 17, "5"), answer_in("The answer is 5, since 2 + 3 = 5.", 14, 15, "5")
('less than 5', '5')
"""

from __future__ import annotations

import re

from ibro_lightning.rewards.mathematics.answers.nouns import ADJECTIVES
from ibro_lightning.rewards.mathematics.answers.number_words import CHANGING, changes, denies
from ibro_lightning.rewards.mathematics.answers.units import is_unit
from ibro_lightning.rewards.mathematics.answers.vocabulary import FUNCTIONS, words

_LONGEST = 80
_SPOKEN = re.compile(
    r"(?i:\banswer)\s{0,3}(?:is|:)[:\s]{0,3}([^\s.,;!?][^\n.,;!?]{0,60}?)(?=\s*(?:[.,;!?\n]|$|\b(?:because|since|as|so)\b))"
)
_SEEN = 200
_MARKUP = r"[\s$*_`#~\"'“”\[({\\]"
_END = re.compile(r"[\n;!?]|\.(?![0-9m])")
_WORD = re.compile(r"[A-Za-z]+(?:['’]t)?")
_SUBJECT = r"(?:the|there|this|that|these|those|it|he|she|they|we|you|I|a|an|his|her|our|their|its|each|[A-Z][a-z]+)\b"
# Where the statement begins that holds the answer, and where a part of it that has its own subject.
_ASSERTION = re.compile(
    rf"[\n;!?]|\.(?![0-9])|\b(?:so|thus|hence|therefore|then)\b|(?:,|\band|\bwhile|\bbut)\s+(?={_SUBJECT})"
)
_SUBORDINATE = re.compile(r"\b(?:that|which|who)\b")
_BULLET = re.compile(r"\s*[-+*•]\s+")
_OPEN_TERM = re.compile(
    r"(?:[0-9π²³%!],?|(?<![A-Za-z])[A-Za-z](?:\*(?!\*)|\()|[<>≤≥±−^/√+|∓≠≈×·÷-]"
    r"|\\(?!n(?![a-z])|text|mathbf|boxed|displaystyle|quad|left|implies|therefore|to(?![a-z])|[Rr]ightarrow)[A-Za-z]+\{?)"
    rf"{_MARKUP}*$"
)
"""What ends in the middle of a term or a list, so that the answer is a part of it."""
_OTHER = re.compile(rf"(?!{_MARKUP}|[A-Za-z.,’]).", re.DOTALL)
_JOINTS = words("of than to by from the a an as for value be been equal")
_NEUTRAL = words("maximum minimum remainder first third")
"""What stands before a number, or is what it is "of", and leaves it as it is."""
_COPULA = re.compile(r"(?:\b(?:is|are|was|were)\b(?!n)|(?<![0-9]):|(?<![<>!\\])=)")
_EQUALS = re.compile(r"\b(?:equals?|be|been)\b")
_DOUBT = re.compile(
    r"(?:\bnot|n['’]t|\bnever|\bcannot)\s+(?:\w+\s+)?(?:true|think|believe|case|say|mean|claim|correct|follow|right)\b"
    r"|\b(?:doubt|reject(?:s|ed)?|discard(?:s|ed)?|extraneous|contradiction|rul(?:e|ed|ing) out|fails?|whether|know if"
    r"|anything|anywhere|something|any number|false|wrong|incorrect|impossible|unlikely|maybe|perhaps|possibly|nobody"
    r"|no one|falsely|wrongly|incorrectly|mistakenly)\b",
    re.IGNORECASE,
)
_OF_THE_ANSWER = re.compile(
    r"\b(?:of|than|half|twice|double)\s+(?:the|this|my|our)?\s*(?:\w+ )?answer\b", re.IGNORECASE
)
"""The answer is something else than what is said of a part of it: "the square of the answer is 5"."""
_SECOND = re.compile(
    r"[0-9}$]\s*,?\s*\b(?:and|or)\b(?:\s|\$|\\\()*(?:(?:it(?:'s| is)|[A-Za-z](?:_\w+)?\s*=)(?:\s|\$)*)?(?:\\boxed\{)?$"
)
"""An answer is before this one: "x = 5 or x = 6"."""
_TAKEN_BACK = re.compile(
    r"\b(?:wait|oops|correction|scratch that|i made a mistake|that(?:'s| is) (?:wrong|not right|incorrect)|should be)\b"
    r"|\b(?:actually|no|sorry|hmm|instead),?\s+(?:it|the|that|i|we|[0-9$\\])",
    re.IGNORECASE,
)
"""What follows an answer that is no longer the answer."""
_LEADING = words(
    "the a an final answer exactly precisely simply just only therefore thus then also indeed hence so total of equal "
    "equals to given by found be now clearly obviously finally actually in fact option choice result his her its their "
    "still always written as there text textbf mathbf boxed displaystyle quad number value worth integer numbers"
)
"""What may stand between "is" and a number that is the answer."""
_SAID = re.compile(
    r"(?:is|are|was|were)\s+(?:(?:indeed|also|thus|therefore|the|our|my|your|a|an|his|her|its|final|correct|right|required"
    r"|desired|only|smallest|largest|greatest|unique|exact|total)\s+)*(?:answer|solution|number|value|result|total|sum|"
    r"correct|right|true|amount|count|what|how|cost|length|area|perimeter|volume|probability|distance|price|speed|time|"
    r"average|maximum|minimum)\b"
)
_REASON = re.compile(r"(?:because|since|so|as|which|where|hence|thus|therefore)\b")
_GOES_ON = re.compile(
    r"(?:for|when|per|at|on|from|with|in (?:the|this|that|a|his|her|their|its|our|total|all|each|every)|altogether"
    r"|total|overall|each|left|remaining"
    r"|of (?:the|them|these|those|his|her|their)|to (?:the|a|his|her|their)|if|respectively|an? [a-z]{2,})\b"
)
_AFTER_COMMA = re.compile(
    rf"\s*(?:(?:which|who|so|as|because|since|where|when|thus|hence|therefore|making|giving|meaning|leaving|respectively|"
    rf"and\s+(?:so|thus|hence|therefore|{_SUBJECT})|by|in|{_SUBJECT})\b|\n|$)"
)
_DEFINITE = re.compile(r"\b(?:the|his|her|their|its|these|those|all)\s+[0-9]+\b")
_HAS_UNIT = re.compile(r"[$€£¥%°]|\\(?:text|mathrm|circ)(?![a-z])")
_DIGIT = re.compile(r"[0-9?!]")
_OPERAND = re.compile(r"(?:^|\b(?:and|or|to|by|through|till|until|of|x)\b)\W*[0-9]|[?!]|[0-9]\s*[-+*/^=<>]")
_RELATIVE = re.compile(r"\b(?:who|which|that|where)\b")
_WHERE = words("than before after until within between top bottom down first third")
"""What bounds a number that is behind it, and tells of one before it where it is."""
_MEANT = words(
    "power root remainder maximum minimum percent percentage exponent inverse square cube pair couple half quarter "
    "point one two three four five six seven eight nine ten twelve dozen hundred thousand pairs squares least most"
)
"""What is said of other things, a few words behind a number that has its unit."""
_NEAR = 2
_TAG = re.compile(r"</?[A-Za-z_]+>")
_DISPLAY_END = re.compile(r"\$\$|\\\]|\*\*")
_CLOSING = re.compile(r"(?:[ \t]?(?:\$+|\\\)|\\\]|\*+|`|[\"”)}\]✅✓✔🎉]))*")
_BEFORE_UNIT = "|".join(sorted(ADJECTIVES | words("square cubic sq cu")))
_AMOUNT = re.compile(
    rf"[ ~\t]{{0,2}}((?:(?:{_BEFORE_UNIT}) ){{0,3}})([A-Za-z]{{1,14}})(\^\{{?[23]\}}?|[²³])?"
    r"((?: per |/)[A-Za-z]{1,14})?(?![A-Za-z0-9(=_^])"
)
_SYMBOLS = re.compile(
    r"[=<>|]|^\s*[(\[].*,|\\(?:le|ge|in|ne|neq|leq|geq|lt|gt|cup|begin)(?![A-Za-z])|(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])"
)
"""What only formulas have that are no single number."""


def answer_in(text: str, start: int, end: int, answer: str, *, boxed: bool = False) -> str:
    """``answer``, which stands at ``text[start:end]``, with the unit behind it; or the clause around it where that is
    the answer: "x > 5", "3 or 4", "2√3", "2 hours 30 minutes".

    Args:
        boxed: it is marked as the answer, so that any sentence may lead to it that does not change or deny it.
    """
    before, after = (_TAG.sub("\n", part) for part in (text[max(0, start - _SEEN) : start], text[end : end + _SEEN]))
    if _TAKEN_BACK.search(after):
        return f"{answer} ?"
    number = not _SYMBOLS.search(re.sub(r"\\text\s*\{[^{}]*\}", "", answer))
    currency = re.search(r"([€£¥]|\\\$)\s*$", before)
    if currency:
        before, answer = before[: currency.start()], currency[1] + answer
    money = bool(currency or re.search(r"\$\s?$", before)) and "$" not in after.split("\n")[0]
    after, unit = _measured(after, before) if number else (after, "")
    has_unit = money or bool(unit) or _HAS_UNIT.search(answer) is not None
    if _leads(before, strict=number and not boxed) and _follows(after, boxed or has_unit, number and not has_unit):
        return answer + unit
    ending = _END.search(text, end)
    rest = text[end : ending.start() if ending else len(text)]
    clause = _clause(before) + (answer if boxed else text[start:end]) + rest
    clause = re.sub(r"(?<!\\)\$|\\[()\[\]]|\*\*", "", clause).strip(" *`_\t,\n")
    return clause if len(clause) < _LONGEST and clause != answer else f"{answer} ?"


def words_in(text: str) -> str:
    """The words after "the answer is", where nothing else in ``text`` is behind them that could be one; "" without."""
    found = list(_SPOKEN.finditer(text))
    if not found or re.search(r"[0-9$]|\\[(\[a-z]", text[found[-1].start() :]):
        return ""
    return found[-1][1].strip(" *_`\"'")


def _clause(before: str) -> str:
    """What leads to the answer in its own statement: behind "is", a colon or an equals sign."""
    copula = [match.end() for pattern in (_COPULA, _EQUALS) for match in pattern.finditer(before)]
    return before[max([before.rfind("\n") + 1, *copula]) :].lstrip()


def _leads(before: str, *, strict: bool) -> bool:
    """Whether what is before an answer leaves it as it is: behind "is", ``strict`` allows known words alone."""
    asserted = since(_ASSERTION, before)
    if _DOUBT.search(asserted) or _OF_THE_ANSWER.search(asserted) or _SECOND.search(before):
        return False
    statement = since(_SUBORDINATE, asserted)
    copula = [match.end() for match in _COPULA.finditer(statement)]
    lead = statement[max(copula, default=0) :]
    if not copula and _BULLET.fullmatch(lead):
        return True
    found = [word.lower() for word in _WORD.findall(lead)]
    if found and found[-1] in FUNCTIONS:
        return False
    if _OPEN_TERM.search(lead) or any(map(denies, found)):
        return False
    if copula and strict:
        return not _OTHER.search(lead) and all(word in _LEADING for word in found)
    while found and found[-1] in _JOINTS:
        found.pop()
    return not (found and found[-1] in CHANGING - _NEUTRAL)


def since(pattern: re.Pattern[str], text: str) -> str:
    """What is behind the last match of ``pattern``; all of ``text`` without one."""
    return text[max((match.end() for match in pattern.finditer(text)), default=0) :]


def _measured(after: str, before: str) -> tuple[str, str]:
    """What is behind a number without its unit, and the unit."""
    closing = _CLOSING.match(after)
    rest = after[closing.end() :] if closing else after
    if (sign := re.match(r"[ ~]?([€£¥])", after)) or (sign := re.match(r"[ ~]?(\$)(?![^\s.,])", after)):
        if sign[1] != "$":
            return after[sign.end() :], f" {sign[1]}"
        if "$" not in before:
            return after[sign.end() :], r" \$"
    amount = _AMOUNT.match(rest)
    if amount is None:
        return after, ""
    if not is_unit(amount[2]):
        return after, ""
    power = (amount[3] or "").replace("²", "^2").replace("³", "^3")
    per = amount[4] or ""
    if per and not is_unit(re.sub(r"/| per ", "", per)):
        return after, ""
    return rest[amount.end() :], rf"\text{{ {amount[1]}{amount[2]}}}{power}" + (rf"\text{{{per}}}" if per else "")


def _follows(after: str, measured: bool, number: bool) -> bool:
    """Whether what is behind an answer, and its unit, leaves it as it is. ``measured``: it has a unit or is marked, so
    that a number behind it counts something else, unless a word such as "and" or "to" joins them."""
    closing = _CLOSING.match(after)
    rest = after[closing.end() :] if closing else after
    spaced = rest[:1].isspace()
    text = rest.lstrip(" \t~")
    if not text or text[0] == "\n" or re.match(r"\.(?![0-9.])", text):
        return True
    if closing and _DISPLAY_END.search(closing[0]) and text[0].isupper():  # the next sentence
        return not _changed(text.split()[0], False)
    if text[0] == "!":
        return bool(closing and closing[0].strip())
    if text[0] == "(":
        inside = text[1:].partition(")")[0]
        return not _denied(inside) if _REASON.match(inside) else inside[:1].isalpha() and not _changed(inside, False)
    if text[0] in ",;—":
        return _AFTER_COMMA.match(text, 1) is not None
    if text[0].isalpha() and number and not spaced:
        return False
    if re.match(r"(?:is|are|was|were)\b", text):
        said = _SAID.match(text)
        return said is not None and not _denied(text[said.end() :])
    if _REASON.match(text):
        return not _DOUBT.search(_until_comma(text))
    if not text[0].isalpha():
        return False
    if number and not _GOES_ON.match(text):
        return False
    return not _changed(text, measured)


def _changed(text: str, measured: bool) -> bool:
    """Whether the rest of a clause has a number in it, or a word that changes one or denies. "The 4 hours" are known,
    and who or which they are is told for them alone."""
    clause = _until_comma(text)
    told = _RELATIVE.split(_DEFINITE.sub("", clause), maxsplit=1)[0]
    if _DOUBT.search(clause) or (_OPERAND if measured else _DIGIT).search(told):
        return True
    found = [word.lower() for word in _WORD.findall(told)]
    near = found[:_NEAR] if measured else found
    return any(changes(word) and word not in _WHERE for word in near) or any(
        changes(word) and word not in _WHERE | _MEANT for word in found[_NEAR:]
    )


def _denied(text: str) -> bool:
    """Whether what is said of an answer, which is named as such, changes or denies it."""
    clause = _until_comma(text)
    found = [word.lower() for word in _WORD.findall(_RELATIVE.split(clause, maxsplit=1)[0])]
    return _DOUBT.search(clause) is not None or any(map(changes, found[:_NEAR])) or any(map(denies, found))


def _until_comma(text: str) -> str:
    ending = re.search(r"[\n;,(]|\.(?![0-9])", text)
    return text[: ending.start() if ending else len(text)]
