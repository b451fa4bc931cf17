"""The module tree as rows for people: containers spliced, repeated siblings on one line, depth limited."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from memory_test.inspection.facts import Call, Inspection, ModuleFacts, Shape

_CONTAINERS = ("ModuleList", "ModuleDict")
Row = tuple[str, str, str, str]


@dataclass
class _Node:
    """A module under the name it has below its printed parent."""

    label: str
    facts: ModuleFacts
    children: list["_Node"] = field(default_factory=list)

    def signature(self) -> tuple[object, ...]:
        """Return what two modules must share to be printed as one."""
        facts = self.facts
        own = (facts.type, facts.parameters, facts.calls)
        return (*own, tuple((child.label, child.signature()) for child in self.children))

    def below(self) -> Iterable["_Node"]:
        """Yield all descendants."""
        for child in self.children:
            yield child
            yield from child.below()


def tree_rows(inspection: Inspection, max_depth: int) -> list[Row]:
    """Return (name, type, parameters, shapes) per line, names indented; N stands for the examples."""
    rows: list[Row] = []
    _walk(_build(inspection.modules), 0, max_depth, inspection, rows)
    return rows


def _build(modules: tuple[ModuleFacts, ...]) -> _Node:
    nodes: dict[str, _Node] = {}
    for facts in modules:
        node = nodes[facts.name] = _Node(facts.name, facts)
        if facts.name:
            owner = facts.name.rpartition(".")[0]
            while owner and nodes[owner].facts.type in _CONTAINERS:
                owner = owner.rpartition(".")[0]
            node.label = facts.name.removeprefix(f"{owner}." if owner else "")
            if facts.type not in _CONTAINERS:
                nodes[owner].children.append(node)
    return nodes[""]


def _walk(root: _Node, depth: int, max_depth: int, inspection: Inspection, rows: list[Row]) -> None:
    rows.append(_row(root.label, root, depth, max_depth, inspection))
    if depth < max_depth:
        for group in _groups(root.children):
            label = group[0].label
            if len(group) > 1:
                label = f"{label}-{group[-1].label.rpartition('.')[2]} ×{len(group)}"
            _walk(_Node(label, group[0].facts, group[0].children), depth + 1, max_depth, inspection, rows)


def _groups(children: list[_Node]) -> Iterable[list[_Node]]:
    """Join neighbours that are numbered and alike."""
    group: list[_Node] = []
    for child in children:
        if group and _follows(group[-1], child):
            group.append(child)
            continue
        if group:
            yield group
        group = [child]
    if group:
        yield group


def _follows(first: _Node, second: _Node) -> bool:
    (stem, _, number), (other, _, following) = first.label.rpartition("."), second.label.rpartition(".")
    numbered = number.isdigit() and following.isdigit() and int(following) == int(number) + 1
    return numbered and stem == other and first.signature() == second.signature()


def _row(label: str, node: _Node, depth: int, max_depth: int, inspection: Inspection) -> Row:
    facts = node.facts
    parts = [_parameters(facts)] if facts.parameters else []
    hidden = list(node.below()) if depth == max_depth else []
    if hidden:
        parts.append(f"+ {sum(item.facts.num_parameters for item in hidden):,} in {len(hidden)} below")
    return "  " * depth + (label or "(root)"), facts.type, " ".join(parts), _calls(facts, inspection)


def _parameters(facts: ModuleFacts) -> str:
    """Return shapes, with names where they are not weight and bias."""
    plain = [p.name for p in facts.parameters] in (["weight"], ["weight", "bias"])
    all_frozen = not any(p.trainable for p in facts.parameters)
    cells = []
    for p in facts.parameters:
        text = join(p.shape) if plain else f"{p.name} {join(p.shape)}"
        cells.append(text + (" frozen" if not p.trainable and not all_frozen else ""))
    return ", ".join(cells) + (" frozen" if all_frozen else "")


def _calls(facts: ModuleFacts, inspection: Inspection) -> str:
    if not facts.calls:
        return "" if inspection.shapes_unknown or facts.type in _CONTAINERS else "not called"
    counted: dict[str, int] = {}
    for call in facts.calls:
        text = _call(call, inspection.num_examples)
        counted[text] = counted.get(text, 0) + 1
    return "; ".join(f"{text} (×{count})" if count > 1 else text for text, count in counted.items())


def _call(call: Call, num_examples: int | None) -> str:
    inputs = ", ".join(join(shape, num_examples) for shape in call.inputs)
    outputs = ", ".join(join(shape, num_examples) for shape in call.outputs)
    return f"{inputs} → {outputs}".strip()


def join(shape: Shape, num_examples: int | None = None) -> str:
    """Return a shape for people: ``N×256×1152`` where the first dimension is the examples'."""
    if not shape:
        return "scalar"
    first = "N" if shape[0] == num_examples else str(shape[0])
    return "×".join([first, *map(str, shape[1:])])
