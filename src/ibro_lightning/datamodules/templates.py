r"""How a problem is asked: named templates, and the way back from a prompt to its bare question.

``TEMPLATES`` by name, each a text with ``{problem}`` for ``str.format``:

- ``plain``: the problem alone.
- ``dapo``: the prompt of DAPO-Math-17K, word for word as its published file has it (arXiv 2503.14476).
- ``boxed``: the problem, then Qwen2.5-Math's request for ``\boxed{}``.
"""

from __future__ import annotations

from ibro_lightning.datamodules.sources import check_template
from ibro_lightning.errors import ConfigError

TEMPLATES: dict[str, str] = {
    "plain": "{problem}",
    "dapo": (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    ),
    "boxed": "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
}


def template_text(template: str) -> str:
    """The text of a named template, or a template of the user's own, checked.

    Raises:
        ConfigError: neither a name nor a text with ``{problem}``.
    """
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{" not in template:
        raise ConfigError(
            "source.template", template, f"write one of {', '.join(TEMPLATES)}, or a text that contains {{problem}}"
        )
    check_template("source.template", template, ("problem",))
    return template


def bare_question(text: str) -> str:
    """``text`` without the words of the known template around it, if there are any.

    >>> bare_question(TEMPLATES["dapo"].format(problem="What is 1 + 1?"))
    'What is 1 + 1?'
    """
    asked = text.strip()
    for template in TEMPLATES.values():
        before, after = (words.strip() for words in template.format(problem="\0").split("\0"))
        around = len(before) + len(after)
        if around and len(asked) >= around and asked.startswith(before) and asked.endswith(after):
            return asked[len(before) : len(asked) - len(after)].strip()
    return text
