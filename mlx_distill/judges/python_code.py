"""What can be read off Python source without running it: the facts that the rubric scores."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

#: Source beyond this many characters is not parsed: no answer that a person reads is that long.
MOST_CHARACTERS = 200_000
#: How many lines at the end of broken source are given up to find a part that parses.
MOST_LINES_DROPPED = 60

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

_NESTING = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.With, ast.AsyncWith, ast.Match)
_GENERIC = {"Exception", "BaseException"}
_SNAKE = re.compile(r"_{0,2}[a-z0-9_]*$")
_PASCAL = re.compile(r"_?[A-Z][A-Za-z0-9]*$")
_UNITTEST_HOOKS = re.compile(r"setUp|tearDown|asyncSetUp|asyncTearDown|visit_|do_[A-Z]|maxDiff")


@dataclass(frozen=True)
class Function:
    """One function or method.

    Attributes:
        lines: Source lines, decorators not counted.
        depth: How deep its deepest block is nested; 0 for straight code.
        annotated: Share of its parameters and its result that carry a type, 0 to 1.
        placeholder: Whether its body does nothing: `pass`, `...` or a lone docstring.
    """

    name: str
    lines: int
    depth: int
    documented: bool
    annotated: float
    placeholder: bool

    @property
    def is_test(self) -> bool:
        """Whether it checks others."""
        return self.name.startswith("test")

    @property
    def public(self) -> bool:
        """Whether it is meant for callers: neither private nor a test or one of its hooks."""
        return not self.name.startswith("_") and not self.is_test and not _UNITTEST_HOOKS.match(self.name)


@dataclass(frozen=True)
class PythonCode:
    """Facts about one script.

    Attributes:
        whole: Whether all of it parses; else the facts are those of its longest beginning that does.
        checks: Assertions that can fail: `assert` on more than a constant, and `self.assert...` calls.
        error_checks: Those that expect an error: `assertRaises`, and `try` with an `else` that fails.
        raises: Exceptions raised by name, generic ones aside.
        generic_raises: `raise Exception(...)`.
        silent_handlers: `except` whose body is only `pass`.
        repeated_lines: Share of the code lines that repeat an earlier long line, 0 to 1.
    """

    whole: bool
    lines: int
    functions: tuple[Function, ...]
    classes: int
    documented_classes: int
    module_docstring: bool
    comments: int
    checks: int
    error_checks: int
    raises: int
    generic_raises: int
    messages: int
    custom_exceptions: int
    handlers: int
    broad_handlers: int
    bare_handlers: int
    silent_handlers: int
    guards: int
    cleanups: int
    global_statements: int
    main_guard: bool
    badly_named: tuple[str, ...]
    repeated_lines: float


def read_python(source: str) -> PythonCode | None:
    """Read a script; None where not even a beginning of it, of at least two lines, parses."""
    if len(source) > MOST_CHARACTERS:
        return None
    lines = source.splitlines()
    for dropped in range(min(MOST_LINES_DROPPED, max(1, len(lines) - 1))):
        kept = "\n".join(lines[: len(lines) - dropped]) + "\n"
        try:
            tree = ast.parse(kept)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return _facts(tree, kept, whole=dropped == 0) if tree.body else None
    return None


def _facts(tree: ast.Module, source: str, *, whole: bool) -> PythonCode:
    nodes = list(ast.walk(tree))
    functions = [node for node in nodes if isinstance(node, FunctionNode)]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    handlers = [node for node in nodes if isinstance(node, ast.ExceptHandler)]
    raises = [node for node in nodes if isinstance(node, ast.Raise) and node.exc is not None]
    production = [node for node in nodes if not isinstance(node, ast.ClassDef) or not _is_test_class(node)]
    abstract = {id(node) for owner in classes if _is_interface(owner) for node in owner.body}
    own_classes = [node for node in production if isinstance(node, ast.ClassDef)]
    return PythonCode(
        whole=whole,
        lines=sum(1 for line in source.splitlines() if line.strip()),
        functions=tuple(_function(node, interface=id(node) in abstract) for node in functions),
        classes=len(own_classes),
        documented_classes=sum(ast.get_docstring(node) is not None for node in own_classes),
        module_docstring=ast.get_docstring(tree) is not None,
        comments=_comments(source),
        checks=sum(_is_check(node) for node in nodes),
        error_checks=sum(_expects_error(node) for node in nodes),
        raises=sum(_raised(node) not in _GENERIC | {"", "AssertionError", "SystemExit"} for node in raises),
        generic_raises=sum(_raised(node) in _GENERIC for node in raises),
        messages=sum(isinstance(node.exc, ast.Call) and bool(node.exc.args) for node in raises),
        custom_exceptions=sum(_is_exception(node) for node in classes),
        handlers=len(handlers),
        broad_handlers=sum(bool(_names(node.type) & _GENERIC) and not _reraises(node) for node in handlers),
        bare_handlers=sum(node.type is None and not _reraises(node) for node in handlers),
        silent_handlers=sum(_is_silent(node) for node in handlers),
        guards=sum(isinstance(node, ast.If) and _leaves_at_once(node) for node in nodes),
        cleanups=sum(
            isinstance(n, ast.With | ast.AsyncWith) or (isinstance(n, ast.Try) and bool(n.finalbody)) for n in nodes
        ),
        global_statements=sum(isinstance(node, ast.Global) for node in nodes),
        main_guard=any(isinstance(n, ast.If) and "__name__" in _names(n.test) for n in tree.body),
        badly_named=tuple(_badly_named(functions, own_classes)),
        repeated_lines=_repeated_lines(source),
    )


def _function(node: FunctionNode, *, interface: bool) -> Function:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments += [extra for extra in (node.args.vararg, node.args.kwarg) if extra is not None]
    typed = [a.annotation is not None for a in arguments if a.arg not in ("self", "cls")] + [node.returns is not None]
    return Function(
        name=node.name,
        lines=(node.end_lineno or node.lineno) - node.lineno + 1,
        depth=_depth(node),
        documented=ast.get_docstring(node) is not None,
        annotated=sum(typed) / len(typed),
        placeholder=not interface and not _is_interface_method(node) and _does_nothing(node.body),
    )


def _depth(function: FunctionNode) -> int:
    deepest = 0
    pending: list[tuple[ast.AST, int]] = [(node, 0) for node in function.body]
    while pending:
        node, depth = pending.pop()
        if isinstance(node, FunctionNode | ast.ClassDef):
            continue
        # `elif` is an If inside the orelse of another, and not deeper for the reader.
        inner = depth + isinstance(node, _NESTING)
        deepest = max(deepest, inner)
        elif_branch = node.orelse if isinstance(node, ast.If) and len(node.orelse) == 1 else []
        for child in ast.iter_child_nodes(node):
            pending.append((child, depth if child in elif_branch and isinstance(child, ast.If) else inner))
    return deepest


def _does_nothing(body: list[ast.stmt]) -> bool:
    return all(
        isinstance(statement, ast.Pass)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for statement in body
    )


def _names(node: ast.AST | None) -> set[str]:
    return (
        {
            n.attr if isinstance(n, ast.Attribute) else n.id
            for n in ast.walk(node)
            if isinstance(n, ast.Name | ast.Attribute)
        }
        if node
        else set()
    )


def _is_interface(node: ast.ClassDef) -> bool:
    return any(_names(base) & {"Protocol", "ABC"} for base in [*node.bases, *(k.value for k in node.keywords)])


def _is_interface_method(node: FunctionNode) -> bool:
    return any(_names(decorator) & {"abstractmethod", "overload"} for decorator in node.decorator_list)


def _is_test_class(node: ast.ClassDef) -> bool:
    return node.name.startswith("Test") or any("TestCase" in name for base in node.bases for name in _names(base))


def _is_exception(node: ast.ClassDef) -> bool:
    return any(name.endswith(("Error", "Exception")) for base in node.bases for name in _names(base))


def _raised(node: ast.Raise) -> str:
    target = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return target.id if isinstance(target, ast.Name) else target.attr if isinstance(target, ast.Attribute) else ""


def _reraises(handler: ast.ExceptHandler) -> bool:
    return any(isinstance(node, ast.Raise) for node in ast.walk(handler))


def _is_silent(handler: ast.ExceptHandler) -> bool:
    return _does_nothing(handler.body) and (handler.type is None or bool(_names(handler.type) & _GENERIC))


def _leaves_at_once(node: ast.If) -> bool:
    return isinstance(node.body[-1], ast.Raise | ast.Return | ast.Continue)


def _is_check(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("assert"):
        return not (node.args and all(isinstance(argument, ast.Constant) for argument in node.args))
    return isinstance(node, ast.Raise) and _raised(node) == "AssertionError"


def _expects_error(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr.startswith("assertRaises") or ast.unparse(node.func) == "pytest.raises"
    return (
        isinstance(node, ast.Try)
        and bool(node.orelse)
        and any(isinstance(n, ast.Raise | ast.Assert) for n in node.orelse)
    )


def _badly_named(functions: list[FunctionNode], classes: list[ast.ClassDef]) -> Iterator[str]:
    for function in functions:
        if not _SNAKE.match(function.name) and not _UNITTEST_HOOKS.match(function.name):
            yield function.name
    yield from (node.name for node in classes if not _PASCAL.match(node.name))


def _comments(source: str) -> int:
    try:
        return sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, IndentationError, SyntaxError):
        return sum(line.lstrip().startswith("#") for line in source.splitlines())


def _repeated_lines(source: str) -> float:
    lines = [line.strip() for line in source.splitlines()]
    long_lines = [
        line
        for line in lines
        if len(line) > 24 and not line.startswith(("#", "assert", "self.assert", "@", "import", "from"))
    ]
    return sum(n - 1 for n in Counter(long_lines).values()) / len(long_lines) if long_lines else 0.0
