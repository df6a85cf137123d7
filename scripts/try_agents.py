"""Published agents at a task of two turns against a scripted model: read a file by a tool, tell what it says.

The model's text is prepared; everything between it and the agent is the server. What an agent needs that the server
lacks shows itself here. Agents are looked for on PATH:

    npm install -g --prefix agents @anthropic-ai/claude-code @openai/codex @qwen-code/qwen-code @continuedev/cli \\
        cline
    PATH=$PWD/agents/bin:$PATH python scripts/try_agents.py
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from running import running
from scripted import scripted_engine

WORD = "halcyon-42"
TASK = "Read the file secret.txt with a tool and tell me the word in it."
LIMIT_S = 120
_TOOL = re.compile(r'"name": ?"(Read|read_files?|shell|exec_command|shell_command|local_shell|run_shell_command|Bash)"')


@dataclass
class Agent:
    """How an agent is started.

    Attributes:
        command: with {url} for the server's address.
        environment: the same.
        files: that it wants in its home: path -> text, the same.
    """

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


AGENTS = {
    "claude": Agent(
        ["claude", "-p", TASK, "--model", "local", "--allowedTools", "Read"],
        {
            "ANTHROPIC_BASE_URL": "{url}",
            "ANTHROPIC_AUTH_TOKEN": "none",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
    ),
    "codex": Agent(
        ["codex", "exec", "--skip-git-repo-check", "--sandbox", "danger-full-access", TASK],
        {"LOCALRUN_KEY": "none"},
        {
            ".codex/config.toml": 'model = "local"\nmodel_provider = "localrun"\n\n[model_providers.localrun]\n'
            'name = "localrun"\nbase_url = "{url}/v1"\nwire_api = "responses"\nenv_key = "LOCALRUN_KEY"\n'
        },
    ),
    "qwen": Agent(
        ["qwen", "-p", TASK, "--auth-type", "openai", "--approval-mode", "yolo"],
        {"OPENAI_BASE_URL": "{url}/v1", "OPENAI_API_KEY": "none", "OPENAI_MODEL": "local"},
    ),
    "cline": Agent(
        ["sh", "-c", f"cline auth -p openai -k none -m local -b {{url}}/v1 && cline -P openai -m local '{TASK}'"],
    ),
    "cn": Agent(
        ["cn", "-p", TASK, "--config", "config.yaml", "--allow", "Read"],
        {"CONTINUE_TELEMETRY_ENABLED": "0"},
        {
            "config.yaml": "name: local\nversion: 0.0.1\nschema: v1\nmodels:\n  - name: local\n    provider: openai\n"
            "    model: local\n    apiBase: {url}/v1\n    apiKey: none\n    roles: [chat]\n"
            "    capabilities: [tool_use]\n"
        },
    ),
}


def script(folder: Path, log: Callable[[str], None]) -> Callable[[str], str]:
    """A model that calls the first tool that it knows for reading, and tells what came of it."""

    def answer(prompt: str) -> str:
        log(prompt)
        asked = prompt.rfind(TASK)
        if WORD in prompt[asked:]:
            return f"The word is {WORD}."
        tool = _TOOL.search(prompt[:asked])
        if asked < 0 or tool is None:
            return "A word in a file"  # a title, say
        return (
            f'<tool_call>\n{{"name": "{tool[1]}", "arguments": {json.dumps(arguments(tool[1], folder))}}}\n</tool_call>'
        )

    return answer


def arguments(tool: str, folder: Path) -> dict[str, object]:
    """Of a call that reads the file."""
    path = str(folder / "secret.txt")
    if tool == "Read":
        return {"file_path": path, "filepath": path}
    if tool == "read_files":
        return {"files": [{"path": path}]}
    if tool == "read_file":
        return {"file_path": path}
    if tool == "exec_command":
        return {"cmd": f"cat {path}"}
    command = f"cat {path}"
    return {"command": ["cat", path] if tool in ("shell", "local_shell") else command, "description": "Read the file"}


def attempt(name: str, keep: Path | None) -> str | None:
    """None if the agent told the word by a tool, else what it said instead."""
    agent = AGENTS[name]
    prompts: list[str] = []
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        (folder / "secret.txt").write_text(f"The word is {WORD}.\n")
        engine = scripted_engine(script(folder, prompts.append))
        with engine, running(engine, name="local", slots=2) as url:
            for path, text in agent.files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(text.replace("{url}", url))
            environment = {key: value.replace("{url}", url) for key, value in agent.environment.items()}
            try:
                done = subprocess.run(
                    [each.replace("{url}", url) for each in agent.command],
                    cwd=folder,
                    env={**os.environ, "HOME": home, "NO_PROXY": "127.0.0.1", **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=LIMIT_S,
                )
                output = done.stdout
            except subprocess.TimeoutExpired as error:
                output = f"{(error.stdout or b'').decode(errors='replace')}\nno end after {LIMIT_S} s"
    if keep:
        (keep / f"{name}.txt").write_text("\n\n======\n\n".join([*prompts, output]))
    told = any(WORD in prompt[prompt.rfind(TASK) :] for prompt in prompts)
    return None if told and WORD in output else output[-2000:] or "nothing"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("agents", nargs="*", help=f"of {', '.join(AGENTS)}; all that are installed if not given")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where prompts and outputs are left")
    options = parser.parse_args()
    failed = 0
    for name in options.agents or [name for name in AGENTS if shutil.which(AGENTS[name].command[0])]:
        problem = attempt(name, options.keep)
        print(f"{name}: {'ok' if problem is None else problem}", flush=True)
        failed += problem is not None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
