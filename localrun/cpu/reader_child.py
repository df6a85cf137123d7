"""The program of a reader (localrun.ranks.readers): it comes to the first process as a rank does, and reads prompts."""

from dataclasses import replace
from typing import Any

from localrun.gguf.file import GGUFFile
from localrun.ranks.rank_child import main
from localrun.ranks.world import World


def _serve(file: GGUFFile, world: World, task: dict[str, Any], n_threads: int) -> None:
    """What takes time to import is imported once the first process knows that this one is here."""
    from localrun.cpu.reader import serve_reading
    from localrun.models.reader import read_config

    config = read_config(file)
    serve_reading(file, replace(config, index_topk=0) if task["dense_attention"] else config, world, n_threads)


if __name__ == "__main__":
    main(_serve)
