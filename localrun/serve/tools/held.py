"""Replies that are held to calls of functions and to their schemas, by a constraint.

A reply that has to be a call is one from its first letter after reasoning. Where the model may choose, its text is
free, or an answer that is held to a schema of its own, up to the mark of a call; from there on the grammar holds.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from localrun.errors import LocalrunError
from localrun.generate.constraint import Constraint
from localrun.serve.errors import APIError, invalid, unsupported
from localrun.serve.tools.form import Form
from localrun.serve.tools.forms import HARMONY
from localrun.serve.tools.grammar import INDEX, Grammar
from localrun.serve.tools.json_form import JSONForm
from localrun.text.harmony import call_header
from localrun.text.tokenizer import Tokenizer

Tool = Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}


@dataclass(frozen=True)
class Holding:
    """What a reply is held to.

    Attributes:
        must_call: it is nothing but calls.
        several: it may have more than one.
        loose: names of functions whose arguments may be anything.
        answer: what it has to be where it is no call.
    """

    must_call: bool
    several: bool
    loose: Collection[str] = ()
    answer: Constraint | None = None

    def constraint(self, form: Form, tools: Sequence[Tool], tokenizer: Tokenizer) -> Constraint:
        """That of a reply, ready for the vocabulary. Raises APIError, with the function's name, for a bad schema."""
        try:
            return self._ready(form, tools, tokenizer)
        except LocalrunError:
            for tool in tools:
                try:
                    self._ready(form, [tool], tokenizer)
                except LocalrunError as error:
                    raise _refused(tool["function"]["name"], error) from None
            raise

    def _ready(self, form: Form, tools: Sequence[Tool], tokenizer: Tokenizer) -> Constraint:
        grammars = [{"lark_grammar": self._lark(form, tools, Grammar(tokenizer.controls))}]
        if self.answer and not self.must_call:
            grammars.append({"name": "answer", **_as_document(self.answer.grammar)})
        constraint = Constraint(json.dumps({"grammars": grammars}))
        constraint.check(tokenizer)
        return constraint

    def _lark(self, form: Form, tools: Sequence[Tool], grammar: Grammar) -> str:
        after_begin = grammar.rule(" | ".join(self._call(form, tool["function"], grammar) for tool in tools))
        call = grammar.rule(f"{grammar.mark(form.begin)} {after_begin}")
        more = f" (SPACE? {call})*" if self.several else ""
        rests = {}  # of calls, by the mark that they begin with
        for begin, end in form.sections:
            rests[begin] = grammar.rule(f"SPACE? {call}{more} SPACE? {grammar.mark(end)}")
        if not rests:
            rests[form.begin] = after_begin
        block = grammar.rule(" | ".join(f"{grammar.mark(begin)} {rest}" for begin, rest in rests.items()))
        blocks = f" (SPACE? {block})*" if self.several else ""
        calls = grammar.rule(f"SPACE? {block}{blocks}")
        if self.must_call:
            return grammar.text(calls)
        if self.answer:
            return grammar.text(f"SPACE? @answer | {calls}")
        rests[form.begin] = after_begin
        starts = ["ANY"]
        for mark, rest in rests.items():
            starts.append(f"{grammar.rule(f'ANY {json.dumps(mark, ensure_ascii=False)}', '[lazy]')} {rest}{blocks}")
            text, control = grammar.before_control(mark)
            if control:  # the mark as the tokens that the vocabulary has for it
                starts.append(f"{grammar.terminal(f'ANY {text}')} {control} {rest}{blocks}")
        return grammar.text(" | ".join(starts))

    def _call(self, form: Form, function: Mapping[str, Any], grammar: Grammar) -> str:
        """A function's alternative, after the beginning of a call."""
        name = function["name"]
        opening = form.opening.format(name=name, index=INDEX).removeprefix(form.begin)
        arguments = form.arguments(None if name in self.loose else function["parameters"], grammar)
        return grammar.rule(f"{grammar.mark(opening)} {arguments} SPACE? {grammar.mark(form.closing)}")


def harmony_call(tools: Sequence[Tool]) -> tuple[str, str, Constraint]:
    """gpt-oss's call: the header that the prompt writes, which stands for text of HARMONY's form, and the arguments.

    Raises APIError for several functions, since the header has to be whole, and for a bad schema.
    """
    if len(tools) > 1:
        raise unsupported("tool_choice", "tool_choice required, which this model can't be made to follow,")
    name, parameters = tools[0]["function"]["name"], tools[0]["function"]["parameters"]
    try:
        constraint = Constraint.json_schema({"type": "object", **parameters})
    except LocalrunError as error:
        raise _refused(name, error) from None
    begun = HARMONY.opening.format(name=name)
    return call_header(name), begun, replace(constraint, after_reasoning=False)


def without_bare_calls(form: Form) -> Form:
    """The same where calls need their marks, as a grammar has them."""
    return replace(form, bare=None) if isinstance(form, JSONForm) else form


def _refused(name: str, error: LocalrunError) -> APIError:
    return invalid(f"a call of {name} can't be held to its parameters: {error}", "tools")


def _as_document(grammar: str) -> Mapping[str, Any]:
    """A constraint's grammar as one of several."""
    if not grammar.lstrip().startswith("{"):
        return {"lark_grammar": grammar}
    (only,) = json.loads(grammar)["grammars"]
    return {key: value for key, value in only.items() if key != "name" and value is not None}
