"""Run all benchmarks in their quick form and print tables; about ten minutes.

    python -m benchmarks --out FOLDER

`python -m benchmarks.layer`, `benchmarks.gate` and `benchmarks.exchange` have the full tables, in
pieces; `python -m benchmarks.zero` is apart, as it starts itself twice.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import conversion, exchange, gate, layer, machine

PARTS = ("conversion", "layer", "gate", "exchange")


def main() -> int:
    """Run the command line; return 1 if one of our own contestants is wrong."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("--out", type=Path, help="folder for JSON files and a picture")
    parser.add_argument("--only", choices=PARTS, help="run one part")
    options = parser.parse_args()
    for key, value in machine.describe().items():
        print(f"{key:13} {value}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    parts = {"conversion": _conversion, "layer": _layer, "gate": _gate, "exchange": _exchange}
    chosen = [options.only] if options.only else PARTS
    return max(parts[name](options.out) for name in chosen)


def _conversion(folder: Path | None) -> int:
    results = conversion.run()
    for case, numbers in results.items():
        cells = "  ".join(f"{key} {value:.3g}" for key, value in numbers.items())
        print(f"  {case:34} {cells}")
    if folder:
        content = {"machine": machine.describe(), "conversion": results}
        (folder / "conversion.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _layer(folder: Path | None) -> int:
    if folder is None:
        return layer.main(["--quick"])
    kept = ["--out", str(folder / "layer.json"), "--png", str(folder / "layer.png")]
    return layer.main(["--quick", *kept])


def _gate(folder: Path | None) -> int:
    kept = [] if folder is None else ["--out", str(folder / "gate.json")]
    return gate.main(["--quick", *kept])


def _exchange(folder: Path | None) -> int:
    kept = [] if folder is None else ["--out", str(folder / "exchange.json")]
    return exchange.main(["--quick", *kept])


if __name__ == "__main__":
    sys.exit(main())
