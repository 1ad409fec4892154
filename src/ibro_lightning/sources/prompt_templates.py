"""Named prompt templates, and the inverse from a prompt to its bare question."""

from __future__ import annotations

from ibro_lightning.errors import ConfigError
from ibro_lightning.sources.base import check_template

TEMPLATES: dict[str, str] = {
    "plain": "{problem}",
    "dapo": (  # of DAPO-Math-17K, verbatim from the published file (arXiv 2503.14476)
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    ),
    # Qwen2.5-Math's instruction.
    "boxed": "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
}


def template_text(template: str) -> str:
    """The text of a named or custom template; raises :class:`ConfigError` for other words without ``{problem}``."""
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{" not in template:
        raise ConfigError("template", template, f"write one of {', '.join(TEMPLATES)}, or a text with {{problem}}")
    check_template("template", template, ("problem",))
    return template


def bare_question(text: str) -> str:
    """``text`` without a surrounding named template, if there is one.

    >>> bare_question(TEMPLATES["dapo"].format(problem="What is 1 + 1?"))
    'What is 1 + 1?'
    """
    asked = text.strip()
    for template in TEMPLATES.values():
        before, after = (words.strip() for words in template.format(problem="\0").split("\0"))
        added = len(before) + len(after)
        if added and len(asked) >= added and asked.startswith(before) and asked.endswith(after):
            return asked[len(before) : len(asked) - len(after)].strip()
    return text
