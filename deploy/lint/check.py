#!/usr/bin/env python3
"""Rules of the house that clippy cannot keep: words, documentation comments that say nothing, long files, one
room per library, no circles of imports.

A file that still breaks a rule is named in allowed.txt next to this file, with the rule. `check.py --all` shows
what is wrong in those too; `check.py --trim` takes the entries out that are not needed any more.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = "deploy/lint/"
KINDS = (".rs", ".md", ".toml", ".sh", ".py", ".yaml", ".yml", ".json", ".txt", ".tpl", ".service", ".timer")
# History keeps its words; a lock file has those of others.
SKIPPED = (HERE, "CHANGELOG.md", "Cargo.lock")
# Without the test modules.
MOST_LINES = 450
# A shorter documentation comment repeats the name of its item, unless it shows code.
FEWEST_WORDS = 4
# Crates without circles of imports between their top modules.
WITHOUT_CIRCLES = ("cli/src/", "common/src/", "dispatcher/src/", "engine/src/", "protocol/src/")
IMPORT = re.compile(r"\bcrate::(\{[^}]*\}|\w+)")
# Help texts of the command line are as short as they can be.
IS_HELP = re.compile(r"\s*#\[(arg|command|value|clap)\b")
# What a Rust file is read by: comments, texts, characters and lifetimes, names that are declared.
PARTS = re.compile(
    r"""//[^\n]*|r\#"(?s:.*?)"\#|"(?:\\(?s:.)|[^"\\])*"|(?P<other>'(?:\\.|[^'\\])')"""
    r"""|\b(?:fn|struct|enum|trait|type|mod|const|static)\ (?P<name>\w+)"""
)
# Documents whose maps and walks name source files.
GUIDES = ("ARCHITECTURE.md", "CONTRIBUTING.md")
NAMED_FILE = re.compile(r"`([\w/]+\.rs)`")
DOC = re.compile(r"\s*///\s?(.*)")


def read_words(text):
    """One pattern for all words, and what to write for each."""
    instead = {}
    for line in text.splitlines():
        line = line.strip()
        if line and not line.startswith("#"):
            words, _, better = line.partition("|")
            for word in words.split(","):
                instead[word.strip()] = better.strip()
    # Words of one sentence may stand on two lines of a comment.
    gap = r"[\s_]+(?:(?://[/!]?|#)\s*)?"
    one = lambda word: gap.join(map(re.escape, word.split())).replace(r"\*", "[a-z]*")
    # The longest words first: the expression takes the first alternative that matches.
    every = "|".join(one(word) for word in sorted(instead, key=len, reverse=True))
    return re.compile(rf"(?<![a-z0-9])(?:{every})(?![a-z0-9])", re.IGNORECASE), instead


def words_of_rust(name, text):
    """Comments, texts and the names that a program declares, each at its place; all else is blank."""
    tests = len(text) if not is_program(name) else len(before_tests(text))
    kept, at = [], 0
    for found in PARTS.finditer(text):
        is_kept = not found["other"] and (not found["name"] or (is_program(name) and found.start() < tests))
        begin = found.start("name") if found["name"] else found.start()
        kept.append(re.sub(r"[^\n]", " ", text[at:begin if is_kept else found.end()]))
        # A variable in a text is no word of it.
        part = text[begin:found.end()] if is_kept else ""
        kept.append(re.sub(r"\{\w*(?::[^{}]*)?\}", lambda it: " " * len(it[0]), part))
        at = found.end()
    return "".join(kept)


def find_words(text, pattern):
    for found in pattern.finditer(text):
        yield text.count("\n", 0, found.start()) + 1, re.sub(r"[\s_/!#]+", " ", found[0].lower())


def find_short_docs(text):
    """Documentation comments of three words or fewer."""
    lines = text.splitlines() + [""]
    block, begun = [], 0
    for number, line in enumerate(lines, 1):
        doc = DOC.match(line)
        if doc:
            block = block or []
            begun = begun if block else number
            block.append(doc[1])
            continue
        text = " ".join(block)
        if block and len(text.split()) < FEWEST_WORDS and "`" not in text and not IS_HELP.match(line):
            yield begun, text
        block = []


def before_tests(text):
    """A file up to its test module, which is the last thing in it."""
    return re.split(r"^#\[cfg\(test\)\]\n(?:#\[.*\]\n)*mod \w+ \{", text, flags=re.MULTILINE)[0]


def code_of_rust(text):
    """The code without its tests, comments and texts."""
    return PARTS.sub(lambda it: it[0] if it["name"] else re.sub(r"[^\n]", " ", it[0]), before_tests(text))


def read_rooms(text):
    """For each library the files and folders that may name it."""
    lines = [line.split("|") for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {library.strip(): tuple(places.split()) for library, places in lines}


def find_libraries(name, code, rooms):
    """Libraries that are named outside of their room."""
    for number, line in enumerate(code.splitlines(), 1):
        for library in re.findall(r"(?<![\w:])(\w+)::|\buse (\w+)", line):
            library = library[0] or library[1]
            if library in rooms and not name.startswith(rooms[library]):
                yield number, library, rooms[library]


def imports(name, code):
    """The top module of a file, and those that it imports."""
    top = re.sub(r"(/mod)?\.rs$", "", name).split("/src/")[1].split("/")[0]
    found = set()
    for one in IMPORT.findall(code):
        found |= set(re.findall(r"[{,]\s*(\w+)", one)) if one.startswith("{") else {one}
    return top, found - {top}


def circles(graph):
    """Modules that reach themselves."""
    reached = {start: set(after) for start, after in graph.items()}
    for middle in graph:
        for start in graph:
            if middle in reached[start]:
                reached[start] |= reached[middle]
    return sorted(start for start in graph if start in reached[start])


def is_program(name):
    return name.endswith(".rs") and "/src/" in name and "test" not in name


def find_absent(text, listed):
    """Source files that a document names and that do not exist: the line, the name. A name may be the end of a path."""
    for line, row in enumerate(text.splitlines(), 1):
        for name in NAMED_FILE.findall(row):
            if "NAME" not in name and not any(f"/{path}".endswith(f"/{name}") for path in listed):
                yield line, name


def findings(name, text, pattern, rooms):
    """What is wrong in a file: the rule, the line, and a sentence."""
    if name.endswith(".rs"):
        read = words_of_rust(name, text)
    elif name.endswith((".py", ".sh")):
        read = re.sub(r"^[^#\n]*", "", text, flags=re.MULTILINE)
    else:
        read = text
    for line, word in find_words(read, pattern):
        yield "words", line, f"`{word}`"
    if is_program(name):
        for line, doc in find_short_docs(text):
            yield "docs", line, f"`{doc}` says nothing: give the unit, the range, the source or the meaning, or drop it"
        for line, library, places in find_libraries(name, code_of_rust(text), rooms):
            yield "rooms", line, f"{library} may be named in {' and '.join(places)} only: give it a function there"
        lines = len(before_tests(text).splitlines())
        if lines > MOST_LINES:
            yield "long", lines, f"{lines} lines without tests, at most {MOST_LINES}: split it by concern"


def test_self(pattern, rooms):
    """Each rule finds what it must, and nothing else."""

    def found(text):
        return [(rule, line) for rule, line, _ in findings("x/src/a.rs", text, pattern, rooms)]

    planted = "/// Its id.\nfn a() {}\n// It is told so\n// long.\nfn wait_so_long() {}\n/// The id in decimal digits.\n"
    planted += 'fn b() { let told = "anew {said}"; }\nuse lapin::Channel;\nfn c(row: &rusqlite::Row) {}\n'
    planted += '// lapin::Channel\nconst A: &str = "lapin::x=off"; use crate::lapin::Channel;\n'
    assert found(planted) == [(rule, line) for rule, line in (
        ("words", 3), ("words", 3), ("words", 5), ("words", 7), ("docs", 1), ("rooms", 8), ("rooms", 9))], found(planted)
    assert found("fn a() {}\n" * (MOST_LINES + 1)) == [("long", MOST_LINES + 1)]
    sound = "/// HOST:PORT\n#[arg(long)]\nlisten: String, // folded, doorway, untold\n" + "fn a() {}\n" * 440
    sound += "#[cfg(test)]\nmod tests {\n    use lapin::Channel;\n" + "fn a() {}\n" * 100 + "}\n"
    assert not found(sound), found(sound)
    graph = dict(imports(f"x/src/{name}.rs", code) for name, code in (
        ("a", "use crate::{b, c::D};"), ("b/mod", "use crate::e::F;"), ("e", "use crate::b::{self};"), ("c", "")))
    assert circles(graph) == ["b", "e"], graph
    guide = "`a.rs` and `x/b.rs`\n`y/b.rs`, `b.rs`, `requests/NAME.rs`, `xa.rs`"
    assert list(find_absent(guide, ["x/a.rs", "c/x/b.rs"])) == [(2, "y/b.rs"), (2, "xa.rs")]


def main():
    pattern, instead = read_words((ROOT / HERE / "words.txt").read_text())
    rooms = read_rooms((ROOT / HERE / "rooms.txt").read_text())
    test_self(pattern, rooms)
    allowed = {tuple(line.split()) for line in (ROOT / HERE / "allowed.txt").read_text().splitlines()}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    listed = [name for name in listed.split("\0") if name]
    wrong, needed, graphs = [], set(), {}
    for name in listed:
        path = ROOT / name
        if not name.endswith(KINDS) or name.startswith(SKIPPED) or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        if is_program(name) and name.startswith(WITHOUT_CIRCLES):
            top, found = imports(name, code_of_rust(text))
            graphs.setdefault(name.split("/")[0], {}).setdefault(top, set()).update(found)
        if name in GUIDES:
            wrong.extend(f"{name}:{line}: there is no file {absent}" for line, absent in find_absent(text, listed))
        for rule, line, what in findings(name, text, pattern, rooms):
            # An entry may be a folder.
            if any(name.startswith(start) for of, start in allowed if of == rule):
                needed.add((rule, name))
                if "--all" not in sys.argv:
                    continue
            if rule == "words":
                word = what.strip("`")
                better = instead.get(word) or next(
                    (text for key, text in instead.items() if key.endswith("*") and word.startswith(key[:-1])), "")
                what += f": write {better}"
            wrong.append(f"{name}:{line}: {what}")
    for crate, graph in graphs.items():
        if circle := circles(graph):
            wrong.append(f"{crate}: modules import each other in a circle: {', '.join(circle)}")
    if "--trim" in sys.argv:
        (ROOT / HERE / "allowed.txt").write_text("".join(f"{rule} {name}\n" for rule, name in sorted(needed)))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
