"""Keeps a judge from knowing whom it judges: takes names and self-mentions out of an answer, and tells families.

A name is replaced wherever it stands, in code too; a sentence in which a model speaks of itself is cut out of the
prose. What a style of writing gives away stays: no text can be blind to that.
"""

from __future__ import annotations

import re

from mlx_distill.code_blocks import code_blocks, lines_of

#: Family → the words by which its models and their makers are known. Order matters: the first that matches counts.
FAMILIES: dict[str, str] = {
    "claude": r"claude|anthropic",
    "gpt": r"chat-?gpt|gpt-?[2-9](?:\.\d)?\w*|gpt-oss|openai|codex",
    "gemini": r"gemini|gemma[-\d]*|google deepmind|deepmind",
    "qwen": r"qwen[\w.]*|qwq|tongyi|alibaba(?: cloud)?",
    "llama": r"llama[-\d.]*|meta ai|codellama",
    "mistral": r"mistral(?: ai)?|mixtral|codestral|devstral|ministral",
    "deepseek": r"deepseek(?:-[rv]\d)?",
    "smollm": r"smol-?lm\d*|hugging ?face(?:tb)?",
    "phi": r"phi-?\d[\w.]*",
    "grok": r"grok-?\d[\w.]*|x\.ai|xai",
    "command": r"command[- ]r(?:\+| plus)?|cohere(?:'s| ai)",
    "kimi": r"kimi|moonshot ai",
    "glm": r"chatglm|glm-\d[\w.]*|zhipu",
    "granite": r"granite-\d[\w.]*",
    "olmo": r"olmo[-\d]*|allen ?ai",
}

#: What stands for a name: the second where it may have to be an identifier.
REMOVED, REMOVED_IN_CODE = "[name removed]", "name_removed"

_NAMES = re.compile(rf"(?<![^\W_])(?:{'|'.join(FAMILIES.values())})(?![^\W\d_])", re.IGNORECASE)

_A_MODEL = r"(?:AI|A\.I\.|artificial intelligence|(?:large )?language model|LLM|chatbot|assistant)"
#: A clause or sentence in which a model speaks of itself. It ends with the sentence, or at the comma of "As an AI, ".
_SELF = re.compile(
    rf"\b(?:I am|I'm|I’m|my name is)\b[^.!?\n]{{0,40}}?\b{_A_MODEL}\b[^.!?\n]*[.!?]?"
    rf"|\bas an? (?:[\w-]+ ){{0,3}}?{_A_MODEL}\b[^.,!?\n]*[.,!?]?"
    r"|\b(?:I was|I've been|I have been|I am|I'm|I’m) (?:made|created|trained|developed|built|fine-?tuned|distilled)\b"
    r"[^.!?\n]*[.!?]?",
    re.IGNORECASE,
)


def blinded(answer: str, model: str) -> str:
    """An answer without what names its author.

    Args:
        model: The author's own name, removed in each form: whole, without its revision, without its owner.
    """
    lines = lines_of(answer)
    hidden: list[str] = []
    at = 0
    for block in code_blocks(answer):
        hidden += _hidden_prose(lines[at : block.start], model)
        # In code, a sentence about oneself may be a string that has to stay for it to run.
        hidden.append(_without_names("\n".join(lines[block.start : block.end]), model, REMOVED_IN_CODE))
        at = block.end
    return "\n".join(hidden + _hidden_prose(lines[at:], model))


def _hidden_prose(lines: list[str], model: str) -> list[str]:
    """The lines as one text, or none."""
    return [_without_names(_SELF.sub(REMOVED, "\n".join(lines)), model, REMOVED)] if lines else []


def _without_names(text: str, model: str, instead: str) -> str:
    for name in _forms(model):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, text, flags=re.IGNORECASE)
    return _NAMES.sub(instead, text)


def _forms(model: str) -> list[str]:
    """A model's name as it may be written; plain words such as "demo" are left alone, they say nothing."""
    bare = re.sub(r"^[a-z]+:", "", model)
    without_revision = bare.partition("@")[0]
    forms = {model, bare, without_revision, without_revision.rpartition("/")[2]}
    return sorted((form for form in forms if len(form) > 3 and not form.isalpha()), key=len, reverse=True)


def family(spec: str) -> str | None:
    """The family of a model, from its spec or name: "anthropic:claude-opus-4-6" is of the family "claude".

    A recorded teacher has none. A model that is not known here is of the family of its name's first letters.
    """
    provider, colon, name = spec.partition(":")
    if colon and provider == "recorded":
        return None
    model = name if colon else spec
    for known, words in FAMILIES.items():
        if re.search(rf"(?<![a-z])(?:{words})", model, re.IGNORECASE):
            return known
    letters = re.match(r"[a-z]+", model.rpartition("/")[2].lower())
    return letters.group() if letters else None


def same_family(judge: str, teacher: str) -> bool:
    """Whether a judge is of the teacher's family, and so may favour it and its students."""
    return family(judge) is not None and family(judge) == family(teacher)
