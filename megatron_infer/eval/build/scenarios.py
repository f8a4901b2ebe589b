"""The 13 kinds of holes (kinds.json says what each is) and where a file has them, by its syntax tree.

Owns the definitions; scenarios.json holds the node types of every grammar. Knows no files, no sampling, no output.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tree_sitter import Node

from megatron_infer.eval.syntax import parser

SCENARIOS: dict[str, str] = json.loads(Path(__file__).with_name("kinds.json").read_text(encoding="utf-8"))
"""Scenario -> what the hole is. A hole is made of whole nodes of the tree and neither starts nor ends with white space.

Statements are those that stand in a block: branches without braces, and an if or switch that is a value, do not count.
Methods are functions with a name and a block, in a class or not. What surrounds statements, comments too, stays.
"""

_DOCUMENTS = 6
"""Letters a comment needs to count as one: a line of dashes announces nothing."""


@dataclass(frozen=True)
class Hole:
    """A piece of a file to be filled in, as byte offsets into its UTF-8 source."""

    scenario: str
    start: int
    end: int


@dataclass(frozen=True)
class Grammar:
    """Which node types of a language mean what.

    methods: have a field "body". blocks: their children are statements. wrappers: stand around a method and belong to
    it. annotations: stand before it, or among its modifiers. initializers: stand between its head and its body.
    statements: node type -> scenario. for_clauses: a for without one of these is a while.
    absent: scenario -> why the language has none.
    """

    methods: tuple[str, ...]
    blocks: tuple[str, ...]
    comments: tuple[str, ...]
    statements: Mapping[str, str]
    docstrings: bool = False
    wrappers: tuple[str, ...] = ()
    annotations: tuple[str, ...] = ()
    initializers: tuple[str, ...] = ()
    for_clauses: tuple[str, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)


@functools.cache
def load_grammars() -> dict[str, Grammar]:
    """Every language that holes can be cut in, by its name in syntax.LANGUAGES."""
    table = json.loads(Path(__file__).with_name("scenarios.json").read_text(encoding="utf-8"))
    grammars = {name: Grammar(**entry) for name, entry in table.items()}
    return {**grammars, "tsx": grammars["typescript"]}


def find_holes(language: str, source: bytes) -> list[Hole] | None:
    """Every hole of a file, each once, in the order of the text; None if it has syntax errors.

    `source` is valid UTF-8. Raises ValueError for a language without a grammar.
    """
    tree = parser(language).parse(source)
    if tree.root_node.has_error:
        return None
    finder = _Finder(source, load_grammars()[language])
    return sorted(set(finder.holes(tree.root_node)), key=lambda hole: (hole.start, hole.end, hole.scenario))


class _Finder:
    """One walk through one file's tree. Remembers the comments passed, by the row they end in."""

    def __init__(self, source: bytes, grammar: Grammar) -> None:
        self._source = source
        self._grammar = grammar
        self._letters_above: dict[int, int] = {}

    def holes(self, root: Node) -> Iterator[Hole]:
        grammar = self._grammar
        stack = [(root, False)]
        while stack:
            node, in_method = stack.pop()
            if node.type in grammar.comments:
                self._remember(node)
                continue
            if node.type in grammar.methods:
                body = node.child_by_field_name("body")
                if body is not None and body.type in grammar.blocks:
                    yield from self._of_method(node, body)
                    in_method = True
            children = node.named_children
            if node.type in grammar.blocks:
                for child in children:
                    if child.type not in grammar.comments:
                        yield from self._of_statement(child, in_method)
            stack.extend((child, in_method) for child in reversed(children))

    def _of_statement(self, node: Node, in_method: bool) -> Iterator[Hole]:
        inner = node
        if node.type == "expression_statement" and node.named_child_count == 1:
            inner = node.named_children[0]
        scenario = self._grammar.statements.get(inner.type)
        if scenario == "for_statement" and self._grammar.for_clauses:
            counted = any(child.type in self._grammar.for_clauses for child in inner.named_children)
            scenario = "for_statement" if counted else "while_statement"
        if scenario:
            yield self._hole(scenario, inner.start_byte, inner.end_byte)
        if in_method:
            whole = self._hole("single_line", node.start_byte, node.end_byte)
            if self._ends_line(whole.end):
                yield Hole("empty", whole.end, whole.end)
                if self._starts_line(whole.start) and b"\n" not in self._source[whole.start : whole.end]:
                    yield whole

    def _of_method(self, node: Node, body: Node) -> Iterator[Hole]:
        yield self._signature(node, body)
        start = self._documented_start(node)
        if start is not None:
            yield self._hole("method_with_comment", start, self._outer(node).end_byte)
        statements = [child for child in body.named_children if child.type not in self._grammar.comments]
        documented = bool(statements) and self._is_docstring(statements[0])
        statements = statements[documented:]
        if statements:
            whole = "method_with_comment" if documented else "method_body"
            yield self._hole(whole, statements[0].start_byte, statements[-1].end_byte)
        if len(statements) >= 3:
            third = (len(statements) + 1) // 3
            parts = (statements[:third], statements[third:-third], statements[-third:])
            for name, part in zip(("top", "mid", "bottom"), parts, strict=True):
                yield self._hole(f"method_body_{name}", part[0].start_byte, part[-1].end_byte)

    def _signature(self, node: Node, body: Node) -> Hole:
        head = next(child for child in node.children if child.type not in self._grammar.annotations)
        if head.type == "modifiers":  # Java's annotations are among them
            head = next((child for child in head.children if child.type not in self._grammar.annotations), head)
            if head.type == "modifiers":
                assert head.next_sibling is not None
                head = head.next_sibling
        last = body.prev_sibling
        while last is not None and last.type in (*self._grammar.comments, *self._grammar.initializers):
            last = last.prev_sibling
        assert last is not None
        return self._hole("method_signature", head.start_byte, last.end_byte)

    def _outer(self, node: Node) -> Node:
        while (parent := node.parent) is not None and parent.type in self._grammar.wrappers:
            node = parent
        return node

    def _documented_start(self, node: Node) -> int | None:
        """Where a method with its annotations starts, if right above it stands a comment; else None."""
        first = self._outer(node)
        while (before := first.prev_named_sibling) is not None and before.type in self._grammar.annotations:
            first = before
        letters = self._letters_above.get(first.start_point[0] - 1, 0)
        return first.start_byte if letters >= _DOCUMENTS and self._starts_line(first.start_byte) else None

    def _remember(self, comment: Node) -> None:
        """Note a comment that has its lines to itself; one right below another adds to it."""
        if self._starts_line(comment.start_byte):
            (row, _), (last_row, column) = comment.start_point, comment.end_point
            if column == 0:  # Rust's doc comments end with their line break
                last_row -= 1
            if self._letters_above.get(last_row) is None:
                self._letters_above[last_row] = self._letters(comment) + self._letters_above.get(row - 1, 0)

    def _is_docstring(self, statement: Node) -> bool:
        return (
            self._grammar.docstrings
            and statement.type == "expression_statement"
            and [child.type for child in statement.named_children] == ["string"]
            and self._letters(statement) >= _DOCUMENTS
        )

    def _letters(self, node: Node) -> int:
        return sum(map(str.isalpha, self._source[node.start_byte : node.end_byte].decode()))

    def _hole(self, scenario: str, start: int, end: int) -> Hole:
        """A hole without the white space that some nodes end with, such as C++'s directives."""
        return Hole(scenario, start, start + len(self._source[start:end].rstrip()))

    def _starts_line(self, offset: int) -> bool:
        return not self._source[self._source.rfind(b"\n", 0, offset) + 1 : offset].strip()

    def _ends_line(self, offset: int) -> bool:
        end = self._source.find(b"\n", offset)
        return not self._source[offset : end if end >= 0 else None].strip()
