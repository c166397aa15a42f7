"""Reversible changes of names in somebody else's modules."""

from types import ModuleType, TracebackType


class Patch:
    """`module.name` is `replacement`, for every change, from construction until `undo()` or the end of a `with` block.

    Args:
        applies_to: a sentence for the user: what runs on these kernels from now on, what does not, what it costs.
        changes: `(module, name, replacement)` each.
    """

    def __init__(self, applies_to: str, *changes: tuple[ModuleType, str, object]) -> None:
        self.applies_to = applies_to
        self.originals = [(module, name, getattr(module, name)) for module, name, _ in changes]
        for module, name, replacement in changes:
            setattr(module, name, replacement)

    def undo(self) -> None:
        for module, name, original in self.originals:
            setattr(module, name, original)

    def __repr__(self) -> str:
        return f"Patch: {self.applies_to}"

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()
