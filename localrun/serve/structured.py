"""What a request says that a reply has to be: OpenAI's response_format, and vLLM's fields.

Sources: https://platform.openai.com/docs/guides/structured-outputs; vLLM's docs/features/structured_outputs.md, which
has guided_json, guided_regex, guided_choice and guided_grammar, and since 0.12 structured_outputs in their place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from localrun.errors import LocalrunError
from localrun.generate.constraint import Constraint
from localrun.serve.errors import invalid

# Its name in the request, what makes a constraint of it, its value.
Field = tuple[str, Callable[[Any], Constraint], Any]


def constraint_of(response_format: Any, guided: Mapping[str, Any], outputs: Any) -> Constraint | None:
    """The constraint that a request's fields ask for, None for none.

    Args:
        guided: the values of guided_json and its kin by the rest of their names; None where they are not set.
        outputs: structured_outputs.

    Raises APIError if they ask for several, or for one that there is not.
    """
    given = [*_of_format(response_format)]
    given += [(f"guided_{name}", _MAKERS[name], value) for name, value in guided.items() if value is not None]
    given += _of_outputs(outputs)
    if len(given) > 1:
        raise invalid(f"{given[0][0]} and {given[1][0]} are given; a reply can be held to one", given[1][0])
    for name, make, value in given:
        try:
            return make(value)
        except LocalrunError as error:
            raise invalid(f"{name}: {error}", name) from None
    return None


def _of_format(given: Any) -> list[Field]:
    kind = given.get("type") if isinstance(given, dict) else None
    if given is None or kind == "text":
        return []
    if kind == "json_object":  # with a schema it is llama.cpp's form
        return [("response_format.schema", _json, given.get("schema") or {"type": "object"})]
    if kind != "json_schema":
        raise invalid("response_format.type is not text, json_object or json_schema", "response_format")
    form = given.get("json_schema")
    if not isinstance(form, dict) or "schema" not in form:
        raise invalid("response_format.json_schema has no schema", "response_format.json_schema")
    return [("response_format.json_schema.schema", _json, form["schema"])]


def _of_outputs(given: Any) -> list[Field]:
    if given is None:
        return []
    if not isinstance(given, dict) or not given.keys() <= {*_MAKERS, "json_object"}:
        raise invalid(f"structured_outputs has other keys than {', '.join(_MAKERS)}, json_object", "structured_outputs")
    wanted = {name: value for name, value in given.items() if value is not None}
    if wanted.pop("json_object", False):
        wanted["json"] = {"type": "object"}
    return [(f"structured_outputs.{name}", _MAKERS[name], value) for name, value in wanted.items()]


def _json(schema: Any) -> Constraint:
    """A schema, or the text of one."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise LocalrunError(f"the schema is not JSON: {error}") from None
    return Constraint.json_schema(schema)


_MAKERS: dict[str, Callable[[Any], Constraint]] = {
    "json": _json,
    "regex": Constraint.regex,
    "choice": Constraint.choice,
    "grammar": Constraint.lark,
}
