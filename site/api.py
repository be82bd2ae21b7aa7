"""API pages from signatures and docstrings, read from the source without importing it: no room needs its optional packages to be described."""
import ast
import inspect
import re
from pathlib import Path


def prose(docstring: str | None) -> str:
    "A docstring as Markdown: code stays code, everything else is plain; a line that opens with a name and a colon starts anew."
    def plain(text): return re.sub(r"([*_<>$\[\]|\\])", r"\\\1", text)
    text = "".join(part if i % 2 else plain(part) for i, part in enumerate(re.split(r"(`[^`]*`)", inspect.cleandoc(docstring or ""))))
    return re.sub(r"(?<!\n)\n(?=\w+(?:, \w+)*: )", r"\\\n", text)


def signature(node: ast.FunctionDef, method: bool = False) -> str:
    "Name, arguments and what comes back, on one line."
    arguments = ast.unparse(node.args)
    if method: arguments = re.sub(r"^(self|cls)(, )?", "", arguments)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({arguments}){returns}"


def directive(kind: str, head: str, body: str, colons: int = 3) -> str:
    return f"{':' * colons}{{py:{kind}}} {head}\n{body.strip()}\n{':' * colons}\n"


def patched(tree: ast.Module) -> dict[str, list[tuple[str, str]]]:
    "Class -> (method, function) for `Class.method = _function`, the way in which notebooks add a method later."
    found = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign): continue
        targets, values = (x.elts if isinstance(x, ast.Tuple) else [x] for x in (node.targets[0], node.value))
        for target, value in zip(targets, values):
            name = value.args[0] if isinstance(value, ast.Call) and ast.unparse(value.func) == "classmethod" else value
            if isinstance(target, ast.Attribute) and isinstance(name, ast.Name): found.setdefault(ast.unparse(target.value), []).append((target.attr, name.id))
    return found


def constants(node: ast.Assign) -> list[tuple[str, str]]:
    "What an assignment binds, with its value as code where that is short."
    target, value = node.targets[0], node.value
    pairs = zip(target.elts, value.elts) if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else [(target, value)]
    return [(ast.unparse(t), f"`{text}`" if len(text := ast.unparse(v)) <= 300 else "") for t, v in pairs]


def functions(body) -> dict[str, ast.FunctionDef]:
    return {n.name: n for n in body if isinstance(n, ast.FunctionDef)}


def class_text(node: ast.ClassDef, tree: ast.Module) -> str:
    "A class with its fields and its public methods, those added later too."
    methods, added = functions(node.body), functions(tree.body)
    own = [m for name, m in methods.items() if not name.startswith("_") and ast.get_docstring(m)]
    own += [ast.FunctionDef(**(vars(added[f]) | {"name": m})) for m, f in patched(tree).get(node.name, []) if f in added]
    fields = [f"{n.target.id}: {ast.unparse(n.annotation)}" + (f" = {ast.unparse(n.value)}" if n.value else "") for n in node.body if isinstance(n, ast.AnnAssign)]
    head = f"{node.name}({re.sub('^self(, )?', '', ast.unparse(methods['__init__'].args))})" if "__init__" in methods else node.name
    code = "\n\n```python\n" + "\n".join(fields) + "\n```\n" if fields else ""
    return directive("class", head, prose(ast.get_docstring(node)) + code + "\n\n" + "\n".join(directive("method", signature(m, True), prose(ast.get_docstring(m))) for m in own), 4)


def module_page(path: Path, notebook: str) -> str:
    "The page of one room: what it exports, in the order of its source."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"), [])
    parts = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in public: parts.append(directive("function", signature(node), prose(ast.get_docstring(node))))
        if isinstance(node, ast.ClassDef) and node.name in public: parts.append(class_text(node, tree))
        if isinstance(node, ast.Assign): parts += [directive("data", name, value) for name, value in constants(node) if name in public]
    name = f"relax.{path.stem}"
    return f"# {name}\n\n{prose(ast.get_docstring(tree))}\nThe notebook [{Path(notebook).stem}](../{notebook}) builds it.\n\n```{{py:module}} {name}\n```\n\n" + "\n".join(parts)


def first_line(path: Path) -> str:
    "What a module says of itself."
    return prose(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))).split("\n")[0]
