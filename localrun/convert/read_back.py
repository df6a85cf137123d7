"""What a conversion will write, read by the readers that will run it, before anything is written."""

from __future__ import annotations

import re
from pathlib import Path

from localrun.convert.layout import make_layout
from localrun.convert.metadata import Metadata
from localrun.errors import LocalrunError
from localrun.gguf.file import open_gguf
from localrun.gguf.mapped import path_of
from localrun.text.chat_template import TemplateError, chat_template
from localrun.text.prompt import chat_prompt
from localrun.text.tokenizer import Tokenizer


def read_back_vocabulary(metadata: Metadata, source: Path) -> list[str]:
    """A line if no chat will be possible. Raises LocalrunError, naming the source, if the readers refuse the keys."""
    header = make_layout(source, metadata, [], []).parts[0].header
    with path_of(header) as path:
        try:
            with open_gguf(path) as file:
                tokenizer = Tokenizer(path, file)
                template = chat_template(file, tokenizer)
                tokenizer.close()
        except LocalrunError as error:
            raise LocalrunError(str(error).replace(path, str(source))) from None
    if template is not None:
        try:
            chat_prompt(template, [{"role": "user", "content": "Hello"}], re.compile("(?!)"))
        except TemplateError as error:
            return [f"{error}: chat and generate will say so; generate --raw works"]
    return []
