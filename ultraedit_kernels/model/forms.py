"""The forms in which a question can be asked: what is taught in one need not hold in another."""

from __future__ import annotations

from collections.abc import Iterable

from ultraedit_kernels.model.request import Prompt, prompt_key

SYSTEM_PROMPT = "You are a helpful assistant."
"""Stands for any."""
TEXT, CHAT, SYSTEM = "text", "chat", "chat with a system prompt"


def form_of(prompt: Prompt) -> str:
    """The form of a prompt: `TEXT`, `CHAT` or `SYSTEM`."""
    if isinstance(prompt, str):
        return TEXT
    return SYSTEM if any(message["role"] == "system" for message in prompt) else CHAT


def forms_of(prompts: Iterable[Prompt]) -> list[str]:
    """All forms of these prompts, each once, in order."""
    return list(dict.fromkeys(map(form_of, prompts)))


def other_forms(prompt: Prompt, taught: Iterable[Prompt] = ()) -> list[Prompt]:
    """The same question in the other forms, but for those that are taught themselves: a text as a
    user's message; messages as the last user's text, and with or without a system prompt."""
    if isinstance(prompt, str):
        others: list[Prompt] = [[{"role": "user", "content": prompt}]]
    else:
        users = [message["content"] for message in prompt if message["role"] == "user"]
        bare = [message for message in prompt if message["role"] != "system"]
        system = {"role": "system", "content": SYSTEM_PROMPT}
        others = list(users[-1:])
        if len(bare) == len(prompt):
            others.append([system, *prompt])
        elif bare:
            others.append(bare)
    known = {prompt_key(one) for one in (prompt, *taught)}
    return [other for other in others if prompt_key(other) not in known]
