"""Typed errors: each says what is wrong, where, and what to do. Importable without torch.

On the command line a `MoeifyError` exits with 1, a wrong command line with 2.
"""

from __future__ import annotations


class MoeifyError(Exception):
    """Base of every error that moeify raises on purpose."""


class InputError(MoeifyError):
    """What the user gave cannot be used; raised inside a pass, it is shown without the graph."""


class PlanError(InputError, ValueError):
    """A plan that cannot be read, or that does not fit the model or the world.

    Args:
        message: What is wrong and what would work.
        file: The plan's file, if it came from one.
        line: 1-based line in `file`.
        path: Where in the plan, such as `layers[1].select`.
    """

    def __init__(
        self, message: str, *, file: str | None = None, line: int | None = None, path: str = ""
    ) -> None:
        self.message, self.file, self.line, self.path = message, file, line, path
        where = ":".join(str(part) for part in (file, line) if part is not None)
        super().__init__(": ".join(part for part in (where, path, message) if part))


class CaptureError(InputError, RuntimeError):
    """The model could not be run once to record its graph."""


class UnsupportedModuleError(InputError, TypeError):
    """A chosen part of the model cannot be converted; `module` names it."""

    def __init__(self, module: str, reason: str) -> None:
        self.module, self.reason = module, reason
        super().__init__(f"{module}: {reason}")


class PassError(MoeifyError, RuntimeError):
    """A pass failed, or left a graph that breaks a rule of the verifier."""


class PassOrderError(MoeifyError, ValueError):
    """A fact that a pass requires does not hold, or the required order is circular."""


class VerificationError(MoeifyError, RuntimeError):
    """The converted model failed a check; the model has been rolled back to the dense one."""


class CheckpointError(InputError, RuntimeError):
    """A saved model is incomplete, damaged, or does not fit."""


class ForwardError(MoeifyError, RuntimeError):
    """A converted model was called as its dense form was never seen to be, or changed since."""


class DerivativeError(MoeifyError, RuntimeError):
    """A derivative that is not computed: of a kind, or at a place, where none is defined."""


class DispatchError(MoeifyError, RuntimeError):
    """Token routing is inconsistent: splits, counts or shapes do not agree."""
