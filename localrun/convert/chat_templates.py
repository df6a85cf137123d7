"""The chat templates of a checkpoint folder to GGUF's keys.

As transformers has them (tokenization_utils_base.py, _from_pretrained, of 5.24): chat_template.jinja and the files of
additional_chat_templates, or else what tokenizer_config.json says. chat_template.json, which is for models that see,
comes last, as with llama.cpp's converter (gguf.SpecialVocab), and then what stands for a program (coded_templates).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gguf import GGUFValueType

from localrun.convert.coded_templates import coded_template
from localrun.convert.errors import CheckpointError
from localrun.convert.metadata import Metadata
from localrun.convert.sources.json_file import read_json, shown

_DEFAULT = "default"  # the name of the one that is used


def add_chat_templates(metadata: Metadata, folder: Path, config: dict[str, Any], files: list[Path]) -> list[str]:
    """Add the keys, and the files that were read to `files`; a line if chat will have no template, or one of ours.

    Args:
        config: tokenizer_config.json.

    Raises CheckpointError if a template cannot be read or is no text.
    """
    templates = _of_files(folder, files) or _of_config(config, folder / "tokenizer_config.json")
    if not templates and (folder / "chat_template.json").exists():
        files.append(folder / "chat_template.json")
        templates = _of_config(read_json(files[-1]), files[-1])
    notes = []
    if _DEFAULT not in templates and (own := coded_template(metadata.architecture, folder, files)):
        templates[_DEFAULT] = own
        notes.append("the checkpoint's chat template is a program, which no GGUF holds: its like in Jinja is written")
    others = {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in templates.items() if name != _DEFAULT}
    for name, text in sorted(others.items()):
        metadata.string(f"tokenizer.chat_template.{name}", text)
    metadata.array("tokenizer.chat_templates", GGUFValueType.STRING, sorted(others))
    if _DEFAULT in templates:
        metadata.string("tokenizer.chat_template", templates[_DEFAULT])
        return notes
    missing = "no chat template"
    if others:
        missing = f"of the chat templates {', '.join(sorted(others))[:100]} none is the default, so none is used"
    return [f"{missing}: chat continues texts, or takes ChatML where the vocabulary has it"]


def _of_files(folder: Path, files: list[Path]) -> dict[str, str]:
    """Templates by name, from files of their own."""
    paths = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        paths[_DEFAULT] = folder / "chat_template.jinja"
    files += paths.values()
    return {name: _read(path) for name, path in paths.items()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: is not UTF-8 text") from None


def _of_config(config: dict[str, Any], path: Path) -> dict[str, str]:
    """Templates by name: of one text, of a list of objects with a name and a template, or of an object."""
    value = config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, list):
        entries = [entry if isinstance(entry, dict) else {} for entry in value]
        named = [(entry.get("name"), entry.get("template")) for entry in entries]
    else:
        named = list(value.items()) if isinstance(value, dict) else [(_DEFAULT, value)]
    for name, text in named:
        if not isinstance(name, str) or not isinstance(text, str):
            raise CheckpointError(f"{path}: chat_template {shown(name)} is {shown(text)}; expected names and texts")
    return dict(named)
