"""No module of the package imports, by itself or through others, a module that imports it."""

import grimp


def test_there_is_no_import_cycle() -> None:
    """Modules that reach each other are one; imports for type checkers alone do not count."""
    graph = grimp.build_graph("mlip_refine", exclude_type_checking_imports=True)
    importers = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(importers) > 100
    reached: dict[str, set[str]] = {}
    for module in importers:
        seen: set[str] = set()
        front = {module}
        while front:
            front = set().union(*(importers.get(m, set()) for m in front)) - seen
            seen |= front
        reached[module] = seen
    assert sorted(module for module, seen in reached.items() if module in seen) == []
