"""How a published model is run: the commands that its card shows."""

from __future__ import annotations

from mlx_distill.config import ShareConfig
from mlx_distill.run_records import RunRecord
from mlx_distill.share.base import Base

_PROMPT = "Write a binary search in Python."


def usage(config: ShareConfig, run: RunRecord, base: Base | None) -> str:
    """A section a tool, as Markdown.

    Args:
        run: As it is published.
    """
    name = config.repo.rpartition("/")[2]
    parts = []
    if config.what != "adapter":
        parts += _whole_model(config.repo, name)
    if config.what != "fused" and base is not None:
        heading = "The adapter alone" if config.what == "both" else None
        parts += _adapter(config.repo, name, base, run, heading)
    return "\n\n".join(parts)


def _whole_model(repo: str, name: str) -> list[str]:
    python = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
chat = [{{"role": "user", "content": "{_PROMPT}"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=512)[0]))"""
    ollama = f"""hf download {repo} --local-dir {name}
mlx-distill export {name} --to ollama --out {name}-ollama
ollama create {name} -f {name}-ollama/Modelfile"""
    return [
        "### mlx-lm",
        _code("sh", f'mlx_lm.generate --model {repo} --prompt "{_PROMPT}" --max-tokens 512'),
        "### transformers",
        _code("python", python),
        "### Ollama",
        _code("sh", ollama),
    ]


def _adapter(repo: str, name: str, base: Base, run: RunRecord, heading: str | None) -> list[str]:
    level = "####" if heading else "###"
    # What mlx-lm is given: for weights that were converted here, only mlx-distill knows the way.
    model = base.hub_id
    folder = f"adapters/{name}"
    pulled = f"mlx-distill pull {repo} --run {folder}"
    python = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{model}"), "{folder}/export/peft")
tokenizer = AutoTokenizer.from_pretrained("{model}")"""
    note = (
        [
            f"The adapter was trained on the weights of a quantized GGUF of {model}, which mlx-distill converts "
            f"(`{run.model.spec}`); on those of the Hub it gives slightly different answers."
        ]
        if base.converted
        else []
    )
    return [
        *([f"### {heading}"] if heading else []),
        *note,
        f"{level} mlx-lm",
        _code("sh", f'{pulled}\nmlx_lm.generate --model {model} --adapter-path {folder} --prompt "{_PROMPT}"'),
        f"{level} transformers",
        _code("sh", f"{pulled}\nmlx-distill export {folder} --to peft"),
        _code("python", python),
        f"{level} Ollama",
        _code(
            "sh",
            f"{pulled}\nmlx-distill fuse {folder}\nmlx-distill export {folder} --to ollama\n"
            f"ollama create {name} -f {folder}/export/ollama/Modelfile",
        ),
    ]


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
