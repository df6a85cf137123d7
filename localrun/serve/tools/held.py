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
from localrun.serve.errors import APIError, invalid
from localrun.serve.tools.form import Form
from localrun.serve.tools.forms import HARMONY
from localrun.serve.tools.grammar import INDEX, Grammar
from localrun.serve.tools.json_form import JSONForm
from localrun.text.harmony import END, START, call_header, header
from localrun.text.tokenizer import Tokenizer

_BEFORE = ("analysis", "commentary")  # gpt-oss's channels for what comes before an answer or a call
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
        has_channels, grammar = form is HARMONY, Grammar(tokenizer.controls)
        text = self._channels(tools, grammar) if has_channels else self._marks(form, tools, grammar)
        grammars = [{"lark_grammar": text}]
        if self.answer and not self.must_call:
            grammars.append({"name": "answer", **_as_document(self.answer.grammar)})
        constraint = Constraint(json.dumps({"grammars": grammars}), after_reasoning=not has_channels)
        constraint.check(tokenizer)
        return constraint

    def _marks(self, form: Form, tools: Sequence[Tool], grammar: Grammar) -> str:
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

    def _channels(self, tools: Sequence[Tool], grammar: Grammar) -> str:
        """gpt-oss's, with its reasoning, since a call is a message in a channel as well."""
        end = grammar.exactly(f"{END}{START}assistant")
        thought, said = (grammar.rule(f"{grammar.exactly(header(name))} ANY {end}") for name in _BEFORE)
        calls = []
        for function in (tool["function"] for tool in tools):
            parameters = None if function["name"] in self.loose else function["parameters"]
            arguments = HARMONY.arguments(parameters, grammar)
            calls.append(grammar.rule(f"{grammar.exactly(call_header(function['name']))} {arguments}"))
        if self.must_call:
            return grammar.text(f"{thought}? ({' | '.join(calls)})")
        answer = f"{grammar.exactly(header('final'))} {'@answer' if self.answer else 'ANY'}"
        return grammar.text(f"({thought} | {said})* ({' | '.join([*calls, answer])})")

    def _call(self, form: Form, function: Mapping[str, Any], grammar: Grammar) -> str:
        """A function's alternative, after the beginning of a call."""
        name = function["name"]
        opening = form.opening.format(name=name, index=INDEX).removeprefix(form.begin)
        arguments = form.arguments(None if name in self.loose else function["parameters"], grammar)
        return grammar.rule(f"{grammar.mark(opening)} {arguments} SPACE? {grammar.mark(form.closing)}")


def without_bare_calls(form: Form) -> Form:
    """The same where calls need their marks, as a grammar has them."""
    return replace(form, bare=None) if isinstance(form, JSONForm) and form.bare else form


def _refused(name: str, error: LocalrunError) -> APIError:
    return invalid(f"a call of {name} can't be held to its parameters: {error}", "tools")


def _as_document(grammar: str) -> Mapping[str, Any]:
    """A constraint's grammar as one of several."""
    if not grammar.lstrip().startswith("{"):
        return {"lark_grammar": grammar}
    (only,) = json.loads(grammar)["grammars"]
    return {key: value for key, value in only.items() if key != "name" and value is not None}
