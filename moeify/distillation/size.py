"""What a student saves: parameters, active parameters and bytes against its teacher."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from moeify.sites.record import conversion_of


@dataclass(frozen=True, slots=True)
class Size:
    """How large a model is; prints as a table, beside its teacher's size if given."""

    parameters: int  # tied ones counted once
    active: int  # used by one token
    bytes: int  # of all parameters
    of: Size | None = None  # the teacher's

    def __str__(self) -> str:
        head, rows = "", []
        for name in ("parameters", "active", "bytes"):
            own = getattr(self, name)
            row = f"{name:<12}{own:>18,}"
            if self.of is not None:
                other = getattr(self.of, name)
                row += f"{other:>18,}{other / max(own, 1):>8.2f}x"
            rows.append(row)
        if self.of is not None:
            head = f"{'':<12}{'student':>18}{'teacher':>18}{'saved':>9}\n"
        return head + "\n".join(rows)


def describe(model: nn.Module, teacher: nn.Module | Size | None = None) -> Size:
    """Count what a model of one process, maybe on meta, holds and what one token uses of it.

    Example:
        >>> print(describe(nn.Linear(4, 4)))
        parameters                  20
        active                      20
        bytes                       80
    """
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    record = conversion_of(model)
    layers = [] if record is None else [converted.layer for converted in record.layers]
    idle = sum((layer.experts - layer.top_k) * layer.expert_parameters for layer in layers)
    other = describe(teacher) if isinstance(teacher, nn.Module) else teacher
    nbytes = sum(p.numel() * p.element_size() for p in parameters)
    return Size(count, count - idle, nbytes, other)
