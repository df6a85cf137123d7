"""localrun serve: a model as an endpoint, for clients of the OpenAI API."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.output import note, tell
from localrun.errors import LocalrunError

if TYPE_CHECKING:
    import socket

    from localrun.engine import Engine
    from localrun.serve.store import Store

_MOST_CACHE_GIB = 1 << 20
_MOST_PAUSE_S = 3600


@dataclass(frozen=True)
class ServeOptions:
    """Where a server listens, whom it lets in, and what it keeps."""

    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option("--port", help="The port to listen on; 0 for any that is free.")] = 8080
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", help="What clients have to send.", envvar="LOCALRUN_API_KEY"),
    ] = None
    slots: Annotated[
        int | None,
        typer.Option("--slots", help="Replies that run at once; up to 4 if not given.", show_default=False),
    ] = None
    cache_ram: Annotated[
        float, typer.Option("--cache-ram", metavar="GIB", help="RAM for finished conversations, to go on from.")
    ] = 2.0
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir", metavar="DIR", help="A folder for those that RAM has no room for, and for the next start."
        ),
    ] = None
    cache_disk: Annotated[
        float, typer.Option("--cache-disk", metavar="GIB", help="What it may hold; the oldest go first.")
    ] = 8.0
    max_pause: Annotated[
        float,
        typer.Option(
            "--max-pause", metavar="SECONDS", help="How long a running reply may wait while others' prompts are read."
        ),
    ] = 1.0
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", metavar="ORIGIN", help="A site whose pages may use the server; repeatable."),
    ] = None

    def check(self) -> None:
        """Raises LocalrunError on what is out of range, and on a key that no client could send."""
        for option, given in (("--cache-ram", self.cache_ram), ("--cache-disk", self.cache_disk)):
            if not 0 <= given <= _MOST_CACHE_GIB:
                raise LocalrunError(f"{option} {given:g}; expected 0 GiB or more")
        if not 0 <= self.max_pause <= _MOST_PAUSE_S:
            raise LocalrunError(f"--max-pause {self.max_pause:g}; expected 0 to {_MOST_PAUSE_S} s")
        key = self.api_key
        if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
            raise LocalrunError("--api-key has characters that no header can carry, or none at all")


@options.takes(
    without=("show_thinking",),
    how=ServeOptions(),
    load=options.LoadOptions(),
    ranks=options.RankOptions(),
    template=options.TemplateOptions(),
)
def serve(
    model: options.Model = None,
    *,
    how: ServeOptions,
    template: options.TemplateOptions,
    load: options.LoadOptions,
    ranks: options.RankOptions,
    verbose: options.Verbose = False,
) -> None:
    """Serve a model over HTTP, in the form of the OpenAI API."""
    from cli.model import given_variables, open_model, template_settings

    try:
        from localrun.serve import server
        from localrun.serve.origins import checked_origins
    except ModuleNotFoundError as error:
        raise LocalrunError(f"{error.name} is missing: pip install 'localrun[serve]'") from None
    how.check()
    origins, given = checked_origins(how.allow_origin or ()), given_variables(template)
    with server.listen_on(how.host, how.port) as listener:
        if how.api_key is None and not server.is_loopback(listener):
            note(f"warning: whoever reaches {how.host} can use the model; --api-key KEY asks for a key")
        with open_model(model, load, verbose, template.chat_template, ranks) as engine:
            name = engine.file.path.stem
            server.serve(
                engine,
                listener,
                name=name,
                variables=template_settings(engine.template, template.think, given),
                store=_store(engine, how),
                api_key=how.api_key,
                slots=server.slots_for(engine, how.slots),
                cache_bytes=int(how.cache_ram * 2**30),
                most_pause_s=how.max_pause,
                origins=origins,
                ready=lambda: _say(name, listener),
            )


def _store(engine: "Engine", how: ServeOptions) -> "Store | None":
    """Where finished conversations go on disk, if they are to."""
    from localrun.serve.store import Store

    if how.cache_dir is None:
        return None
    if engine.config is None:
        note("llama.cpp runs this model: --cache-dir has no effect")
        return None
    return Store(engine, how.cache_dir, int(how.cache_disk * 2**30), note)


def _say(name: str, listener: "socket.socket") -> None:
    from localrun.serve.server import url

    note(f"serving {name} at {url(listener)}")
    tell("Ctrl-C ends it when all replies are finished; again, at once.")
