"""A reversible change of one name in somebody else's module."""

from types import ModuleType, TracebackType


class Patch:
    """`module.name` is `replacement` from construction until `undo()`, or until the end of a `with` block."""

    def __init__(self, module: ModuleType, name: str, replacement: object) -> None:
        self.module, self.name = module, name
        self.original = getattr(module, name)
        setattr(module, name, replacement)

    def undo(self) -> None:
        setattr(self.module, self.name, self.original)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()
