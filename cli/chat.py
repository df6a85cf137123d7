"""localrun chat: a conversation on the terminal, or through a pipe."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.output import is_screen, note, printable, size, tell
from cli.text import check_text
from localrun.bundled import MINIATURE

if TYPE_CHECKING:
    from cli.terminal.conversation import Conversation


@options.takes(
    sampling=options.SamplingOptions(),
    load=options.LoadOptions(),
    ranks=options.RankOptions(),
    template=options.TemplateOptions(),
)
def chat(
    model: options.Model = None,
    n_tokens: options.NTokens = -1,
    system: options.System = None,
    stop: options.Stop = None,
    plain: Annotated[bool, typer.Option("--plain", help="Show replies as they are, not as Markdown.")] = False,
    *,
    template: options.TemplateOptions,
    sampling: options.SamplingOptions,
    load: options.LoadOptions,
    ranks: options.RankOptions,
    verbose: options.Verbose = False,
) -> None:
    """Chat with a model; /help lists the commands.

    Reads messages from the terminal, or a line each from a pipe. Replies go to stdout, all else to stderr.
    """
    from cli.interrupt import raising
    from cli.model import given_sampling, given_variables, max_tokens, open_model, sampling_for
    from cli.terminal.conversation import Conversation
    from cli.terminal.display import FOLD, SHOW, PlainDisplay, TerminalDisplay
    from cli.terminal.lines import EditedLines, PlainLines
    from cli.terminal.repl import Repl

    limit = max_tokens(n_tokens)
    given, variables = given_sampling(sampling), given_variables(template)
    if system is not None:
        system = check_text(system, "the system message")
    with open_model(model, load, verbose, template.chat_template, ranks) as engine:
        conversation = Conversation(engine, sampling_for(engine, given), system, stop or [], limit)
        on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        renders = on_terminal and is_screen() and not plain and conversation.template is not None
        display = (TerminalDisplay if renders else PlainDisplay)(SHOW if template.show_thinking else FOLD)
        repl = Repl(conversation, display, template.think, variables)
        _banner(conversation)
        with raising():
            repl.run(EditedLines(repl.completions(), repl.status) if on_terminal else PlainLines())


def _banner(conversation: "Conversation") -> None:
    engine = conversation.engine
    facts = engine.describe()
    where = f"{facts['backend']} on {facts['device']} with {facts['threads']} threads"
    name, architecture = printable(str(facts["model"])), printable(str(facts["architecture"]))
    tell(f"{name} ({architecture}, {size(int(facts['weight_bytes']))}), {where}, context {facts['ctx']} tokens")
    if engine.file.path == MINIATURE:
        note("a small story model: it continues what you write; `localrun chat smollm2` chats")
    elif conversation.template is None:
        note("the file has no chat template and no ChatML: what you write is continued as it is")
    elif engine.template is None:
        note("the file has no chat template; using ChatML, as llama.cpp does")
    tell("/help lists the commands, Ctrl-C stops a reply, Ctrl-D ends.")
