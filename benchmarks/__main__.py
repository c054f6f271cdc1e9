"""Run the benchmarks and print a table; `--out FILE` keeps the numbers as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import conversion, layer, machine


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results here")
    parser.add_argument("--only", choices=("conversion", "layer"), help="run one part")
    options = parser.parse_args()
    results: dict[str, object] = {"machine": machine.describe()}
    for key, value in machine.describe().items():
        print(f"{key:13} {value}")
    parts = {"conversion": conversion.run, "layer": layer.run}
    for name, part in parts.items():
        if options.only in (None, name):
            results[name] = table = part()
            print(f"\n{name}")
            for case, numbers in table.items():
                cells = "  ".join(f"{key} {value:.3g}" for key, value in numbers.items())
                print(f"  {case:34} {cells}")
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
