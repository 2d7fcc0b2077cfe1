"""Which models are kin: of one maker, or by name of one line. A judge may favour its own."""

from __future__ import annotations

import re

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
