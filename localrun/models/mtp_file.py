"""A file of its own for a model's layer for multi-token prediction, as llama.cpp's converter writes it for DeepSeek-V4.

It has the model's keys, the embedding and head, and the tensors of the one layer, under its number in the model.
"""

from __future__ import annotations

from dataclasses import replace

from localrun.errors import LocalrunError
from localrun.gguf.file import GGUFFile
from localrun.models.config import Config
from localrun.models.names import check_types, has_mtp
from localrun.models.reader import read_config


def is_mtp_only(file: GGUFFile) -> bool:
    """Whether a file holds nothing but the layer for multi-token prediction of a model that is in another one."""
    tells = any(name.endswith(".nextn.eh_proj.weight") for name in file.tensors)
    return tells and not any(name.startswith("blk.0.") for name in file.tensors)


def read_mtp_config(file: GGUFFile, model: Config) -> Config:
    """The model's configuration with the file's layer. Raises LocalrunError if that is another model's, or broken."""
    config = read_config(file)
    mine, its = (vars(replace(each, num_nextn_predict_layers=1)) for each in (model, config))
    if different := next((name for name, value in mine.items() if its[name] != value), ""):
        found, expected = str(its[different])[:100], str(mine[different])[:100]
        raise LocalrunError(f"{file.path}: is another model's: {different} is {found}, expected {expected}")
    check_types(file)
    if not has_mtp(file, config):
        raise LocalrunError(f"{file.path}: lacks a part of the layer for multi-token prediction")
    return config
