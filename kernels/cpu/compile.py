"""C++ kernels for the CPU, compiled on the machine that runs them, when first needed.

The sources are beside this file: plain C++ without torch's headers, called through ctypes with
addresses and sizes, so that they compile in seconds and for the processor at hand. Without a
working compiler `library` returns None and warns once in the log, and the ops run on torch alone;
`MOEIFY_NATIVE=0` asks for that.

What calls them is disabled for Dynamo: a compiled graph frees a tensor after its last use that it
knows of, and knows nothing of addresses.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify.compat import compile_cpp

log = logging.getLogger("moeify")

_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int}


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """Return the compiled `name`.cpp of this folder, or None where it cannot be compiled."""
    if os.environ.get("MOEIFY_NATIVE", "1") == "0":
        return None
    try:
        found: ctypes.CDLL = compile_cpp(source(name))
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning("%s.cpp does not compile here, CPU ops run on torch alone: %s", name, first)
        return None
    return found


def source(name: str) -> str:
    """Return `name`.cpp with the shared header in front and the headers of this folder inlined."""
    folder = Path(__file__).parent
    text = (folder / "vector.h").read_text() + (folder / f"{name}.cpp").read_text()
    return re.sub(r'#include "(\w+\.h)"\n', lambda found: (folder / found[1]).read_text(), text)


@functools.cache
def function(name: str, symbol: str, arguments: str) -> Any:
    """Return a C function of a library, or None where that does not compile.

    `arguments` has a letter for each: "p" an address or None, "l" an int64, "i" an int.
    """
    lib = library(name)
    if lib is None:
        return None
    found = getattr(lib, symbol)
    found.restype = ctypes.c_int64  # not read where a function returns nothing
    found.argtypes = [_TYPES[letter] for letter in arguments]
    return found


def floats(*shape: int) -> Tensor:
    """Return an uninitialised float32 tensor on the CPU, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def integers(*shape: int) -> Tensor:
    """Return an uninitialised int32 tensor on the CPU, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.int32, device="cpu")


def address(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's data; None is the null pointer."""
    return None if tensor is None else tensor.data_ptr()
