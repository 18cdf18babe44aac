"""The fenced blocks of the documents, and the commands and names in their text."""

import re
import subprocess
from dataclasses import dataclass, field


@dataclass
class Block:
    file: str
    line: int
    # The heading above the block.
    section: str
    language: str
    # What the tests do with the block, and its options: "run", {"at": "site7"}.
    act: str
    options: dict = field(default_factory=dict)
    text: str = ""

    @property
    def place(self):
        return f"{self.file}:{self.line}"


# What is done with a block; a language that is no shell's says it by itself.
ACTS = {
    "sh": {"run": "run as it stands", "make": "its targets are there"},
    "sql": {"": "run by psql"},
    "ini": {"": "read by PgBouncer"},
    "text": {"": "nothing to run"},
    # Programs: those whose libraries `make test-docs` has are run, over several changes of the account.
    "python": {"run": "run as it stands", "unrun": "not run here"},
    "js": {"run": "run as it stands", "unrun": "not run here"},
    "java": {"run": "run as it stands", "unrun": "not run here"},
    "go": {"run": "run as it stands"},
    "rust": {"run": "run as it stands"},
    "systemd": {"check": "read by systemd-analyze"},
    # `make test-chart` compares it with the schemas of Kubernetes.
    "yaml": {"check": "compared with Kubernetes' schemas", "run": "run by Active Record", "unrun": "not run here"},
}


def documents():
    """All documents of the repository."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.md"], check=True, capture_output=True, text=True)
    return done.stdout.split()


def blocks_of(file):
    """The blocks of a document; one that does not say what is to be done with it is an error."""
    found, section, block, lines = [], "", None, []
    for number, line in enumerate(open(file), 1):
        fence = re.match(r"\s*(?:```|~~~)\s*(.*)", line)
        if block and fence:
            block.text = "".join(lines)
            found.append(block)
            block = None
        elif block:
            lines.append(line)
        elif fence:
            language, *words = fence[1].split() or [""]
            options = dict(word.split("=", 1) for word in words if "=" in word)
            act = " ".join(word for word in words if "=" not in word)
            if act not in ACTS.get(language, {}):
                known = ", ".join(f"`{f'{one} {act}'.strip()}`: {what}" for one, acts in ACTS.items() for act, what in acts.items())
                raise AssertionError(f"{file}:{number}: the block is marked `{fence[1].strip()}`, which is none of {known}")
            block, lines = Block(file, number + 1, section, language, act, options), []
        elif line.startswith("#"):
            section = line.strip("# \n")
    assert not block, f"{block.place}: the block has no end"
    return found


def spans_of(file):
    """What stands between backticks in the text, in one line each."""
    text = re.sub(r"^\s*(```|~~~).*?^\s*\1", "", open(file).read(), flags=re.M | re.S)
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text)]
