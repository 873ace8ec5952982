"""Chat templates of Hugging Face tokenizers: Jinja programs that write a conversation as the model was tuned on it."""

from __future__ import annotations

import datetime
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any


def render_chat(template: str, messages: Sequence[Mapping[str, str]], **variables: Any) -> str:
    """The text of a conversation up to where the assistant's next turn begins.

    Rendered as transformers' `apply_chat_template(…, add_generation_prompt=True)` does: in Jinja's immutable sandbox,
    blocks trimmed, with loop controls and the helpers that templates call.

    Args:
      template: the Jinja source.
      messages: each with `role` and `content`.
      **variables: such as `bos_token`.

    Raises:
      ValueError: if there are no messages, or the template is damaged or refuses them.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if not messages:
        raise ValueError("a conversation without messages; give at least one")

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    known = {"tools": None, "documents": None, "add_generation_prompt": True}
    try:
        return environment.from_string(template).render(messages=list(messages), **(known | variables))
    except (jinja2.TemplateError, KeyError, TypeError) as error:
        raise ValueError(f"the chat template cannot write this conversation: {error}") from error


def render_cut_chat(
    template: str, messages: Sequence[Mapping[str, str]], rest: str, **variables: Any
) -> tuple[str, str]:
    """The text of a conversation in two parts: up to the end of the last message's `content`, and from `rest` on.

    The last message is its `content` and then `rest`, in one turn: a document that is read once, and a question about
    it. Arguments and errors as for `render_chat`; ValueError also for a template that changes or repeats what it is
    given, so that there is no one place to cut.
    """
    if not messages:
        raise ValueError("a conversation without messages; give at least one")
    *before, last = messages
    cut = uuid.uuid4().hex
    text = render_chat(template, [*before, {**last, "content": last["content"] + cut + rest}], **variables)
    parts = text.split(cut)
    if len(parts) != 2:
        raise ValueError(
            f"the chat template writes the last message {len(parts) - 1} times: it cannot be read in two parts; give "
            "document and question as one prompt"
        )
    return parts[0], parts[1]
