"""A reply that has to be a call: the prompt writes its beginning, and the model goes on from there.

What the model writes then is not constrained: arguments may still be no JSON.
"""

from __future__ import annotations

from localrun.generate.reasoning import TAGS
from localrun.serve.errors import unsupported
from localrun.serve.tools.form import Form
from localrun.serve.tools.forms import HARMONY
from localrun.text import harmony


def beginning(form: Form, choice: str) -> str:
    """The beginning of a call for a choice of "required" or a function's name; "" where the model may choose.

    Raises APIError where the form has none.
    """
    if choice in ("none", "auto"):
        return ""
    if choice != "required":
        return form.one_call.format(choice)
    if form is HARMONY:  # the header of a message has to be whole
        raise unsupported("tool_choice", "tool_choice required, which this model can't be made to follow,")
    return form.any_call


def prompted(form: Form, choice: str, opened: str | None) -> str:
    """What is put at the prompt's end for it.

    Args:
        opened: the tag of reasoning that the prompt has opened; there is no reasoning then.
    """
    if form is HARMONY:
        return harmony.call_header(choice)
    begun = beginning(form, choice)
    return f"{dict(TAGS)[opened]}\n\n{begun}" if opened else begun
